"""Sharing parts out among actors that die, without a cluster: how often parts are tried, and what stops the work."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qlip.apps import tokenize_actor, tokenize_ray
from qlip.apps.encoding import TokenizeOptions
from qlip.apps.token_parts import PartDone
from qlip.apps.tokenize_actor import ActorJob, Failed, Place, TokenizeActor, attempts_file
from qlip.apps.tokenize_ray import make_on_ray
from qlip.core.errors import UserError
from qlip.data.source_parts import Part
from qlip.data.token_files import TokenStoreInfo

INFO = TokenStoreInfo(encoder_fingerprint="a" * 64, num_bits=28, grid=(2, 2), encoding={"device": "cuda"})


class GoneError(Exception):
    """Stands in for Ray's error of an actor that is dead."""


class FakeRay:
    """Actors whose answers are told by a function of the part's name, None while the model is opened."""

    exceptions = SimpleNamespace(
        RayError=GoneError, RayActorError=GoneError, OutOfMemoryError=GoneError, ObjectLostError=GoneError
    )

    def __init__(self, answer: Callable[[str | None], Any]) -> None:
        self.answer, self.num_started, self.num_killed = answer, 0, 0

    def remote(self, actor_class: type) -> Any:
        def started(job: ActorJob) -> Any:
            self.num_started += 1
            return SimpleNamespace(
                open=SimpleNamespace(remote=lambda: (self.num_started, None)),
                make=SimpleNamespace(remote=lambda part: (object(), part[0])),
                seen=SimpleNamespace(remote=lambda: (object(), "seen")),
            )

        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=started))

    def wait(self, calls: list, *, timeout: float) -> tuple[list, list]:
        return ([], calls) if not calls or self.answer is never else (calls[:1], calls[1:])

    def get(self, call: tuple[Any, str | None]) -> Any:
        return self.answer(call[1])

    def kill(self, handle: Any) -> None:
        self.num_killed += 1


def never(name: str | None) -> Any:
    raise AssertionError(name)


def pool_of(ray: FakeRay, out: Path, *, num_parts: int = 4, counted: list[int] | None = None) -> Any:
    job = ActorJob.of(TokenizeOptions(model="model", out=out), INFO, num_gpus=0, num_cpus=1)
    parts = deque((f"{number:05d}", None) for number in range(num_parts))
    on_rows = [].append if counted is None else counted.append
    return tokenize_ray._Pool(ray=ray, job=job, num_actors=2, max_attempts=3, todo=parts, on_rows=on_rows)


def done_or_open(name: str | None) -> Any:
    if name is None:
        return Place(node="here", ray_node="", pid=1)
    return PartDone(name=name, num_good=3, skipped={}, num_entries=3)


def test_lost_parts_are_tried_again_as_often_as_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    left = {"00001": 2, "00002": 99}

    def answer(name: str | None) -> Any:
        if left.get(str(name), 0):
            left[str(name)] -= 1
            raise GoneError("The actor is dead because its node has died.")
        return done_or_open(name)

    ray, counted = FakeRay(answer), []
    done = []
    with pytest.raises(
        UserError, match=r"not made after 3 attempts .*: 00002 \(why: .*\*\.attempts\.jsonl\)"
    ) as caught:
        done.extend(pool_of(ray, tmp_path, counted=counted).run())
    assert "\n" not in str(caught.value)
    assert [one.name for one in done] == ["00000", "00003", "00001"] and sum(counted) == 9
    lines = {name: attempts_file(tmp_path, name).read_text().splitlines() for name in ("00001", "00002")}
    assert [len(lines[name]) for name in lines] == [3, 3] and len(list(tmp_path.iterdir())) == 2
    reasons = [json.loads(line)["reason"] for line in lines["00001"]]
    assert reasons == ["its node has died", "its node has died", "made"] and left["00002"] == 96
    assert ray.num_started == ray.num_killed == 2 + 4, (
        "another one for each that died but the last; none outlives its work"
    )
    assert "part 00001 lost with its worker on node here, attempt 2 of 3 follows" in capsys.readouterr().out


def test_actors_that_cannot_open_the_model_come_to_an_end(tmp_path: Path) -> None:
    def answer(name: str | None) -> Any:
        raise GoneError("no memory")

    ray = FakeRay(answer)
    with pytest.raises(UserError, match=r"6 actors died while they opened model \(no memory\); give an actor more"):
        list(pool_of(ray, tmp_path).run())
    assert ray.num_started == 2 + 5


def test_what_an_actor_cannot_do_stops_the_work(tmp_path: Path) -> None:
    ray = FakeRay(lambda name: Failed(text="node a: disk full; free some") if name == "00001" else done_or_open(name))
    with pytest.raises(UserError, match="node a: disk full; free some"):
        list(pool_of(ray, tmp_path).run())


def test_waiting_for_room_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize_ray, "START_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"no actor of 0 GPUs and 1 CPUs could start .*`ray status`"):
        list(pool_of(FakeRay(never), tmp_path).run())


def job_for(out: Path, **info: Any) -> ActorJob:
    job = ActorJob.of(TokenizeOptions(model="model", out=out), replace(INFO, **info), num_gpus=0, num_cpus=1)
    job.prepare_folder([])
    return job


def test_a_node_with_another_folder_or_other_versions_is_refused(tmp_path: Path) -> None:
    job = job_for(tmp_path, versions={"torch": "0.1"})
    other = TokenizeActor(replace(job, options=replace(job.options, out=tmp_path / "other")))
    assert "other is not the same folder on this node" in other.open().text
    assert "not 0.1); install the same here" in TokenizeActor(job).open().text
    job.clear_folder()
    assert not list(tmp_path.iterdir())


def test_errors_of_a_part_are_one_line_and_what_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        options = SimpleNamespace(out=tmp_path)

        def make(self, parts: list[Part], *, on_rows: Callable[[int], None]) -> Iterator[PartDone]:
            raise KeyError("first line\nlast line")

    monkeypatch.setattr(tokenize_actor, "PartMaker", lambda options, info: Broken())
    monkeypatch.setattr(tokenize_actor.torch, "set_num_threads", lambda num: None)
    monkeypatch.chdir(tmp_path)
    job = job_for(tmp_path)
    actor = TokenizeActor(job)
    assert actor.open().pid and actor.job.info.encoding["device"] == "cpu"
    said = actor.make(("00003", None))
    assert "part 00003: KeyError" in said.text and "\n" not in said.text and said.text.endswith("are kept")
    done = PartDone(name="00003", num_good=1, skipped={}, num_entries=1)
    monkeypatch.setattr(tokenize_actor, "finished", lambda out, name, *, num_views: done)
    assert actor.make(("00003", None)) == done


@pytest.mark.parametrize(
    "given,words",
    [
        ({"num_actors": -1}, "--ray-actors are 0 or more"),
        ({"cpus_per_actor": 0}, "some CPUs or GPUs"),
        ({"gpus_per_actor": 1}, "--device cpu and 1 GPUs an actor"),
        ({"address": "127.0.0.1:1"}, r"no Ray cluster at 127\.0\.0\.1:1: .*refused; start one with `ray start --head`"),
        ({"address": "nowhere at all"}, "no Ray cluster at nowhere at all"),
    ],
    ids=["fewer than none", "no room", "a GPU for the CPU", "nobody there", "no address"],
)
def test_bad_options_are_one_line(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    pytest.importorskip("ray", reason="needs Ray: pip install 'qlip[ray]'")
    options = TokenizeOptions(model="model", out=tmp_path, device="cpu")
    usual: dict[str, Any] = {"address": "", "num_actors": 0, "gpus_per_actor": 0, "cpus_per_actor": 1}
    with pytest.raises(UserError, match=words) as caught:
        list(make_on_ray(options, INFO, [("00000", None)], **(usual | given), on_rows=print))
    assert "\n" not in str(caught.value)


def test_ray_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs Ray: pip install 'qlip\[ray\]'"):
        tokenize_ray._connected("")


def test_room_is_counted_node_by_node() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 8.0}},
        {"Alive": True, "Resources": {"CPU": 64.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 64.0}},
    ]
    assert tokenize_ray._num_places(nodes, num_gpus=1, num_cpus=2) == 8 + 1
    assert tokenize_ray._num_places(nodes, num_gpus=0.1, num_cpus=0) == 80 + 80
    assert tokenize_ray._num_places(nodes, num_gpus=0, num_cpus=3) == 5 + 1 + 21
