"""The folder of a UM3 and what it can do: pictures of seeds, captions, continuations, scores; a fresh process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_generators import read_vocabularies_once
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlip.core.errors import UserError
from qlip.models.unified import UM3ForCausalLM
from qlip.models.unified_model import Unified, WritingSettings, is_unified, open_unified
from qlip.models.unified_processor import UM3Processor
from tiny_assistants import some_picture
from tiny_unified import IMAGE_LENGTH, tiny_llama_folder, tiny_unified_folder

PROMPTS = ["a red star", "two"]


@pytest.fixture(autouse=True, scope="module")
def vocabularies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_vocabularies_once(patch)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unified_folder(tmp_path_factory.mktemp("models") / "um3")


@pytest.fixture
def unified(folder: Path) -> Unified:
    return open_unified(folder)


# --- drawing --------------------------------------------------------------------------------------------------------


def test_a_picture_belongs_to_its_prompt_and_seed(unified):
    together = unified.bits([*PROMPTS, "two"], seeds=[1, 2, 3])
    assert together.shape == (3, 4, 28) and together.dtype == torch.bool
    alone = [unified.bits([prompt], seeds=[seed])[0] for prompt, seed in zip([*PROMPTS, "two"], (1, 2, 3), strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[1], together[2])
    pictures = unified.generate(PROMPTS, seeds=[1, 2])
    assert torch.equal(pictures, unified.processor.image_tokenizer.decode(together[:2]))
    assert pictures.shape == (2, 3, 16, 16) and pictures.dtype == torch.uint8


def test_without_temperature_the_most_probable_picture_is_drawn(unified):
    """Step by step on whole sequences, each id the best of its sub-code."""
    unified.settings = WritingSettings(temperature=0.0)
    bits = unified.bits(["a red star"], seeds=[9])
    ids = unified.processor(["a red star"], continue_image=True)["input_ids"]
    for place in range(IMAGE_LENGTH):
        first, behind = unified.processor.vocabulary.place_bounds()[place % 4]
        best = unified.model(input_ids=ids).logits[0, -1, first:behind].argmax() + first
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    assert torch.equal(unified.processor.ids_to_bits(ids[:, -IMAGE_LENGTH:]), bits)


def test_guidance_is_between_the_prompt_and_the_empty_prompt(unified):
    """First id at temperature 0: the best of ``u + s (c - u)`` in log-probabilities, of the prompt and of none."""
    unified.settings = WritingSettings(temperature=0.0, guidance=6.0)
    bits = unified.bits(["a red star"], seeds=[0])
    first, behind = unified.processor.vocabulary.place_bounds()[0]
    conditional, unconditional = (
        unified.model(input_ids=unified.processor([parts], continue_image=True)["input_ids"]).logits[0, -1]
        for parts in (["a red star"], [])
    )
    guided = torch.lerp(unconditional.log_softmax(-1), conditional.log_softmax(-1), 6.0)[first:behind]
    assert unified.processor.bits_to_ids(bits)[0, 0] == first + guided.argmax()
    unified.settings = WritingSettings(temperature=0.0)
    assert not torch.equal(bits, unified.bits(["a red star"], seeds=[0]))


def test_a_caller_hears_of_the_tokens(unified):
    heard = []
    bits = unified.bits(PROMPTS, seeds=[1, 2], on_tokens=lambda done, bits: heard.append((done, bits)))
    assert heard[-1][0] == 4 and torch.equal(heard[-1][1], bits)


def test_a_prompt_that_leaves_no_room_is_refused(unified):
    with pytest.raises(UserError, match="leaves no room for a picture of 16 in 256: shorten it"):
        unified.bits(["word " * 200], seeds=[0])
    with pytest.raises(UserError, match="shorten it"):
        unified.continue_from(["word " * 300])


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"guidance": -2.0}, {"max_new_tokens": 0}], ids=str
)
def test_impossible_settings_are_refused(unified, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        unified.continue_from(["a"], WritingSettings(**wrong))


# --- captions, continuations, scores --------------------------------------------------------------------------------


def test_captions_are_one_line_of_text_and_belong_to_pictures(unified):
    pictures = [some_picture(1, size=(30, 20)), some_picture(2), Image.new("RGB", (16, 16), "red")]
    settings = WritingSettings(max_new_tokens=20)
    captions = unified.caption(pictures, settings, seeds=[1, 2, 3])
    assert captions == [unified.caption([one], settings, seeds=[i + 1])[0] for i, one in enumerate(pictures)]
    assert len(set(captions)) == 3 and not any("\n" in one or "<" in one[:1] for one in captions)
    greedy = WritingSettings(temperature=0.0, max_new_tokens=20)
    assert unified.caption(pictures, greedy, seeds=[1, 2, 3]) == unified.caption(pictures, greedy)


def test_a_text_is_continued_with_text_alone_unless_it_may_draw(unified):
    for seed in range(4):
        parts = unified.continue_from(["Once upon"], WritingSettings(max_new_tokens=60), seed=seed)
        assert all(isinstance(part, str) for part in parts)
    settings = WritingSettings(max_new_tokens=1, temperature=0.0)
    assert unified.continue_from(["a", some_picture(1)], settings, images=True) == unified.continue_from(
        ["a", some_picture(1)], settings, images=True, seed=5
    )


def test_interleaved_output_holds_pictures(unified):
    """A model that begins an image whenever it can: its table's row for the marker follows whatever was there last."""
    begin = unified.processor.vocabulary.image_begin
    unified.model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([begin]), 1e4))
    parts = unified.continue_from(["a"], WritingSettings(max_new_tokens=2 * (IMAGE_LENGTH + 2) + 5), images=True)
    assert [part.size for part in parts] == [(16, 16)] * 2, "the third, cut off, is left out"
    assert all(isinstance(part, str) for part in unified.continue_from(["a"], WritingSettings(max_new_tokens=9)))


def test_scores_of_texts_are_those_of_the_plain_softmax_over_text(unified):
    for text, (nll, count) in zip(["a red star", ""], unified.text_nll(["a red star", ""]), strict=True):
        ids = torch.tensor([[*unified.processor.encode([text]), unified.processor.tokenizer.eos_token_id]])
        states = unified.model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        logits = states @ unified.model.lm_head.weight[: unified.model.config.text_vocab_size].T
        assert nll == pytest.approx(F.cross_entropy(logits, ids[0, 1:], reduction="sum").item(), abs=1e-3)
        assert count == ids.shape[1] - 1
    assert unified.text_nll(["word " * 400])[0][1] == unified.context_length - 1


# --- folders --------------------------------------------------------------------------------------------------------


def test_only_its_own_folders_are_opened(folder, tmp_path):
    assert is_unified(folder) and not is_unified(tmp_path) and not is_unified(folder / "image_tokenizer")
    llama = tiny_llama_folder(tmp_path / "llama")
    for other in (tmp_path, llama, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"holds no unified model: give"):
            open_unified(other)


@pytest.mark.parametrize("broken", ["missing tensor", "torn file", "another shape", "no weights"])
def test_damaged_weights_are_one_line(folder, tmp_path, broken):
    copy = shutil.copytree(folder, tmp_path / "um3")
    file = copy / "model.safetensors"
    tensors = load_file(file)
    match broken:
        case "missing tensor":
            del tensors["lm_head.weight"]
            save_file(tensors, file, metadata={"format": "pt"})
        case "torn file":
            file.write_bytes(file.read_bytes()[:-100])
        case "another shape":
            tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].contiguous()
            save_file(tensors, file, metadata={"format": "pt"})
        case "no weights":
            file.unlink()
    with pytest.raises(UserError) as caught:
        open_unified(copy)
    assert "\n" not in str(caught.value)


def test_what_is_saved_is_what_was_there(folder, unified):
    assert json.loads((folder / "config.json").read_text())["model_type"] == "um3"
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert isinstance(again, UM3ForCausalLM)
    for name, tensor in unified.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    identity = unified.identity()
    assert identity["encoder_fingerprint"] == unified.model.config.image_tokenizer
    assert identity == open_unified(folder).identity()
    assert identity["parameters"] == {"unified": sum(parameter.numel() for parameter in again.parameters())}
    unified.to(torch.device("cpu"), dtype=torch.bfloat16)
    assert unified.identity() == identity | {"dtype": "bfloat16"}


def test_what_a_meta_device_and_used_memory_leave_is_overwritten(folder, unified, monkeypatch):
    """Fresh memory is often zero; here it never is, so a buffer that nobody computes would show."""
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: _dirty(empty(*args, **options)))
    again = open_unified(folder)
    monkeypatch.undo()
    ids = unified.processor(["a red star"])["input_ids"]
    assert torch.equal(again.model(input_ids=ids).logits, unified.model(input_ids=ids).logits)


def _dirty(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.is_meta else tensor


FRESH = """
import sys, torch
torch.set_num_threads(1)
import qlip.models
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
folder = sys.argv[1]
model, processor = AutoModelForCausalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
assert len(AutoTokenizer.from_pretrained(folder)) == len(processor.tokenizer)
torch.manual_seed(3)
ids = model.generate(**processor([["a red star"], ["two"]], continue_image=True), do_sample=True, max_new_tokens=24)
print(ids.tolist())
"""


def test_a_fresh_process_generates_the_same_with_transformers_alone(folder, unified):
    command, environment = [sys.executable, "-c", FRESH, str(folder)], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = unified.processor([["a red star"], ["two"]], continue_image=True)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder)
    here = model.generate(**rows, do_sample=True, max_new_tokens=24).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == here
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.text_vocab_size


def test_in_bfloat16_rotary_tables_and_pictures_stay_exact(unified):
    """A table of frequencies in bfloat16 would turn distant tokens by wrong angles."""
    before = {name: buffer.clone() for name, buffer in unified.model.named_buffers()}
    tokenizer = unified.processor.image_tokenizer.measured.model
    images = {name: tensor.clone() for name, tensor in tokenizer.named_parameters()}
    unified.to(torch.device("cpu"), dtype=torch.bfloat16)
    assert unified.dtype == torch.bfloat16 and before
    for name, buffer in unified.model.named_buffers():
        assert torch.equal(buffer, before[name]) and buffer.dtype == before[name].dtype, name
    for name, tensor in tokenizer.named_parameters():
        assert torch.equal(tensor, images[name])
    assert unified.generate(["a red star"], seeds=[0]).shape == (1, 3, 16, 16)


def test_pictures_go_to_the_image_tokenizers_device(unified):
    unified.processor.image_tokenizer.to(torch.device("meta"))
    assert unified.processor.image_ids(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).device.type == "meta"


def test_logits_that_are_not_finite_are_one_line(unified):
    with torch.no_grad():
        unified.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite: take --precision fp32"):
        unified.generate(["a star"], seeds=[0])


def test_plain_tuples_are_given_where_they_are_asked_for(unified):
    ids = unified.processor(["a star"])["input_ids"]
    logits = unified.model(ids, return_dict=False)[0]
    assert torch.equal(logits, unified.model(ids).logits)


def test_model_and_processor_are_saved_as_transformers_users_do(unified, tmp_path):
    unified.model.save_pretrained(tmp_path / "copy")
    unified.processor.save_pretrained(tmp_path / "copy")
    again = open_unified(tmp_path / "copy")
    assert torch.equal(again.bits(["a red star"], seeds=[3]), unified.bits(["a red star"], seeds=[3]))
    with pytest.raises(UserError, match="image_tokenizer is there already: choose another folder"):
        unified.processor.save_pretrained(tmp_path / "copy")
    by_hand = UM3Processor(unified.processor.tokenizer, unified.processor.image_tokenizer, unified.model.config)
    with pytest.raises(UserError, match="save its model with save_unified instead"):
        by_hand.save_pretrained(tmp_path / "other")
