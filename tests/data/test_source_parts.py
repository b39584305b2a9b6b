"""Sources cut into parts: together the same items, each part for itself, under names that files can have."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flaky_files import clean_memory, upload
from shard_files import encoded, pair, picture, write_shards, write_tar

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.shard_source import ShardSource
from qlip.data.source_parts import Part, first_items, limited_parts, parts_of
from qlip.data.sources import open_source
from qlip.data.tar_reader import Skip

PNG = encoded(picture(4, 4))


def shards(root: Path) -> str:
    write_shards(root, num_shards=3, per_shard=2)
    (root / "classnames.txt").write_text("cat\ndog")
    return str(root)


def remote_shards(root: Path) -> str:
    write_shards(root, num_shards=2, per_shard=2)
    upload(root)
    return "memory://pool"


def put(root: Path, *names: str) -> str:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PNG)
    return str(root)


def class_folder(root: Path) -> str:
    return put(root, *(f"{name}/{number}.png" for name in ("a b", "ü") for number in range(4)))


def odd_names(root: Path) -> str:
    return put(root, "-rf.png", "a..b.png", "new\nline.png", "ü.png", "sub/x.png", " .jpg", "*.png")


def with_metadata(root: Path) -> str:
    put(root, *(f"{number}.png" for number in range(5)))
    lines = [{"file_name": f"{number}.png", "text": f"number {number}", "n": number} for number in (3, 1, 4, 0, 2)]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return str(root)


def coco(root: Path) -> str:
    put(root, *(f"images/{number}.jpg" for number in range(5)))
    table = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in (2, 0, 1, 4, 3)],
        "annotations": [{"image_id": number, "caption": f"number {number}"} for number in range(5)],
    }
    (root / "captions.json").write_text(json.dumps(table))
    return str(root / "captions.json")


def pictures(num: int) -> list[bytes | None]:
    """The second is missing."""
    return [None if number == 1 else encoded(picture(4, 4, seed=number)) for number in range(num)]


def parquet(root: Path) -> str:
    """Row groups of 2 in files of 7 and 3 rows, and a file without any."""
    root.mkdir()
    for number, rows in enumerate((7, 0, 3)):
        table = pa.table({"image": pa.array(pictures(rows), pa.binary()), "n": pa.array(range(rows), pa.int64())})
        pq.write_table(table, root / f"test-{number:05d}-of-00003.parquet", row_group_size=2)
    return str(root)


def parquet_with_keys(root: Path) -> str:
    """In folders, with a column of splits."""
    for folder in ("b", "a"):
        (root / folder).mkdir(parents=True)
        columns = {"jpg": pictures(6), "key": [f"{folder}{row}" for row in range(6)], "split": ["test", "val"] * 3}
        pq.write_table(pa.table(columns), root / folder / "0.parquet", row_group_size=3)
    return f"{root}/b/0.parquet::{root}/a/0.parquet"


def saved_dataset(root: Path) -> str:
    root.mkdir()
    (root / "dataset_info.json").write_text("{}")
    names = [f"data-{number:05d}-of-00002.arrow" for number in range(2)]
    for name, rows in zip(names, (7, 2), strict=True):
        table = pa.table({"image": pictures(rows), "n": list(range(rows))})
        with pa.ipc.new_stream(root / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    with (root / names[0]).open("rb+") as file:
        file.truncate(file.seek(0, 2) - 20)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return str(root)


KINDS: list[tuple[Callable[[Path], str], list[str]]] = [
    (shards, ["00000", "00001", "00002"]),
    (remote_shards, ["00000", "00001"]),
    (class_folder, ["00000", "00001", "00002"]),
    (odd_names, ["00000", "00001", "00002"]),
    (with_metadata, ["00000", "00001"]),
    (coco, ["00000", "00001"]),
    (
        parquet,
        [
            *(f"test-00000-of-00003-0000{part}" for part in range(3)),
            "test-00001-of-00003",
            "test-00002-of-00003",
        ],
    ),
    (parquet_with_keys, ["00000-b_0-00000", "00001-b_0-00001", "00002-a_0-00000", "00003-a_0-00001"]),
    (saved_dataset, [*(f"data-00000-of-00002-0000{part}" for part in range(3)), "data-00001-of-00002"]),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0].__name__)
def cut(request, tmp_path, monkeypatch) -> tuple[Source, list[Part], list[str]]:
    """A source, its parts of at most 3, and the stems they should have."""
    clean_memory(monkeypatch)
    write, stems = request.param
    root = tmp_path / "data"
    if write in (shards, remote_shards):
        root.mkdir()
    source = open_source(write(root))
    return source, parts_of(source, max_items=3), stems


def test_parts_hold_the_items_of_the_source(cut):
    source, parts, stems = cut
    whole = list(source.items())
    assert len(whole) > 3
    assert [stem for stem, _ in parts] == stems == sorted({stem.lower() for stem in stems})
    files = [Path(f"{stem}.parquet") for stem in stems]
    assert sorted(files) == files, "files sort as the parts do"
    travelled: list[Part] = pickle.loads(pickle.dumps(parts))
    assert list(chain.from_iterable(part.items() for _, part in travelled)) == whole
    for _, part in travelled:
        found = list(part.items())
        assert (part.name, part.class_names) == (source.name, source.class_names)
        assert part.num_items in (None, len(found)) and len(found) <= 3
        assert len(part.identity()) == 64
    assert len({part.identity() for _, part in parts} - {source.identity()}) == len(parts)


def test_the_first_items_whether_cut_or_not(cut):
    source, parts, _ = cut
    num_items = sum(isinstance(entry, Item) for entry in source.items())
    for num in range(1, num_items + 2):
        first = pickle.loads(pickle.dumps(first_items(source, num)))
        found = list(first.items())
        assert found == list(source.items())[: len(found)]
        assert sum(isinstance(entry, Item) for entry in found) == min(num, num_items)
        assert isinstance(found[-1], Item) or num > num_items, "what comes after the last one is left out"
        limited = limited_parts(parts, num)
        assert [stem for stem, _ in limited] == [stem for stem, _ in parts][: len(limited)]
        assert list(chain.from_iterable(part.items() for _, part in limited)) == found
        again = parts_of(first, max_items=3)
        assert [(stem, part.identity()) for stem, part in again] == [(stem, part.identity()) for stem, part in limited]
        assert first.num_items == (num if source.num_items is None else min(num, source.num_items))


def test_identity_of_the_first_items(tmp_path):
    source = open_source(put(tmp_path, "a.png", "b.png"))
    identities = {source.identity(), first_items(source, 1).identity(), first_items(source, 2).identity()}
    assert len(identities) == 3
    assert first_items(source, 1).identity() == first_items(open_source(str(tmp_path)), 1).identity()


@pytest.mark.parametrize(
    ("names", "stems"),
    [
        (["a.tar", "b.c.tar"], ["a", "b_c"]),
        (["b.tar", "a.tar"], ["00000-b", "00001-a"]),
        (["1.tar", "2.tar", "10.tar"], ["00000-1", "00001-2", "00002-10"]),
        (["x/0.tar", "y/0.tar"], ["00000-0", "00001-0"]),
        (["A.tar", "a.tar"], ["00000-A", "00001-a"]),
        (["a.tar", "a-b.tar"], ["00000-a", "00001-a-b"]),
        (["a b.tar", "a_b.tar"], ["00000-a_b", "00001-a_b"]),
        (["_a.tar"], ["00000-_a"]),
        (["-rf.tar", "ü'\n*.tar"], ["00000--rf", "00001-____"]),
        ([f"{'x' * 240}{number}.tar" for number in range(2)], [f"0000{number}-{'x' * 100}" for number in range(2)]),
    ],
    ids=["dots", "order", "digits", "folders", "case", "before the dot", "same", "hidden", "shell", "long"],
)
def test_stems_of_shards(tmp_path, names, stems):
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, pair(str(number)))
    source = open_source(str(tmp_path / names[0]))
    assert isinstance(source, ShardSource)
    source.shards = [tmp_path / name for name in names]  # as patterns and lists give them
    parts = parts_of(source, max_items=1)
    assert [stem for stem, _ in parts] == stems == sorted(stems)
    assert [[entry.key for entry in part.items()] for _, part in parts] == [[str(i)] for i in range(len(names))]


def test_many_parts_have_longer_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("qlip.data.source_parts.MIN_DIGITS", 1)
    source = open_source(put(tmp_path, *(f"{number}.png" for number in range(11))))
    stems = [stem for stem, _ in parts_of(source, max_items=1)]
    assert stems == [f"{number:02d}" for number in range(11)]


def test_parts_of_a_folder_do_not_carry_all_names(tmp_path):
    source = open_source(put(tmp_path, *(f"{number:03d}.png" for number in range(200))))
    parts = parts_of(source, max_items=10)
    assert len(parts) == 20 and all(len(pickle.dumps(part)) < len(pickle.dumps(source)) / 4 for part in parts)


def test_given_class_names_stay(tmp_path):
    put(tmp_path / "data", "n1/a.png", "n2/a.png")
    (tmp_path / "names.txt").write_text("tench\ngoldfish")
    source = open_source(str(tmp_path / "data"), labels=tmp_path / "names.txt")
    parts = parts_of(source, max_items=1)
    assert [part.class_names for _, part in parts] == [("tench", "goldfish")] * 2
    assert {entry.label for _, part in parts for entry in part.items() if isinstance(entry, Item)} == {0, 1}


def test_a_damaged_row_group_is_lost_in_its_part(tmp_path):
    table = pa.table({"image": [encoded(picture(4, 4, seed=number)) for number in range(6)]})
    path = tmp_path / "x.parquet"
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True, **plain)
    data = bytearray(path.read_bytes())
    data[data.index(table["image"][2].as_py()) + 30] ^= 1
    path.write_bytes(data)
    source = open_source(str(path))
    parts = [list(part.items()) for _, part in parts_of(source, max_items=2)]
    assert [[type(entry).__name__ for entry in part] for part in parts] == [["Item"] * 2, ["Skip"], ["Item"] * 2]
    assert list(chain.from_iterable(parts)) == list(source.items())


class ListSource:
    """A source of another kind."""

    name: str = "list"
    class_names: tuple[str, ...] = ()
    num_items: int | None = 2

    def identity(self) -> str:
        return "list"

    def items(self) -> Iterator[Item | Skip]:
        yield Item(key="a", image=PNG)
        yield Skip(key="b", reason="bad", shard="")


def test_other_sources_stay_whole():
    source = ListSource()
    assert parts_of(source, max_items=1) == [("00000", source)]


def test_question_files_are_refused(tmp_path):
    put(tmp_path, "x.png")
    question = {"question_id": 1, "image": "x.png", "text": "What?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    with pytest.raises(UserError, match=r"questions\.jsonl are questions.*give the folder of pictures"):
        parts_of(open_source(str(tmp_path / "questions.jsonl")), max_items=1)
