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
    views: Literal["centre", "flip", "ten-crop"] = "centre",
    embeddings: bool = False,
    compress: bool = False,
    batch_size: int = 100,
    batch_invariant: bool = False,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    workers: int = -1,
    max_skip_share: float = 0.05,
    engine: Literal["local", "ray"] = "local",
    ray_address: str = "",
    ray_actors: int = 0,
    ray_gpus: float = 1.0,
    ray_cpus: float = 0.0,
) -> None:
    """Turn pictures into a token store (Parquet: bits and captions), from which generators are trained.

    A stopped or killed call goes on where it was: start it again. docs/token_store.md has it all.

    Example: qlip tokenize runs/demo/stage2/export runs/demo/data/train runs/tokens --caption-fields prompts

    Args:
        model: Tokenizer: QLIP folder or hub id, VQModel folder of diffusers, LlamaGen's VQGAN file.
        src: Pictures: class folders, a flat folder, tar shards, a COCO or Karpathy json, parquet, a saved HF dataset.
        out: Folder for the store, a file per shard; finished files are kept on a second run.
        image_size: Side of the pictures in pixels, for VQ tokenizers, which take many.
        images: Folder of the pictures that a COCO or Karpathy json names, if it is not beside it.
        split: Which split of a Karpathy json, a parquet folder or a saved dataset.
        caption_fields: Fields of the pictures' json that hold captions (captions.short); `prompts` are those of scenes.
        max_samples: Take the first so many pictures; 0 takes all.
        views: What is cut from each: its centre, both ways round (2 rows), or ten crops (10 rows).
        embeddings: Also store the text-aligned embedding (float16), for qlip search --text.
        compress: Entropy-code the bits (pip install 'qlip[codec]'); smaller, and slower to read.
        batch_size: Rows encoded together.
        batch_invariant: Encode picture by picture, so that no bit depends on the batch; slower.
        precision: bf16 is faster on a GPU and flips a few bits.
        device: auto, cpu, cuda, ...
        workers: Processes that decode pictures (of each actor, with ray); -1 fits the machine, 0 a thread.
        max_skip_share: Stop when a larger share of the pictures cannot be used.
        engine: This machine, or a Ray cluster (docs/tokenize_cluster.md).
        ray_address: Of the cluster's head; `auto` finds the cluster of this machine, empty starts one here.
        ray_actors: Tokenizers at work at once; 0 is as many as fit.
        ray_gpus: GPUs of each, also a fraction; 0 for CPUs.
        ray_cpus: CPUs of each; 0 is one and its decoders.
    """
    from qlip.apps.encoding import TokenizeOptions
    from qlip.apps.tokenize import RayOptions, default_workers, tokenize_images

    if workers == -1:
        workers = default_workers(device) if engine == "local" else 0
    options = TokenizeOptions(
        model=model,
        out=out,
        image_size=image_size,
        caption_fields=caption_fields,
        views=views,
        batch_size=batch_size,
        batch_invariant=batch_invariant,
        precision=precision,
        embeddings=embeddings,
        compress=compress,
        device=device,
        workers=workers,
        max_skip_share=max_skip_share,
    )
    tokenize_images(
        src,
        options,
        images=images,
        split=split,
        max_samples=max_samples,
        engine=engine,
        ray=RayOptions(address=ray_address, actors=ray_actors, gpus=ray_gpus, cpus=ray_cpus),
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
