"""The order of conversations, batches, exact resuming, and every bad sample counted."""

import dataclasses
import itertools
import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_processors import chat_processor
from shard_files import encoded, picture

from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, open_image
from qlip.data.chat_labels import ChatEncoder
from qlip.data.conversation_loader import ConversationDataConfig, ConversationLoader, conversation_loader
from qlip.data.conversation_order import ConversationOrder
from qlip.data.conversations import open_conversations
from qlip.data.ledger import read_ledger

WORDS = ("red", "blue", "it", "is", "A", "B")


def write_data(folder: Path, *, num_images: int = 14, num_texts: int = 9) -> Path:
    """Conversations of all lengths; every third with a picture has two of them."""
    random = np.random.default_rng(0)
    records = []
    for number in range(num_images + num_texts):
        names = [f"{number}.png", f"{number}b.png"][: 1 + (number % 3 == 0)] if number < num_images else []
        for place, name in enumerate(names):
            (folder / name).write_bytes(encoded(picture(12 + number, 10, seed=2 * number + place)))
        answer = " ".join(WORDS[word] for word in random.integers(len(WORDS), size=random.integers(1, 40)))
        turns = [("human", "<image> " * len(names) + "What is it?"), ("gpt", answer)]
        record = {"id": f"k{number}", "conversations": [{"from": role, "value": text} for role, text in turns]}
        records.append(record | ({"image": names} if names else {}))
    (folder / "c.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def processor():
    return chat_processor("chatml")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def loader_of(data: Path, processor, *, rank: int = 0, num_ranks: int = 1, need_images=False, seed=0, **options):
    config = ConversationDataConfig(
        conversations=str(data / "c.json"),
        images=str(data),
        **({"batch_size": 2, "num_workers": 0, "max_length": 99} | options),
    )
    return conversation_loader(
        config,
        processor=processor,
        seed=seed,
        ledger=data / "skipped.jsonl",
        need_images=need_images,
        rank=rank,
        num_ranks=num_ranks,
    )


def batches_of(loader: ConversationLoader, num: int) -> list[dict]:
    return list(itertools.islice(loader, num))


def numbers(batches: list[dict]) -> list[list[int]]:
    return [batch["sample_index"].tolist() for batch in batches]


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and a["key"] == b["key"] and all(torch.equal(a[k], b[k]) for k in a if k != "key")
        for a, b in zip(first, second, strict=True)
    )


def test_a_batch_is_what_its_samples_are(data: Path, processor) -> None:
    """Against encoding and opening each by hand: ids padded on the right, pictures in the order of their places."""
    conversations = open_conversations(data / "c.json")
    encoder = ChatEncoder(processor, max_length=99)
    for batch in batches_of(loader_of(data, processor, batch_size=4), 6):
        pictures = []
        for row, number in enumerate(batch["sample_index"].tolist()):
            conversation = conversations[number]
            chat, length = encoder.encode(conversation), int(batch["attention_mask"][row].sum())
            assert batch["key"][row] == conversation.key
            assert torch.equal(batch["input_ids"][row, :length], chat.input_ids)
            assert torch.equal(batch["labels"][row, :length], chat.labels)
            assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
            assert (batch["labels"][row, length:] == -100).all()
            assert (batch["attention_mask"][row] == (torch.arange(batch["input_ids"].shape[1]) < length)).all()
            pictures += [open_image(data / name, limits=ImageLimits()) for name in conversation.images]
        assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
        if not pictures:
            assert "pixel_values" not in batch
            continue
        expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        assert torch.equal(batch["pixel_values"], expected) and expected.shape[1:] == (3, 16, 16)
        assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * len(pictures)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_two_ranks_share_an_epoch(data: Path, processor, group_by_length: bool) -> None:
    """All of it once, but for what fills the last batch of a modality; at any time both read the same modality."""
    loaders = [loader_of(data, processor, rank=rank, num_ranks=2, group_by_length=group_by_length) for rank in (0, 1)]
    epoch = [batches_of(loader, 4 + 3) for loader in loaders]  # 14 with and 9 without, 4 at a time
    counts = Counter(number for batches in epoch for batch in numbers(batches) for number in batch)
    assert set(counts) == set(range(23)) and set(counts.values()) <= {1, 2} and counts.total() == 28
    for first, second in zip(*epoch, strict=True):
        assert ("pixel_values" in first) == ("pixel_values" in second)
        if counts.total() == len(counts):
            assert not set(first["key"]) & set(second["key"])
    assert [loader.state_dict()["epoch"] for loader in loaders] == [1, 1]
    assert numbers(batches_of(loaders[0], 7)) == numbers(epoch[0])  # iterating anew begins anew


def test_two_ranks_are_disjoint_where_nothing_is_filled(tmp_path: Path, processor) -> None:
    data = write_data(tmp_path, num_images=8, num_texts=4)
    first, second = (numbers(batches_of(loader_of(data, processor, rank=r, num_ranks=2), 3)) for r in (0, 1))
    assert sorted(chain(*first, *second)) == list(range(12))


def test_epochs_and_seeds_differ(data: Path, processor) -> None:
    loader = loader_of(data, processor, batch_size=1)
    both = numbers(batches_of(loader, 46))
    assert sorted(both[:23]) == sorted(both[23:]) and both[:23] != both[23:]
    assert numbers(batches_of(loader_of(data, processor, batch_size=1, seed=1), 23)) != both[:23]


def order_of(num_words: np.ndarray, **options) -> ConversationOrder:
    has_image = np.arange(len(num_words)) % 5 > 0
    defaults = {"batch_size": 8, "num_ranks": 4, "group_by_length": True, "need_images": False, "seed": 0}
    return ConversationOrder(num_words=num_words, has_image=has_image, **(defaults | options))


def test_grouping_saves_padding_and_evens_ranks_out() -> None:
    num_words = np.random.default_rng(0).geometric(1 / 80, size=20_000)

    def shares(order: ConversationOrder) -> tuple[float, float]:
        lengths = num_words[order.epoch(0)].astype(float)  # (m, ranks, b)
        longest = lengths.max(axis=2)
        uneven = 1 - longest.mean(axis=1) / longest.max(axis=1)  # of a rank's time, waiting for the slowest
        return 1 - lengths.sum() / (longest.sum() * lengths.shape[2]), uneven.mean()

    (grouped, grouped_wait), (mixed, mixed_wait) = (
        shares(order_of(num_words, group_by_length=g)) for g in (True, False)
    )
    assert grouped < 0.1 < 0.5 < mixed and grouped_wait < 0.03 < 0.2 < mixed_wait


def test_the_order_of_a_big_epoch() -> None:
    order = order_of(np.random.default_rng(0).integers(1, 500, size=20_000))
    epoch = order.epoch(3)
    assert epoch.shape == (order.num_batches, 4, 8) and order.num_batches == 16_000 // 32 + 4_000 // 32
    assert sorted(epoch.reshape(-1)) == list(range(20_000))
    modality = order.has_image[epoch].reshape(len(epoch), -1)
    assert (modality.all(axis=1) | ~modality.any(axis=1)).all()
    switches = (np.diff(modality[:, 0].astype(int)) != 0).sum()
    assert switches > 100  # mixed in time too
    assert (epoch != order.epoch(4)).any() and np.array_equal(epoch, order.epoch(3))


def test_a_modality_smaller_than_a_batch_is_drawn_several_times() -> None:
    order = dataclasses.replace(order_of(np.ones(51)), has_image=np.arange(51) > 0)
    epoch = order.epoch(0).reshape(-1, 32)
    assert len(epoch) == 3 and sorted((epoch == 0).sum(axis=1).tolist()) == [0, 0, 32]
    assert set(epoch.reshape(-1)) == set(range(51))


@pytest.mark.parametrize("workers", [(0, 0), (2, 2), (0, 2)], ids=["0", "2", "0 then 2"])
def test_resuming_is_bit_exact(data: Path, processor, workers: tuple[int, int]) -> None:
    """Across the end of an epoch, with a sample replaced on the way, whatever the number of workers."""
    (data / "3.png").write_bytes(b"broken")
    options = {"max_skip_share": 0.5, "rank": 1, "num_ranks": 2}
    whole = batches_of(loader_of(data, processor, num_workers=0, **options), 12)
    loader = loader_of(data, processor, num_workers=workers[0], **options)
    batches = iter(loader)
    first = [next(batches) for _ in range(5)]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = loader_of(data, processor, num_workers=workers[1], **options)
    resumed.resume([state | {"rank": 0}, state])
    assert resumed.state_dict() == state
    assert same(first + batches_of(resumed, 7), whole)
    assert resumed.state_dict()["epoch"] == 1
    assert all("k3" not in batch["key"] for batch in whole)


def test_the_random_state_of_training_is_left_alone(data: Path, processor) -> None:
    before = torch.get_rng_state()
    batches_of(loader_of(data, processor), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"num_ranks": 3}, {"batch_size": 3}], ids=["ranks", "batch size"])
def test_another_split_begins_the_next_epoch(data: Path, processor, change: dict, capsys) -> None:
    states = [loader_of(data, processor, rank=rank, num_ranks=2).state_dict() for rank in (0, 1)]
    states[1]["epoch"], states[1]["done"] = 4, 3
    loader = loader_of(data, processor, **({"num_ranks": 2} | change))
    loader.resume(states)
    assert "begins epoch 5" in capsys.readouterr().out
    batches_of(loader, 1)
    assert (loader.state_dict()["epoch"], loader.state_dict()["done"]) == (5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"group_by_length": False}, "group_by_length True -> False"),
        ({"need_images": True}, "need_images False -> True"),
        ({}, "conversations 23 conversations, sha256 .* -> 23 conversations, sha256"),
    ],
)
def test_changed_data_are_refused(data: Path, processor, change: dict, message: str) -> None:
    state = loader_of(data, processor).state_dict()
    if not change:
        (data / "c.json").write_text((data / "c.json").read_text().replace("What", "Why"))
    with pytest.raises(UserError, match=f"cannot be resumed: .*{message}"):
        loader_of(data, processor, **change).resume([state])


def edit(data: Path, number: int, **fields: object) -> None:
    records = json.loads((data / "c.json").read_text())
    records[number] |= fields
    (data / "c.json").write_text(json.dumps(records))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_samples_are_replaced_and_written_down(data: Path, processor, num_workers: int) -> None:
    (data / "1.png").unlink()
    (data / "2.png").write_bytes(encoded(picture())[:60])
    edit(data, 4, conversations=[{"from": "human", "value": "<image>" + " it" * 99}, {"from": "gpt", "value": "B"}])
    edit(data, 20, conversations=[{"from": "bot", "value": "A"}, {"from": "gpt", "value": "B"}])
    loader = loader_of(data, processor, max_skip_share=0.5, num_workers=num_workers)
    epoch = batches_of(loader, 11)
    assert all(len(batch["key"]) == 2 for batch in epoch)
    seen = {key for batch in epoch for key in batch["key"]}
    assert {f"k{number}" for number in range(23)} - seen == {"k1", "k2", "k4", "k20"}
    lines = [json.loads(line) for line in (data / "skipped.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["k1"] == "missing image: 1.png" and reasons["k2"].startswith("broken image")
    assert reasons["k4"].startswith("longer than the context: ") and reasons["k20"].startswith("unknown role: 'bot'")
    assert read_ledger(data / "skipped.jsonl").keys() == {
        "missing image",
        "broken image",
        "longer than the context",
        "unknown role",
    }
    assert loader.state_dict()["counts"]["skipped"].keys() == set(read_ledger(data / "skipped.jsonl")) - {
        "unknown role"
    }
    assert loader.state_dict()["counts"]["num_good"] == 22
    for batch in epoch:
        assert len({key in {f"k{number}" for number in range(14)} for key in batch["key"]}) == 1


@pytest.mark.parametrize("num_workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(data: Path, processor, num_workers: int) -> None:
    for path in data.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"samples skipped, more than max_skip_share 0.05: missing image") as caught:
        batches_of(loader_of(data, processor, num_workers=num_workers), 11)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"200 conversations one after the other .*missing image"):
        batches_of(loader_of(data, processor, max_skip_share=1.0), 11)


def test_too_many_unusable_records_stop_it_before_the_start(data: Path, processor) -> None:
    edit(data, 0, conversations=[])
    edit(data, 1, image="../x.png")
    with pytest.raises(UserError, match=r"2 of 23 samples skipped, more than max_skip_share 0.05: no conversation"):
        loader_of(data, processor)


def test_only_the_projector_needs_pictures(data: Path, processor, capsys) -> None:
    loader = loader_of(data, processor, need_images=True)
    assert "9 of 23 conversations have no picture" in capsys.readouterr().out
    assert set(chain(*numbers(batches_of(loader, 7)))) == set(range(14))
    assert loader.state_dict()["epoch"] == 1


def test_plain_leaves_questions_out(data: Path, processor) -> None:
    asked, plain = (batches_of(loader_of(data, processor, plain=plain), 1)[0] for plain in (False, True))
    assert asked["key"] == plain["key"] and asked["input_ids"].shape[1] > plain["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0, num_workers 0: give"),
        ({"batch_size": 12, "num_ranks": 2}, "23 usable conversations, too few for 2 x 12 .*: lower data.batch_size"),
        ({"batch_size": 15, "need_images": True}, "14 usable conversations, too few for 1 x 15"),
        ({"images": ""}, "has pictures: set data.images"),
        ({"images": "/nowhere"}, "images /nowhere is not there"),
        ({"conversations": "/nowhere.json"}, "/nowhere.json is not there"),
    ],
)
def test_what_cannot_work_is_refused_before_the_start(data: Path, processor, options: dict, message: str) -> None:
    paths = {name: options.pop(name) for name in ("images", "conversations") if name in options}
    ranks = {name: options.pop(name) for name in ("num_ranks", "need_images") if name in options}
    defaults = {"conversations": str(data / "c.json"), "images": str(data), "num_workers": 0}
    config = ConversationDataConfig(**(defaults | paths | options))
    with pytest.raises(UserError, match=message):
        arguments = {"need_images": False} | ranks
        conversation_loader(config, processor=processor, seed=0, ledger=data / "skipped.jsonl", **arguments)


def test_texts_alone_need_no_images_and_train_no_projector(tmp_path: Path, processor) -> None:
    data = write_data(tmp_path, num_images=0, num_texts=6)
    config = ConversationDataConfig(conversations=str(data / "c.json"), batch_size=2, num_workers=0)
    arguments = {"processor": processor, "seed": 0, "ledger": data / "skipped.jsonl"}
    batches = batches_of(conversation_loader(config, need_images=False, **arguments), 3)
    assert all("pixel_values" not in batch for batch in batches)
    with pytest.raises(UserError, match="no pictures, and only the projector is trained"):
        conversation_loader(config, need_images=True, **arguments)


def test_a_tokenizer_without_padding_is_refused(data: Path) -> None:
    processor = chat_processor("chatml")
    processor.tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token: set pad_token"):
        loader_of(data, processor)
