"""A QLIP folder, scenes with their conversations, and `scenes_llava_tiny` cut down to a second on one core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qlip.core.log import read_metrics
from qlip.data.scene_conversations import write_scene_conversations
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.qlip.loading import save_model
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes import find_recipe
from qlip.recipes.instruction_run import InstructionRunConfig
from qlip.recipes.model import ModelConfig, TowerSize
from tiny_assistants import TEXTS

SIZE = TinyLanguageModel(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, vocab_size=300)
NUM_SCENES = 24


def write_home(folder: Path) -> Path:
    """`tower`, a QLIP of 16 px and 2 x 2 patches; `scenes`, shards; `scenes.json`, their questions; `captions.json`."""
    torch.manual_seed(0)
    size = TowerSize(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=size, decoder=size, text=size, context_length=16, projection_dim=16
    )
    processor = QLIPProcessor.for_size(16, context_length=16)
    save_model(QLIPModel(sizes.build_config()), folder=folder / "tower", processor=processor, step=0)
    write_scene_shards(folder / "scenes", num=NUM_SCENES, split="train", config=SceneConfig(image_size=16))
    write_scene_conversations(str(folder / "scenes"), folder / "scenes.json")
    write_scene_conversations(str(folder / "scenes"), folder / "captions.json", captions=True)
    return folder


def tiny(home: Path, *, steps: int = 3, **changes: Any) -> InstructionRunConfig:
    """`scenes_llava_tiny` with a language model of width 16 and batches of 4; `changes` with __ for a dot."""
    config = find_recipe("scenes_llava_tiny")
    assert isinstance(config, InstructionRunConfig)
    config.tower, config.tiny = str(home / "tower"), replace(SIZE)
    config.data.conversations, config.data.images = str(home / "scenes.json"), str(home / "scenes")
    config.data.batch_size, config.task.optimizer.warmup_steps = 4, 1
    config.trainer.steps, config.trainer.log_every, config.trainer.save_every = steps, 1, 2
    config.trainer.device, config.trainer.precision, config.trainer.tracker = "cpu", "fp32", "none"
    return changed(config, **changes)


def second_stage(home: Path, export: Path, **changes: Any) -> InstructionRunConfig:
    """The same from an export of the first."""
    return tiny(home, **{"init": str(export), "tower": "", **changes})


def changed(config: Any, **changes: Any) -> Any:
    """The config with other fields; `data__images` is `data.images`."""
    for path, value in changes.items():
        *parts, name = path.split("__")
        owner = config
        for part in parts:
            owner = getattr(owner, part)
        assert hasattr(owner, name), path
        setattr(owner, name, value)
    return config


def save_language_model(
    folder: Path,
    config: PreTrainedConfig,
    model_class: type[PreTrainedModel],
    *,
    chat_template: str | None,
    markers: tuple[str, ...] = (),
    end: str | None = None,
    spare: int = 0,
    dtype: torch.dtype = torch.float32,
) -> str:
    """A causal language model as hubs have them: `config` gets the vocabulary of a small byte-level tokenizer, and
    `spare` rows more than that."""
    tokenizer = tokenizer_of(markers=markers, end=end)
    tokenizer.chat_template = chat_template
    config.vocab_size = len(tokenizer) + spare
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    torch.manual_seed(1)
    model_class(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokenizer_of(*, markers: tuple[str, ...], end: str | None) -> PreTrainedTokenizerBase:
    """Bytes and a few pairs, and markers of a chat template."""
    _, tokenizer = tiny_language_model(TEXTS, SIZE)
    tokenizer.add_special_tokens({"additional_special_tokens": list(markers)})
    tokenizer.eos_token = end or tokenizer.eos_token
    return tokenizer


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Of a run or an export."""
    export = folder / "export" if (folder / "export").is_dir() else folder
    return load_file(export / "model.safetensors")


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of tensors that are not bit for bit the same."""
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def figures_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speed, which is never the same twice."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(run / "metrics.jsonl")]
