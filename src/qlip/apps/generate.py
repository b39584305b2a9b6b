"""`qlip generate`: prompts -> pictures and a sheet, or the folders that GenEval and DPG-Bench read.

The model is a text-to-image model or a UM3; both draw a picture from its own prompt and seed alone.

OUT/<prompt>_0.png ...   OUT/sheet.png (a row for each prompt)   OUT/generation.json (settings, file, prompt, seed)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import ProgressLine, console, progress
from qlip.engine.parallel import has_fast_bf16, pick_device
from qlip.engine.run_folder import make_writable
from qlip.evals.benchmark_files import is_whole_png, picture_seed, save_png, tiled
from qlip.evals.dpg_bench import write_dpg
from qlip.evals.geneval import write_geneval
from qlip.models.caption_encoder import cleaned_prompt
from qlip.models.generator import Generator, open_generator
from qlip.models.image_tokenizer import ImageTokenizer
from qlip.models.sampling import SamplingConfig
from qlip.models.unified_model import Unified, WritingSettings, is_unified, open_unified

Benchmark = Literal["geneval", "dpg"]
Precision = Literal["auto", "fp32", "bf16"]
"""What the model computes in: auto is bfloat16 on GPUs that have it, float32 elsewhere."""
SHEET_SIDE = 256  # pixels that a picture of a sheet is enlarged to, in whole steps
TEXT_HEIGHT = 22  # pixels of a prompt's line above its row
MOST_PIXELS = 30_000_000  # of a sheet; pictures of a larger one are enlarged less
LONGEST_STEM = 60  # characters of a prompt in a file's name


def generate_pictures(
    model: Path,
    prompts: Sequence[str],
    *,
    num: int,
    out: Path,
    seed: int = 0,
    sampling: dict[str, float | None],
    batch_size: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    caption_encoder: str = "",
    preview: bool = False,
) -> list[Path]:
    """Write `num` pictures of every prompt and a sheet of all; returns the paths of the pictures.

    `sampling` has fields of `SamplingConfig`, None for the model's own. Picture k of any prompt has the seed
    `picture_seed(seed, prompt_index=0, sample_index=k)`, so it does not depend on what else is asked for. `preview`
    keeps OUT/preview.png up to date while a batch is drawn. Pictures that the same call has written before are kept.
    Raises `UserError` for empty prompts, impossible numbers, a folder that is no generator or cannot be written, and an
    `out` with pictures of another call.
    """
    if distributed.launched_processes() > 1:
        raise UserError("prompts are drawn by one process, only benchmarks are shared: start qlip generate by itself")
    if not prompts:
        raise UserError('no prompt given: qlip generate MODEL "a red star" --out DIR')
    for name, value in (("--num", num), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: give at least 1")
    texts = [cleaned_prompt(prompt) for prompt in prompts]
    generator = _open(model, sampling, device=device, precision=precision, caption_encoder=caption_encoder)
    _read_before(generator, texts, preview=preview)
    make_writable(out)
    asked = [
        (text, picture_seed(seed, prompt_index=0, sample_index=index), f"{stem}_{index}.png")
        for text, stem in zip(texts, _stems(texts), strict=True)
        for index in range(num)
    ]
    record = {
        "model": str(model),
        **generator.identity(),
        "sampling": generator.sampling,
        "seed": seed,
        "batch_size": batch_size if generator.model.dtype != torch.float32 else "any",  # see models/sampling.py
        "pictures": [{"file": name, "prompt": text, "seed": own_seed} for text, own_seed, name in asked],
    }
    _begin(out / "generation.json", record)
    left = [entry for entry in asked if not is_whole_png(out / entry[2])]
    tokens = math.prod(generator.model.config.grid)
    with progress("generate", len(asked) * tokens, start=(len(asked) - len(left)) * tokens, unit="tokens") as bar:
        for first in range(0, len(left), batch_size):
            batch = left[first : first + batch_size]
            before = (len(asked) - len(left) + first) * tokens
            drawn = _draw(generator, batch, out, bar=bar, before=before, preview=preview)
            for (_, _, name), picture in zip(batch, drawn, strict=True):
                save_png(out / name, picture)
    save_png(out / "sheet.png", sheet_of([_read(out / name) for _, _, name in asked], texts, num=num))
    (out / "preview.png").unlink(missing_ok=True)
    console.print(f"{len(asked)} pictures in {out}; side by side: {out / 'sheet.png'}")
    return [out / name for _, _, name in asked]


def _begin(path: Path, record: dict[str, Any]) -> None:
    """Write the record, or go on where the same command was stopped. Raises `UserError` for another one's pictures."""
    record = json.loads(json.dumps(record))
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != record:
            raise UserError(f"{path.parent} holds pictures of another model, prompts or settings: choose another --out")
        return
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space or choose another --out") from None


def _read(path: Path) -> Tensor:
    """(3, S, S) uint8."""
    return rearrange(torch.from_numpy(np.array(Image.open(path).convert("RGB"))), "h w c -> c h w")


def generate_benchmark(
    model: Path,
    benchmark: Benchmark,
    prompts: Path,
    *,
    out: Path,
    num: int = 4,
    seed: int = 0,
    sampling: dict[str, float | None],
    batch_size: int = 16,
    device: str = "auto",
    precision: Precision = "auto",
    caption_encoder: str = "",
) -> None:
    """Write the pictures of a benchmark exactly as its scorer reads them; finished ones are kept on a second run.

    Raises `UserError` as `write_geneval` and `write_dpg` do.
    """
    if benchmark == "dpg" and num != 4:
        raise UserError(f"--num is {num}, but a picture of DPG-Bench has 4 tiles: leave --num out")
    distributed.start(device_type=pick_device(device).type)
    generator = _open(model, sampling, device=device, precision=precision, caption_encoder=caption_encoder)
    settings: dict[str, Any] = {**generator.identity(), **generator.sampling}
    if settings["dtype"] != "float32":
        settings["batch_size"] = batch_size  # pictures depend on it there

    def generate(texts: list[str], seeds: list[int]) -> Tensor:
        return generator.generate(texts, seeds=seeds)

    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "settings": settings}
    if benchmark == "geneval":
        found = write_geneval(generate, prompts, out, num_samples=num, **options)
        console.print(f"{found.num_pictures} pictures of {len(found.pictures)} prompts in {out}, as GenEval reads them")
        return
    written = write_dpg(generate, prompts, out, **options)
    console.print(
        f"{written.num_prompts} pictures in {out}, as DPG-Bench reads them: score with "
        f"--resolution {written.resolution} --pic-num {written.num_tiles}"
    )


def dtype_of(precision: Precision, device: torch.device) -> torch.dtype:
    """What `--precision` means there."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda" and has_fast_bf16(device))
    return torch.bfloat16 if bf16 else torch.float32


def _open(
    model: Path, sampling: dict[str, float | None], *, device: str, precision: Precision, caption_encoder: str
) -> Generator | Unified:
    """The model on its device, with its own guidance and the other defaults of its kind unless told."""
    place = pick_device(device)
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    SamplingConfig(**given).check()
    generator: Generator | Unified
    if is_unified(model) or is_unified(model / "export"):  # of a run, which `open_unified` refuses with its export
        if caption_encoder:
            raise UserError(f"--caption-encoder: {model} is a UM3, which reads prompts itself: leave it out")
        generator = open_unified(model)
        settings = WritingSettings(**({"guidance": generator.model.config.guidance} | given))
        generator = Unified(generator.model, generator.processor, settings)
    else:
        generator = open_generator(model, caption_encoder=caption_encoder)
        generator.settings = SamplingConfig(**({"guidance": generator.model.config.guidance} | given))
    generator.to(place, dtype=dtype_of(precision, place))
    return generator


def _image_tokenizer(generator: Generator | Unified) -> ImageTokenizer:
    return generator.tokenizer if isinstance(generator, Generator) else generator.processor.image_tokenizer


def _read_before(generator: Generator | Unified, texts: list[str], *, preview: bool) -> None:
    """Say what has no effect or is not read; raise `UserError` for a prompt that leaves a UM3 no room for a picture."""
    if isinstance(generator, Generator):
        _warn(generator, texts)
        return
    if preview:
        console.print("--preview has no effect: a UM3 shows its pictures when they are done")
    room = generator.context_length - generator.processor.vocabulary.image_length - 1  # the marker that begins it
    for text in texts:
        length = len(generator.processor.encode([text]))
        if length > room:
            raise UserError(
                f"the prompt {_shown(text)!r} has {length} tokens, and beside a picture there is room for {room}: "
                "shorten it"
            )


def _shown(text: str) -> str:
    return text if len(text) <= LONGEST_STEM else f"{text[:LONGEST_STEM]}..."


def _warn(generator: Generator, texts: list[str]) -> None:
    """Say which prompts the model reads in part only."""
    for text in texts:
        cut = generator.captions.num_cut(text)
        shown = _shown(text)
        if cut:
            console.print(
                f"{shown!r}: the last {cut} of its tokens are not read, the model takes {generator.captions.length}"
            )
        if generator.captions.has_unknown(text):
            console.print(f"{shown!r}: some of its characters are unknown to the caption encoder")


def _draw(
    generator: Generator | Unified,
    batch: Sequence[tuple[str, int, str]],
    out: Path,
    *,
    bar: ProgressLine,
    before: int,
    preview: bool,
) -> Tensor:
    """Pictures (b, 3, S, S) uint8 of one batch, on the CPU."""
    columns, tokenizer = generator.model.config.grid[1], _image_tokenizer(generator)

    def report(done: int, bits: Tensor) -> None:
        bar.update(before + done * len(batch))
        if preview and isinstance(generator, Generator) and done % columns == 0:
            save_png(out / "preview.png", tiled(tokenizer.decode(bits).cpu(), columns=len(bits)))

    bits = generator.bits([text for text, _, _ in batch], seeds=[seed for _, seed, _ in batch], on_tokens=report)
    return tokenizer.decode(bits).cpu()


def _stems(texts: list[str]) -> list[str]:
    """A file name for each prompt: its words, or its place where it has none that a file may be called by."""
    stems: list[str] = []
    for place, text in enumerate(texts):
        words = re.sub(r"\W+", "-", text.lower()).strip("-")[:LONGEST_STEM].strip("-")
        while len(words.encode()) > 2 * LONGEST_STEM:  # file systems count bytes
            words = words[:-1]
        stem, number = words or f"prompt-{place}", 2
        while stem in (*stems, "sheet", "preview", "generation"):
            stem, number = f"{words or 'prompt'}-{number}", number + 1
        stems.append(stem)
    return stems


def sheet_of(pictures: Sequence[Tensor], texts: Sequence[str], *, num: int, side: int = SHEET_SIDE) -> Tensor:
    """`num` pictures (3, S, S) uint8 of each text -> (3, H, W) uint8: a line of text above each row of pictures.

    Pictures smaller than `side` are enlarged in whole steps.
    """
    own = pictures[0].shape[-1]
    side = min(side, int((MOST_PIXELS / len(pictures)) ** 0.5))
    scaled = own * max(1, side // own)
    sheet = Image.new("RGB", (num * scaled, len(texts) * (scaled + TEXT_HEIGHT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, text in enumerate(texts):
        top = row * (scaled + TEXT_HEIGHT)
        draw.text((4, top + 3), text, fill="black", font=font)
        for column, picture in enumerate(pictures[row * num : (row + 1) * num]):
            tile = Image.fromarray(rearrange(picture, "c h w -> h w c").contiguous().numpy())
            tile = tile.resize((scaled, scaled), Image.Resampling.NEAREST)
            sheet.paste(tile, (column * scaled, top + TEXT_HEIGHT))
    return rearrange(torch.from_numpy(np.array(sheet)), "h w c -> c h w")
