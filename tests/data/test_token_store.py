"""Token files against packing by hand; what is damaged, cut, mixed or foreign is refused by name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from qlip.core.errors import UserError
from qlip.data.token_dataset import TokenDataset
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits, unpack_bits
from qlip.data.token_loader import TokenDataConfig, token_loader
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter

INFO = TokenStoreInfo(encoder_fingerprint="a" * 64, num_bits=28, grid=(2, 3), source={"name": "pictures"})
CAPTIONS = [(), ("a star",), ("a star", "ein Stern \N{WHITE STAR}")]


def random_bits(num: int, info: TokenStoreInfo = INFO, *, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, info.num_tokens, info.num_bits, generator=torch.Generator().manual_seed(seed)) < 0.5


def rows_of(bits: torch.Tensor, *, first: int = 0) -> TokenRows:
    places = range(first, first + len(bits))
    return TokenRows(
        keys=[f"key/{place:04d}" for place in places],
        packed=pack_bits(bits),
        captions=[CAPTIONS[place % 3] for place in places],
        sizes=[None if place % 5 == 4 else (place + 1, 2 * place + 1) for place in places],
    )


def write(file: Path, bits: torch.Tensor, info: TokenStoreInfo = INFO, *, first: int = 0, group: int = 8) -> Path:
    with TokenWriter(file, info, row_group_rows=group) as writer:
        for place in range(0, len(bits), 5):
            writer.write(rows_of(bits[place : place + 5], first=first + place))
    return file


def refused(*words: str):
    return pytest.raises(UserError, match=".*".join(map(re.escape, words)))


@pytest.mark.parametrize("num_bits", [1, 7, 14, 28])
@pytest.mark.parametrize("num_tokens", [1, 6, 9])
def test_packing_is_bit_after_bit_with_the_most_significant_first(num_bits: int, num_tokens: int) -> None:
    bits = torch.rand(3, num_tokens, num_bits) < 0.5
    packed = pack_bits(bits)
    for row, expected in zip(packed, bits.flatten(1).int().tolist(), strict=True):
        text = "".join(map(str, expected)).ljust(8 * len(row), "0")
        assert bytes(row) == int(text, 2).to_bytes(len(row), "big")
    assert torch.equal(unpack_bits(packed, num_tokens=num_tokens, num_bits=num_bits), bits)


@pytest.mark.parametrize("grid,num_bits", [((16, 16), 28), ((6, 6), 14), ((3, 5), 7)], ids=["896 bytes", "63", "odd"])
def test_rows_come_back(tmp_path: Path, grid: tuple[int, int], num_bits: int) -> None:
    info = replace(INFO, grid=grid, num_bits=num_bits)
    bits = random_bits(37, info)
    write(tmp_path / "00000.parquet", bits[:20], info)
    write(tmp_path / "00001.parquet", bits[20:], info, first=20)
    store = TokenStore(tmp_path)
    assert len(store) == store.verify() == 37
    assert [rows for _, _, rows in store.row_groups] == [8, 8, 4, 8, 8, 1]
    assert store.info == info
    for place in [*range(37), -1, -37]:
        row, wanted = store[place], place % 37
        assert row.key == f"key/{wanted:04d}" and torch.equal(row.bits, bits[place])
        assert row.captions == CAPTIONS[wanted % 3]
        assert row.size == (None if wanted % 5 == 4 else (wanted + 1, 2 * wanted + 1))
    assert store.num_without_captions() == 13
    with pytest.raises(IndexError):
        store[37]


def test_layout_is_the_one_that_is_written_down(tmp_path: Path) -> None:
    file = pq.ParquetFile(write(tmp_path / "a.parquet", random_bits(9)))
    schema = file.schema_arrow
    assert schema.field("bits").type == pa.binary(21) and not schema.field("bits").nullable
    assert schema.field("key").type == pa.string() and not schema.field("key").nullable
    assert schema.field("caption").type == pa.string()
    assert [schema.field(name).type for name in ("width", "height")] == [pa.int32()] * 2
    said = json.loads(schema.metadata[b"qlip.tokens"])
    assert said["encoder_fingerprint"] == "a" * 64 and said["grid"] == [2, 3] and said["format_version"] == 1
    columns = {column["path_in_schema"]: column for column in file.metadata.row_group(0).to_dict()["columns"]}
    assert columns["bits"]["compression"] == "UNCOMPRESSED" and columns["caption"]["compression"] == "ZSTD"
    assert not columns["bits"]["has_dictionary_page"] and not columns["key"]["has_dictionary_page"]
    plain = file.read().to_pylist()  # any reader of Parquet gets bytes
    assert plain[2]["caption"] == "a star" and plain[2]["captions"] == list(CAPTIONS[2])
    assert plain[1]["caption"] == "a star" and plain[1]["captions"] is None and plain[0]["caption"] is None
    assert plain[0]["bits"] == bytes(pack_bits(random_bits(9))[0])


def test_other_columns_are_ignored_and_ours_may_lack(tmp_path: Path) -> None:
    table = pq.read_table(write(tmp_path / "a.parquet", random_bits(9)))
    other = table.drop_columns(["captions", "width"]).append_column("score", pa.array([0.5] * 9))
    pq.write_table(other, tmp_path / "a.parquet")
    row = TokenStore(tmp_path / "a.parquet")[2]
    assert row.captions == ("a star",) and row.size is None


def test_what_a_kill_leaves_is_no_file(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "00000.parquet", INFO, row_group_rows=2)
    writer.write(rows_of(random_bits(3)))  # and nothing after it
    assert [file.name for file in tmp_path.iterdir()] == ["00000.tmp"]
    with refused("no token files"):
        TokenStore(tmp_path)


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), TokenWriter(tmp_path / "a.parquet", INFO) as writer:
        writer.write(rows_of(random_bits(3)))
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir())
    with refused("cannot write", "free disk space"):
        TokenWriter(tmp_path / "none" / "a.parquet", INFO)
    with refused("rows of", "pack_bits"), TokenWriter(tmp_path / "a.parquet", INFO) as writer:
        writer.write(rows_of(torch.zeros(2, 5, 28, dtype=torch.bool)))


def test_a_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    bits = random_bits(40)
    file = write(tmp_path / "00003.parquet", bits)
    content = bytearray(file.read_bytes())
    content[content.index(bytes(pack_bits(bits)[17]))] ^= 1
    file.write_bytes(content)
    store = TokenStore(tmp_path)
    with refused("00003.parquet row group 2 is damaged", "remove it"):
        store.verify()
    with refused("00003.parquet"):
        store[17]
    assert torch.equal(store[5].bits, bits[5])  # other row groups are whole


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99], ids=["empty", "half", "without footer"])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    file = write(tmp_path / "00000.parquet", random_bits(40))
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with refused("00000.parquet is no whole parquet file", "remove it"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"encoder_fingerprint": "b" * 64}, {"num_bits": 14}, {"grid": (3, 2)}],
    ids=["encoder", "bits", "grid"],
)
def test_mixed_files_are_refused(tmp_path: Path, change: dict) -> None:
    other = replace(INFO, **change)
    write(tmp_path / "0.parquet", random_bits(3))
    write(tmp_path / "1.parquet", random_bits(3, other), other)
    (name, value), *_ = change.items()
    with refused("1.parquet has", name, str(value), "0.parquet has", "folder of its own"):
        TokenStore(tmp_path)


@pytest.mark.parametrize("width", [0, 4], ids=["without embeddings", "with embeddings"])
def test_embeddings_of_two_models_are_refused(tmp_path: Path, width: int) -> None:
    for name in ("old", "new"):
        info = replace(INFO, embedding_width=width, decoder={"fingerprint": name})
        rows = replace(rows_of(random_bits(1)), embeddings=np.eye(1, width, dtype=np.float16) if width else None)
        with TokenWriter(tmp_path / f"{name}.parquet", info) as writer:
            writer.write(rows)
    if not width:  # any decoder of the encoder will do
        assert len(TokenStore(tmp_path)) == 2
        return
    with refused("old.parquet has embeddings of model old, new.parquet of new", "folder of its own"):
        TokenStore(tmp_path)


def test_a_store_without_views_is_refused(tmp_path: Path) -> None:
    info = replace(INFO, views=())
    write(tmp_path / "0.parquet", random_bits(3, info), info)
    with refused("0.parquet", "no views", "remove it"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    "said,missing",
    [({}, 0), ({"parts": 5}, 3), ({"parts": 2}, 0), ({"parts": 1}, 0), ({"parts": "5"}, 0), ({"parts": True}, 0)],
    ids=lambda value: str(value),
)
def test_missing_parts_are_counted(
    tmp_path: Path, said: dict, missing: int, capsys: pytest.CaptureFixture[str]
) -> None:
    info = replace(INFO, source={"name": "pictures", **said})
    for number in range(2):
        write(tmp_path / f"{number}.parquet", random_bits(3), info, first=3 * number)
    store = TokenStore(tmp_path)
    assert store.num_missing_parts == missing and TokenStore(tmp_path / "0.parquet").num_missing_parts == 0
    store.warn_of_missing_parts()
    assert ("has 2 of 5 parts" in capsys.readouterr().out) == bool(missing)


@pytest.mark.parametrize("rank", [0, 1])
def test_training_on_a_store_that_is_not_finished_warns_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    write(tmp_path / "0.parquet", random_bits(9), replace(INFO, source={"parts": 3}))
    config = TokenDataConfig(tokens=str(tmp_path), batch_size=2)
    loader = token_loader(
        config, tokenize=lambda texts: {}, encoder_fingerprint="a" * 64, seed=0, rank=rank, num_ranks=2
    )
    assert len(next(iter(loader))["key"]) == 2
    assert capsys.readouterr().out.count("1 of 3 parts") == (rank == 0)


def test_another_encoder_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", random_bits(3))
    store = TokenStore(tmp_path)
    store.require("a" * 64)
    with refused("a" * 64, "b" * 64, "qlip tokenize"):
        store.require("b" * 64)


def test_the_same_key_twice_is_found(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", random_bits(3))
    write(tmp_path / "1.parquet", random_bits(3), first=2)
    with refused("1.parquet row group 0", "key/0002 came before"):
        TokenStore(tmp_path).verify()


def test_bits_behind_the_last_token_are_found(tmp_path: Path) -> None:
    info = replace(INFO, num_bits=7, grid=(1, 1))
    rows = rows_of(random_bits(2, info))
    with TokenWriter(tmp_path / "0.parquet", info) as writer:
        writer.write(replace(rows, packed=rows.packed | np.uint8(1)))
    with refused("behind the last token"):
        TokenStore(tmp_path).verify()


@pytest.mark.parametrize(
    "said,words",
    [
        (None, "no token file"),
        ("{", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"format_version": 2}', "format version 2, this qlip reads 1; update qlip"),
        ('{"format_version": 1}', "config field"),
        ('{"format_version": 1, "encoder_fingerprint": "a", "num_bits": 0, "grid": [2, 3]}', "no tokens of 0 bits"),
        ('{"format_version": 1, "encoder_fingerprint": "a", "num_bits": 5, "grid": [2, 3]}', "column bits is"),
        ('{"format_version": 1, "encoder_fingerprint": "a", "num_bits": 28, "grid": [2, 3], "new": 1}', "new"),
    ],
)
def test_what_is_no_token_file_is_refused(tmp_path: Path, said: str | None, words: str) -> None:
    table = pq.read_table(write(tmp_path / "0.parquet", random_bits(3)))
    pq.write_table(table.replace_schema_metadata({"qlip.tokens": said} if said else None), tmp_path / "0.parquet")
    with refused("0.parquet", words) as caught:
        TokenStore(tmp_path)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def test_nothing_there_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with refused("qlip tokenize"):
            TokenStore(place)


def test_a_data_loader_reads_every_row_once(tmp_path: Path) -> None:
    bits = random_bits(40)
    write(tmp_path / "0.parquet", bits[:25])
    write(tmp_path / "1.parquet", bits[25:], first=25)
    seen: dict[str, torch.Tensor] = {}
    for rank in (0, 1):
        dataset = TokenDataset(tmp_path, rank=rank, num_ranks=2)
        for batch in DataLoader(dataset, batch_size=4, num_workers=2):
            assert batch["bits"].dtype == torch.bool and batch["label"].tolist() == [-1] * len(batch["key"])
            for key, row, caption in zip(batch["key"], batch["bits"], batch["caption"], strict=True):
                assert key not in seen and caption == next(iter(CAPTIONS[int(key[-4:]) % 3]), "")
                seen[key] = row
    assert sorted(seen) == [f"key/{place:04d}" for place in range(40)]
    assert torch.equal(torch.stack([seen[key] for key in sorted(seen)]), bits)
