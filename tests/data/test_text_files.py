"""Documents of every kind of file: each once an epoch over all ranks, resumed exactly; what is broken is skipped."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from document_files import TEXTS, entries_of, lines_of, stream_of, taken, write, write_lines

from qlip.core.errors import UserError
from qlip.data import text_files as reader
from qlip.data.ledger import Ledger
from qlip.data.text_files import text_files

KINDS = ("a.jsonl", "a.jsonl.zst", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.tar")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_documents_from_any_number_on(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name, TEXTS)
    field = "scene.story" if name.endswith(".tar") else "text"
    for first in (0, 1, 5, 12, 22, 23):
        assert entries_of(file, text_field=field, first=first) == list(enumerate(TEXTS))[first:]


def test_members_of_shards_can_be_the_documents(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tar", TEXTS[:2])
    assert entries_of(file, text_field="txt") == [(0, "caption document 0"), (1, "caption document 1")]


def test_zstandard_files_of_several_frames_are_read_whole(tmp_path: Path) -> None:
    first, second = (write(tmp_path, f"{n}.jsonl.zst", TEXTS[5 * n : 5 * n + 5]).read_bytes() for n in (0, 1))
    (tmp_path / "both.jsonl.zst").write_bytes(first + second)
    assert sorted(taken(stream_of(tmp_path / "both.jsonl.zst"), 10)) == sorted(TEXTS[:10])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("sizes", [(23,), (3, 1, 9, 5, 2, 3)], ids=["one file", "many files"])
def test_every_document_comes_once_an_epoch_over_all_ranks(
    tmp_path: Path, sizes: tuple[int, ...], num_ranks: int
) -> None:
    starts = list(itertools.accumulate(sizes, initial=0))
    for number, size in enumerate(sizes):
        write(tmp_path, f"{number}.jsonl", TEXTS[starts[number] : starts[number] + size])
    found: Counter[tuple[int, str]] = Counter()
    for rank in range(num_ranks):
        stream = stream_of(tmp_path, rank=rank, num_ranks=num_ranks)
        for text in stream:
            if stream.position.epoch == 2:
                break
            found[stream.position.epoch, text] += 1
    assert found == Counter(itertools.product((0, 1), TEXTS))


def test_order_differs_between_epochs_and_seeds_and_windows_mix(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", TEXTS)
    stream = iter(stream_of(tmp_path))
    first, second = ([next(stream) for _ in TEXTS] for _ in range(2))
    assert first != second and first != TEXTS and sorted(first) == sorted(second) == sorted(TEXTS)
    assert taken(stream_of(tmp_path, seed=1), 23) != first == taken(stream_of(tmp_path), 23)
    assert sorted(first[:4]) == sorted(TEXTS[:4]), "a window holds neighbours"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_resumes_exactly_at_every_document(tmp_path: Path, name: str, num_ranks: int) -> None:
    content = [*TEXTS[:7], " ", *TEXTS[7:]]  # one that is skipped
    write(tmp_path, name, content)
    write(tmp_path, f"b{name}", [f"more {number}" for number in range(6)])
    options: dict[str, Any] = {"num_ranks": num_ranks, "ledger": Ledger(None, max_skip_share=1.0)}
    stream = stream_of(tmp_path, **options)
    whole, states = [], []
    for text in stream:
        whole.append(text)
        states.append(json.loads(json.dumps(stream.state_dict())))
        if len(whole) == 70:
            break
    for stop in range(1, 60, 3):
        other = stream_of(tmp_path, **(options | {"ledger": Ledger(None, max_skip_share=1.0)}))
        other.resume([states[stop - 1]] * num_ranks)
        assert taken(other, 8) == whole[stop : stop + 8]
        assert other.state_dict() == states[stop + 7], "counts too"


def test_other_ranks_begin_the_next_epoch_and_changes_are_refused(tmp_path: Path, capsys) -> None:
    write(tmp_path, "a.jsonl", TEXTS)
    stream = stream_of(tmp_path)
    taken(stream, 30)
    other = stream_of(tmp_path, num_ranks=2)
    other.resume([stream.state_dict()])
    assert "saved by 1 ranks, here are 2" in " ".join(capsys.readouterr().out.split())
    taken(other, 1)
    assert other.position.epoch == 2
    with pytest.raises(UserError, match="seed 0 -> 1"):
        stream_of(tmp_path, seed=1).resume([stream.state_dict()])
    write(tmp_path, "b.jsonl", TEXTS)
    with pytest.raises(UserError, match=r"text 1 files.* -> 2 files.*; put it back"):
        stream_of(tmp_path).resume([stream.state_dict()])


BROKEN = {
    "broken json": b"{",
    "broken json: not an object": b"[1]",
    "missing text: no text in field text": b'{"other": "text"}',
    "missing text: no text in field text (number)": b'{"text": 3}',
    "empty document": b'{"text": " \\n\\u0000"}',
    "broken json (no UTF-8)": b'{"text": "\xff"}',
    "broken json (deep)": b"[" * 100_000,
}


@pytest.mark.parametrize("reason", BROKEN)
def test_unusable_documents_are_skipped_and_counted(tmp_path: Path, reason: str) -> None:
    good = lines_of(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(good[:100] + good[100:].replace(b"\n", b"\n" + BROKEN[reason] + b"\n\n", 1))
    ledger = tmp_path / "skipped"
    assert set(taken(stream_of(tmp_path, ledger=Ledger(ledger, max_skip_share=0.05)), 46)) == set(TEXTS)
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [entry["reason"] for entry in entries] == [reason.partition(" (")[0]] * 2
    assert entries[0]["key"].startswith("line ") and entries[0]["shard"].endswith("a.jsonl")
    assert [entry["epoch"] for entry in entries] == [0, 1]


def test_giant_lines_are_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_DOCUMENT_BYTES", 50)
    giant = ["x" * length for length in (36, 38, 39, 40, 88, 89, 100, 1000)]  # with their field up to 50 bytes are read
    skipped = [(number, "<document too large: over 50 bytes>") for number in range(1, 8)]
    found = entries_of(write_lines(tmp_path, lines_of([*giant, "next"])))
    assert found == [(0, giant[0]), *skipped, (8, "next")]


def test_nul_and_half_surrogates_are_cut_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\u0000b \\ud800 \\ud83d\\ude00"}\n')
    assert taken(stream_of(tmp_path), 1) == ["a b  \U0001f600"]


def test_undecodable_and_null_rows_of_parquet_are_skipped(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"good", b"\xff", None, b""], pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet")
    reasons = ["<undecodable text: not UTF-8>", "<missing text: null>", "<empty document>"]
    assert entries_of(tmp_path / "a.parquet") == list(enumerate(["good", *reasons]))


def test_giant_rows_of_parquet_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_DOCUMENT_BYTES", 50)
    file = write(tmp_path, "a.parquet", ["x" * 50, "x" * 51, "next"])
    assert entries_of(file) == [(0, "x" * 50), (1, "<document too large: over 50 bytes>"), (2, "next")]


def test_too_many_unusable_documents_stop_the_run(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", ["", "", *TEXTS])
    with pytest.raises(UserError, match=r"2 of 25 samples skipped.*empty document \(2\)"):
        taken(stream_of(tmp_path), 50)


def test_ranks_whose_files_are_empty_go_on_with_the_next_epoch(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path, f"{number}.jsonl", [f"{number} {document}" for document in range(40)] if number else [])
    for rank in range(4):
        stream = stream_of(tmp_path, rank=rank, num_ranks=4)
        assert len({text[0] for text in taken(stream, 400)}) > 1, "files change their ranks"
        assert stream.position.epoch >= 9


def test_an_epoch_without_documents_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"no usable document in 1 files from .*a\.jsonl on; give files whose 'text'"):
        taken(stream_of(tmp_path), 1)
    write(tmp_path, "a.jsonl", TEXTS[:1])
    with pytest.raises(UserError, match="for rank 1 of 2"):
        taken(stream_of(tmp_path, rank=1, num_ranks=2), 1)


def test_a_column_that_is_not_there_or_holds_no_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", TEXTS)
    with pytest.raises(UserError, match=r"no column 'story'; set data.text_field to one of id, text"):
        stream_of(tmp_path, text_field="story")
    with pytest.raises(UserError, match="column 'id' holds int64"):
        stream_of(tmp_path, text_field="id")


def test_folders_globs_braces_and_joins_name_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    names = ["a0.jsonl", "a1.jsonl", "deep/b.jsonl.zst"]
    files = [write(tmp_path, name, TEXTS) for name in names]
    for name in (".hidden.jsonl", "_half.parquet", "readme.md", ".cache/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert text_files(str(tmp_path)) == files
    assert text_files(f"{tmp_path}/a*.jsonl") == text_files(f"{tmp_path}/a{{0..1}}.jsonl") == files[:2]
    assert text_files(f"{files[2]}::{files[0]}") == [files[2], files[0]]
    assert text_files(f"{files[2]}::{tmp_path}::{tmp_path}/deep/../a*::{files[2]}") == [files[2], *files[:2]], (
        "no doubles"
    )


def test_the_metadata_of_shards_is_no_text(tmp_path: Path) -> None:
    """img2dataset writes a parquet file beside every shard."""
    for name in ("00000.tar", "00000.parquet", "00001.parquet", "00000.jsonl", "deep/00001.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path, name, TEXTS)
    left = [file.relative_to(tmp_path).as_posix() for file in text_files(str(tmp_path))]
    assert left == ["00000.jsonl", "00000.tar", "00001.parquet", "deep/00001.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no texts given: set data.text"),
        ("s3://bucket/a.jsonl", "read from files only; copy them"),
        ("{tmp}/a.jsonl", r"a\.jsonl is not there"),
        ("{tmp}/*.jsonl", "no file matches"),
        ("{tmp}", "holds no texts; give one with files .jsonl"),
        ("{tmp}/a.md", r"a\.md is no file of texts that is read here; give .jsonl"),
    ],
)
def test_what_names_no_texts_is_refused(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(UserError, match=message):
        text_files(spec.replace("{tmp}", str(tmp_path)))


def test_windows_of_no_document_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", TEXTS)
    with pytest.raises(UserError, match="shuffle_window 0: give at least 1"):
        stream_of(tmp_path, shuffle_window=0)
