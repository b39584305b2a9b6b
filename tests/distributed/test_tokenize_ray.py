"""On a Ray cluster that loses a node and workers, a store is row for row what one process makes; nothing is dropped."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from watched_parts import WatchedPart

from qlip.apps.encoding import TokenizeOptions
from qlip.apps.token_parts import PartDone, PartMaker
from qlip.apps.tokenize import store_info
from qlip.apps.tokenize_ray import make_on_ray
from qlip.core.errors import UserError
from qlip.data.source_parts import Part, parts_of
from qlip.data.sources import open_source
from qlip.data.token_store import TokenStore
from qlip.models.image_tokenizer import open_image_tokenizer
from tiny_tokenizer import save_tiny_tokenizer

NUM_PARTS, PART_SIZE = 8, 6
BROKEN = {7, 25}  # pictures


def write_shards(folder: Path) -> None:
    folder.mkdir()
    for number in range(NUM_PARTS):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for place in range(number * PART_SIZE, (number + 1) * PART_SIZE):
                noise = np.random.default_rng(place).integers(0, 256, (20, 24 + place, 3), dtype=np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(noise).save(buffer, "PNG")
                picture = b"broken" if place in BROKEN else buffer.getvalue()
                for ending, content in (("png", picture), ("txt", f"caption {place}".encode())):
                    member = tarfile.TarInfo(f"{place:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def contents(folder: Path) -> list[tuple]:
    """Every row, and every skipped picture, by file."""
    found: list[tuple] = [(file.name, file.read_text()) for file in sorted(folder.glob("*.skipped.jsonl"))]
    store = TokenStore(folder)
    assert store.verify() == len(store)
    for file, group, _ in store.row_groups:
        rows = store.read_rows(file, group, with_embeddings=True)
        assert rows.embeddings is not None
        numbers = rows.packed.tolist(), rows.embeddings.tolist()
        found.append((store.files[file].name, rows.keys, rows.captions, rows.sizes, rows.labels, *numbers))
    return found


def attempts(out: Path) -> dict[str, list[dict[str, Any]]]:
    ending = ".attempts.jsonl"
    files = sorted(out.glob(f"*{ending}"))
    return {file.name.removesuffix(ending): list(map(json.loads, file.read_text().splitlines())) for file in files}


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes of one CPU on this machine, and its second node."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'qlip[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where actors find watched_parts.py
    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # what `auto` finds
        yield cluster, cluster.add_node(**node)
    finally:
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(300)  # nine processes open torch, beside other tests
def test_a_killed_node_and_a_part_that_kills_its_workers(tmp_path: Path, two_nodes: tuple[Any, Any]) -> None:
    """The second node dies half way through its first part; part 5 kills its process until the cause is taken away."""
    cluster, second = two_nodes
    model = save_tiny_tokenizer(tmp_path / "model")
    write_shards(tmp_path / "shards")
    alone, out, signs = tmp_path / "alone", tmp_path / "out", tmp_path / "signs"
    for folder in (alone, out, signs):
        folder.mkdir()
    parts: list[Part] = parts_of(open_source(str(tmp_path / "shards")), max_items=100)
    options = TokenizeOptions(model=str(model), out=alone, batch_size=4, embeddings=True, device="cpu")
    info = store_info(open_image_tokenizer(model), options, {"name": "test"})
    maker = PartMaker(options, info)
    expected = {done.name: done for done in maker.make(parts, on_rows=lambda num: None)}
    maker.close()

    watched: list[Part] = [(name, WatchedPart(name=name, source=part, signs=signs)) for name, part in parts]
    deadly = parts[5][0]
    (signs / f"kill-{deadly}").touch()
    (signs / f"hold-{second.node_id}").touch()
    counted: list[int] = []

    def make(todo: list[Part]) -> Iterator[PartDone]:
        return make_on_ray(
            replace(options, out=out),
            info,
            todo,
            address="auto",
            num_actors=0,
            gpus_per_actor=0,
            cpus_per_actor=1,
            on_rows=counted.append,
        )

    def kill_the_second_node() -> None:
        while not (signs / "held").exists():
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_the_second_node, daemon=True)
    killer.start()
    done = []
    with pytest.raises(UserError, match=rf"3 attempts .*: {deadly} \(.*attempts\.jsonl\); .* start the same command"):
        done.extend(make(watched))
    killer.join(timeout=30)
    held = (signs / "held").read_text()
    lost = attempts(out)
    assert sorted(lost) == sorted({held, deadly}) and [line["reason"] == "made" for line in lost[held]] == [False, True]
    assert [line["ray_node"] == second.node_id for line in lost[held]] == [True, False]
    assert len(lost[deadly]) == len({line["pid"] for line in lost[deadly]}) == 3
    assert sum(counted) == (NUM_PARTS - 1) * PART_SIZE

    (signs / f"kill-{deadly}").unlink()
    done.extend(make([part for part in watched if not (out / f"{part[0]}.parquet").exists()]))
    assert len(done) == NUM_PARTS and {one.name: one for one in done} == expected
    assert contents(out) == contents(alone) and sum(counted) == NUM_PARTS * PART_SIZE
    names = {file.name for file in out.iterdir()} - {file.name for file in alone.iterdir()}
    assert names == {f"{held}.attempts.jsonl"}, "what was lost and made is recorded; nothing else is left"
