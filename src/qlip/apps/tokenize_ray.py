"""`qlip tokenize --engine ray`: parts of a store made by actors on the nodes of a Ray cluster, whatever dies.

    parts -> one actor per free place -> OUT/.making/<node>-<process>/00000.parquet -> renamed into OUT

An actor has one part at a time. When it dies, with its node or for lack of memory, its part goes to another one and a
line to `OUT/<part>.attempts.jsonl`; a part that was lost `max_attempts` times is left out and named at the end.
Plain actors and not Ray Data, which repeats the work of a dead actor without end and waits until that actor itself is
back: a model too large for its node would be opened for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.token_parts import PartDone
from qlip.apps.tokenize_actor import ActorJob, Failed, Place, TokenizeActor, attempts_file
from qlip.core.errors import UserError, last_line
from qlip.core.log import console
from qlip.data.source_parts import Part
from qlip.data.token_files import TokenStoreInfo

START_SECONDS = 600.0  # without a single actor at work, before the wait for the cluster ends
LOOK_SECONDS = 1.0  # between two looks at how far actors are
LOCAL_OBJECTS = 256 * 2**20  # bytes of shared memory of a cluster started here: parts and ledgers are small


def make_on_ray(
    options: TokenizeOptions,
    info: TokenStoreInfo,
    parts: list[Part],
    *,
    address: str,
    num_actors: int,
    gpus_per_actor: float,
    cpus_per_actor: float,
    max_attempts: int = 3,
    on_rows: Callable[[int], None],
) -> Iterator[PartDone]:
    """Make the file of each part on a Ray cluster, in any order; `on_rows` hears of every so many items and skips.

    `address` is `host:port` of the cluster's head, `auto` for the one this machine belongs to; empty starts one here.
    0 actors are as many as the nodes have room for; more than that wait for nodes to come. `on_rows` hears a negative
    number when a part is lost. Skipped pictures are counted in the results, and limited by the caller.

    Raises `UserError` for a cluster that cannot be reached or has no room, nodes that see another OUT or have other
    versions, errors of a part, and at the end, when all others are made, for parts that were lost `max_attempts` times.
    """
    if num_actors < 0 or min(gpus_per_actor, cpus_per_actor) < 0 or gpus_per_actor + cpus_per_actor == 0:
        raise UserError("give an actor some CPUs or GPUs: --ray-cpus, --ray-gpus, --ray-actors are 0 or more")
    if not parts:
        return
    job = ActorJob.of(options, info, num_gpus=gpus_per_actor, num_cpus=cpus_per_actor)
    ray = _connected(address)
    try:
        places = _num_places(ray.nodes(), num_gpus=gpus_per_actor, num_cpus=cpus_per_actor)
        if not num_actors and not places:
            raise UserError(
                f"no node of the Ray cluster has {gpus_per_actor:g} GPUs and {cpus_per_actor:g} CPUs: "
                "give less to an actor (--ray-gpus 0 computes on CPUs), or --ray-actors N to wait for nodes"
            )
        num_actors = min(num_actors or places, len(parts))
        console.print(f"Ray: {num_actors} actors of {gpus_per_actor:g} GPUs and {cpus_per_actor:g} CPUs")
        job.prepare_folder(parts)
        pool = _Pool(
            ray=ray, job=job, num_actors=num_actors, max_attempts=max_attempts, todo=deque(parts), on_rows=on_rows
        )
        yield from pool.run()
    finally:
        ray.shutdown()  # ends the actors
        job.clear_folder()


@dataclass(kw_only=True, slots=True)
class _Actor:
    """A worker as the driver knows it."""

    handle: Any
    place: Place | None = None
    """None until its model is open."""
    part: Part | None = None
    """What it is making."""
    num_seen: int = 0
    """Items and skips of that part that `on_rows` has heard of."""
    look: Any = None
    """A question how far it is, not answered yet."""


@dataclass(kw_only=True, slots=True)
class _Pool:
    """Shares parts out; all state is here, in the process of the command."""

    ray: Any
    job: ActorJob
    num_actors: int
    max_attempts: int
    todo: deque[Part]
    on_rows: Callable[[int], None]
    calls: dict[Any, _Actor] = field(default_factory=dict)
    """Answers that are waited for, and whose they are."""
    attempts: Counter[str] = field(default_factory=Counter)
    """How often the actor of a part has died."""
    lost: list[str] = field(default_factory=list)
    """Parts that are not tried again."""
    num_unopened: int = 0
    """Actors that died before their model was open."""

    def run(self) -> Iterator[PartDone]:
        for _ in range(self.num_actors):
            self._start()
        at_work = looked = time.monotonic()
        while self.todo or self._busy():
            ready, _ = self.ray.wait(list(self.calls), timeout=LOOK_SECONDS)
            for answer in ready:
                done = self._answered(answer, self.calls.pop(answer))
                if done is not None:
                    yield done
            now = time.monotonic()
            if now - looked >= LOOK_SECONDS:
                self._look()
                looked = now
            at_work = now if self._busy() else at_work
            if now - at_work > START_SECONDS:
                raise UserError(
                    f"no actor of {self.job.num_gpus:g} GPUs and {self.job.num_cpus:g} CPUs could start within "
                    f"{START_SECONDS:g} s: `ray status` says what the cluster has free; give less to an actor or wait"
                )
        if self.lost:
            names, more = ", ".join(sorted(self.lost)[:20]), ", ..." if len(self.lost) > 20 else ""
            raise UserError(
                f"not made after {self.max_attempts} attempts that took their workers down: {names}{more} "
                f"(why: {attempts_file(self.job.options.out, '*')}); all other parts are there: give actors more "
                "memory or mend these pictures, then start the same command again"
            )

    def _busy(self) -> list[_Actor]:
        return [actor for actor in self.calls.values() if actor.part is not None]

    def _start(self) -> None:
        remote = self.ray.remote(TokenizeActor).options(
            num_gpus=self.job.num_gpus,
            num_cpus=self.job.num_cpus,
            max_restarts=0,  # another actor may start elsewhere
            max_task_retries=0,
            max_concurrency=2,  # `seen` while `make`
            scheduling_strategy="SPREAD",
        )
        actor = _Actor(handle=remote.remote(self.job))
        self.calls[actor.handle.open.remote()] = actor

    def _give(self, actor: _Actor, part: Part) -> None:
        actor.part, actor.num_seen, actor.look = part, 0, None
        self.calls[actor.handle.make.remote(part)] = actor

    def _answered(self, answer: Any, actor: _Actor) -> PartDone | None:
        """What an actor says, or that it has died."""
        exceptions = self.ray.exceptions
        try:
            said = self.ray.get(answer)
        except (exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            self._died(actor, reason_of(error))
            return None
        except exceptions.RayError as error:  # a node without qlip, an object store that is full
            raise UserError(f"Ray: {reason_of(error)}; mend the cluster, finished parts are kept") from None
        if isinstance(said, Failed):
            raise UserError(said.text)
        if isinstance(said, Place):
            actor.place = said
        else:
            self._heard(actor, said.num_entries)
            if self.attempts[said.name]:
                self._record(actor, said.name, "made")
        if self.todo:
            self._give(actor, self.todo.popleft())
        else:  # it may not outlive its node until a part comes back, for which another one is started
            self.ray.kill(actor.handle)
        return said if isinstance(said, PartDone) else None

    def _died(self, actor: _Actor, reason: str) -> None:
        self.ray.kill(actor.handle)  # if it was only out of reach it must not come back
        if actor.part is None:
            self.num_unopened += 1
            if self.num_unopened >= self.max_attempts * self.num_actors:
                raise UserError(
                    f"{self.num_unopened} actors died while they opened {self.job.options.model} ({reason}); "
                    "give an actor more memory: fewer of them on a node with more --ray-cpus or --ray-gpus"
                )
        else:
            name, place = actor.part[0], actor.place
            assert place is not None
            self._heard(actor, 0)
            self.attempts[name] += 1
            self._record(actor, name, reason)
            again = self.attempts[name] < self.max_attempts
            then = f"attempt {self.attempts[name] + 1} of {self.max_attempts} follows" if again else "left out"
            console.print(f"part {name} lost with its worker on node {place.node}, {then}: {reason}")
            if again:
                self.todo.append(actor.part)
            else:
                self.lost.append(name)
        if len(self.calls) < min(self.num_actors, len(self.todo) + len(self._busy())):
            self._start()

    def _record(self, actor: _Actor, name: str, reason: str) -> None:
        """A line of an attempt; a part that was made at once has none."""
        assert actor.place is not None
        file = attempts_file(self.job.options.out, name)
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **asdict(actor.place), "reason": reason}
        try:
            with file.open("a") as opened:
                opened.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}; free disk space or choose another OUT") from None

    def _look(self) -> None:
        """Hear how far the actors are; who does not answer is not waited for."""
        for actor in self._busy():
            if actor.look is None:
                actor.look = actor.handle.seen.remote()
            ready, _ = self.ray.wait([actor.look], timeout=0)
            if not ready:
                continue
            with contextlib.suppress(self.ray.exceptions.RayError):  # dead: its part's answer will say so
                name, num_seen = self.ray.get(actor.look)
                if actor.part is not None and name == actor.part[0]:
                    self._heard(actor, num_seen)
            actor.look = None

    def _heard(self, actor: _Actor, num_seen: int) -> None:
        if num_seen != actor.num_seen:
            self.on_rows(num_seen - actor.num_seen)
        actor.num_seen = num_seen


def reason_of(error: Exception) -> str:
    """Why an actor is dead, of all that Ray says, or else its last line; at most 300 characters in one line."""
    text = " ".join(str(error).split())
    for beginning in ("Worker exit detail: ", "The actor is dead because "):
        _, found, reason = text.rpartition(beginning)
        if found:
            break
    text = reason.partition(" Some common causes")[0] if found else last_line(error)
    return text[:300].rstrip(" .") or type(error).__name__


def _connected(address: str) -> Any:
    """The module of Ray, with a cluster behind it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # nodes have their own environments
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'qlip[ray]'") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    remedy = "start one with `ray start --head`, or leave --ray-address out to use this machine alone"
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in host:  # Ray itself tries for two minutes, and then ends the process
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=LOCAL_OBJECTS,
            )
    except (OSError, ValueError, OverflowError, RuntimeError, ray.exceptions.RayError, SystemExit) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {_first_line(error)}; {remedy}") from None
    return ray


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200].rstrip(" .")
    return "it does not answer" if isinstance(error, SystemExit) else text or type(error).__name__


def _num_places(nodes: list[dict[str, Any]], *, num_gpus: float, num_cpus: float) -> int:
    """How many actors the nodes that are alive have room for."""
    places = 0
    for node in nodes:
        if node["Alive"]:
            wanted = {kind: num for kind, num in (("GPU", num_gpus), ("CPU", num_cpus)) if num}
            places += int(min(node["Resources"].get(kind, 0) / num for kind, num in wanted.items()) + 1e-6)
    return places
