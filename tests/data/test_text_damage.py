"""Files of texts that are cut short, damaged, empty or gone: what is good is kept, the rest counted, runs go on."""

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from document_files import TEXTS, cut, damage_parquet, entries_of, stream_of, taken, write

from qlip.core.errors import UserError
from qlip.data.ledger import Ledger
from qlip.data.tar_reader import Skip
from qlip.data.text_files import read_documents
from qlip.data.text_stream import TextStream


def test_damaged_shards_lose_what_is_damaged(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tar", TEXTS)
    file.write_bytes(file.read_bytes()[:-11_000])
    stream = stream_of(file, text_field="scene.story", ledger=Ledger(None, max_skip_share=0.5))
    assert set(taken(stream, 30)) <= set(TEXTS)
    assert any(reason.startswith("truncated tar") for reason in stream.ledger.skipped)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.parquet"])
def test_files_that_are_cut_short_lose_their_rest(tmp_path: Path, name: str, kept: float) -> None:
    cut(write(tmp_path, name, TEXTS), kept)
    write(tmp_path, "b.jsonl", ["good", "better"])
    ledger = tmp_path / "skipped"
    stream = stream_of(tmp_path, ledger=Ledger(ledger, max_skip_share=0.5))
    assert {"good", "better"} <= set(taken(stream, 60)) <= {"good", "better", *TEXTS}
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert len(entries) >= 2 and {(entry["key"], Path(entry["shard"]).name) for entry in entries} == {("", name)}
    assert all(entry["reason"].startswith("unreadable file: ") for entry in entries)
    with pytest.raises(UserError, match=r"\d of \d+ samples skipped.*unreadable file \(\d\)"):
        taken(stream_of(tmp_path / name, ledger=Ledger(None, max_skip_share=0.0)), 100)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz"])
def test_what_lies_before_damage_is_kept(tmp_path: Path, name: str) -> None:
    texts = [f"{number} {Random(number).randbytes(500).hex()}" for number in range(400)]
    file = write(tmp_path, name, texts)
    cut(file, 0.75)
    *good, (number, reason) = entries_of(file)
    assert good == list(enumerate(texts))[: len(good)] and 200 < len(good) <= number <= 300
    assert reason.startswith("<unreadable file: ")


def test_rows_behind_damage_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, "a.parquet", TEXTS)
    damage_parquet(file, group=2)
    *good, (number, skip) = read_documents(file, text_field="text", first=0, wanted=lambda number: number % 2 == 0)
    assert good == list(enumerate(TEXTS))[:10:2] and number == 10
    assert isinstance(skip, Skip) and (skip.key, skip.count) == ("", 7)
    assert entries_of(file, first=15) == list(enumerate(TEXTS))[15:], "what is not read is not missed"


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_damaged_files_resume_exactly_and_go_on_when_mended(tmp_path: Path, name: str, num_ranks: int) -> None:
    file = write(tmp_path, name, TEXTS)
    whole_file = file.read_bytes()
    damage_parquet(file, group=2) if name == "a.parquet" else cut(file, 0.9)
    write(tmp_path, "b.jsonl", [f"more {number}" for number in range(9)])

    def stream() -> TextStream:
        return stream_of(tmp_path, num_ranks=num_ranks, ledger=Ledger(None, max_skip_share=1.0))

    first = stream()
    given, states = [], []
    for text in itertools.islice(first, 70):
        given.append(text)
        states.append(json.loads(json.dumps(first.state_dict())))
    assert sum(states[-1]["counts"]["skipped"].values()) >= 2 and states[-1]["position"]["epoch"] >= 1
    for stop in range(1, 66, 2 if num_ranks == 1 else 1):
        again = stream()
        again.resume([states[stop - 1]] * num_ranks)
        assert taken(again, 4) == given[stop : stop + 4]
        assert again.state_dict() == states[stop + 3], "counts too"
    file.write_bytes(whole_file)
    mended = stream()
    mended.resume([states[9]] * num_ranks)
    assert set(taken(mended, 90)) >= set(TEXTS[::num_ranks])


@pytest.mark.parametrize("kind", ["gone", "empty"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.tar"])
def test_files_that_are_gone_or_empty_are_skipped_unless_nothing_is_left(tmp_path: Path, name: str, kind: str) -> None:
    file = write(tmp_path, name, TEXTS)
    options: dict[str, Any] = {"text_field": "scene.story"} if name.endswith(".tar") else {}
    with_others, alone = stream_of(f"{file}::{write(tmp_path, 'b.jsonl', TEXTS)}"), stream_of(file, **options)
    file.unlink() if kind == "gone" else file.write_bytes(b"")
    assert set(taken(with_others, 23)) == set(TEXTS)
    with pytest.raises(UserError, match=r"(\d) of \1 samples skipped"):
        taken(alone, 1)


def test_files_that_go_while_resuming_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl", TEXTS)
    stream = stream_of(tmp_path)
    taken(stream, 8)
    state = stream.state_dict()
    file.unlink()
    write(tmp_path, "a.jsonl", [])
    again = stream_of(tmp_path, ledger=Ledger(tmp_path / "skipped", max_skip_share=0.05))
    again.resume([state])
    with pytest.raises(UserError, match=r"samples skipped.*unreadable file"):
        taken(again, 30)
