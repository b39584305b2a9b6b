"""`qlip verify`: how many bits flip when the same pictures are encoded in other ways, and why those.

    qlip verify MODEL IMAGES...

A bit is the sign of a latent. Another order of summation moves a latent by its last digits, so a bit flips only where
its latent lies at zero to rounding: the margin |u| says how far away that is.
Shapes: `b` pictures, `n` tokens, `L` bits.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from qlip.apps.verify_report import print_report
from qlip.apps.verify_settings import Setting, reference, settings_for
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, ImageRejected, open_image
from qlip.core.log import progress
from qlip.engine.parallel import pick_device
from qlip.evals.card import run_card_fields
from qlip.evals.results import write_results
from qlip.models.qlip.fingerprint import encoder_fingerprint
from qlip.models.qlip.loading import load_model, load_processor
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.pretrained import one_line
from qlip.models.qlip.processing import QLIPProcessor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
QUANTILES = (0.001, 0.01, 0.1, 0.5, 0.9)
THRESHOLDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(kw_only=True, slots=True)
class Pictures:
    """Pictures as the model takes them, and what could not be used."""

    pixel_values: Tensor
    """(b, 3, S, S) CLIP-normalised, on the CPU."""
    num_found: int
    """Files found, of which at most `max_images` were opened."""
    unusable: dict[str, str]
    """File -> reason."""


def verify_model(
    model_folder: Path,
    images: Sequence[Path],
    *,
    device: str,
    batch_sizes: Sequence[int],
    max_images: int,
    compile: bool,
    json: Path | None,
) -> None:
    """Print how many bits differ from the reference in each setting, and the margins; `json` keeps them with a card.

    Raises `UserError` for what is no model or no picture, and for a model without quantizer.
    """
    started = time.monotonic()
    if min(batch_sizes, default=1) < 1:
        raise UserError(f"batch sizes start at 1, got {min(batch_sizes)}; change --batch-sizes")
    files = find_pictures(images)
    place = pick_device(device)
    model, processor = load_model(model_folder), load_processor(model_folder)
    if model.config.vision_config.quantizer == "none":
        raise UserError(f"{model_folder} has no quantizer, so it makes no bits; give a model that has one")
    pictures = load_pictures(files, processor, max_images=max_images)
    card = card_fields(model, place) | {
        "model": str(model_folder),
        "count": len(pictures.pixel_values),
        "files_found": pictures.num_found,
        "unusable": len(pictures.unusable),
    }
    model.float().vision_model.to(place)
    details = measure(model, pictures.pixel_values, place=place, batch_sizes=batch_sizes, compile=compile)
    details["unusable"] = pictures.unusable
    card |= run_card_fields(seconds=time.monotonic() - started)
    figures = {f"bits_flipped/{row['name']}": row["bits_flipped"] for row in details["settings"] if not row["left_out"]}
    result = {"eval": "verify", "figures": figures, "details": details, "card": card}
    print_report(result)
    if json is not None:
        write_results(json, [result])


# --- pictures ----------------------------------------------------------------------------------------------------


def find_pictures(images: Sequence[Path]) -> list[Path]:
    """Files as they are given, folders searched to any depth for the known suffixes, sorted; each once.

    Raises `UserError` for a path that is not there and when nothing is found.
    """
    if not images:
        raise UserError("no pictures given: qlip verify MODEL IMAGES...")
    found: list[Path] = []
    for path in images:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no picture or folder at {path}; give image files or folders of them")
    if not found:
        raise UserError(f"no pictures under {', '.join(map(str, images))}; looked for {' '.join(SUFFIXES)}")
    return list(dict.fromkeys(found))


def load_pictures(files: Sequence[Path], processor: QLIPProcessor, *, max_images: int) -> Pictures:
    """Open at most `max_images` of the files, spread evenly over them, since folders are often sorted by class.

    Raises `UserError` when none of them can be used.
    """
    if max_images < 1:
        raise UserError(f"max_images is {max_images}; give at least 1")
    count = min(max_images, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    pixel_values, unusable = [], {}
    with progress("read", count) as bar:
        for done, path in enumerate(chosen, start=1):
            try:
                picture = open_image(path, limits=ImageLimits())
                pixel_values.append(processor(images=picture, return_tensors="pt")["pixel_values"])
            except ImageRejected as error:
                unusable[str(path)] = str(error)
            bar.update(done)
    if not pixel_values:
        name, reason = next(iter(unusable.items()))
        raise UserError(f"none of the {count} files is a usable picture: {name}: {reason}; give others")
    return Pictures(pixel_values=torch.cat(pixel_values), num_found=len(files), unusable=unusable)


# --- measuring ---------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(
    model: QLIPModel, pixel_values: Tensor, *, place: torch.device, batch_sizes: Sequence[int], compile: bool
) -> dict[str, Any]:
    """Encode (b, 3, S, S) pixels as the reference and in every setting; plain numbers for the report.

    The model's vision tower must be float32 on `place`; afterwards it is as it was.
    """
    count = len(pixel_values)
    settings = settings_for(model, place, num_pictures=count, batch_sizes=batch_sizes, compile=compile)
    rounds = 1 + sum(not setting.left_out for setting in settings)
    with progress("verify", rounds * count) as bar:
        finished = 0

        def encode(setting: Setting) -> tuple[float, Tensor]:
            nonlocal finished
            started, bits = time.monotonic(), []
            with setting.opener(model, place) as bits_of:
                for batch in pixel_values.split(setting.batch_size):
                    bits.append(bits_of(batch))
                    finished += len(batch)
                    bar.update(finished, setting.name)
            return time.monotonic() - started, torch.cat(bits)

        with _latents_seen(model) as seen:
            seconds, bits = encode(Setting(name="reference", opener=reference))
        margins = _margins(model, torch.cat(seen))
        rows = [_row(setting, encode, bits=bits, margins=margins) for setting in settings]
    return {
        "bits": bits.numel(),
        "tokens": bits.shape[0] * bits.shape[1],
        "pictures": count,
        "reference_seconds": round(seconds, 3),
        "settings": rows,
        "margins": None if margins is None else margin_figures(margins, on_sphere=_on_sphere(model)),
    }


@contextmanager
def _latents_seen(model: QLIPModel) -> Iterator[list[Tensor]]:
    """The quantizer's inputs (1, n, L), float32 on the CPU, of every encoding inside."""
    seen: list[Tensor] = []
    hook = model.vision_model.quantizer.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0].float().cpu())
    )
    try:
        yield seen
    finally:
        hook.remove()


def _margins(model: QLIPModel, latents: Tensor) -> Tensor | None:
    """(b, n, L) distances of the latents from zero, None where zero is no threshold: fsq has levels, vq neighbours."""
    if model.config.vision_config.quantizer not in ("bsq", "lfq"):
        return None
    return (F.normalize(latents, dim=-1, eps=1e-12) if _on_sphere(model) else latents).abs()


def _on_sphere(model: QLIPModel) -> bool:
    vision = model.config.vision_config
    return vision.quantizer == "bsq" and vision.quantizer_l2_norm


def _row(
    setting: Setting, encode: Callable[[Setting], tuple[float, Tensor]], *, bits: Tensor, margins: Tensor | None
) -> dict[str, Any]:
    """Name, why it was left out, and otherwise what differs from the reference's bits."""
    if setting.left_out:
        return {"name": setting.name, "left_out": setting.left_out}
    try:
        seconds, others = encode(setting)
    except RuntimeError as error:  # an operation that this device lacks, a compiler that fails, no memory
        reason = one_line(getattr(error, "inner_exception", error))
        return {"name": setting.name, "left_out": f"failed: {reason}"}
    flipped = bits != others
    tokens = flipped.any(-1)
    largest = None if margins is None or not flipped.any() else margins[flipped].max().item()
    return {
        "name": setting.name,
        "left_out": "",
        "bits_flipped": int(flipped.sum()),
        "bits_share": flipped.double().mean().item(),
        "tokens_changed": int(tokens.sum()),
        "tokens_share": tokens.double().mean().item(),
        "pictures_changed": int(tokens.any(-1).sum()),
        "largest_margin": largest,
        "seconds": round(seconds, 3),
    }


def margin_figures(margins: Tensor, *, on_sphere: bool) -> dict[str, Any]:
    """Histogram in half decades from 1e-7, shares below round thresholds, and quantiles of margins (b, n, L).

    On the sphere `random` is the share that latents of random direction would have: the density of one coordinate at
    zero, ``Gamma(L/2) / (sqrt(pi) Gamma((L-1)/2))``, times twice the threshold.
    """
    num_bits, values = margins.shape[-1], margins.double().flatten().numpy()
    top = max(0, math.ceil(math.log10(max(values.max(), 1.0))))
    edges = [0.0, *(10.0 ** (half / 2) for half in range(-14, 2 * top + 1))]
    counts, _ = np.histogram(values, edges)
    below = [{"threshold": t, "share": float((values < t).mean())} for t in THRESHOLDS]
    if on_sphere and num_bits > 1:
        log_density = math.lgamma(num_bits / 2) - math.lgamma((num_bits - 1) / 2) - math.log(math.pi) / 2
        for entry in below:
            entry["random"] = 2 * entry["threshold"] * math.exp(log_density)
    return {
        "edges": edges,
        "counts": counts.tolist(),
        "below": below,
        "quantiles": {f"{share:g}": float(np.quantile(values, share)) for share in QUANTILES},
    }


def card_fields(model: QLIPModel, place: torch.device) -> dict[str, Any]:
    """What was measured and where; the fingerprint and the dtype are those of the weights as they are stored."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {
        "protocol": "verify-v1",
        "encoder_fingerprint": encoder_fingerprint(model),
        "quantizer": model.config.vision_config.quantizer,
        "stored_dtype": str(model.vision_model.post_layernorm.weight.dtype).removeprefix("torch."),
        "image_size": model.config.vision_config.image_size,
        "device": place.type,
        "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else f"{platform.machine()} {cpu}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
