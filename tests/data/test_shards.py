"""Shards to samples: which files, which order, exact resume, captions, the ledger."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image
from shard_files import dataset, encoded, pair, picture, write_shards, write_tar
from torchdata.stateful_dataloader import StatefulDataLoader

from qlip.core.errors import UserError
from qlip.data.ledger import Ledger, read_ledger
from qlip.data.shards import ShardConfig, ShardDataset, check_shard_split, expand_shards
from qlip.data.tar_reader import SampleRejected, Skip


def keys_of(samples, num: int | None = None) -> list[str]:
    iterator = iter(samples)
    return [s["key"] for s in iterator] if num is None else [next(iterator)["key"] for _ in range(num)]


def batches(data: ShardDataset, num_workers: int, state: dict | None = None) -> StatefulDataLoader:
    loader = StatefulDataLoader(data, batch_size=3, num_workers=num_workers, collate_fn=list)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))  # checkpoints keep it as JSON
    return loader


# Which files


def test_expand_shards(tmp_path):
    for name in ("00000.tar", "00001.tar", "00002.tar", "sub/a.tar", "sub/b.tar", "with {space} [1]/x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "00000.parquet").touch()

    def names(spec: str) -> list[str]:
        return [path.name for path in expand_shards(spec)]

    assert names(f"{tmp_path}/{{00000..00002}}.tar") == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(f"{tmp_path}/{{00002..00001}}.tar") == ["00002.tar", "00001.tar"]
    assert names(f"{tmp_path}/sub/{{b,a}}.tar") == ["b.tar", "a.tar"]
    assert names(str(tmp_path)) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(f"{tmp_path}/0000[01].tar") == ["00000.tar", "00001.tar"]
    assert names(f"{tmp_path}/s*/*.tar") == ["a.tar", "b.tar"]
    assert names(f"{tmp_path}/sub::{tmp_path}/00001.tar") == ["a.tar", "b.tar", "00001.tar"]
    assert names(f"{tmp_path}/with {{space}} [1]") == ["x.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no shards given"),
        ("pipe:curl http://host/0.tar", "commands are not run"),
        ("{folder}", "no .tar files"),
        ("{folder}/x*.tar", "no file matches"),
        ("{folder}/{{00000..00004}}.tar", r"00001.tar is not there \(4 of 5 missing\)"),
        ("{folder}/{{0..99999999999}}.tar", "mend the range"),
        ("{folder}/{{0..99999}}{{0..99999}}.tar", "mend the range"),
        ("{folder}/{{a,{{b,c}}}}.tar", "braces inside braces"),
    ],
)
def test_expand_shards_refuses_in_one_line(tmp_path, spec, message):
    if "00004" in spec:
        (tmp_path / "00000.tar").touch()
    with pytest.raises(UserError, match=message) as caught:
        expand_shards(spec.format(folder=tmp_path) if "{folder}" in spec else spec)
    assert "\n" not in str(caught.value)


def test_fewer_shards_than_readers_is_refused_before_the_first_sample(tmp_path, monkeypatch):
    write_shards(tmp_path, num_shards=3, per_shard=2)
    check_shard_split(4, num_ranks=2, num_workers=2)
    check_shard_split(1, num_ranks=1, num_workers=0)
    with pytest.raises(UserError, match="3 shards for 2 ranks x 2 workers: give at least 4"):
        check_shard_split(3, num_ranks=2, num_workers=2)
    with pytest.raises(UserError, match="3 shards for 4 ranks x 1 workers: give at least 4 shards, or at most 3 ranks"):
        dataset(tmp_path, repeat=True, num_ranks=4)
    assert len(keys_of(dataset(tmp_path, rank=3, num_ranks=4))) == 0  # one pass may leave a rank idle
    # A real worker that raises costs torch five seconds to take down.
    monkeypatch.setattr("qlip.data.shards.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(UserError, match="3 shards for 2 ranks x 2 workers"):
        next(iter(dataset(tmp_path, repeat=True, num_ranks=2)))


# Which order


def test_evaluation_is_one_pass_in_order_every_time(tmp_path):
    keys = write_shards(tmp_path, num_shards=3, per_shard=4)
    data = dataset(tmp_path)
    assert keys_of(data) == keys
    assert keys_of(data) == keys
    assert keys_of(dataset(tmp_path, repeat=True, shuffle_buffer=0), 24) == keys * 2


def test_training_order_is_a_function_of_seed_and_epoch(tmp_path):
    keys = write_shards(tmp_path, num_shards=4, per_shard=10)
    data = dataset(tmp_path, repeat=True, shuffle_buffer=15, seed=3)
    order = keys_of(data, 80)
    assert order == keys_of(data, 80) == keys_of(dataset(tmp_path, repeat=True, shuffle_buffer=15, seed=3), 80)
    assert sorted(order[:40]) == sorted(order[40:]) == keys
    assert order[:40] != order[40:] and order[:40] != keys
    assert order != keys_of(dataset(tmp_path, repeat=True, shuffle_buffer=15, seed=4), 80)
    first_block = {key[:5] for key in order[:15]}
    assert len(first_block) == 2  # shards are permuted, and samples of two shards mix


def test_augmentation_draws_depend_on_seed_epoch_and_key_alone(tmp_path):
    write_shards(tmp_path, num_shards=4, per_shard=5)

    def draws(num: int, **options) -> list[tuple[str, float]]:
        iterator = iter(dataset(tmp_path, repeat=True, **options))
        return [(sample["key"], sample["draw"]) for sample, _ in zip(iterator, range(num), strict=False)]

    first_epoch = dict(draws(20))
    assert first_epoch == dict(draws(20, shuffle_buffer=3))
    assert len(set(first_epoch.values())) == 20
    assert dict(draws(40)[20:]).keys() == first_epoch.keys() and dict(draws(40)[20:]) != first_epoch


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("repeat", [False, True])
def test_ranks_and_workers_share_every_sample_once(tmp_path, num_workers, repeat):
    keys = write_shards(tmp_path, num_shards=8, per_shard=3)
    seen: Counter[str] = Counter()
    for rank in range(2):
        data = dataset(tmp_path, repeat=repeat, rank=rank, num_ranks=2, shuffle_buffer=5)
        iterator = iter(batches(data, num_workers))
        mine = [batch for batch, _ in zip(iterator, range(4), strict=False)]
        seen.update(sample["key"] for batch in mine for sample in batch)
    assert seen == Counter(keys)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("num_done", [0, 1, 4, 9, 15])
def test_resume_equals_the_uninterrupted_order(tmp_path, num_workers, num_done):
    write_shards(tmp_path, num_shards=4, per_shard=7)
    write_tar(tmp_path / "00001.tar", [*pair("a"), ("b.jpg", b"broken"), ("b.txt", b"b"), ("c.pkl", b""), *pair("d")])
    options = {"repeat": True, "shuffle_buffer": 6, "max_skip_share": 0.9}

    def take(loader: StatefulDataLoader, num: int) -> list[tuple[str, float]]:
        return [(s["key"], s["draw"]) for batch, _ in zip(loader, range(num), strict=False) for s in batch]

    uninterrupted = take(batches(dataset(tmp_path, **options), num_workers), 22)
    loader = batches(dataset(tmp_path, ledger=tmp_path / "ledger.jsonl", **options), num_workers)
    iterator = iter(loader)
    for _ in range(num_done):
        next(iterator)
    resumed = batches(dataset(tmp_path, ledger=tmp_path / "ledger.jsonl", **options), num_workers, loader.state_dict())
    assert take(resumed, 22 - num_done) == uninterrupted[3 * num_done :]
    assert read_ledger(tmp_path / "ledger.jsonl") == {"not an image": 1, "unsafe field": 1}


def test_resume_at_every_sample_keeps_counts_and_position(tmp_path):
    write_shards(tmp_path, num_shards=2, per_shard=5)
    write_tar(tmp_path / "00009.tar", [("x.txt", b"no image"), *pair("y"), ("z.pth", b"")])
    options = {"repeat": True, "shuffle_buffer": 4, "max_skip_share": 0.9}
    whole = dataset(tmp_path, **options)
    iterator = iter(whole)
    history = []
    for _ in range(30):
        history.append((next(iterator)["key"], json.loads(json.dumps(whole.state_dict()))))
    for i in range(29):
        again = dataset(tmp_path, **options)
        again.load_state_dict(history[i][1])
        assert again.state_dict() == history[i][1]
        assert next(iter(again))["key"] == history[i + 1][0]
        assert again.state_dict() == history[i + 1][1]


def test_resume_of_an_evaluation_pass_and_of_a_finished_one(tmp_path):
    keys = write_shards(tmp_path, num_shards=2, per_shard=5)
    data = dataset(tmp_path)
    iterator = iter(data)
    assert [next(iterator)["key"] for _ in range(7)] == keys[:7]
    again = dataset(tmp_path)
    again.load_state_dict(data.state_dict())
    assert keys_of(again) == keys[7:]
    done = dataset(tmp_path)
    done.load_state_dict(again.state_dict())
    assert keys_of(done) == [] and done.ledger.num_good == 10
    assert keys_of(done) == keys  # the next pass starts afresh


def test_resume_refuses_another_order(tmp_path):
    write_shards(tmp_path, num_shards=4, per_shard=3)
    state = dataset(tmp_path, repeat=True).state_dict()
    for options, message in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"shuffle_buffer": 5}, "shuffle_buffer 2000 -> 5"),
        ({"num_ranks": 2}, "num_ranks 1 -> 2"),
    ):
        with pytest.raises(UserError, match=message):
            dataset(tmp_path, repeat=True, **options).load_state_dict(state)
    (tmp_path / "00004.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    with pytest.raises(UserError, match="shards 4 files"):
        dataset(tmp_path, repeat=True).load_state_dict(state)


# Captions


def caption_or_reason(tmp_path, members, **options) -> tuple[str | None, dict[str, int]]:
    path = write_tar(tmp_path / "one.tar", [*members, *pair("good")])
    data = dataset(path, max_skip_share=1.0, **options)
    samples = {sample["key"]: sample["caption"] for sample in data}
    return samples.get("a"), dict(data.ledger.skipped)


@pytest.mark.parametrize(
    ("text", "caption", "reason"),
    [
        (b"  a cat\n", "a cat", None),
        (b"\xef\xbb\xbfa cat", "a cat", None),
        (b"a\0cat", "a cat", None),
        (b"x" * 1_000_000, "x" * 5000, None),
        ("eine Straße 猫".encode(), "eine Straße 猫", None),
        (b"", None, "empty caption"),
        (b" \n\0 ", None, "empty caption"),
        (b"\xff\xfea\0", None, "undecodable caption"),
        (None, None, "missing caption"),
    ],
)
def test_captions_from_text(tmp_path, text, caption, reason):
    members = [("a.jpg", encoded(picture(), "JPEG")), *([("a.txt", text)] if text is not None else [])]
    assert caption_or_reason(tmp_path, members) == (caption, {reason: 1} if reason else {})


def test_captions_drawn_from_json(tmp_path):
    keys = write_shards(tmp_path, num_shards=1, per_shard=60)
    data = dataset(tmp_path, caption_weights={"captions.short": 0.25, "captions.dense": 0.75, "absent": 9.0})
    captions = {sample["key"]: sample["caption"] for sample in data}
    assert captions == {sample["key"]: sample["caption"] for sample in data}
    assert all(captions[key] in (f"short {key}", f"dense {key}") for key in keys)
    assert 30 <= sum(caption.startswith("dense") for caption in captions.values()) <= 57
    with pytest.raises(UserError, match="caption_weights"):
        dataset(tmp_path, caption_weights={"a": -1.0})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"{", "broken json"),
        (b"[]", "broken json"),
        (b"[" * 9999, "broken json"),
        (b"{}", "missing caption"),
        (None, "missing caption"),
    ],
)
def test_json_without_a_caption(tmp_path, record, reason):
    members = [("a.jpg", encoded(picture(), "JPEG")), *([("a.json", record)] if record is not None else [])]
    assert caption_or_reason(tmp_path, members, caption_weights={"captions.short": 1.0})[1] == {reason: 1}


def test_plain_caption_where_the_json_names_none(tmp_path):
    members = [("a.jpg", encoded(picture(), "JPEG")), ("a.json", b'{"other": "x"}'), ("a.txt", b"a plain caption")]
    assert caption_or_reason(tmp_path, members, caption_weights={"captions.short": 1.0})[0] == "a plain caption"


def test_half_a_surrogate_in_json_does_not_reach_the_tokenizer(tmp_path):
    members = [("a.jpg", encoded(picture(), "JPEG")), ("a.json", b'{"c": "cat \\ud83d"}')]
    caption, _ = caption_or_reason(tmp_path, members, caption_weights={"c": 1.0, "captions.short": 1.0})
    assert caption is not None and caption.encode()


# The ledger


def test_bad_samples_are_skipped_and_recorded(tmp_path):
    members = [*pair("good"), ("none.txt", b"no image"), ("html.jpg", b"<html>"), ("html.txt", b"t"), *pair("last")]
    write_tar(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(b"")
    ledger = tmp_path / "ledger.jsonl"
    data = dataset(tmp_path, max_skip_share=0.7, ledger=ledger)
    assert keys_of(data) == ["good", "last"]
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [(line["key"], line["reason"], line["epoch"]) for line in lines] == [
        ("none", "missing image", 0),
        ("html", "not an image: a web page", 0),
        ("", "not a tar: zero bytes", 0),
    ]
    assert keys_of(data) == ["good", "last"]  # logs everything again
    assert read_ledger(ledger) == {"missing image": 1, "not an image": 1, "not a tar": 1}


def test_the_run_stops_above_the_share(tmp_path):
    for shard in range(2):
        members = [m for i in range(150) for m in (pair(f"{i}") if i % 10 else [(f"{i}.txt", b"no image")])]
        write_tar(tmp_path / f"{shard}.tar", members)
    ledger = tmp_path / "ledger.jsonl"
    data = dataset(tmp_path, repeat=True, ledger=ledger, shuffle_buffer=0)
    keys: list[str] = []
    with pytest.raises(UserError) as caught:
        for sample in data:
            keys.append(sample["key"])
    assert len(keys) == 179  # stopped at the 200th sample seen, a good one
    message = str(caught.value)
    assert "20 of 200" in message and "missing image (20)" in message and str(ledger) in message and "\n" not in message
    few = write_tar(tmp_path / "few.tar", [*pair("a"), ("b.txt", b"")])
    with pytest.raises(UserError, match="1 of 2 samples skipped"):  # at the end of the epoch
        keys_of(dataset(few))
    with pytest.raises(UserError, match="empty shard"):
        next(iter(dataset(write_tar(tmp_path / "none.tar", []), repeat=True)))


def test_an_epoch_without_a_sample_ends(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match="no usable sample in 1 shards"):
        next(iter(dataset(tmp_path, repeat=True, max_skip_share=1.0)))


def test_decode_may_reject_and_its_faults_are_not_hidden(tmp_path):
    write_shards(tmp_path, num_shards=1, per_shard=4)

    def reject_first(image: Image.Image, caption, sample, random) -> dict:
        if sample.key.endswith("0"):
            raise SampleRejected("too dull: grey")
        return {}

    def faulty(image, caption, sample, random) -> dict:
        raise KeyError("a fault of the program")

    config = ShardConfig(shards=str(tmp_path), max_skip_share=0.5)
    options = {"repeat": False, "rank": 0, "num_ranks": 1, "ledger": None}
    data = ShardDataset(config, decode=reject_first, **options)
    assert len(keys_of(data)) == 3 and data.ledger.skipped == {"too dull": 1}
    with pytest.raises(KeyError):
        keys_of(ShardDataset(config, decode=faulty, **options))


def test_ledger_file_survives_several_writers_and_a_cut(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for reader in range(2):
        ledger = Ledger(path, max_skip_share=1.0)
        for i in range(3):
            ledger.skip(Skip(key=f"{i}", reason="r: detail", shard=f"{reader}", count=2), epoch=0)
    with path.open("a") as file:
        file.write('{"shard": "0", "ke')
    assert read_ledger(path) == {"r": 12}
    with pytest.raises(UserError, match="cannot write the ledger"):
        Ledger(tmp_path / "no" / "where", max_skip_share=1.0).skip(Skip(key="", reason="r", shard=""), epoch=0)


def test_natural_photographs_in_shards(tmp_path):
    data = pytest.importorskip("skimage.data")
    members = []
    for name in ("astronaut", "coffee", "chelsea"):  # these ship in the wheel
        photograph = Image.fromarray(getattr(data, name)())
        members += [(f"{name}.jpg", encoded(photograph, "JPEG", quality=90)), (f"{name}.txt", f"a {name}".encode())]
    samples = list(dataset(write_tar(tmp_path / "photos.tar", members)))
    assert [(s["key"], s["caption"], s["size"]) for s in samples] == [
        ("astronaut", "a astronaut", (512, 512)),
        ("coffee", "a coffee", (600, 400)),
        ("chelsea", "a chelsea", (451, 300)),
    ]
