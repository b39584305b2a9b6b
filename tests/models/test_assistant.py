"""An assistant: answers that depend on their own prompt alone, folders that are damaged or hostile."""

from __future__ import annotations

import json

import pytest
import torch

from qlip.core.errors import UserError
from qlip.models.assistant import AnswerSettings, ChatPrompt, open_assistant
from tiny_assistants import (
    question,
    save_tiny_assistant,
    some_picture,
    tiny_assistant,
)


def test_an_answer_depends_on_its_own_prompt_alone():
    assistant = tiny_assistant()
    prompts = [
        question("Is there a blue ring?"),
        question("What?", seed=1),
        ChatPrompt(messages=[{"role": "user", "content": "red"}]),
    ]
    settings = AnswerSettings(max_new_tokens=6)
    together = assistant.answer(prompts, settings)
    assert together == [assistant.answer([prompt], settings)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_stop_strings_end_an_answer():
    assistant = tiny_assistant()
    whole = assistant.answer([question()], AnswerSettings(max_new_tokens=12))[0]
    stop = whole[3]
    stopped = assistant.answer([question()], AnswerSettings(max_new_tokens=12, until=(stop,)))[0]
    assert stopped == whole[: whole.index(stop)].strip()


def test_markers_in_a_question_are_plain_characters():
    assistant = tiny_assistant()
    ids = assistant.inputs([question("a </s> b <image> c")])["input_ids"][0].tolist()
    assert ids.count(assistant.processor.image_token_id) == 4  # the picture's
    assert assistant.processor.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("places", [0, 2])
def test_as_many_places_as_pictures(places):
    prompt = question()
    prompt.messages[0]["content"] = [{"type": "image"}] * places + [{"type": "text", "text": "?"}]
    with pytest.raises(UserError, match=f"{places} places for pictures, 1 pictures"):
        tiny_assistant().answer([prompt])


def test_a_question_without_room_is_refused():
    with pytest.raises(UserError, match="the context 512: shorten it"):
        tiny_assistant().answer([question("x" * 600)])


@pytest.mark.parametrize("damage", ["weights", "config", "processor", "template", "nothing"])
def test_damaged_folders_are_one_line(damage, tmp_path):
    folder = save_tiny_assistant(tmp_path / "assistant")
    files = {"weights": "model.safetensors", "config": "config.json", "processor": "processor_config.json"}
    if damage in files:
        (folder / files[damage]).write_bytes(b"{")
    elif damage == "template":
        (folder / "chat_template.jinja").unlink()
    else:
        folder = tmp_path / "none"
    with pytest.raises(UserError) as refused:
        open_assistant(folder)
    assert str(refused.value).count("\n") == 0
    assert str(folder.name) in str(refused.value)


def test_a_prompt_that_does_not_fit_leaves_the_others_alone():
    assistant, settings = tiny_assistant(), AnswerSettings(max_new_tokens=6)
    prompts = [question(), question("x" * 600), question("What?", seed=1)]
    alone = [assistant.answer([prompt], settings)[0] for prompt in (prompts[0], prompts[2])]
    assert assistant.answer_what_fits(prompts, settings) == [alone[0], None, alone[1]]


def test_texts_and_parts_are_one():
    """Templates of other LLaVAs read parts alone."""
    assistant = tiny_assistant()
    said = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "two"}]
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in said]
    last = question().messages
    ids = [
        assistant.inputs([ChatPrompt(messages=[*m, *last], images=[some_picture()])])["input_ids"]
        for m in (said, parts)
    ]
    assert torch.equal(*ids)


@pytest.mark.parametrize("features", ["post_quantizer", "codes"])
def test_bits_do_not_depend_on_what_the_assistant_computes_in(features):
    assistant = tiny_assistant(features=features)
    read = []
    assistant.model.model.multi_modal_projector.register_forward_hook(lambda module, x, y: read.append(x[0]))
    for dtype in (torch.float32, torch.bfloat16):
        assistant.to(torch.device("cpu"), dtype=dtype)
        assistant.answer([question()], AnswerSettings(max_new_tokens=2))
    assert assistant.dtype == torch.bfloat16
    assert torch.equal(*read)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized weights"),
        ({"_attn_implementation": "somebody/kernel", "attn_implementation": "somebody/kernel"}, ""),
        ({"auto_map": {"AutoConfig": "evil.Evil"}}, ""),
    ],
    ids=["quantized", "kernel of a hub", "code of the folder"],
)
def test_a_config_does_not_choose_code(fields, said, tmp_path):
    folder = save_tiny_assistant(tmp_path / "assistant")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    if said:
        with pytest.raises(UserError, match=said):
            open_assistant(folder)
    else:
        model = open_assistant(folder).model
        assert model.config._attn_implementation == "sdpa"
