"""Recipes of assistants: LLaVA-1.5's numbers, its shapes with QLIP-L-14-392, and language models of three families."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_assistant_runs import (
    NUM_SCENES,
    figures_of,
    save_language_model,
    second_stage,
    tiny,
    weights_of,
    write_home,
)
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from qlip.core.config import from_json, to_json
from qlip.core.errors import UserError
from qlip.models.assistant import AnswerSettings, open_assistant
from qlip.models.chat_templates import CHATML, LLAMA_3
from qlip.models.llava import build_llava, build_processor
from qlip.models.qlip.towers import QLIPVisionModel
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.instruction_run import InstructionRunConfig, run_instruction
from tiny_assistants import question

ASSISTANTS = [name for name in RECIPES if isinstance(find_recipe(name), InstructionRunConfig)]
LLAVA = [name for name in ASSISTANTS if name.startswith("llava_v15")]
PRETRAINING, TUNING = 558_128, 665_298  # conversations of LLaVA's two files


@pytest.mark.parametrize("name", ASSISTANTS)
def test_a_recipes_config_survives_json(name):
    config = find_recipe(name)
    assert config.recipe == name and RECIPES[name][1]
    again = from_json(InstructionRunConfig, json.loads(json.dumps(to_json(config))))
    assert again == config and find_recipe(name) == config and find_recipe(name) is not config


@pytest.mark.parametrize("name", ASSISTANTS)
def test_a_recipe_says_what_it_needs_and_what_to_expect(name):
    text = getattr(importlib.import_module(RECIPES[name][0]), name).__doc__
    for heading in ("Command", "Hardware", "Time", "Expect"):
        assert re.search(rf"^    {heading}: +\S", text, re.MULTILINE), heading
    assert f"train {name} " in text
    assert ("--init" in text) == name.endswith("finetune") and ("--tower" in text) != name.endswith("finetune")


@pytest.mark.parametrize("name", LLAVA)
def test_the_numbers_are_those_of_llava_1_5(name):
    """QLIP section 7; the rate falls as a cosine in every run (engine/optim)."""
    config = find_recipe(name)
    assert isinstance(config, InstructionRunConfig)
    first = name.endswith("pretrain")
    num, batch, rate = (PRETRAINING, 256, 1e-3) if first else (TUNING, 128, 2e-5)
    optimizer = config.task.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.part_lrs) == ("adamw", rate, 0.0, {})
    assert (optimizer.betas, optimizer.eps, optimizer.clip_norm) == ((0.9, 0.999), 1e-8, 1.0)  # of its trainer
    assert config.data.global_batch_size == batch
    assert config.trainer.steps == math.ceil(num / batch)  # one epoch
    assert optimizer.warmup_steps == math.ceil(0.03 * config.trainer.steps)
    assert config.data.max_length == 2048 and config.trainer.precision == "bf16"
    assert config.task.trains == ("projector" if first else "projector_and_language_model")
    assert (config.data.plain, config.pad_to_square) == (first, not first)
    assert config.data.group_by_length
    assert (config.features, config.layer, config.lora.rank) == ("hidden", -2, 0)
    assert config.trainer.ema_decay == 0
    if "7b" in name:
        assert (config.chat_template, config.trainer.parallel) == ("vicuna_v1", "fsdp")
        assert config.trainer.activation_checkpointing
        assert batch % (8 * config.data.batch_size) == 0  # on the eight GPUs it is made for
    else:
        assert config.chat_template == "auto"
    assert batch % config.data.batch_size == 0


def vicuna_tokenizer() -> PreTrainedTokenizerFast:
    """32,000 words and Vicuna's three special ones among them."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 32_000))]
    named = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(named, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def num_parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


def test_llava_7b_with_qlip_l_has_the_papers_shapes():
    """784 features of width 1024 -> 4096 -> 4096; all on the meta device but the projector."""
    vision = find_recipe("qlip_l_14_392").model.build_config().vision_config
    with torch.device("meta"):
        encoder = QLIPVisionModel(vision)
        vicuna = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, max_position_embeddings=4096))
    processor = build_processor(vicuna_tokenizer(), image_size=392, patch_size=14, chat_template="vicuna_v1")
    model = build_llava(encoder, vicuna, processor)
    parts, projector = model.model, model.model.multi_modal_projector
    shapes = [tuple(layer.weight.shape) for layer in (projector.linear_1, projector.linear_2)]
    assert shapes == [(4096, 1024), (4096, 4096)]
    assert num_parameters(projector) == (1024 + 1) * 4096 + (4096 + 1) * 4096 == 20_979_712
    # the encoder, then both halves of its bottleneck: 1024 -> 1024 -> 28 -> 1024 -> 1024
    bottleneck = (1024 + 1) * 1024 + (1024 + 1) * 28 + (28 + 1) * 1024 + (1024 + 1) * 1024
    assert num_parameters(parts.vision_tower) == 303_858_624 + bottleneck == 306_016_220
    # a block: four maps of attention, three of the feed-forward, two norms; a table has a row for <image>
    block = 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    table = (32_000 + 1) * 4096
    assert num_parameters(parts.language_model) == 32 * block + table + 4096
    assert num_parameters(model.lm_head) == table
    assert num_parameters(vicuna) == 6_738_415_616 + 2 * 4096  # Vicuna's own, and <image> in both tables
    assert model.config.image_seq_length == 28**2 == 784
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    pixels = processor.image_processor(torch.zeros(3, 100, 200, dtype=torch.uint8), return_tensors="pt")
    assert processor.replace_image_token(pixels, 0) == "<image>" * 784
    assert pixels["pixel_values"].shape == (1, 3, 392, 392)
    features = parts.vision_tower(torch.zeros(1, 3, 392, 392, device="meta"), output_hidden_states=True).hidden_states
    assert features[-2][:, 1:].shape == (1, 784, 1024)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


GROUPED = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA_3_MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
Family = tuple[type[PreTrainedConfig], type[PreTrainedModel], dict[str, Any], dict[str, Any]]
FAMILIES: dict[str, Family] = {
    "llama, untied": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": False},
        {"chat_template": LLAMA_3, "markers": LLAMA_3_MARKERS},
    ),
    "qwen2, tied": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"tie_word_embeddings": True},
        {"chat_template": CHATML, "markers": CHATML_MARKERS, "end": "<|im_end|>", "spare": 40},
    ),
    "qwen3, tied, wide heads, bf16": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"tie_word_embeddings": True, "head_dim": 8},
        {"chat_template": CHATML, "markers": CHATML_MARKERS, "dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_from_a_folder_comes_through_both_stages(home, tmp_path, family):
    """Own template, grouped heads, tied and untied tables: untouched by the first stage, trained by the second."""
    config_class, model_class, sizes, saving = FAMILIES[family]
    folder = save_language_model(tmp_path / "llm", config_class(**GROUPED, **sizes), model_class, **saving)
    first = tiny(home, language_model=folder, task__trains="projector", data__plain=True, steps=1)
    run_instruction(first, folder=tmp_path / "first")
    own, after = load_file(Path(folder) / "model.safetensors"), weights_of(tmp_path / "first")
    tied = sizes["tie_word_embeddings"]
    assert ("language_model.lm_head.weight" in after) == ("lm_head.weight" in own) == (not tied)
    for name, tensor in own.items():  # tables may have rows for <image> and <pad> behind
        assert torch.equal(after[f"language_model.{name}"][: len(tensor)], tensor.float()), name
    added = len(after["language_model.model.embed_tokens.weight"]) - len(own["model.embed_tokens.weight"])
    assert added == (0 if saving.get("spare") else 2)
    run_instruction(second_stage(home, tmp_path / "first" / "export", steps=2), folder=tmp_path / "second")
    assert all(0 < line["token_loss"] < math.inf for line in figures_of(tmp_path / "second"))
    trained = weights_of(tmp_path / "second")
    assert all(not torch.equal(trained[f"language_model.{name}"], after[f"language_model.{name}"]) for name in own)
    assistant = open_assistant(tmp_path / "second" / "export")
    assert assistant.processor.chat_template.endswith(saving["chat_template"])
    config, tokenizer = assistant.model.config.text_config, assistant.processor.tokenizer
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    end = saving["markers"][-1]  # of an answer
    assert tokenizer.convert_tokens_to_ids(end) in assistant.model.generation_config.eos_token_id
    tables = [table.weight for table in (assistant.model.get_input_embeddings(), assistant.model.lm_head)]
    assert (tables[0] is tables[1]) == tied
    assert len(assistant.answer([question()], AnswerSettings(max_new_tokens=3))) == 1


def test_a_language_model_without_a_chat_template_needs_one(home, tmp_path):
    folder = save_language_model(tmp_path / "llm", LlamaConfig(**GROUPED), LlamaForCausalLM, chat_template=None)
    config = tiny(home, language_model=folder, steps=1)
    with pytest.raises(UserError) as error:
        run_instruction(config, folder=tmp_path / "run")
    said = str(error.value)
    assert "\n" not in said and "no chat template of its own: give --chat-template vicuna_v1|llama_3|chatml" in said
    config.chat_template = "vicuna_v1"
    run_instruction(config, folder=tmp_path / "run")
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    config.chat_template = str(tmp_path / "own.jinja")
    run_instruction(config, folder=tmp_path / "own")
    assert open_assistant(tmp_path / "own" / "export").processor.chat_template.endswith("[{{ m.content }}]{% endfor %}")


def test_an_epoch_of_the_scenes_is_whole(home, tmp_path):
    """Six batches of four: the seventh step begins the next epoch."""
    run_instruction(tiny(home, steps=7, trainer__save_every=7), folder=tmp_path)
    (position,) = (tmp_path / "checkpoints").glob("step_*/position.json")
    saved = json.dumps(json.loads(position.read_text()))
    assert '"epoch": 1' in saved and '"done": 1' in saved and NUM_SCENES == 6 * 4
    assert isinstance(open_assistant(tmp_path / "export").model, LlavaForConditionalGeneration)
