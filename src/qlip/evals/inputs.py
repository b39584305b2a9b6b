"""What every evaluation is given besides the model and the protocol, and the checks that come before any work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits
from qlip.data.items import Item, Source
from qlip.data.transforms import prepared_pixels
from qlip.engine.run_folder import versions
from qlip.evals.collect import Collected, Measure, Reading, collect
from qlip.evals.networks import Networks
from qlip.evals.protocols import Preparation, Protocol
from qlip.models.measured import Ability, MeasuredModel

WORK = {"parts": ".parts", "features": "features"}


@dataclass(kw_only=True, slots=True)
class EvalInput:
    """Data and how to go through them; no figure depends on anything but `source`, `train_source`, `max_samples`."""

    source: Source
    """What is scored."""
    train_source: Source | None = None
    """What probes learn from."""
    reference: Source | None = None
    """Pictures to take the Frechet distance against; None takes the originals themselves."""
    max_samples: int = 0
    """Score the first so many items; 0 scores all."""
    batch_size: int = 100
    """Pictures per forward pass, at most a part's."""
    max_skip_share: float = 0.05
    """Stop when a larger share of the pictures cannot be used."""
    leave_out: tuple[str, ...] = ()
    """Metrics of the protocol that are not to be measured, said on the card."""
    networks: Networks = field(default_factory=lambda: Networks(None))
    """Where the weights of Inception and LPIPS are."""
    split: str = ""
    """Which split of a json or parquet folder was asked for; `source.name` says it where it was used."""
    folder: Path | None = None
    """Result folder, in which finished parts and features are kept; None keeps all in memory."""
    work_folders: list[Path] = field(default_factory=list)
    """Where this run has put parts so far; `clean_up` removes these and no others."""
    limits: ImageLimits = field(default_factory=ImageLimits)
    """Pictures beyond these are skipped."""

    def reading(
        self,
        source: Source,
        *,
        preparation: Preparation,
        size: int,
        wanted: Callable[[Item], bool] | None = None,
        prepare: Callable[[Image.Image, Item], Tensor] | None = None,
        max_samples: int | None = None,
    ) -> Reading:
        """How to go through a source: all items, prepared as the protocol says, unless told otherwise."""
        return Reading(
            source=source,
            prepare=prepare or partial(_prepare, preparation, size),
            wanted=wanted or _any_item,
            max_samples=self.max_samples if max_samples is None else max_samples,
            batch_size=self.batch_size,
            max_skip_share=self.max_skip_share,
            limits=self.limits,
        )

    def collect(
        self,
        protocol: Protocol,
        measure: Measure,
        *,
        model: MeasuredModel,
        device: torch.device,
        wanted: Callable[[Item], bool] | None = None,
        **what: Any,
    ) -> Collected:
        """Rows of all pictures of `source` that are `wanted`, under the protocol; `what` else they depend on."""
        return collect(
            self.reading(
                self.source,
                preparation=protocol.preparation,
                size=picture_side(model, protocol),
                wanted=wanted,
            ),
            measure,
            title=protocol.name,
            device=device,
            folder=self.work_folder(
                "parts",
                model=model,
                device=device,
                source=self.source,
                max_samples=self.max_samples,
                **protocol.card(),
                **what,
            ),
        )

    def work_folder(
        self,
        kind: Literal["parts", "features"],
        *,
        model: MeasuredModel,
        device: torch.device,
        source: Source,
        max_samples: int,
        **what: Any,
    ) -> Path | None:
        """Where rows of just this work are kept: a folder named by the sha256 of all that they depend on.

        That is the model with its config, the kind of device, the data, versions of qlip, torch and Pillow, and `what`
        else. Parts serve to resume and go with `clean_up`, features stay for the next run.
        """
        if self.folder is None:
            return None
        known = {"device": device.type, "data": source.identity(), "versions": versions(), "max_samples": max_samples}
        text = json.dumps(model.identity() | known | what, sort_keys=True, default=str)
        folder = self.folder / WORK[kind] / hashlib.sha256(text.encode()).hexdigest()[:16]
        if kind == "parts":
            self.work_folders.append(folder)
        return folder

    def clean_up(self) -> None:
        """Remove the parts that this run has used, once all is finished."""
        for folder in self.work_folders:
            shutil.rmtree(folder, ignore_errors=True)
        if self.folder is not None and (self.folder / WORK["parts"]).is_dir():
            with suppress(OSError):  # another run's parts are still there
                (self.folder / WORK["parts"]).rmdir()


def known_count(data: EvalInput) -> int | None:
    """How many pictures there are at most, None where only reading tells."""
    known = [count for count in (data.max_samples or None, data.source.num_items) if count is not None]
    return min(known, default=None)


def _any_item(item: Item) -> bool:
    return True


def _prepare(preparation: Preparation, size: int, image: Image.Image, item: Item) -> Tensor:
    return prepared_pixels(image, size=size, filter=preparation.filter, crop=preparation.crop)


def picture_side(model: MeasuredModel, protocol: Protocol) -> int:
    """S for this model under this protocol. Raises `UserError` when the model takes another size."""
    wanted = protocol.preparation.size
    if not wanted and not model.image_size:
        raise UserError(f"{model.name} takes any size: use a protocol that names one, not {protocol.name}")
    if wanted and model.image_size not in (0, wanted):
        raise UserError(
            f"{protocol.name} is for pictures of {wanted} pixels, the model takes {model.image_size}: use a protocol "
            "of that size or one of the images-... protocols, which take the model's"
        )
    return wanted or model.image_size


def require_ability(model: MeasuredModel, ability: Ability, protocol: Protocol) -> None:
    """Raise `UserError` when the model cannot do what the protocol measures."""
    if ability not in model.abilities:
        what = {"reconstruct": "has no decoder", "match_text": "scores no texts", "features": "gives no features"}
        what |= {"caption": "writes no captions", "continue": "continues no texts"}
        unified = ", or give a unified model (the export of `qlip train scenes_um3_tiny`)"
        other = unified if ability in ("caption", "continue") else ""
        raise UserError(f"a {model.name} {what[ability]}: leave {protocol.name} out of --evals{other}")


def objects_of_scene(item: Item) -> list[dict[str, Any]]:
    """The objects of a rendered scene. Raises `UserError` for data without ground truth."""
    if "scene" not in item.record:
        raise UserError("this protocol needs scene shards (json with `scene`); make some: `qlip data scenes`")
    return item.record["scene"]["objects"]


def holds_one_object(item: Item) -> bool:
    """Whether the scene shows exactly one object."""
    return len(objects_of_scene(item)) == 1
