"""Read and write QLIP folders: config.json, model.safetensors, processor files, model card."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.core.errors import UserError
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor

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


def load_model(folder: str | Path) -> QLIPModel:
    """A QLIP model in evaluation mode from a folder of ours.

    Raises `UserError` when the folder is no model, or tensors are missing, left over or misshapen.
    """
    _refuse_other_folders(folder)
    try:
        model, info = QLIPModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load {folder}: {str(error).splitlines()[0]}; export the model again") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            first = sorted(map(str, info[kind]))[0]
            raise UserError(f"{folder}: {len(info[kind])} {kind.replace('_', ' ')}, first {first}; export it again")
    return model.eval()


def load_processor(folder: str | Path) -> QLIPProcessor:
    """The processor that belongs to a model folder, with the Pillow image back end it was saved with."""
    _refuse_other_folders(folder)
    processor = QLIPProcessor.from_pretrained(folder)
    if not isinstance(processor.image_processor, CLIPImageProcessorPil):
        size = processor.image_processor.crop_size["height"]
        processor.image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    return processor


def _refuse_other_folders(folder: str | Path) -> None:
    if not (Path(folder) / "config.json").is_file() or not (Path(folder) / "processor_config.json").is_file():
        raise UserError(
            f"{folder} is not a model folder (no config.json and processor_config.json); "
            "give the `export` folder of a run, or `qlip export RUN OUT` first"
        )


def save_model(model: nn.Module, *, folder: Path, processor: QLIPProcessor, step: int) -> None:
    """Write model, processor and card; the folder appears whole or not at all."""
    assert isinstance(model, QLIPModel)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    processor.image_processor.save_pretrained(temporary)  # preprocessor_config.json, for older tools
    vision = model.config.vision_config
    card = MODEL_CARD.format(
        image_size=vision.image_size, num_tokens=vision.grid_size**2, num_bits=vision.num_bits, steps=step
    )
    (temporary / "README.md").write_text(card)
    (temporary / "trained_steps.txt").write_text(str(step))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
