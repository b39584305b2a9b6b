"""QLIP inside transformers' LLaVA: features of the language model, folders in fresh processes, added tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from qlip.core.errors import UserError
from qlip.models.assistant import AnswerSettings, ChatPrompt, open_assistant, save_assistant
from qlip.models.language_model import open_language_model, tiny_language_model
from qlip.models.llava import build_llava, build_processor
from tiny_assistants import (
    SIZE,
    TEXTS,
    question,
    save_tiny_assistant,
    some_picture,
    tiny_assistant,
    tiny_encoder,
    tiny_llava,
)

ROWS = [("hidden", -2), ("hidden", -1), ("post_quantizer", -1), ("codes", -1)]
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("features", "layer"), ROWS, ids=["layer -2", "layer -1", "after Q", "codes"])
@torch.inference_mode()
def test_the_projector_reads_what_table_6_says(features, layer):
    model, _ = tiny_llava(features=features, layer=layer)
    read = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    ids = torch.full((2, 5), model.config.image_token_id)
    ids[:, 4] = 7
    model(input_ids=ids, pixel_values=PIXELS)
    tower = tiny_encoder(seed=0)(PIXELS, output_hidden_states=True)
    expected = {
        ("hidden", -2): lambda: tower.hidden_states[-2][:, 1:],
        ("hidden", -1): lambda: tower.hidden_states[-1][:, 1:],
        ("post_quantizer", -1): lambda: tower.last_hidden_state,
        ("codes", -1): lambda: tower.quantized.z_q,
    }[features, layer]()
    assert torch.equal(read[0], expected)
    if features == "hidden":
        assert len(tower.hidden_states) == 4  # the input and three blocks: -2 is behind the second
    if features == "codes":
        assert expected.shape == (2, 4, 28)
        torch.testing.assert_close(expected.abs(), torch.full_like(expected, 28**-0.5))


@torch.inference_mode()
def test_features_take_the_places_of_image_tokens():
    assistant = tiny_assistant()
    inputs = assistant.inputs([question()])
    embeds = []
    language_model = assistant.model.model.language_model
    language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    assistant.model(**inputs)
    places = inputs["input_ids"][0] == assistant.model.config.image_token_id
    features = assistant.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output[0]
    assert places.sum() == 4
    assert torch.equal(embeds[0][0, places], features)
    table = language_model.get_input_embeddings()
    assert torch.equal(embeds[0][0, ~places], table(inputs["input_ids"][0, ~places]))


@pytest.mark.parametrize(("features", "layer"), ROWS, ids=["layer -2", "layer -1", "after Q", "codes"])
def test_answers_are_those_of_plain_transformers(features, layer, tmp_path):
    """Auto classes, the chat template and `generate`, as their documentation shows them; pictures need no resizing."""
    folder = save_tiny_assistant(tmp_path / "assistant", features=features, layer=layer)
    picture = some_picture(5, size=(16, 16))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=text, images=picture, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    plain = processor.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    ours = open_assistant(folder).answer(
        [ChatPrompt(messages=messages, images=[picture])], AnswerSettings(max_new_tokens=12)
    )
    assert ours == [plain]
    assert plain  # it says something


def test_a_fresh_process_opens_the_folder_after_one_import(tmp_path):
    folder = save_tiny_assistant(tmp_path / "assistant")
    picture = some_picture(5, size=(16, 16))
    picture.save(tmp_path / "picture.png")
    program = f"""
import qlip.models
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r})
model = AutoModelForImageTextToText.from_pretrained({str(folder)!r})
content = [{{"type": "image"}}, {{"type": "text", "text": "How many?"}}]
messages = [{{"role": "user", "content": content}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open({str(tmp_path / "picture.png")!r}), return_tensors="pt")
print(type(model.model.vision_tower).__name__, model.generate(**inputs, max_new_tokens=8)[0].tolist())
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    prompt = question("How many?")
    prompt.images = [picture]
    assistant = open_assistant(folder)
    inputs = assistant.inputs([prompt])
    expected = assistant.model.generate(**inputs, max_new_tokens=8)[0].tolist()
    assert output.strip() == f"QLIPVisionModel {expected}"


def test_added_tokens_get_the_mean_row_and_old_rows_stay():
    torch.manual_seed(0)
    language_model, tokenizer = tiny_language_model(TEXTS, SIZE)
    before = language_model.get_input_embeddings().weight.detach().clone()
    processor = build_processor(tokenizer, image_size=16, patch_size=8)
    model = build_llava(tiny_encoder(), language_model, processor)
    after = model.get_input_embeddings().weight
    assert len(after) == len(before) + 2  # <image> and <pad>
    assert torch.equal(after[: len(before)], before)
    torch.testing.assert_close(after[len(before)], before.mean(0))
    assert model.lm_head.weight is after  # tied


def test_untied_outputs_and_spare_rows(tmp_path):
    """A language model with more rows than its tokenizer has tokens, as Qwen's, keeps them all."""
    _, tokenizer = tiny_language_model(TEXTS, SIZE)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    language_model, tokenizer = open_language_model(tmp_path / "lm")
    assert language_model.dtype == torch.bfloat16
    processor = build_processor(tokenizer, image_size=16, patch_size=8)
    model = build_llava(tiny_encoder(), language_model, processor)
    save_assistant(model, folder=tmp_path / "assistant", processor=processor, step=None)
    opened = open_assistant(tmp_path / "assistant").model
    assert opened.dtype == torch.float32
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(opened.lm_head.weight, opened.get_input_embeddings().weight)
    assert len(opened.lm_head.weight) == config.vocab_size


def test_features_that_the_encoder_does_not_have():
    language_model, tokenizer = tiny_language_model(TEXTS, SIZE)
    processor = build_processor(tokenizer, image_size=16, patch_size=8)
    with pytest.raises(UserError, match="layer -6: the encoder has states -4 to 3"):
        build_llava(tiny_encoder(), language_model, processor, layer=-6)
    plain = tiny_encoder(quantizer="none", hidden_size_post_q=16, quantizer_embed_type="identity")
    with pytest.raises(UserError, match="this encoder has none: take hidden"):
        build_llava(plain, language_model, processor, features="codes")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("llama_3", "needs <|start_header_id|> <|end_header_id|> <|eot_id|>"),
        ("vicuna", "'vicuna' is neither known nor a file: give --chat-template vicuna_v1"),
    ],
)
def test_templates_that_do_not_fit(template, said):
    _, tokenizer = tiny_language_model(TEXTS, SIZE)
    with pytest.raises(UserError) as refused:
        build_processor(tokenizer, image_size=16, patch_size=8, chat_template=template)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{% for m in messages %}{{ m.content }", "fails: unexpected '}'"),
        (b"{{ raise_exception('no') }}", "fails: no"),
        (b"\xff\xfe", "cannot be read as UTF-8"),
    ],
    ids=["broken", "refusing", "no text"],
)
def test_templates_that_are_broken(content, said, tmp_path):
    """In a file of the user's, and in a folder that is opened."""
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError) as refused:
        tiny_llava(chat_template=str(tmp_path / "t.jinja"))
    assert said in str(refused.value)
    assert str(refused.value).count("\n") == 0
    if "fails" in said:
        assistant = tiny_assistant()
        assistant.processor.chat_template = content.decode()
        with pytest.raises(UserError, match="the chat template of this tokenizer fails"):
            assistant.answer([question()])


@pytest.mark.parametrize("present", [True, False], ids=["not a model", "no folder"])
def test_a_language_model_that_is_none(present, tmp_path):
    folder = Path(tmp_path / "lm")
    if present:
        folder.mkdir()
    with pytest.raises(UserError, match="lm"):
        open_language_model(folder)
