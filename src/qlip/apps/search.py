"""`qlip search STORE`: pictures of a token store nearest to a picture or a text, or near-duplicates of each other.

--image      -> encoded as the store's pictures were -> embedding or bits -> cosine, or bits that differ
--text       -> text tower                           -> embedding         -> cosine
--duplicates -> every picture with every other one                        -> bits that differ
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from qlip.apps.encoding import TokenizeOptions, encoder_of
from qlip.apps.first_look import open_picture
from qlip.apps.search_report import (
    Tile,
    Way,
    enlarged,
    hit_tiles,
    hits_record,
    one_line,
    pairs_record,
    print_hits,
    print_pairs,
    shortened,
    text_tile,
    warn_of_cut_text,
    write_results,
)
from qlip.core.errors import UserError
from qlip.core.log import progress
from qlip.data.token_files import REMEDY, pack_bits
from qlip.data.token_search import (
    near_duplicates,
    nearest_by_bits,
    nearest_by_embedding,
    num_pictures,
)
from qlip.data.token_store import TokenStore
from qlip.data.views import VIEWS, view_pixels
from qlip.engine.parallel import pick_device
from qlip.engine.run_folder import make_writable
from qlip.models.image_tokenizer import ImageTokenizer, QLIPTokenizer, VQTokenizer, open_image_tokenizer
from qlip.models.measured import MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.qlip.loading import load_processor

SHEET_COLUMNS = 6  # even, so that pairs stay together
BF16 = "bfloat16 autocast"  # as `qlip tokenize --precision bf16` says it


def search_store(
    store: Path,
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
    """Print the `num` pictures nearest to `image` or `text`, or the closest pairs of `duplicates`.

    `out` gets results.json and sheet.png. `model` is where the tokenizer lies, if not where the store says.
    Raises `UserError` unless exactly one thing is asked, for a store without pictures, for a text or `by="embedding"`
    without embeddings, for a text that is no UTF-8, and for a model other than the one that made the store.
    """
    if [image is not None, bool(text), duplicates is not None].count(True) != 1:
        raise UserError("search for one thing: give --image PICTURE, --text WORDS or --duplicates SHARE")
    if num < 1:
        raise UserError(f"--num {num}: give at least 1")
    tokens = _open_store(store)
    way = _way(tokens, by, text=text, duplicates=duplicates)
    if out is not None:
        make_writable(out)
    if duplicates is not None:
        _find_duplicates(tokens, duplicates, num=num, model=model, out=out, device=device)
        return
    picture = None if image is None else open_picture(image)
    maker = _open_maker(tokens, model, by=way, device=device)
    if picture is None:
        query, first = _text_query(maker, text), text_tile(text, size=maker.tokenizer.image_size)
    else:
        assert image is not None
        pixels = _pixels(tokens, maker, picture)
        query, first = _picture_query(tokens, maker, pixels, by=way), Tile(enlarged(pixels[0]), ("query", image.name))
    hits = (nearest_by_bits if way == "bits" else nearest_by_embedding)(tokens, query, num=num)
    print_hits(tokens, hits, asked=shortened(text) or str(image), by=way)
    if out is not None:
        tiles = hit_tiles(tokens, maker.tokenizer, hits, ranks=range(1, len(hits) + 1), by=way)
        asked = {"image": str(image)} if text == "" else {"text": text}
        record = _about(tokens, maker, asked, by=way) | hits_record(tokens, hits, by=way)
        write_results(out, record, [first, *tiles], columns=SHEET_COLUMNS)


def _open_store(path: Path) -> TokenStore:
    """The store. Raises `UserError` for what is none, and for one without pictures."""
    try:
        tokens = TokenStore(path)
    except UserError as error:
        if path.expanduser().is_file() and "is no whole parquet file" in str(error):  # it may be anything
            raise UserError(f"{str(error).removesuffix(REMEDY)}give a token store") from None
        raise
    if not len(tokens):
        raise UserError(f"{tokens.path} has no pictures: give a token store that has some (qlip tokenize)")
    return tokens


def _way(tokens: TokenStore, by: str, *, text: str, duplicates: float | None) -> Way:
    """What is compared. Raises `UserError` for what the store does not have, and for no share."""
    has_embeddings = tokens.info.embedding_width > 0
    if duplicates is not None:
        if not 0 <= duplicates <= 1:
            raise UserError(f"--duplicates {duplicates}: give a share of the bits from 0 to 1, such as 0.05")
        if by == "embedding":
            raise UserError("duplicates are found by bits: leave --by embedding out")
        return "bits"
    readable = text.encode("utf-8", "replace").decode()
    if readable != text:  # half surrogates, which is how Python holds bytes that are no UTF-8
        raise UserError(f"the text {shortened(readable)!r} is no UTF-8: give --text in UTF-8")
    if text and (not one_line(text) or by == "bits"):
        problem = "a text has no bits" if one_line(text) else "the text is empty"
        raise UserError(f"{problem}: give words with --text and leave --by out, or give --image")
    if (text or by == "embedding") and not has_embeddings:
        raise UserError(f"{tokens.path} has no embeddings: make it with qlip tokenize --embeddings")
    return "embedding" if has_embeddings and by != "bits" else "bits"


@dataclass(kw_only=True, slots=True)
class _Maker:
    """The tokenizer that made a store."""

    path: str
    tokenizer: ImageTokenizer
    fingerprint: str
    """Of the whole model."""


def _open_maker(tokens: TokenStore, model: str, *, by: Way, device: str) -> _Maker:
    """The tokenizer on `device`.

    Raises `UserError` for one that does not open, made other tokens or, if they are compared, other embeddings.
    """
    place, info = pick_device(device), tokens.info
    path = model or info.decoder.get("path", "")
    if not path:
        raise UserError(f"{tokens.path} does not say where its tokenizer lies: say it with --model")
    size = 0 if info.decoder.get("name") == MeasuredQLIP.name else info.transform.get("size")  # QLIP has its own
    try:
        tokenizer = open_image_tokenizer(path, image_size=size if isinstance(size, int) else 0)
    except UserError as error:
        if "--image-size" in str(error):
            _require_kind(tokens, path)
        elif model:
            raise
        # A remedy of qlip tokenize is none here: a model whose size does not fit is another one.
        problem = "was not made by this model" if model else "has a tokenizer that does not open"
        said = one_line(str(error).partition(":")[0])
        raise UserError(f"{tokens.path} {problem} ({said}): say where the one that made it is with --model") from None
    tokens.require(tokenizer.encoder_fingerprint)
    if (tokenizer.grid, tokenizer.num_bits) != (info.grid, info.num_bits):
        raise UserError(f"{tokens.path} has tokens of another grid than its tokenizer makes: run qlip tokenize again")
    assert isinstance(tokenizer, QLIPTokenizer | VQTokenizer)
    fingerprint = tokenizer.measured.identity()["model_fingerprint"]
    if by == "embedding" and not isinstance(tokenizer, QLIPTokenizer):
        raise UserError(f"a {tokenizer.name} has no text-aligned embeddings: give an --image and --by bits")
    if by == "embedding":
        _require_embeddings_of(tokens, fingerprint)
    tokenizer.to(place)
    return _Maker(path=path, tokenizer=tokenizer, fingerprint=fingerprint)


def _require_kind(tokens: TokenStore, path: str) -> None:
    """Raise `UserError` for a model of another kind than the one that made the store."""
    made_by, kind = tokens.info.decoder.get("name", ""), open_measured(path).name
    if made_by and made_by != kind:
        raise UserError(
            f"{tokens.path} was made by a {one_line(made_by)}, {one_line(path)} is a {kind}: say where the one that "
            "made it is with --model"
        )


def _require_embeddings_of(tokens: TokenStore, fingerprint: str) -> None:
    """Raise `UserError` unless this model made the embeddings: the encoder alone does not settle them."""
    made_by = tokens.info.decoder.get("fingerprint", "")  # the same in all files, else it is no store
    if made_by != fingerprint:
        raise UserError(
            f"the embeddings of {tokens.path} are of model {one_line(made_by)}, this one is {fingerprint}: give the "
            "model that made them with --model, or an --image and --by bits"
        )


def _pixels(tokens: TokenStore, maker: _Maker, picture: Image.Image) -> Tensor:
    """The first view (1, 3, S, S) uint8 of a picture, as the store's were cut."""
    choice = next((choice for choice, names in VIEWS.items() if names == tokens.info.views), None)
    if choice is None:
        raise UserError(f"{tokens.path} has views that this qlip does not know: update qlip")
    return view_pixels(picture, size=maker.tokenizer.image_size, views=choice)[:1]


def _picture_query(tokens: TokenStore, maker: _Maker, pixels: Tensor, *, by: Way) -> np.ndarray:
    """(1, 3, S, S) uint8 -> packed bits (ceil(n L / 8),) uint8 or embedding (e,), computed as the store's were."""
    encoding = tokens.info.encoding
    options = TokenizeOptions(
        model=maker.path,
        out=tokens.path,
        batch_size=1,
        batch_invariant=encoding.get("batch_invariant") is True,
        precision="bf16" if encoding.get("dtype") == BF16 else "fp32",
        embeddings=by == "embedding",
    )
    encoded = encoder_of(maker.tokenizer, options)(pixels)
    if by == "bits":
        return pack_bits(encoded.bits)[0]
    assert encoded.embeddings is not None
    return encoded.embeddings[0].float().cpu().numpy()


def _text_query(maker: _Maker, text: str) -> np.ndarray:
    """Embedding (e,) of a text as it stands; says how much of it is not read."""
    assert isinstance(maker.tokenizer, QLIPTokenizer)
    tokenize = maker.tokenizer.measured.tokenize
    num_read, num_of_longer = tokenize([text, f"{text} a"])["attention_mask"].sum(1).tolist()
    if num_read == num_of_longer:  # no room is left: count without the limit
        num = len(load_processor(maker.path).tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])
        warn_of_cut_text(text, num_tokens=num, num_read=num_read)
    return maker.tokenizer.text_embeds([text])[0].float().cpu().numpy()


def _find_duplicates(
    tokens: TokenStore, max_share: float, *, num: int, model: str, out: Path | None, device: str
) -> None:
    """Compare all, print, write; the tokenizer is needed for the sheet alone and checked before the long work."""
    place = pick_device(device)
    maker = None if out is None else _open_maker(tokens, model, by="bits", device=device)
    pictures = num_pictures(tokens)
    with progress(f"compare {pictures} pictures", pictures * (pictures - 1) // 2, unit="pairs") as bar:
        found = near_duplicates(tokens, max_share=max_share, num=num, device=place, on_pairs=bar.update)
    print_pairs(tokens, found)
    if out is None or maker is None:
        return
    hits = [hit for pair in found.pairs for hit in pair]
    ranks = [number // 2 + 1 for number in range(len(hits))]
    tiles = hit_tiles(tokens, maker.tokenizer, hits, ranks=ranks, by="bits")
    record = _about(tokens, maker, {"duplicates": max_share}, by="bits") | pairs_record(tokens, found)
    write_results(out, record, tiles, columns=SHEET_COLUMNS)


def _about(tokens: TokenStore, maker: _Maker, query: dict[str, Any], *, by: Way) -> dict[str, Any]:
    """What was asked of which store and model."""
    return {
        "query": query,
        "by": by,
        "store": {
            "path": str(tokens.path),
            "identity": tokens.identity(),
            "encoder_fingerprint": tokens.info.encoder_fingerprint,
            "pictures": num_pictures(tokens),
        },
        "model": {"path": maker.path, "fingerprint": maker.fingerprint},
    }
