"""Every row once an epoch over all ranks, mixed within windows, resumed bit for bit."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from qlip.core.errors import UserError
from qlip.data.token_files import TokenRows, TokenStoreInfo, pack_bits
from qlip.data.token_loader import TokenDataConfig, TokenLoader, token_loader
from qlip.data.token_store import TokenStore
from qlip.data.token_writer import TokenWriter

INFO = TokenStoreInfo(encoder_fingerprint="a" * 64, num_bits=9, grid=(2, 2))
FILES = (17, 1, 23, 12)  # rows, in row groups of 4


def captions_of(index: int) -> tuple[str, ...]:
    return tuple(f"{index} {number}" for number in range(index % 4))


def bits_of(index: int) -> torch.Tensor:
    """The index in binary, so that a batch tells whose bits it holds."""
    return torch.tensor([index >> place & 1 for place in range(36)], dtype=torch.bool).reshape(4, 9)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", FILES)


def write_store(folder: Path, files: tuple[int, ...], *, captioned: bool = True) -> Path:
    folder.mkdir()
    first = 0
    for number, rows in enumerate(files):
        places = range(first, first + rows)
        first += rows
        with TokenWriter(folder / f"{number:05d}.parquet", INFO, row_group_rows=4) as writer:
            packed = pack_bits(torch.stack([bits_of(place) for place in places]))
            captions = [captions_of(place) if captioned else () for place in places]
            keys = [f"key {place}" for place in places]
            writer.write(TokenRows(keys=keys, packed=packed, captions=captions, sizes=[None] * rows))
    return folder


def texts_as_ids(texts: list[str]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[len(text), sum(map(ord, text))] for text in texts])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loader_of(folder: Path, *, rank: int = 0, num_ranks: int = 1, seed: int = 0, **options) -> TokenLoader:
    config = TokenDataConfig(tokens=str(folder), **({"batch_size": 4, "shuffle_window": 3} | options))
    return token_loader(
        config, tokenize=texts_as_ids, encoder_fingerprint="a" * 64, seed=seed, rank=rank, num_ranks=num_ranks
    )


def rows_of(loader: TokenLoader, num: int) -> list[int]:
    """The first rows a loader gives, batch by batch."""
    batches = itertools.islice(loader, -(-num // loader.config.batch_size))
    return [index for batch in batches for index in batch["sample_index"].tolist()][:num]


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def test_a_batch_is_of_the_contract(folder: Path) -> None:
    store = TokenStore(folder)
    for batch in itertools.islice(loader_of(folder), 20):
        assert batch["bits"].shape == (4, 4, 9) and batch["bits"].dtype == torch.bool
        for place, index in enumerate(batch["sample_index"].tolist()):
            assert torch.equal(batch["bits"][place], bits_of(index)) and torch.equal(store[index].bits, bits_of(index))
            assert batch["key"][place] == store[index].key == f"key {index}"
            assert batch["caption"][place] in (captions_of(index) or ("",))
        assert torch.equal(batch["input_ids"], texts_as_ids(batch["caption"])["input_ids"])
        assert batch["attention_mask"].shape == (4, 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_every_row_once_an_epoch_over_all_ranks(folder: Path, num_ranks: int) -> None:
    total = sum(FILES)
    of_rank = [total * (rank + 1) // num_ranks - total * rank // num_ranks for rank in range(num_ranks)]
    for epochs in (1, 2, 3):
        rows = [
            row
            for rank, own in enumerate(of_rank)
            for row in rows_of(loader_of(folder, rank=rank, num_ranks=num_ranks), epochs * own)
        ]
        assert Counter(rows) == dict.fromkeys(range(total), epochs)


def test_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    rows = rows_of(loader_of(folder), 106)
    assert rows == rows_of(loader_of(folder), 106) == rows_of(loader_of(folder, batch_size=7), 106)
    assert rows[:53] != rows[53:] and rows != rows_of(loader_of(folder, seed=1), 106)


def test_a_window_mixes_its_row_groups_and_no_others(folder: Path) -> None:
    group_of = [number for number, (_, _, rows) in enumerate(TokenStore(folder).row_groups) for _ in range(rows)]
    groups = [group_of[row] for row in rows_of(loader_of(folder), 53)]
    assert groups != sorted(groups, key=groups.index), "mixed"
    seen: set[int] = set()
    place = 0
    while place < len(groups):  # windows of three whole groups, one after the other
        end = max(end for end in range(place, 54) if len(set(groups[place:end])) <= 3)
        assert not seen & set(groups[place:end])
        seen |= set(groups[place:end])
        place = end
    in_order = [group_of[row] for row in rows_of(loader_of(folder, shuffle_window=1), 53)]
    assert in_order == sorted(in_order, key=in_order.index) != sorted(in_order)


def test_captions_are_drawn_alike_and_anew(folder: Path) -> None:
    drawn = Counter(
        text for batch in itertools.islice(loader_of(folder), 500) for text in batch["caption"] if text[:2] == "7 "
    )
    assert drawn.keys() == set(captions_of(7)) and min(drawn.values()) > 0.5 * max(drawn.values())
    first = {text for batch in itertools.islice(loader_of(folder, captions="first"), 40) for text in batch["caption"]}
    assert first == {captions_of(index)[0] for index in range(53) if captions_of(index)} | {""}


@pytest.mark.parametrize("num_batches", [0, 1, 6, 7, 13, 14, 15, 40])
def test_resumes_bit_for_bit(folder: Path, num_batches: int) -> None:
    whole = [list(itertools.islice(loader_of(folder, rank=rank, num_ranks=2), num_batches + 12)) for rank in (0, 1)]
    states = []
    for rank in (0, 1):
        loader = loader_of(folder, rank=rank, num_ranks=2)
        for _ in itertools.islice(loader, num_batches):
            pass
        states.append(json.loads(json.dumps(loader.state_dict())))
    for rank in (0, 1):
        loader = loader_of(folder, rank=rank, num_ranks=2)
        loader.resume(states)
        for first, second in zip(whole[rank][num_batches:], loader, strict=False):
            assert_equal(first, second)
        assert loader.state_dict()["rank"] == rank


def test_another_number_of_ranks_begins_the_next_epoch(folder: Path, capsys: pytest.CaptureFixture) -> None:
    states = []
    for rank in (0, 1):
        loader = loader_of(folder, rank=rank, num_ranks=2)
        list(itertools.islice(loader, 7 if rank else 2))  # 28 rows are more than an epoch of rank 1
        states.append(loader.state_dict())
    loader = loader_of(folder)
    loader.resume(states)
    assert "saved by 2 ranks, here are 1; every rank begins epoch 2" in capsys.readouterr().out
    assert rows_of(loader, 53) == rows_of(loader_of(folder), 3 * 53)[2 * 53 :]


def test_what_cannot_be_trained_on_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="53 pictures, too few for 2 x 27 at a time: lower batch_size"):
        loader_of(folder, batch_size=27, num_ranks=2)
    with pytest.raises(UserError, match="0 pictures, too few"):
        empty = tmp_path / "empty"
        empty.mkdir()
        with TokenWriter(empty / "0.parquet", INFO):
            pass
        loader_of(empty)
    with pytest.raises(UserError, match="has no captions"):
        loader_of(write_store(tmp_path / "plain", (9,), captioned=False))
    with pytest.raises(UserError, match=r"set data\.tokens"):
        token_loader(TokenDataConfig(), tokenize=texts_as_ids, encoder_fingerprint="a", seed=0)
    with pytest.raises(UserError, match=f"encoder {'a' * 64}, this model's is b"):
        config = TokenDataConfig(tokens=str(folder))
        token_loader(config, tokenize=texts_as_ids, encoder_fingerprint="b", seed=0)
    with pytest.raises(UserError, match="shuffle_window 0"):
        loader_of(folder, shuffle_window=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"seed": 1}, {"shuffle_window": 2}, {"captions": "first"}],
    ids=["rows", "seed", "window", "captions"],
)
def test_a_position_in_other_data_is_refused(folder: Path, options: dict) -> None:
    state = loader_of(folder).state_dict()
    if not options:
        (folder / "00001.parquet").unlink()
    with pytest.raises(UserError, match=r"cannot be resumed: \w+ .* -> .*; put it back"):
        loader_of(folder, **options).resume([state])
