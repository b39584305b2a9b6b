"""The commands around token stores, and the playground. As `commands.py`: signature and docstring are the help.

Nothing heavy is imported before a command is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def detokenize(
    model: Positional[str],
    src: Positional[Path],
    out: Positional[Path],
    *,
    format: Literal["png", "webp"] = "png",
    image_size: int = 0,
    max_samples: int = 0,
    batch_size: int = 100,
    device: str = "auto",
) -> None:
    """Turn a token store back into pictures, one file each; what is there is kept, so a stopped call goes on.

    Example: qlip detokenize runs/demo/stage2/export runs/tokens pictures --max-samples 100

    Args:
        model: The tokenizer whose encoder made the store.
        src: Token store, the folder that qlip tokenize has made, or one of its files.
        out: Folder for the pictures: one folder per file of the store, names are keys with unusual characters escaped.
        format: Lossless in both; webp is smaller and slower.
        image_size: Side of the pictures in pixels, for VQ tokenizers, which take many.
        max_samples: Take the first so many pictures; 0 takes all.
        batch_size: Pictures decoded together.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.detokenize import detokenize_store

    detokenize_store(
        model,
        src,
        out,
        format=format,
        image_size=image_size,
        max_samples=max_samples,
        batch_size=batch_size,
        device=device,
    )


def tokens_verify(store: Positional[Path], *, model: str = "", json: Path | None = None) -> None:
    """Read every row of a token store: checksums, packing, keys that come twice; says what is in it.

    Example: qlip tokens verify runs/tokens --model runs/demo/stage2/export

    Args:
        store: Token store.
        model: Also check that this tokenizer's encoder made it.
        json: Write what was found there too.
    """
    from qlip.apps.token_tools import verify_store

    verify_store(store, model=model, json=json)


def tokens_merge(
    stores: Positional[tuple[Path, ...]],
    *,
    out: Path,
    rows_per_file: int = 100_000,
    compress: bool = False,
) -> None:
    """Join token stores of one tokenizer into one with files of equal size; compressed ones are unpacked, or packed.

    Example: qlip tokens merge runs/tokens_a runs/tokens_b --out runs/tokens

    Args:
        stores: Token stores that one encoder made; their keys must differ.
        out: Folder for the new store.
        rows_per_file: Pictures of a file.
        compress: Entropy-code the bits (qlip tokenize --compress).
    """
    from qlip.apps.token_tools import merge_stores

    merge_stores(stores, out=out, rows_per_file=rows_per_file, compress=compress)


def tokens_export(
    store: Positional[Path],
    out: Positional[Path],
    *,
    format: Literal["llamagen", "titok", "webdataset", "npy"],
) -> None:
    """Write a token store as the files of other projects.

    Example: qlip tokens export runs/tokens runs/codes --format llamagen

    Args:
        store: Token store.
        out: Folder for the files; what an earlier call finished is kept.
        format: llamagen (an .npy a picture), titok (pretokenized.jsonl), webdataset (tars of bits.bin, txt, json), npy
            (int64 ids of each file, with its keys).
    """
    from qlip.apps.token_tools import export_store

    export_store(store, out, format=format)


def search(
    store: Positional[Path],
    *,
    image: Path | None = None,
    text: str = "",
    duplicates: float | None = None,
    by: Literal["auto", "embedding", "bits"] = "auto",
    num: int = 10,
    model: str = "",
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Find pictures of a token store: nearest to a picture or a text, or near-duplicates of each other.

    Example: qlip search runs/tokens --text "a red star" --out found

    Args:
        store: Token store; texts need one with embeddings (qlip tokenize --embeddings).
        image: Look for pictures like this one.
        text: Look for pictures that show this.
        duplicates: Instead list pairs of which at most this share of bits differs, such as 0.05.
        by: Cosine of the text-aligned embeddings, or number of equal bits; auto takes embeddings where there are any.
        num: How many to show; of duplicates, pairs.
        model: The tokenizer that made the store, if it lies elsewhere now.
        out: Folder for results.json and sheet.png, the pictures as the tokenizer decodes them.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.search import search_store

    search_store(
        store,
        image=image,
        text=text,
        duplicates=duplicates,
        by=by,
        num=num,
        model=model,
        out=out,
        device=device,
    )


def app(
    model: Positional[str],
    *,
    images: Path | None = None,
    generator: str = "",
    assistant: str = "",
    unified: str = "",
    device: str = "auto",
    port: int = 7860,
    max_upload_mb: int = 20,
    open_browser: bool = True,
) -> None:
    """The playground in a browser, on this machine alone: reconstruct, look at bits and flip them, classify, ask, draw.

    Example: qlip app runs/demo/stage2/export --images pictures --generator runs/t2i/export

    Args:
        model: Tokenizer: QLIP folder or hub id, or a VQ model (diffusers folder, LlamaGen file), taken at 256 px.
        images: Folder of pictures to pick from; without one, procedural scenes.
        generator: Folder of a text-to-image model, to draw.
        assistant: Folder of an assistant, to ask.
        unified: Folder of a UM3, to caption and to draw.
        device: auto, cpu, cuda, ...
        port: On 127.0.0.1; if it is taken, the next free one.
        max_upload_mb: Largest file that may be uploaded.
        open_browser: Open the page in the browser.
    """
    from qlip.apps.playground import launch_playground

    launch_playground(
        model,
        images=images,
        generator=generator,
        assistant=assistant,
        unified=unified,
        device=device,
        port=port,
        max_upload_mb=max_upload_mb,
        open_browser=open_browser,
    )
