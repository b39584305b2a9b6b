"""A first look at a model: pictures through the tokens and back, and a picture scored against labels."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from rich.table import Table

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.log import console, progress
from qlip.engine.parallel import pick_device
from qlip.evals.scene_zero_shot import TEMPLATES
from qlip.evals.zero_shot import class_weights
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.modeling import unit_norm


def open_picture(path: Path) -> Image.Image:
    """An RGB picture from a file. Raises `UserError` naming the file and the reason."""
    if not path.is_file():
        raise UserError(f"no picture at {path}; give an image file")
    try:
        return open_image(path, limits=ImageLimits())
    except ImageRejected as error:
        raise UserError(f"{path}: {error}; give another picture") from None


@torch.inference_mode()
def reconstruct_images(model_folder: Path, images: list[Path], *, out: Path, device: str) -> None:
    """Write `<stem>.png` for every picture and `sheet.png`, one row each: what the model saw, what it gave back."""
    if not images:
        raise UserError("no pictures given: qlip reconstruct MODEL IMAGE... --out DIR")
    pictures = [open_picture(path) for path in images]
    model, processor = load_model(model_folder), load_processor(model_folder)
    place = pick_device(device)
    model.to(place)
    size = model.config.vision_config.image_size
    scale = max(1, 256 // size)
    sheet = Image.new("RGB", (2 * size * scale, len(pictures) * size * scale))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    with progress("reconstruct", len(pictures)) as bar:
        for row, (path, picture) in enumerate(zip(images, pictures, strict=True)):
            pixel_values = processor(images=picture, return_tensors="pt")["pixel_values"].to(place)
            seen = processor.postprocess(pixel_values)[0]
            returned = processor.postprocess(model(pixel_values).reconstructions)[0]
            returned.save(_free_name(out, path.stem))
            for column, tile in enumerate((seen, returned)):
                tile = tile.resize((size * scale, size * scale), Image.Resampling.NEAREST)
                sheet.paste(tile, (column * size * scale, row * size * scale))
            bar.update(row + 1)
    sheet.save(out / "sheet.png")
    vision = model.config.vision_config
    through = "no quantizer" if vision.quantizer == "none" else f"{vision.num_bits * vision.grid_size**2} bits each"
    console.print(f"{len(pictures)} pictures, {through}, in {out}; before and after: {out / 'sheet.png'}")


def _free_name(out: Path, stem: str) -> Path:
    path, number = out / f"{stem}.png", 2
    while path.exists() or path.name == "sheet.png":
        path, number = out / f"{stem}_{number}.png", number + 1
    return path


@torch.inference_mode()
def classify_image(model_folder: Path, image: Path, *, labels: str, device: str) -> None:
    """Print labels by probability: softmax of exp(logit_scale) times the cosine."""
    names = [label.strip() for label in labels.split(",") if label.strip()]
    if not names:
        raise UserError('no labels given: --labels "red circle,blue star"')
    picture = open_picture(image)
    model, processor = load_model(model_folder), load_processor(model_folder)
    place = pick_device(device)
    model.to(place)
    longest, known = len(processor.tokenizer), model.config.text_config.vocab_size
    if longest > known:
        raise UserError(f"{model_folder}: its tokenizer has {longest} ids, its text tower {known}; add tokenizer.json")
    pixel_values = processor(images=picture, return_tensors="pt")["pixel_values"].to(place)
    embedding = unit_norm(model.get_image_features(pixel_values).pooler_output)[0].cpu()
    templates = [template.format for template in TEMPLATES]
    cosines = class_weights(MeasuredQLIP(model, processor), names, templates) @ embedding
    probabilities = (model.logit_scale.exp().cpu() * cosines).softmax(0)
    table = Table(title=str(image), title_justify="left")
    for column in ("label", "probability", "cosine"):
        table.add_column(column, justify="left" if column == "label" else "right")
    for i in probabilities.argsort(descending=True).tolist():
        table.add_row(names[i], f"{float(probabilities[i]):.3f}", f"{float(cosines[i]):.3f}")
    console.print(table)
