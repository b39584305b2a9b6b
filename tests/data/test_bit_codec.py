"""Codes of bits against counting by hand and -sum log2 p; compressed files give the rows that raw ones give."""

import builtins
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from qlip.core.errors import UserError
from qlip.data.bit_codec import NUM_CONTEXTS, BitModel
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter

INFO = TokenStoreInfo(encoder_fingerprint="a" * 64, num_bits=12, grid=(3, 4))


def correlated_bits(num: int, grid: tuple[int, int] = INFO.grid, num_bits: int = INFO.num_bits, *, seed: int = 0):
    """Rows whose bits mostly repeat those of the left token, every third bit those of the bit before it."""
    random = np.random.default_rng(seed)
    bits = random.random((num, *grid, num_bits)) < random.random(num_bits)
    for column in range(1, grid[1]):
        bits[:, :, column] ^= (bits[:, :, column] ^ bits[:, :, column - 1]) & (random.random(bits[:, :, 0].shape) < 0.8)
    for bit in range(2, num_bits, 3):
        bits[..., bit] ^= (bits[..., bit] ^ bits[..., bit - 1]) & (random.random(bits[..., 0].shape) < 0.95)
    return torch.from_numpy(bits.reshape(num, grid[0] * grid[1], num_bits))


def context_by_hand(bits: list, place: int, bit: int, width: int, partners: list[int]) -> int:
    left = bits[place - 1][bit] if place % width else 2
    upper = bits[place - width][bit] if place >= width else 2
    first, second = ([int(bits[place][partner]) for partner in partners] + [0, 0])[:2]
    return ((3 * left + upper) * 2 + first) * 2 + second


def test_fitting_is_counting() -> None:
    bits, width = correlated_bits(600), INFO.grid[1]
    model = BitModel.fit(bits, grid=INFO.grid)
    partners = model.to_json()["partners"]
    assert partners[2] == [1] and partners[5] == [4] and partners[0] == [] and partners[1] == []
    seen: Counter[tuple[int, int, bool]] = Counter()
    for row in bits.tolist():
        for place, token in enumerate(row):
            for bit, value in enumerate(token):
                seen[bit, context_by_hand(row, place, bit, width, partners[bit]), value] += 1
    for bit in range(INFO.num_bits):
        for context in range(0, NUM_CONTEXTS, 4 >> len(partners[bit])):  # those of no partner are copies
            zeros, ones = seen[bit, context, False], seen[bit, context, True]
            assert model.ones[bit, context] == round(65536 * (ones + 0.5) / (zeros + ones + 1)), (bit, context)


def test_lengths_are_cross_entropies_and_codes_take_a_few_bytes_more() -> None:
    both, width = correlated_bits(800), INFO.grid[1]
    fitted, bits = both[:600], both[600:]
    model = BitModel.fit(fitted, grid=INFO.grid)
    partners = model.to_json()["partners"]
    lengths = model.code_lengths(bits, grid=INFO.grid)
    for row, length in zip(bits[:20].tolist(), lengths, strict=False):
        expected = 0.0
        for place, token in enumerate(row):
            for bit, value in enumerate(token):
                chance = model.ones[bit, context_by_hand(row, place, bit, width, partners[bit])] / 65536
                expected -= math.log2(chance if value else 1 - chance)
        assert length == pytest.approx(expected)
    sizes = np.array([len(code) for code in model.encode(bits, grid=INFO.grid)])
    assert np.all(8 * sizes > lengths - 8) and np.all(sizes < lengths / 8 + 8)
    assert np.mean(sizes - lengths / 8) < 4
    entropies = BitModel.fit(fitted, grid=INFO.grid, max_partners=0).code_lengths(bits, grid=INFO.grid)
    assert lengths.sum() < 0.97 * entropies.sum() < 0.9 * bits.numel()  # what partners, and what neighbours save


@pytest.mark.parametrize("num_bits", [1, 7, 28])
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (6, 6), (3, 5)], ids=lambda grid: f"{grid[0]} x {grid[1]}")
@pytest.mark.parametrize("num", [0, 1, 40])
def test_round_trip(num: int, grid: tuple[int, int], num_bits: int) -> None:
    bits = correlated_bits(num, grid, num_bits)
    model = BitModel.from_json(json.loads(json.dumps(BitModel.fit(bits, grid=grid).to_json())))
    coded = model.encode(bits, grid=grid)
    assert len(coded) == num and torch.equal(model.decode(coded, grid=grid), bits)
    for row in range(0, num, 17):  # alone
        assert torch.equal(model.decode(coded[row : row + 1], grid=grid), bits[row : row + 1])
        assert model.encode(bits[row : row + 1], grid=grid) == coded[row : row + 1]


def test_other_bits_than_those_it_was_fitted_to_come_back_too() -> None:
    model = BitModel.fit(torch.zeros(3000, 12, 12, dtype=torch.bool), grid=INFO.grid)  # ones are next to impossible
    bits = torch.cat([correlated_bits(20), torch.ones(1, 12, 12, dtype=torch.bool)])
    coded = model.encode(bits, grid=INFO.grid)
    assert torch.equal(model.decode(coded, grid=INFO.grid), bits)
    assert len(coded[-1]) <= 2 * 144 + 8


def test_random_bits_keep_their_size_and_constant_ones_lose_it() -> None:
    grid = (16, 16)
    bits = torch.rand(300, 256, 28, generator=torch.Generator().manual_seed(0)) < 0.5
    model = BitModel.fit(bits, grid=grid)
    assert not any(model.to_json()["partners"])  # none pays
    sizes = [len(code) for code in model.encode(bits[:50], grid=grid)]
    assert max(sizes) <= 896 + 8 and sum(sizes) / 50 < 896 + 5
    bits = (torch.arange(28) % 3 == 0).expand(300, 256, 28)
    model = BitModel.fit(bits, grid=grid)
    coded = model.encode(bits[:50], grid=grid)
    assert max(map(len, coded)) <= 4 and torch.equal(model.decode(coded, grid=grid), bits[:50])


def test_the_code_is_the_one_that_files_have() -> None:
    """Written down, so that another constriction or processor that codes otherwise is found."""
    bits = torch.from_numpy(np.unpackbits(np.frombuffer(b"These bits have always been coded like so.", "u1")))
    bits = bits.bool()[:324].reshape(3, 9, 12)
    tables = [(np.arange(9 << (bit % 3)) * 65000 // (9 << (bit % 3)) + 40 * bit + 1).astype(">u2") for bit in range(12)]
    partners = [[], [0], [1, 0], [], [2], [4, 1], [], [6], [7, 3], [], [9], [10, 5]]
    ones = [table.tobytes().hex() for table in tables]
    model = BitModel.from_json({"name": "left, upper, two partners; 1", "partners": partners, "ones": ones})
    coded = model.encode(bits, grid=(3, 3))
    assert [code.hex() for code in coded] == CODES
    assert torch.equal(model.decode(coded, grid=(3, 3)), bits)


CODES = [
    "0437155878bb932dd4be03d86bf09591c5472f7d725648f8",
    "0115d737cbe55ca68fa1332cdcb1cf7625c32a2c4110ac5f",
    "000bea7b49b4a284696b97fc200f158e36046a93b13faeb4",
]


@pytest.mark.parametrize("change", ["cut by 4", "cut by half", "nothing", "zeros", "a word", "bytes", "null", "long"])
def test_codes_that_cannot_be_are_refused(change: str) -> None:
    bits = correlated_bits(50, (6, 6), 28)
    model = BitModel.fit(bits, grid=(6, 6))
    refused = 0
    for code in model.encode(bits, grid=(6, 6)):
        longer = {"zeros": bytes(4), "a word": b"abcd", "bytes": b"\0", "long": code * 1000}
        shorter = {"cut by 4": len(code) - 4, "cut by half": len(code) // 2, "nothing": 0}
        wrong: Any = code + longer[change] if change in longer else None
        wrong = code[: shorter[change]] if change in shorter else wrong
        try:
            model.decode([wrong], grid=(6, 6))
        except ValueError as error:
            assert "\n" not in str(error) and "picture" in str(error)
            refused += 1
    assert refused >= (46 if change == "cut by 4" else 50)  # the last bytes hold hardly any bit


def test_any_bytes_are_some_bits_or_an_error() -> None:
    model = BitModel.fit(correlated_bits(50), grid=INFO.grid)
    random = np.random.default_rng(0)
    for code in [*(random.bytes(size) for size in range(60)), b"\xff" * 40, bytes(40)]:
        try:
            bits = model.decode([code], grid=INFO.grid)
        except ValueError:
            continue
        assert model.encode(bits, grid=INFO.grid) == [code]
    for grid in [(1 << 40, 1 << 40), (1, 20_000)]:  # numbers, calls
        with pytest.raises(ValueError, match="too many"):
            model.decode([b""], grid=grid)
    with pytest.raises(UserError, match=r"too large.*leave --compress out"):
        BitModel.fit(torch.zeros(1, 1, 2000, dtype=torch.bool), grid=(1, 1))


GOOD = BitModel.fit(correlated_bits(600), grid=INFO.grid).to_json()


@pytest.mark.parametrize(
    "change,words",
    [
        ({"name": "another"}, "coded as 'another'"),
        ({"ones": GOOD["ones"][:-1]}, "no lists of one length"),
        ({"partners": [], "ones": []}, "empty"),
        ({"partners": [[]] * 5000, "ones": ["8000" * 9] * 5000}, "up to 1024"),
        ({"partners": [*GOOD["partners"][:-1], [0, 1, 2]]}, "bit 11.*no list of up to 2"),
        ({"partners": [*GOOD["partners"][:-1], [1.0]]}, "bit 11.*no list of up to 2"),
        ({"partners": [*GOOD["partners"][:-1], [11]]}, "bit 11.*not earlier"),
        ({"partners": [*GOOD["partners"][:-1], [-1]]}, "bit 11.*not earlier"),
        ({"ones": ["8000" * 8, *GOOD["ones"][1:]]}, "bit 0.*no table of 9"),
        ({"ones": ["80 0" * 9, *GOOD["ones"][1:]]}, "bit 0.*no table of 9"),
        ({"ones": ["NaN!" * 9, *GOOD["ones"][1:]]}, "bit 0.*no table of 9"),
        ({"ones": [[0.5] * 9, *GOOD["ones"][1:]]}, "bit 0.*no table of 9"),
        ({"ones": ["0000" + "8000" * 8, *GOOD["ones"][1:]]}, "probability of 0"),
    ],
)
def test_what_is_no_model_is_refused(change: dict, words: str) -> None:
    BitModel.from_json(GOOD)
    with pytest.raises(ValueError, match=words) as caught:
        BitModel.from_json(GOOD | change)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150


def test_a_missing_constriction_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.parquet", correlated_bits(3), compress=True)
    imported = builtins.__import__

    def without(name: str, *rest: Any) -> object:
        if name == "constriction":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"^compressed token files need.*pip install 'qlip\[codec\]'$"):
        TokenStore(tmp_path)[0]
    with pytest.raises(UserError, match=r"qlip\[codec\]"):  # before there are any rows
        TokenWriter(tmp_path / "1.parquet", INFO, compress=True)
    assert [file.name for file in tmp_path.iterdir()] == ["0.parquet"]


def write(file: Path, bits: torch.Tensor, *, first: int = 0, compress: bool = False, info=INFO) -> Path:
    with TokenWriter(file, info, row_group_rows=16, compress=compress) as writer:
        for start in range(0, len(bits), 7):
            places = range(first + start, first + min(start + 7, len(bits)))
            writer.write(
                TokenRows(
                    keys=[f"{place:09d}" for place in places],
                    packed=pack_bits(bits[start : start + 7]),
                    captions=[(f"picture {place}",) if place % 3 else () for place in places],
                    sizes=[(place + 1, 9) for place in places],
                    labels=[place % 2 for place in places],
                )
            )
    return file


def test_compressed_files_have_the_rows_of_raw_ones(tmp_path: Path) -> None:
    bits = correlated_bits(60)
    write(tmp_path / "raw.parquet", bits)
    write(tmp_path / "coded.parquet", bits, compress=True)
    raw, coded = TokenStore(tmp_path / "raw.parquet"), TokenStore(tmp_path / "coded.parquet")
    assert raw.verify() == coded.verify() == 60 and raw.identity() != coded.identity()
    assert [rows for _, _, rows in coded.row_groups] == [16, 16, 16, 12]
    for place in [*torch.randperm(60).tolist(), -1]:
        ours, theirs = coded[place], raw[place]
        assert torch.equal(ours.bits, theirs.bits) and torch.equal(ours.bits, bits[place])
        for name in ("key", "captions", "size", "label"):
            assert getattr(ours, name) == getattr(theirs, name)
    assert raw.num_without_captions() == coded.num_without_captions() == 20
    assert replace(coded.info, codec={}) == raw.info


def test_a_store_may_hold_both(tmp_path: Path) -> None:
    bits = correlated_bits(60)
    write(tmp_path / "0.parquet", bits[:20], compress=True)
    write(tmp_path / "1.parquet", bits[20:40], first=20)
    write(tmp_path / "2.parquet", bits[40:], first=40, compress=True)
    store = TokenStore(tmp_path)
    assert store.verify() == 60
    assert torch.equal(torch.stack([row.bits for row in store]), bits)
    write(tmp_path / "3.parquet", bits[:0], compress=True)  # every picture of a part may be broken
    assert TokenStore(tmp_path).verify() == 60


def test_a_flipped_byte_of_a_code_is_found_and_named(tmp_path: Path) -> None:
    file = write(tmp_path / "00003.parquet", correlated_bits(60), compress=True)
    code = pq.read_table(file)["coded"][17].as_py()
    content = bytearray(file.read_bytes())
    content[content.index(code) + len(code) // 2] ^= 1
    file.write_bytes(content)
    store = TokenStore(tmp_path)
    with pytest.raises(UserError, match=r"00003\.parquet row group 1 is damaged.*remove it"):
        store.verify()
    assert torch.equal(store[5].bits, correlated_bits(60)[5])


@pytest.mark.parametrize("change", ["codes", "model", "width"])
def test_files_whose_codes_cannot_be_are_refused(tmp_path: Path, change: str) -> None:
    """With checksums that are right: somebody else's files."""
    file = write(tmp_path / "0.parquet", correlated_bits(20), compress=True)
    table = pq.read_table(file)
    if change == "codes":
        place = table.schema.get_field_index("coded")
        codes = [code + b"more" for code in table["coded"].to_pylist()]
        table = table.set_column(place, table.schema.field(place), [codes])
        words = r"0\.parquet row group 0 is damaged \(a picture's code.*remove it"
    else:
        said = json.loads(table.schema.metadata[b"qlip.tokens"])
        said |= {"num_bits": 11} if change == "width" else {"codec": said["codec"] | {"name": "new"}}
        table = table.replace_schema_metadata({b"qlip.tokens": json.dumps(said)})
        words = r"0\.parquet.*tokens of 11 bits.*of 12.*remove" if change == "width" else r"0\.parquet.*'new'.*remove"
    pq.write_table(table, file)
    with pytest.raises(UserError, match=words):
        TokenStore(tmp_path).verify()


@pytest.mark.parametrize("streaming", [False, True], ids=["normal", "streaming"])
def test_datasets_reads_the_bits_of_raw_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    bits = correlated_bits(20)
    file = write(tmp_path / "0.parquet", bits)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(file), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    rows = list(loaded)
    assert [row["bits"] for row in rows] == [row.tobytes() for row in pack_bits(bits)]
    assert rows[4]["key"] == "000000004" and rows[4]["caption"] == "picture 4" and rows[3]["caption"] is None
