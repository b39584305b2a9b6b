"""The model card (README.md) that goes with every saved model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CARD = """---
library_name: qlip
license: other
license_name: see-the-card
pipeline_tag: {pipeline_tag}
tags: [qlip, visual-tokenizer, binary-spherical-quantization]
---

# {title}

{description}

The weights have the licence that whoever trained them gave them; write it above. The code, `qlip`, is Apache-2.0.

```python
{example}
```
"""

TOKENIZER_EXAMPLE = """from qlip import QLIPModel, QLIPProcessor

model = QLIPModel.from_pretrained("path/to/this/folder")
processor = QLIPProcessor.from_pretrained("path/to/this/folder")
inputs = processor(images=image, text=["a cat", "a dog"], return_tensors="pt")
bits = model.encode(inputs["pixel_values"])
pictures = processor.postprocess(model.decode(bits))
scores = model(**inputs).logits_per_image"""

PART_EXAMPLE = """from qlip.models import {name}

model = {name}.from_pretrained("path/to/this/folder")"""

ONNX_EXAMPLE = """import onnxruntime

encoder = onnxruntime.InferenceSession("encoder.onnx")
decoder = onnxruntime.InferenceSession("decoder.onnx")
(bits,) = encoder.run(None, {"pixel_values": pixel_values})  # float32 in, bool (batch, tokens, bits) out
(pixel_values,) = decoder.run(None, {"bits": bits})"""

PT2_EXAMPLE = """import torch

encoder = torch.export.load("encoder.pt2").module()
decoder = torch.export.load("decoder.pt2").module()
bits = encoder(pixel_values)  # float32 in, bool (batch, tokens, bits) out
pixel_values = decoder(bits)"""

PIPELINE_TAGS = {
    "QLIPModel": "zero-shot-image-classification",
    "QLIPVisionModel": "image-feature-extraction",
    "QLIPTextModel": "feature-extraction",
    "QLIPDecoder": "image-to-image",
    "QLIPForImageClassification": "image-classification",
}
TITLES = {
    "QLIPModel": "A QLIP visual tokenizer",
    "QLIPVisionModel": "The vision encoder of a QLIP visual tokenizer",
    "QLIPTextModel": "The text encoder of a QLIP visual tokenizer",
    "QLIPDecoder": "The decoder of a QLIP visual tokenizer",
    "QLIPForImageClassification": "An image classifier on a QLIP encoder",
}


def model_card(model: PreTrainedModel, *, training: str = "") -> str:
    """YAML header and a short page: sizes from the config, how to load. `training` ends the sentence of sizes."""
    name = type(model).__name__
    whole = name == "QLIPModel"
    return CARD.format(
        pipeline_tag=PIPELINE_TAGS.get(name, "feature-extraction"),
        title=TITLES.get(name, name),
        description=f"{_sizes(model)}{training}. {_parameters(model)}.",
        example=TOKENIZER_EXAMPLE if whole else PART_EXAMPLE.format(name=name),
    )


def graphs_card(model: PreTrainedModel, layout: str) -> str:
    """The page of a folder with encoder and decoder as graphs of this layout, `onnx` or `pt2`."""
    return CARD.format(
        pipeline_tag="image-feature-extraction",
        title=f"Encoder and decoder of a QLIP visual tokenizer as {layout} graphs",
        description=f"{_sizes(model)}. Pixels are CLIP-normalised on both sides.",
        example=ONNX_EXAMPLE if layout == "onnx" else PT2_EXAMPLE,
    )


def _sizes(model: PreTrainedModel) -> str:
    vision = getattr(model.config, "vision_config", model.config)
    if not hasattr(vision, "grid_size"):
        return type(model).__name__
    tokens = f"{vision.image_size} px pictures, {vision.grid_size**2} tokens"
    if getattr(vision, "quantizer", "none") != "none":
        tokens += f" of {vision.num_bits} bits each"
    return tokens


def _parameters(model: PreTrainedModel) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"
