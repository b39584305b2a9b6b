"""Texts and pictures to ids and back: markers as plain characters, pictures as the tokenizer has them, whole or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_llamagen import DS4, random_weights, written
from tiny_generators import read_vocabularies_once
from torch import Tensor
from transformers import AutoProcessor

from qlip.core.errors import UserError
from qlip.models.image_tokenizer import open_image_tokenizer
from qlip.models.unified_model import save_unified
from qlip.models.unified_processor import TOKENIZER_FOLDER, UM3Processor
from qlip.models.widening import RESERVED
from tiny_assistants import some_picture
from tiny_tokenizer import save_tiny_tokenizer
from tiny_unified import IMAGE_LENGTH, tiny_llama, tiny_unified_folder, tiny_unified_parts


@pytest.fixture(autouse=True, scope="module")
def vocabularies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_vocabularies_once(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unified_folder(tmp_path_factory.mktemp("models") / "um3")


@pytest.fixture(scope="module")
def processor(folder: Path) -> UM3Processor:
    return UM3Processor.from_pretrained(folder)


def pixels_of(*pictures: Image.Image) -> Tensor:
    """(b, 3, 16, 16) uint8 of pictures of that size."""
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).permute(0, 3, 1, 2)


def square(seed: int) -> Image.Image:
    return some_picture(seed, size=(16, 16))


# --- to ids ---------------------------------------------------------------------------------------------------------


def test_a_sequence_is_bos_texts_and_pictures_between_markers(processor):
    tokenizer, vocabulary = processor.tokenizer, processor.vocabulary
    ids = processor.encode(["a red star", square(1), "two"])
    red, two = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a red star", "two"))
    image = processor.image_ids(pixels_of(square(1)))[0].tolist()
    begin, end = vocabulary.image_begin, vocabulary.image_end
    assert ids == [tokenizer.bos_token_id, *red, begin, *image, end, *two]
    assert len(image) == IMAGE_LENGTH and min(image) >= vocabulary.text_size


@pytest.mark.parametrize(
    "text",
    ["<|image_begin|> red <|image_end|>", "</s>", "<s>a</s><s>", "<<|image_end|>|image_end|>", "<|image_begin|>" * 3],
    ids=["markers of images", "an end", "two documents", "one inside another", "three"],
)
def test_markers_that_a_user_types_are_plain_characters(processor, text):
    ids = processor.encode([text])
    assert not set(ids[1:]) & set(processor.tokenizer.all_special_ids)
    (back,) = processor.decode(ids)
    assert back.replace(" ", "") == text.replace(" ", "")


def test_reserved_tokens_that_a_user_types_are_plain_too(processor):
    _, tokenizer = tiny_llama(reserved=True)
    config = tiny_unified_parts(processor.image_tokenizer)[0].config
    reserved = UM3Processor(tokenizer, processor.image_tokenizer, config)
    assert not set(reserved.encode_text("".join(RESERVED))) & set(tokenizer.all_special_ids)


def test_pictures_are_the_tokenizers_bits(processor):
    pixels = pixels_of(square(1), square(2))
    bits = processor.image_tokenizer.encode(pixels)
    ids = processor.image_ids(pixels)
    weights = 2 ** torch.arange(6, -1, -1)
    by_hand = (bits.unflatten(-1, (4, 7)) * weights).sum(-1) + torch.arange(4) * 128 + processor.vocabulary.text_size
    assert torch.equal(ids, by_hand.flatten(1)) and ids.dtype == torch.int64
    assert torch.equal(processor.ids_to_bits(ids), bits)


def test_any_picture_becomes_a_square_of_the_tokenizer(processor, tmp_path):
    picture = some_picture(3, size=(48, 24))
    picture.save(tmp_path / "picture.png")
    ids = processor.encode([picture])
    assert ids == processor.encode([tmp_path / "picture.png"]) == processor.encode([np.asarray(picture)])
    assert ids == processor.encode([np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 255])
    small = picture.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    assert (pixels_of(small).int() - processor.pixels([picture]).int()).abs().max() <= 1


def test_rows_of_a_batch_are_padded_on_the_left(processor):
    batch = processor([["a red star"], [square(1)], []])
    bos, pad = processor.tokenizer.bos_token_id, processor.pad_id
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [len(processor.encode(["a red star"])), IMAGE_LENGTH + 3, 1]
    for row, mask, length in zip(batch["input_ids"], batch["attention_mask"], lengths, strict=True):
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert row[len(row) - length] == bos and (row[: len(row) - length] == pad).all()
    drawing = processor([["a red star"], []], continue_image=True)["input_ids"]
    assert (drawing[:, -1] == processor.vocabulary.image_begin).all()


def test_one_sequence_is_a_batch_of_one_and_a_text_alone_is_a_sequence(processor):
    wanted = [processor.encode(["a red star"])]
    for parts in (["a red star"], [["a red star"]], "a red star"):
        assert processor(parts)["input_ids"].tolist() == wanted, parts
    assert processor(square(1))["input_ids"].tolist() == processor([square(1)])["input_ids"].tolist()


# --- and back -------------------------------------------------------------------------------------------------------


def test_a_picture_comes_back_as_the_tokenizer_decodes_it(processor):
    ids = processor.encode([square(1)])
    (picture,) = processor.decode(ids)
    tokenizer = processor.image_tokenizer
    assert torch.equal(pixels_of(picture), tokenizer.decode(tokenizer.encode(pixels_of(square(1)))))
    both = processor.decode_image_tokens(processor.image_ids(pixels_of(square(1), square(2))))
    assert np.array_equal(both[0], picture) and not np.array_equal(both[1], picture)


def test_texts_and_pictures_come_back_in_order(processor):
    parts = ["a red star", square(1), "two", square(2), square(1)]
    back = processor.decode(torch.tensor(processor.encode(parts)))
    assert [type(part) is str for part in back] == [True, False, True, False, False]
    assert (back[0], back[2]) == ("a red star", "two") and np.array_equal(back[1], back[4])


@pytest.mark.parametrize("cut", [1, 2, 5, IMAGE_LENGTH + 1])
def test_a_picture_that_is_cut_off_is_left_out(processor, cut):
    ids = processor.encode(["a red star", square(1)])
    assert processor.decode(ids[:-cut])[:1] == ["a red star"]
    assert len(processor.decode(ids[:-cut])) == (2 if cut == 1 else 1)  # without its end alone it is whole
    words = processor.encode_text("two")
    assert processor.decode([*ids[: -cut - 1], *words]) == ["a red startwo"]


def test_ids_that_are_no_picture(processor):
    ids = processor.image_ids(pixels_of(square(1)))
    with pytest.raises(ValueError, match=r"not \(b, 16\) of whole pictures"):
        processor.decode_image_tokens(ids[:, :-1])
    with pytest.raises(ValueError, match="another sub-code"):
        processor.decode_image_tokens(ids.roll(1, dims=1))
    sequence = processor.encode(["a", square(1), "b"])
    start = sequence.index(processor.vocabulary.image_begin) + 1
    moved = sequence[:start] + sequence[start + 1 : start + IMAGE_LENGTH] + sequence[start : start + 1]
    assert processor.decode(moved + sequence[start + IMAGE_LENGTH :]) == ["a", "b"]
    assert processor.decode([]) == [] == processor.decode([processor.tokenizer.bos_token_id])


# --- folders --------------------------------------------------------------------------------------------------------


def test_auto_processor_finds_it(folder, processor):
    found = AutoProcessor.from_pretrained(folder)
    assert isinstance(found, UM3Processor)
    assert found.encode(["a", square(1)]) == processor.encode(["a", square(1)])


def test_another_image_tokenizer_is_refused_with_both_fingerprints(folder, processor, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "um3")
    shutil.rmtree(copy / TOKENIZER_FOLDER)
    save_tiny_tokenizer(copy / TOKENIZER_FOLDER, seed=1)
    other = open_image_tokenizer(copy / TOKENIZER_FOLDER)
    with pytest.raises(UserError, match="give the image tokenizer") as caught:
        UM3Processor.from_pretrained(copy)
    for fingerprint in (other.encoder_fingerprint, processor.image_tokenizer.encoder_fingerprint):
        assert fingerprint[:12] in str(caught.value)


@pytest.mark.parametrize(
    "broken", ["no config", "no image tokenizer", "no text tokenizer", "a wrong field", "a torn file"]
)
def test_broken_folders_are_one_line(folder, tmp_path, broken):
    copy = shutil.copytree(folder, tmp_path / "um3")
    config = json.loads((copy / "config.json").read_text())
    match broken:
        case "no config":
            (copy / "config.json").unlink()
        case "no image tokenizer":
            shutil.rmtree(copy / TOKENIZER_FOLDER)
        case "no text tokenizer":
            (copy / "tokenizer.json").unlink()
        case "a wrong field":
            (copy / "config.json").write_text(json.dumps(config | {"visual_division": [7, 7]}))
        case "a torn file":
            (copy / "config.json").write_text(json.dumps(config)[:-40])
    with pytest.raises(UserError) as caught:
        UM3Processor.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_a_vq_tokenizer_has_one_sub_code(tmp_path):
    """LlamaGen's VQGAN of 32 codes at 16 px: 4 x 4 tokens of 5 bits."""
    weights = random_weights(DS4, num_res=1, seed=0)
    weights["quantize.embedding.weight"] = torch.randn(32, 8)
    source = written(tmp_path / "vq.pt", {"model": weights})
    images = open_image_tokenizer(source, image_size=16)
    model, tokenizer = tiny_unified_parts(images, division=())
    assert model.config.visual_division == [5] and model.vocabulary.image_length == 16
    save_unified(model, folder=tmp_path / "um3", tokenizer=tokenizer, image_tokenizer=str(source), step=None)
    processor = UM3Processor.from_pretrained(tmp_path / "um3")
    (picture,) = processor.decode(processor.encode([square(1)]))
    assert torch.equal(pixels_of(picture), images.decode(images.encode(pixels_of(square(1)))))
