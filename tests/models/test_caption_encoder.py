"""What a generator reads of a text: features of the right network, at the right end, of any prompt one may type."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_generators import tiny_config
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5ForConditionalGeneration

from qlip.core.errors import UserError
from qlip.models.caption_encoder import (
    LONGEST_PROMPT,
    CaptionEncoder,
    _to_the_right,
    cleaned_prompt,
    open_caption_encoder,
)

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "star", "and", "ring"]


def write_t5(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A T5 of width 8 that knows five words, with its decoder, as FLAN-T5 is published."""
    torch.manual_seed(3)
    config = T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    T5ForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    markers = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **markers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5"))


def opened(source: Path, **changes: object) -> CaptionEncoder:
    return open_caption_encoder(tiny_config(**changes), tokenizer_model=None, source=str(source))


def test_texts_move_to_the_right_end_in_order():
    mask = torch.rand(20, 7) < 0.5
    mask = mask.sort(1, descending=True).values  # from no slot to all
    features = torch.randn(20, 7, 3)
    moved, moved_mask = _to_the_right(features, mask), _to_the_right(mask, mask)
    for row in range(20):
        count = int(mask[row].sum())
        assert moved_mask[row].tolist() == [False] * (7 - count) + [True] * count
        assert torch.equal(moved[row, 7 - count :], features[row, :count])


def test_t5_features_are_those_of_the_encoder_itself(t5):
    encoder = opened(t5, caption_length=6)
    ids = encoder.tokenize(["a red star", "ring", "a red star and a red ring and a star"])
    assert ids["input_ids"][1].tolist() == [7, 1, 0, 0, 0, 0]
    assert ids["attention_mask"][1].tolist() == [1, 1, 0, 0, 0, 0]
    assert ids["input_ids"][2].tolist() == [3, 4, 5, 6, 3, 1]  # cut, its end kept
    features, mask = encoder.encode(ids["input_ids"], ids["attention_mask"])
    assert mask.sum(1).tolist() == [4, 2, 6] and features.shape == (3, 6, 8) and not features.requires_grad
    plain = T5EncoderModel.from_pretrained(t5).eval()
    for row, words in enumerate(([3, 4, 5, 1], [7, 1], [3, 4, 5, 6, 3, 1])):
        with torch.no_grad():
            wanted = plain(input_ids=torch.tensor([words])).last_hidden_state[0]
        assert torch.allclose(features[row, 6 - len(words) :], wanted, atol=1e-5)
    network = encoder.network
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())


def test_a_t5_in_half_precision_stays_so(tmp_path):
    encoder = opened(write_t5(tmp_path, dtype=torch.bfloat16))
    features, _ = encoder.encode(**encoder.tokenize(["a star"]))
    assert features.dtype == torch.bfloat16


def test_the_configs_own_folder_is_taken_if_no_other_is_given(t5, tmp_path):
    config = tiny_config(caption_source=str(t5))
    assert open_caption_encoder(config, tokenizer_model=None).network is not None
    config = tiny_config(caption_source=str(tmp_path / "moved away"))
    assert open_caption_encoder(config, tokenizer_model=None, source=str(t5)).network is not None


def test_the_text_tower_of_a_qlip_gives_its_last_states():
    model = tiny_model()
    config = tiny_config(caption_encoder="qlip", caption_width=32, caption_length=12)
    encoder = open_caption_encoder(config, tokenizer_model=model)
    ids, mask = torch.tensor([[1, 2, 299] + [0] * 9, [4, 5, 6, 7, 8, 299] + [0] * 6]), torch.zeros(2, 12)
    mask[0, :3], mask[1, :6] = 1, 1
    features, moved = encoder.encode(ids, mask.long())
    assert moved.sum(1).tolist() == [3, 6]
    for row, count in enumerate((3, 6)):
        with torch.no_grad():
            wanted = model.text_model(ids[row : row + 1, :count]).last_hidden_state[0]
        assert torch.allclose(features[row, 12 - count :], wanted, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.text_model.parameters())


def test_a_learned_table_reads_clips_ids():
    encoder = open_caption_encoder(tiny_config(caption_encoder="learned"), tokenizer_model=None)
    ids, mask = encoder.encode(**encoder.tokenize(["star", "a red star and a ring", ""]))
    assert ids[0].tolist()[1:] == [49406, 1565, 49407] and mask[0].tolist() == [False, True, True, True]
    assert ids[1].tolist() == [49406, 320, 736, 49407]  # cut, its end kept
    assert mask[2].tolist() == [False, False, True, True]


def test_how_much_is_cut_and_what_is_unknown(t5):
    encoder = opened(t5, caption_length=4)
    assert [encoder.num_cut(text) for text in ("a red star", "a red star and a ring", "")] == [0, 3, 0]
    assert encoder.has_unknown("a blue star") and not encoder.has_unknown("a red star")
    assert encoder.has_unknown("红色的星星")
    assert encoder.num_cut("a </s> <pad> star") > 0  # markers are plain characters
    learned = open_caption_encoder(tiny_config(caption_encoder="learned"), tokenizer_model=None)
    assert learned.num_cut("a red star and a ring") == 4 and not learned.has_unknown("红色的星星 ★ \u200d")


def refused(source: Path | str, **changes: object) -> str:
    with pytest.raises(UserError) as error:
        open_caption_encoder(tiny_config(**changes), tokenizer_model=None, source=str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_t5_is_one_line(t5, tmp_path):
    remedy = "download google/flan-t5-xl and give its folder with --caption-encoder"
    assert refused("") == f"no folder of the T5 encoder is given: {remedy}"
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'} is no folder: {remedy}"
    assert "gives features of width 8, the model takes 5" in refused(t5, caption_width=5)
    (tmp_path / "empty").mkdir()
    assert "cannot read a T5 encoder from" in refused(tmp_path / "empty")
    for name, damage in (("model.safetensors", b"\0" * 9), ("config.json", b"{"), ("tokenizer.json", b"[]")):
        folder = shutil.copytree(t5, tmp_path / name)
        (folder / name).write_bytes(damage)
        assert "cannot read a T5 encoder from" in refused(folder), name


def test_half_a_t5_is_one_line(t5, tmp_path):
    """Missing tensors would be drawn at random, with a warning that nobody reads."""
    folder = shutil.copytree(t5, tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.startswith("encoder.block.1")))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lacks 1 tensors of a T5 encoder: download it again" in refused(folder)


def test_a_text_tower_that_is_not_there_or_does_not_fit_is_one_line():
    with pytest.raises(UserError, match="caption encoder qlip needs a QLIP tokenizer: take t5 or learned"):
        open_caption_encoder(tiny_config(caption_encoder="qlip"), tokenizer_model=None)
    with pytest.raises(UserError, match="the text tower gives features of width 32, the model takes 8"):
        open_caption_encoder(tiny_config(caption_encoder="qlip"), tokenizer_model=tiny_model())
    with pytest.raises(UserError, match="captions of 21 slots, but the text tower has 20: set caption_length to 20"):
        config = tiny_config(caption_encoder="qlip", caption_width=32, caption_length=21)
        open_caption_encoder(config, tokenizer_model=tiny_model())


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\tred \n star\r\n", "a red star"),
        ("a\0red\x1b[31m star\x7f\x9b", "a red [31m star"),
        ("红色的星星", "红色的星星"),
        ("نجمة حمراء", "نجمة حمراء"),
        ("👩\u200d🚀 ★ 🇨🇭", "👩\u200d🚀 ★ 🇨🇭"),
        ("e\u0301toile", "étoile"),
        ("half \ud83d of a pair", "half of a pair"),
        ("a\u00a0b\u2028c\u3000d", "a b c d"),
        ("<|endoftext|> </s>", "<|endoftext|> </s>"),
        ("x" * LONGEST_PROMPT, "x" * LONGEST_PROMPT),
    ],
    ids=["blanks", "controls", "chinese", "arabic", "emoji", "composed", "surrogate", "spaces", "markers", "longest"],
)
def test_prompts_keep_what_can_be_read(prompt, cleaned):
    assert cleaned_prompt(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["", " \n\t", "\0\0", "\ue000", "\ud800"], ids=repr)
def test_empty_prompts_are_refused(prompt):
    with pytest.raises(UserError, match="the prompt is empty: say what the picture should show, in quotes"):
        cleaned_prompt(prompt)


def test_a_prompt_beyond_any_caption_is_refused():
    with pytest.raises(UserError, match=f"the prompt has {LONGEST_PROMPT + 1} characters: give at most"):
        cleaned_prompt("x" * (LONGEST_PROMPT + 1))
