"""The processor: open_clip's token ids, plain markers, a round trip through files, and rounded pictures."""

from __future__ import annotations

from random import Random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from qlip.core.pixels import from_uint8, normalise
from qlip.models.qlip.loading import load_processor, save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor, clip_tokenizer, text_tokenizer
from qlip.recipes.run import ModelConfig, TowerSize

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


def test_a_processor_survives_its_files(tmp_path):
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=9)
    processor = QLIPProcessor.for_size(16, context_length=9)
    save_model(QLIPModel(sizes.build_config()), folder=tmp_path / "m", processor=processor, step=0)
    again = load_processor(tmp_path / "m")
    assert isinstance(again, QLIPProcessor)
    assert type(again.image_processor) is CLIPImageProcessorPil
    assert again.tokenizer.model_max_length == 9
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8))
    texts = ["a cat", "a very long text about a cat and a dog"]
    for process in (lambda p: p(images=picture, return_tensors="pt")["pixel_values"],):
        assert torch.equal(process(processor), process(again)) and process(again).shape == (1, 3, 16, 16)
    ours, theirs = (text_tokenizer(p.tokenizer)(texts) for p in (processor, again))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    both = again(images=picture, text=texts, return_tensors="pt", padding=True, truncation=True)
    assert set(both) >= {"pixel_values", "input_ids", "attention_mask"} and both["input_ids"].shape == (2, 9)


def test_postprocess_returns_the_pictures_that_went_in():
    pictures = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    processor = QLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=clip_tokenizer(context_length=4))
    returned = processor.postprocess(from_uint8(pictures))
    assert len(returned) == 2 and returned[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(returned[1]), pictures[1].permute(1, 2, 0).numpy())


def test_postprocess_rounds_and_clamps():
    processor = QLIPProcessor(image_processor=CLIPImageProcessorPil(), tokenizer=clip_tokenizer(context_length=4))
    unit = torch.tensor([-3.0, 0.4 / 255, 0.6 / 255, 99.6 / 255, 254.4 / 255, 7.0]).expand(1, 3, 1, 6)
    pixels = normalise(unit).requires_grad_()
    (picture,) = processor.postprocess(pixels)
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 1, 100, 254, 255]
