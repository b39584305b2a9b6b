"""The commands around tokens: tokenize, generate. As `commands.py`: signature and docstring are the help.

Nothing heavy is imported before a command is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional


def tokenize(
    model: Positional[str],
    src: Positional[str],
    out: Positional[Path],
    *,
    image_size: int = 0,
    images: str = "",
    split: str = "train",
    caption_fields: tuple[str, ...] = (),
    max_samples: int = 0,
    batch_size: int = 100,
    batch_invariant: bool = False,
    device: str = "auto",
) -> None:
    """Turn pictures into a token store (Parquet: bits and captions), from which generators are trained.

    Example: qlip tokenize runs/demo/stage2/export runs/demo/data/train runs/tokens --caption-fields prompts

    Args:
        model: Tokenizer: QLIP folder or hub id, VQModel folder of diffusers, LlamaGen's VQGAN file.
        src: Pictures: class folders, a flat folder, tar shards, a COCO or Karpathy json, parquet.
        out: Folder for the store; finished files are kept on a second run.
        image_size: Side of the pictures in pixels, for VQ tokenizers, which take many.
        images: Folder of the pictures that a COCO or Karpathy json names, if it is not beside it.
        split: Which split of a Karpathy json or a parquet folder.
        caption_fields: Fields of the pictures' json that hold captions (captions.short); `prompts` are those of scenes.
        max_samples: Take the first so many pictures; 0 takes all.
        batch_size: Pictures encoded together.
        batch_invariant: Encode picture by picture, so that no bit depends on the batch; slower.
        device: auto, cpu, cuda, ...
    """
    from qlip.apps.tokenize import tokenize_images

    tokenize_images(
        model,
        src,
        out,
        image_size=image_size,
        images=images,
        split=split,
        caption_fields=caption_fields,
        max_samples=max_samples,
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        device=device,
    )


def generate(
    model: Positional[Path],
    prompt: Positional[tuple[str, ...]] = (),
    *,
    out: Path,
    num: int = 4,
    seed: int = 0,
    guidance: float | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 16,
    benchmark: Literal["none", "geneval", "dpg"] = "none",
    prompts: Path | None = None,
    caption_encoder: str = "",
    preview: bool = False,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> None:
    """Draw pictures of prompts with a text-to-image model or a UM3; or all those of GenEval or DPG-Bench, to be scored.

    Example: qlip generate runs/demo/text_to_image/export "a red star" "two rings" --num 4 --out pictures

    Args:
        model: Folder of a text-to-image model or a UM3, the export of a run.
        prompt: What the pictures should show; several prompts in quotes.
        out: Folder for the pictures, sheet.png and generation.json.
        num: Pictures of each prompt.
        seed: Another seed gives other pictures; the same gives the same ones, whatever else is drawn.
        guidance: How much the prompt counts (classifier-free guidance); 1 is none; the model's own if not given. For a
            UM3 more than 1 is worth it only when captions were left out in training (data.caption-dropout).
        temperature: Logits are divided by it; 0 takes the most probable code; 1 if not given.
        top_k: Draw among so many most probable codes; 0 is all. If not given 1000 (LlamaGen's), 0 for a UM3.
        top_p: Draw among the most probable codes that together reach this. If not given 1, .95 for a UM3 (QLIP's).
        batch_size: Pictures drawn together.
        benchmark: Write what the scorer of geneval or dpg reads, for the prompts of its own files.
        prompts: GenEval's evaluation_metadata.jsonl, or DPG-Bench's folder of prompts.
        caption_encoder: Folder of the T5 encoder, if it lies elsewhere than in training. A UM3 has none.
        preview: Keep OUT/preview.png up to date while pictures are drawn; not with a UM3.
        device: auto, cpu, cuda, ...
        precision: What the model computes in; auto is bf16 on GPUs that have it, fp32 elsewhere.
    """
    from qlip.apps.generate import generate_benchmark, generate_pictures
    from qlip.core.distributed import stop
    from qlip.core.errors import UserError

    sampling = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if benchmark == "none":
        if prompts is not None:
            raise UserError("--prompts is read for a benchmark: add --benchmark geneval or dpg")
        generate_pictures(
            model,
            prompt,
            num=num,
            out=out,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            device=device,
            precision=precision,
            caption_encoder=caption_encoder,
            preview=preview,
        )
        return
    if prompts is None or prompt:
        raise UserError(f"--benchmark {benchmark} takes its prompts from its files: give --prompts PATH, no prompt")
    if preview:
        raise UserError(
            "--preview is for prompts of your own: leave it out, and look at the pictures as they are written"
        )
    generate_benchmark(
        model,
        benchmark,
        prompts,
        num=num,
        out=out,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
        device=device,
        precision=precision,
        caption_encoder=caption_encoder,
    )
    stop()
