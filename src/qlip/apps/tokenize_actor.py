"""What an actor of `qlip tokenize --engine ray` is and does, on a node of the cluster.

A part is made in OUT/.making/<node>-<process>/ and renamed into OUT, so that two actors with one part, of which Ray
took one for dead, never write to one file: whoever is last replaces a whole file by an equal one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.token_parts import PartDone, PartMaker, finished, part_file, skipped_file
from qlip.core.errors import UserError, last_line
from qlip.data.source_parts import Part
from qlip.data.token_files import TokenStoreInfo

MAKING = ".making"  # folder in OUT for files of parts that are not whole yet


def attempts_file(out: Path, name: str) -> Path:
    """Where attempts of a part that was lost are listed, one JSON object {time, node, ray_node, pid, reason} a line."""
    return out / f"{name}.attempts.jsonl"


@dataclass(kw_only=True, slots=True, frozen=True)
class ActorJob:
    """What all actors share."""

    options: TokenizeOptions
    info: TokenStoreInfo
    num_gpus: float
    num_cpus: float
    folder: Path
    """Where the command was started; relative paths begin there."""
    word: str
    """Content of a file in OUT, by which a node shows that it sees the same folder."""

    @classmethod
    def of(cls, options: TokenizeOptions, info: TokenStoreInfo, *, num_gpus: float, num_cpus: float) -> ActorJob:
        """Paths made absolute, the device chosen. Raises `UserError` for a device that actors will not have."""
        device = ("cuda" if num_gpus else "cpu") if options.device == "auto" else options.device
        if (device.partition(":")[0] == "cuda") != (num_gpus > 0):
            raise UserError(
                f"--device {device} and {num_gpus:g} GPUs an actor: change --ray-gpus or leave --device out"
            )
        model = Path(options.model).expanduser()
        options = replace(
            options,
            device=device,
            out=options.out.expanduser().absolute(),
            model=str(model.absolute()) if model.exists() else options.model,
            max_skip_share=1.0,  # a share of all parts, which no actor knows
        )
        info = replace(info, encoding=info.encoding | {"device": device.partition(":")[0]})
        word = secrets.token_hex(8)
        return cls(options=options, info=info, num_gpus=num_gpus, num_cpus=num_cpus, folder=Path.cwd(), word=word)

    @property
    def marker(self) -> Path:
        return self.options.out / f".ray-{self.word}"

    def prepare_folder(self, parts: list[Part]) -> None:
        """Take away what a killed call has left of these parts; attempts are counted anew."""
        self.clear_folder()
        for name, _ in parts:
            part_file(self.options.out, name).with_suffix(".tmp").unlink(missing_ok=True)
            attempts_file(self.options.out, name).unlink(missing_ok=True)
        try:
            self.marker.write_text(self.word)
        except OSError as error:
            raise UserError(f"cannot write {self.marker}: {error.strerror}; make OUT a folder you can write") from None

    def clear_folder(self) -> None:
        """Files that dead actors have begun."""
        self.marker.unlink(missing_ok=True)
        shutil.rmtree(self.options.out / MAKING, ignore_errors=True)


@dataclass(kw_only=True, slots=True, frozen=True)
class Place:
    """Where an actor is."""

    node: str
    """Host name."""
    ray_node: str
    """As `ray list nodes` has it."""
    pid: int


@dataclass(kw_only=True, slots=True, frozen=True)
class Failed:
    """What stops the whole work, in one line with the remedy."""

    text: str


class TokenizeActor:
    """An actor: one process on a node of the cluster, with its own copy of the model."""

    def __init__(self, job: ActorJob) -> None:
        self.job, self.node = job, socket.gethostname()
        self.maker: PartMaker | None = None
        self.making, self.num_seen = "", 0

    def open(self) -> Place | Failed:
        """Check the node and open the model; not in the constructor, whose errors Ray takes for a death."""
        job = self.job
        try:
            self._check_node()
            with contextlib.suppress(OSError):  # without that folder only absolute paths can be found
                os.chdir(job.folder)
            torch.set_num_threads(max(1, int(job.num_cpus) - job.options.workers))
            scratch = job.options.out / MAKING / f"{self.node}-{os.getpid()}"
            scratch.mkdir(parents=True, exist_ok=True)
            self.maker = PartMaker(replace(job.options, out=scratch), job.info)
        except Exception as error:  # whatever it is, another node would not do better
            return self._failed(error, doing=f"opening {job.options.model}")
        return Place(node=self.node, ray_node=_ray_node(), pid=os.getpid())

    def make(self, part: Part) -> PartDone | Failed:
        """One part, unless it is there: its actor may have died between renaming the file and saying so."""
        name, out = part[0], self.job.options.out
        try:
            done = finished(out, name, num_views=len(self.job.info.views))
            if done is not None:
                return done
            self.making, self.num_seen = name, 0
            assert self.maker is not None
            (done,) = self.maker.make([part], on_rows=self._saw)
            scratch = self.maker.options.out
            skipped_file(out, name).unlink(missing_ok=True)
            if skipped_file(scratch, name).exists():  # first: a finished file has them beside it
                skipped_file(scratch, name).replace(skipped_file(out, name))
            part_file(scratch, name).replace(part_file(out, name))
            return done
        except Exception as error:  # a picture that cannot be read is a skip: this is more, and no node can do better
            return self._failed(error, doing=f"part {name}")

    def seen(self) -> tuple[str, int]:
        """The part being made, and how many items and skips of it are done."""
        return self.making, self.num_seen

    def _saw(self, num: int) -> None:
        self.num_seen += num

    def _check_node(self) -> None:
        """Raise `UserError` for a node that sees another OUT, or may make other bits."""
        out, versions = self.job.options.out, self.job.info.versions
        try:
            word = self.job.marker.read_text()
        except OSError:
            word = ""
        if word != self.job.word:
            raise UserError(f"{out} is not the same folder on this node; use one on a shared filesystem")
        other = [
            f"{name} {version(name)}, not {wanted}" for name, wanted in versions.items() if version(name) != wanted
        ]
        if other:
            raise UserError(f"other versions than where the command runs ({'; '.join(other)}); install the same here")

    def _failed(self, error: Exception, *, doing: str) -> Failed:
        if isinstance(error, UserError):
            return Failed(text=f"node {self.node}: {error}")
        if isinstance(error, torch.OutOfMemoryError):
            return Failed(text=f"node {self.node}, {doing}: the GPU's memory is full; give a smaller --batch-size")
        text = f"node {self.node}, {doing}: {type(error).__name__}: {last_line(error)[:300]}"
        return Failed(text=f"{text}; --engine local shows where, finished parts are kept")


def _ray_node() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
