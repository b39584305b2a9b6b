"""`qlip eval explain`: the same pictures and model under protocols that each change one thing, and what that is worth.

Most gaps between two papers' figures are gaps between protocols: this says how large, on one's own pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.engine.parallel import pick_device
from qlip.evals.inputs import EvalInput, known_count
from qlip.evals.protocols import Preparation, Protocol, ReconstructionSettings
from qlip.evals.reconstruction import LEAST_FOR_FID, ReconstructionEvaluator
from qlip.evals.results import write_results
from qlip.evals.run import EvalRequest, result_folder
from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.opening import open_measured

SIZE = 256  # for models that take any
CPU = torch.device("cpu")


@dataclass(kw_only=True, slots=True, frozen=True)
class Variant:
    """One protocol beside the base."""

    changes: str
    """What it does otherwise, in words."""
    protocol: Protocol
    reference: bool = False
    """Whether Frechet distances are taken against the reference pictures."""


def variants(*, size: int, metrics: tuple[str, ...], reference: bool) -> list[Variant]:
    """The base (bicubic, centre crop, rounded, against the originals), then one change each."""
    base = Protocol(
        name="explain-base-v1",
        summary="bicubic, centre crop, rounded",
        settings=ReconstructionSettings(metrics=metrics),
        preparation=Preparation(size=size),
    )
    found = [Variant(changes="bicubic, centre crop, rounded", protocol=base)]
    for filter in ("bilinear", "lanczos", "adm"):
        changed = replace(base, name=f"explain-{filter}-v1", preparation=Preparation(size=size, filter=filter))
        found.append(Variant(changes=f"resize filter {filter}", protocol=changed))
    squashed = replace(base, name="explain-squash-v1", preparation=Preparation(size=size, crop="squash"))
    found.append(Variant(changes="both sides squashed, no crop", protocol=squashed))
    truncated = replace(
        base, name="explain-truncate-v1", settings=ReconstructionSettings(metrics=metrics, rounding="truncate")
    )
    found.append(Variant(changes="pixels truncated, not rounded", protocol=truncated))
    if reference:
        other = replace(base, name="explain-reference-v1")
        found.append(Variant(changes="Frechet against the other pictures", protocol=other, reference=True))
    return found


def explain(
    model: str,
    *,
    data: str,
    max_samples: int,
    networks: Path | None,
    reference: str,
    out: Path | None,
    batch_size: int,
    device: str,
) -> None:
    """Measure every variant, print them beside the base, write OUT/results.json.

    rFID and LPIPS are measured where their weights are found, and said to be left out where not. Raises `UserError` as
    `qlip eval` does.
    """
    folder = out or result_folder(model, root="runs/explain")
    place = pick_device(device)
    distributed.start(device_type=place.type)
    request = EvalRequest(
        data=data, reference=reference, max_samples=max_samples, batch_size=batch_size, networks=networks, folder=folder
    )
    opened, measured = distributed.on_all_ranks(lambda: (request.open(), open_measured(model)))
    measured.to(place)
    size = 0 if measured.image_size else SIZE
    metrics = distributed.gather_objects(_possible_metrics(measured, opened))[0]  # as rank 0 finds the weights
    results = []
    for variant in variants(size=size, metrics=metrics, reference=bool(reference)):
        given = opened if variant.reference else replace(opened, reference=None)
        evaluator = ReconstructionEvaluator(variant.protocol, given)
        figures = evaluator.run(measured, place)
        card = {"model": model, "changes": variant.changes, **evaluator.card()}
        results.append({"eval": "reconstruction", "figures": figures, "details": {}, "card": card})
        distributed.on_first_rank(partial(write_results, folder / "results.json", results))
    distributed.on_first_rank(opened.clean_up)
    _print(results, metrics)
    console.print(f"cards: {folder / 'results.json'}")


def _possible_metrics(model: MeasuredModel, data: EvalInput) -> tuple[str, ...]:
    """PSNR and SSIM, and whatever this model and the weights at hand allow; says what is left out and why."""
    found = ["psnr", "ssim"]
    for name, load in (("lpips_alex", lambda: data.networks.lpips("alex", CPU)), ("rfid", lambda: _check_fid(data))):
        try:
            load()
            found.append(name)
        except UserError as error:
            console.print(f"{name} is left out: {error}")
    if isinstance(model, MeasuredQLIP):
        found.append("fd_encoder")
    return tuple(found)


def _check_fid(data: EvalInput) -> None:
    count = known_count(data)
    if count is not None and count < LEAST_FOR_FID:
        raise UserError(f"{count} pictures are fewer than {LEAST_FOR_FID}; give more")
    data.networks.inception(CPU)


def _print(results: list[dict[str, Any]], metrics: tuple[str, ...]) -> None:
    """A row per variant: each figure, and how far it is from the base."""
    base = results[0]["figures"]
    table = Table(title=f"{results[0]['card']['count']} pictures of {results[0]['card']['data']}", title_justify="left")
    table.add_column("protocol")
    for name in metrics:
        table.add_column(name, justify="right")
        table.add_column("", justify="right", style="dim")
    for result in results:
        cells = []
        for name in metrics:
            value = result["figures"][name]
            difference = "" if result is results[0] else f"{value - base[name]:+.3f}"
            cells += [f"{value:.3f}", difference]
        table.add_row(result["card"]["changes"], *cells)
    console.print(table)
