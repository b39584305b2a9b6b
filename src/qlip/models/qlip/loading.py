"""Read and write QLIP folders: config.json, model.safetensors, processor files, model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging

from qlip.core.errors import UserError
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor

EXPORT_MARKER = "trained_steps.txt"
NEEDED_FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
LOAD_ERRORS = (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError)
MODEL_CARD = """---
license: apache-2.0
library_name: qlip
pipeline_tag: zero-shot-image-classification
tags: [qlip, visual-tokenizer, binary-spherical-quantization]
---

# A QLIP visual tokenizer

{image_size} px pictures, {num_tokens} tokens of {num_bits} bits each, trained for {steps} steps with `qlip train`.

```python
from qlip import QLIPModel, QLIPProcessor

model = QLIPModel.from_pretrained("path/to/this/folder")
processor = QLIPProcessor.from_pretrained("path/to/this/folder")
inputs = processor(images=image, text=["a cat", "a dog"], return_tensors="pt", padding=True)
bits = model.encode(inputs.pixel_values)
pictures = processor.postprocess(model.decode(bits))
```
"""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars, which take milliseconds here, and its tables of tensors, which `UserError` names."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def load_model(folder: str | Path) -> QLIPModel:
    """A QLIP model in evaluation mode from a folder of ours.

    Raises `UserError` when the folder is no model, or tensors are missing, left over or misshapen.
    """
    _refuse_other_folders(folder)
    try:
        with quiet_transformers():
            model, info = QLIPModel.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load {folder}: {_reason(error)}; export the model again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            first = min(key if isinstance(key, str) else key[0] for key in info[kind])  # misshapen: (name, shapes)
            raise UserError(f"{folder}: {len(info[kind])} {kind.replace('_', ' ')}, first {first}; export it again")
    return model.eval()


def load_processor(folder: str | Path) -> QLIPProcessor:
    """The processor that belongs to a model folder.

    Raises `UserError` when the folder is no model or a processor file is broken.
    """
    _refuse_other_folders(folder)
    try:
        with quiet_transformers():
            return QLIPProcessor.from_pretrained(folder)
    except LOAD_ERRORS as error:
        raise UserError(f"cannot load the processor of {folder}: {_reason(error)}; export the model again") from error


def _refuse_other_folders(folder: str | Path) -> None:
    missing = [name for name in NEEDED_FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} is not a model folder (no {', '.join(missing)}); "
            "give the `export` folder of a run, or `qlip export RUN OUT` first"
        )


def _reason(error: Exception) -> str:
    """What went wrong, in one line; transformers' configs put the reason last, everything else first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].strip().removeprefix("ValueError: ")


def save_model(model: nn.Module, *, folder: Path, processor: QLIPProcessor, step: int) -> None:
    """Write model, processor and card; the folder appears whole or not at all.

    An earlier export is replaced. Raises `UserError` for a folder that holds anything else or cannot be written.
    """
    assert isinstance(model, QLIPModel)
    if folder.is_file() or (folder.exists() and not (folder / EXPORT_MARKER).exists() and any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no export of ours; choose another folder")
    temporary = folder.with_name(folder.name + ".tmp")
    earlier = folder.with_name(folder.name + ".old")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(model, temporary, processor=processor, step=step)
        if folder.exists():
            folder.rename(earlier)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or _reason(error)
        raise UserError(f"cannot write to {folder}: {reason}; free disk space or choose another folder") from None
    shutil.rmtree(earlier, ignore_errors=True)


def _write_files(model: QLIPModel, folder: Path, *, processor: QLIPProcessor, step: int) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # preprocessor_config.json, for older tools
    vision = model.config.vision_config
    card = MODEL_CARD.format(
        image_size=vision.image_size, num_tokens=vision.grid_size**2, num_bits=vision.num_bits, steps=step
    )
    (folder / "README.md").write_text(card)
    (folder / EXPORT_MARKER).write_text(str(step))
