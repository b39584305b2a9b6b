"""What `datasets` saves to disk, read without it: the same rows, damage lost alone, nothing executed."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from shard_files import encoded, picture

from qlip.core.errors import UserError
from qlip.data.items import Item, Source
from qlip.data.source_parts import parts_of
from qlip.data.sources import open_source, require_classes
from qlip.data.tar_reader import Skip

PICTURES = [encoded(picture(4, 4, seed=seed)) for seed in range(6)]
NAME = "data-00000-of-00001"


def struct(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def stream(path: Path, columns: dict[str, Any] | pa.Table, *, rows_per_batch: int = 2) -> bytes:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return path.read_bytes()


def save(folder: Path, *files: dict[str, Any] | pa.Table, **state: Any) -> Path:
    """A folder as `save_to_disk` lays it out."""
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for name, columns in zip(names, files, strict=True):
        stream(folder / name, columns)
    folder.mkdir(exist_ok=True)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]} | state))
    return folder


def split_items(source: Source) -> tuple[list[Item], list[Skip]]:
    found = list(source.items())
    return [x for x in found if isinstance(x, Item)], [x for x in found if isinstance(x, Skip)]


def refused(spec: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        list(open_source(str(spec), **options).items())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_equal_those_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "caption": datasets.List(datasets.Value("string")),
            "width": datasets.Value("int32"),
        }
    )
    captions = [[f"{number}", "again"] for number in range(6)]
    columns = {
        "image": [struct(data, "x.png") for data in PICTURES],
        "label": [0, 1] * 3,
        "caption": captions,
        "width": [4] * 6,
    }
    whole = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict({"train": whole.select([4, 1, 3]), "validation": whole})
    both.save_to_disk(str(tmp_path / "pets"), num_shards={"train": 1, "validation": 3})
    source = open_source(str(tmp_path / "pets"), split="val")
    items, skips = split_items(source)
    assert not skips and source.num_items == 6 and source.name == "pets val"
    assert [item.image for item in items] == PICTURES and [item.label for item in items] == [0, 1] * 3
    assert [list(item.captions) for item in items] == captions and items[0].record == {"width": 4}
    assert items[3].key == "data-00001-of-00003/00000001"
    require_classes(source, 2)
    assert source.class_names == ("cat", "dog")
    assert "give --split train or validation" in refused(tmp_path / "pets")
    chosen = open_source(str(tmp_path / "pets" / "train"))  # a split alone; --split has nothing to choose
    assert [item.image for item in split_items(chosen)[0]] == [PICTURES[row] for row in (4, 1, 3)]
    assert chosen.name == "pets/train" and chosen.identity() != source.identity()


def test_columns_of_keys_and_splits(tmp_path):
    columns = {"jpg": PICTURES, "key": list("abcdef"), "split": ["train", "test"] * 3}
    source = open_source(str(save(tmp_path / "x", columns)))
    assert [item.key for item in split_items(source)[0]] == ["b", "d", "f"] and source.num_items == 3
    assert "give --split test or train" in refused(tmp_path / "x", split="val")
    save(tmp_path / "x", columns, {**columns, "key": list("ghijkd")})
    assert "key d comes twice" in refused(tmp_path / "x")


def test_rows_without_pictures_are_skipped(tmp_path):
    images = [struct(PICTURES[0]), struct(None, "/etc/passwd"), None]
    items, skips = split_items(open_source(str(save(tmp_path / "x", {"image": images}))))
    assert [item.key for item in items] == [f"{NAME}/00000000"]
    assert [skip.reason for skip in skips] == ["missing image: only its path is in the file", "missing image"]


def test_cut_files_keep_their_good_batches(tmp_path):
    folder = save(tmp_path / "x", {"image": PICTURES, "label": list(range(6))})
    file = folder / f"{NAME}.arrow"
    data = file.read_bytes()
    kept = set()
    for end in range(len(data) - 1, 0, -61):
        file.write_bytes(data[:end])
        try:
            source = open_source(str(folder))
        except UserError as error:
            assert "is no Arrow stream" in str(error) and end < 1000
            continue
        items, skips = split_items(source)
        assert [item.image for item in items] == PICTURES[: len(items)] and source.num_items == len(items) + 1
        assert [(skip.reason.split(":")[0], skip.count) for skip in skips] == [("damaged arrow", 1)]
        kept.add(len(items))
    assert kept == {0, 2, 4, 6}


def test_a_file_cut_between_two_batches_is_noticed(tmp_path):
    folder = save(tmp_path / "x", {"image": PICTURES})
    shorter = stream(tmp_path / "shorter.arrow", {"image": PICTURES[:4]})
    (folder / f"{NAME}.arrow").write_bytes(shorter[:-8])  # pyarrow reads it to its end and says nothing
    items, skips = split_items(open_source(str(folder)))
    assert len(items) == 4 and [skip.reason for skip in skips] == ["damaged arrow: cut short, its end mark is missing"]


def test_a_batch_that_contradicts_itself_is_lost_alone(tmp_path):
    texts = pa.array(["one", "two", "three", "four", "five", "six"])
    folder = save(tmp_path / "x", {"image": PICTURES, "text": texts})
    file = folder / f"{NAME}.arrow"
    offsets = pa.array([0, 5, 9], pa.int32()).buffers()[1].to_pybytes()[:12]
    data = file.read_bytes()
    assert data.count(offsets) == 1
    file.write_bytes(data.replace(offsets, b"\xff\xff\xff\x7f" * 3))  # 2 GB behind the buffer
    source = open_source(str(folder))
    items, skips = split_items(source)
    assert [item.image for item in items] == PICTURES[:2] + PICTURES[4:]
    assert [item.key[-1] for item in items] == ["0", "1", "4", "5"]
    assert [(skip.reason.split(",")[0], skip.count) for skip in skips] == [("damaged arrow: record batch 1", 2)]
    parts = parts_of(source, max_items=2)
    assert [entry for _, part in parts for entry in part.items()] == list(source.items())
    file.write_bytes(data.replace(b"five", b"fi\xffe"))
    assert [skip.count for skip in split_items(open_source(str(folder)))[1]] == [2], "text that is not UTF-8"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"_data_files": []}, "without rows"),
        ({"_data_files": [{"filename": "../x.arrow"}]}, "leads out of the folder"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, "leads out of the folder"),
        (
            {"_data_files": [{"filename": "gone.arrow"}, {"filename": f"{NAME}.arrow"}]},
            r"'gone.arrow'.*\(1 of 2 missing\)",
        ),
        ({"_data_files": [{"filename": "x" * 5000}]}, "which is not there"),
        ({"_data_files": [{"filename": f"{NAME}.arrow"}] * 2}, "given twice"),
        ({"_data_files": [{"filename": 5}]}, "no list _data_files"),
        ({"_data_files": [5]}, "no list _data_files"),
        ({"_data_files": 5}, "no list _data_files"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "save it again with a newer `datasets`"),
    ],
    ids=["empty", "above", "absolute", "gone", "long", "twice", "number", "numbers", "no list", "indices"],
)
def test_hostile_states(tmp_path, state, said):
    assert re.search(said, refused(save(tmp_path / "x", {"image": PICTURES}, **state)))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("state.json", "[]", "is no json object; copy it again"),
        ("state.json", "{", "is no json object"),
        ("dataset_dict.json", '{"splits": 3}', "has no list of splits"),
        ("dataset_dict.json", '{"splits": ["test"]}', "test/state.json cannot be read"),
        ("dataset_dict.json", '{"splits": ["train"]}', "has no split 'test': give --split train"),
        (f"{NAME}.arrow", "ARROW1", "is no Arrow stream"),
        (f"{NAME}.arrow", "", "is no Arrow stream"),
    ],
    ids=["a list", "no json", "splits", "no folder", "other split", "another format", "empty"],
)
def test_broken_files(tmp_path, name, text, said):
    folder = save(tmp_path / "x", {"image": PICTURES})
    (folder / name).write_text(text)
    assert said in refused(folder)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table([PICTURES, PICTURES], names=["image", "image"]), "two columns 'image'"),
        (pa.table({"url": ["x"]}), "no column of pictures (columns: url)"),
    ],
    ids=["twice", "urls"],
)
def test_other_tables(tmp_path, table, said):
    assert said in refused(save(tmp_path / "x", table))


def test_a_column_name_that_is_not_utf8(tmp_path):
    folder = save(tmp_path / "x", {"image": PICTURES, "zzzz": [0] * 6})
    file = folder / f"{NAME}.arrow"
    file.write_bytes(file.read_bytes().replace(b"zzzz", b"\xffzzz"))
    assert "whose name is not UTF-8" in refused(folder)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_types_that_would_be_unpickled_are_not(tmp_path):
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": b""}
    about["ARROW:extension:metadata"] = pickle.dumps(Payload(tmp_path / "marker"))
    schema = pa.schema([pa.field("image", pa.binary()), pa.field("odd", pa.int64(), metadata=about)])
    table = pa.table({"image": PICTURES, "odd": [0] * 6}).cast(schema)
    found = list(open_source(str(save(tmp_path / "x", table))).items())
    assert len(found) == 6 and not (tmp_path / "marker").exists()
