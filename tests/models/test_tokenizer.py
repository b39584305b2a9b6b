"""CLIP's tokenizer offline: open_clip's ids, plain markers, padding and cutting."""

from __future__ import annotations

import contextlib
import json
from random import Random

import open_clip
import pytest
import torch

from qlip.models.qlip.tokenizer import clip_tokenizer, load_tokenizer, text_tokenizer

TEXT = (
    "a an the red Orange yellow circle STAR ring picture photo of two three dogs on, in; under (left) right. it's "
    "they'll café naïve señor übergroß 日本語 新しい кошка गाय 😀 🚗 2nd 3.14 100% #tag @home foo_bar x-y/z $5 ~ | [b] "
    "\\ {c} ½ ² supercalifragilistic qzxv İstanbul rock&roll ... !? <| |> don`t"
)
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def tokenize():
    return text_tokenizer(clip_tokenizer(context_length=77))


@pytest.fixture(scope="module")
def theirs():
    return open_clip.get_tokenizer("ViT-B-32")


def strings() -> list[str]:
    random = Random(0)
    joined = [random.choice([" ", " ", "  ", "\t", "\n"]).join(random.choices(WORDS, k=1 + i % 30)) for i in range(198)]
    return [*joined, "", "a" * 300]


def test_ids_equal_open_clips(tokenize, theirs):
    """Two hundred texts of letters, digits, punctuation and scripts, the empty one and one that is cut."""
    texts = strings()
    ours, expected = tokenize(texts), theirs(texts)
    assert len(texts) == 200
    for text, ids, mask, reference in zip(texts, ours["input_ids"], ours["attention_mask"], expected, strict=True):
        count = int(mask.sum())
        assert ids[:count].tolist() == reference[:count].tolist(), text
        assert ids[count - 1] == 49407 and not reference[count:].any()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("fish &amp; chips", "fish & chips"),  # HTML entities are resolved
        ("a “quoted” word, don\u2019t", 'a "quoted" word, don\'t'),  # curly quotes become straight
        ("\uff46\uff55\uff4c\uff4c", "full"),  # so do full-width letters
        ("ﬁne", "fine"),  # and ligatures
        ("mÃ©tal", "métal"),  # text decoded with the wrong table is mended
        ("\x00a", "a"),  # control characters go
        ("ΟΔΟΣ", "οδος"),  # Python's lower() knows the final sigma
    ],
)
def test_where_open_clip_cleans_texts_and_transformers_does_not(tokenize, theirs, text, cleaned):
    """open_clip runs ftfy and html.unescape first. Our ids are transformers' (as of every CLIP on the hub)."""
    assert not torch.equal(
        tokenize([text])["input_ids"][0], theirs([text])[0, : tokenize([text])["input_ids"].shape[1]]
    )
    ours = tokenize([cleaned])["input_ids"][0]
    if cleaned != "οδος":
        assert ours.tolist() == theirs([text])[0, : len(ours)].tolist()


@pytest.mark.parametrize("marker", ["<|endoftext|>", "<|startoftext|>"])
def test_markers_inside_a_text_are_plain_characters(tokenize, marker):
    (ids,) = tokenize([f"a {marker} cat"])["input_ids"].tolist()
    assert ids[0] == 49406 and ids[-1] == 49407
    assert not {49406, 49407} & set(ids[1:-1])
    tokenizer = clip_tokenizer(context_length=77)
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == f"a{marker}cat"


def test_texts_are_padded_to_the_longest_and_cut_to_the_context():
    tokenize = text_tokenizer(clip_tokenizer(context_length=5))
    encoded = tokenize(["cat", "a very long text about a cat"])
    assert encoded["input_ids"].shape == (2, 5)
    assert encoded["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert encoded["input_ids"][:, -1].tolist() == [49407, 49407]
    assert tokenize(["cat"])["input_ids"].shape == (1, 3)


def test_code_beside_a_tokenizer_is_not_run_and_nobody_is_asked(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    clip_tokenizer(context_length=8).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(ValueError):
        load_tokenizer(tmp_path, context_length=8, hub={})
    assert not marker.exists()
