"""What a recipe of an assistant returns, and how it becomes a run: chats and pictures in, a LLaVA folder out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.conversation_loader import ConversationDataConfig, conversation_loader
from qlip.data.conversations import open_conversations
from qlip.engine.parallel import block_stacks
from qlip.engine.trainer import TrainerConfig, train
from qlip.models.assistant import open_assistant, save_assistant
from qlip.models.language_model import TinyLanguageModel, open_language_model, tiny_language_model
from qlip.models.llava import FeatureKind, build_llava, build_processor, end_answers_as, with_chat_template
from qlip.models.lora import LoraSettings, add_lora, merge_lora
from qlip.models.qlip.loading import load_model
from qlip.recipes.running import (
    LEAST_OF_TRAINER,
    begin,
    prepare_folder,
    refuse_small,
    said_once,
    tracker_of,
)
from qlip.tasks.instruct import InstructConfig, InstructTask

LEAST = {
    "trainer": LEAST_OF_TRAINER,
    "data": {"batch_size": 1, "global_batch_size": 0, "num_workers": 0, "max_length": 8},
    "lora": {"rank": 0},
    "tiny": dict.fromkeys(("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"), 1),
}
TEXTS_FOR_TOKENIZER = 2000  # conversations from which a tiny language model's tokenizer learns


@dataclass(kw_only=True, slots=True)
class InstructionRunConfig:
    """Everything that decides the training of an assistant."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe this came from."""
    tower: str = ""
    """The vision tower: a QLIP folder or hub id."""
    language_model: str = ""
    """Folder of a causal language model of transformers: Vicuna, Llama-3, Qwen, ..."""
    init: str = ""
    """Export of an earlier stage to go on from; it brings tower, projector, language model and chat template."""
    features: FeatureKind = "hidden"
    """What of the tower the projector reads: hidden states, post_quantizer or codes (rows of Table 6)."""
    layer: int = -2
    """Which hidden states; -2 is the paper's choice, -1 are those before the quantizer."""
    chat_template: str = "auto"
    """auto (the language model's own, or that of `init`), vicuna_v1, llama_3, chatml, short, or a Jinja file."""
    pad_to_square: bool = True
    """Whether pictures get bars of the mean colour, LLaVA's way; otherwise they are cropped."""
    fresh_language_model: bool = False
    """Whether, without `language_model`, a tiny one that knows nothing is made, its tokenizer from the chats."""
    tiny: TinyLanguageModel = field(default_factory=TinyLanguageModel)
    """Its size."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank updates instead of all weights of the language model."""
    task: InstructConfig = field(default_factory=InstructConfig)
    """What trains, and rates."""
    data: ConversationDataConfig = field(default_factory=ConversationDataConfig)
    """Conversations, pictures, batch sizes."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and how often."""


@dataclass(kw_only=True, slots=True)
class InstructionOptions:
    """What `qlip train RECIPE` takes for a recipe of an assistant: its fields and where to run."""

    run: Annotated[InstructionRunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    out: Path
    """Run folder; starting again in it resumes."""
    accept_changes: bool = False
    """Resume although the config differs from the one the run was started with."""


def run_instruction(config: InstructionRunConfig, *, folder: Path, accept_changes: bool = False) -> Path:
    """Train what the config describes in `folder`, or resume, and return the export folder.

    Under torchrun all processes call it. Raises `UserError` before training for missing data or parts, and for parts
    that do not fit together.
    """
    _refuse_impossible(config)
    batch_size, micro_batches = begin(config.trainer, config.data)
    model, processor = distributed.on_all_ranks(partial(_parts, config))
    task = InstructTask(model, config.task)
    export_folder = folder / "export"
    if prepare_folder(folder, config, **_sizes(model), accept_changes=accept_changes):
        return export_folder
    loader = distributed.on_all_ranks(
        partial(
            conversation_loader,
            config.data,
            processor=processor,
            seed=config.trainer.seed,
            ledger=folder / "skipped.jsonl",
            rank=distributed.rank(),
            num_ranks=distributed.world_size(),
            need_images=config.task.trains == "projector",
        )
    )

    def export(trained: nn.Module) -> None:
        assert isinstance(trained, LlavaForConditionalGeneration)
        save_assistant(merge_lora(trained), folder=export_folder, processor=processor, step=config.trainer.steps)

    with said_once():
        train(
            task,
            loader,
            config.trainer,
            folder=folder,
            title=config.recipe,
            batch_size=batch_size,
            micro_batches=micro_batches,
            evaluators={},
            tracker=tracker_of(config, folder),
            export=export,
        )
    if distributed.rank() == 0:
        console.print(f'the model is {export_folder}; ask it: qlip ask {export_folder} picture.png "a question"')
    return export_folder


def _sizes(model: nn.Module) -> dict[str, int]:
    """For `prepare_folder`: frozen weights have no moments, which of a language model's are most of a checkpoint."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return {"num_weights": weights, "extra_held": -2 * frozen}


def _parts(config: InstructionRunConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    model, processor = _from_earlier(config) if config.init else _from_scratch(config)
    longest = int(model.config.text_config.max_position_embeddings)
    if config.data.max_length > longest:
        fresh = not (config.init or config.language_model)
        raise UserError(
            f"data.max_length {config.data.max_length} is more than the {'fresh ' * fresh}language model's {longest} "
            f"positions: {'add --language-model FOLDER, or ' * fresh}lower it"
        )
    if config.lora.rank:
        add_lora(model, config.lora)
    trainer = config.trainer
    wants_blocks = trainer.parallel == "fsdp" or trainer.activation_checkpointing or trainer.compile
    if wants_blocks and not block_stacks(model.model.language_model):
        raise UserError(
            f"the blocks of a {type(model.model.language_model).__name__} are not found, so they cannot be sharded, "
            "checkpointed or compiled one by one: leave these options out, or take Llama, Qwen, ..."
        )
    if distributed.rank() == 0 and config.language_model and config.task.trains != "projector":
        console.print("the projector is fresh; LLaVA trains it alone first, and goes on from there with --init")
    return model, processor


def _from_scratch(config: InstructionRunConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    encoder = load_model(config.tower).vision_model
    if config.language_model:
        language_model, tokenizer = open_language_model(config.language_model)
    else:
        language_model, tokenizer = tiny_language_model(_texts(config), config.tiny)
    processor = build_processor(
        tokenizer,
        image_size=encoder.config.image_size,
        patch_size=encoder.config.patch_size,
        chat_template=config.chat_template,
        pad_to_square=config.pad_to_square,
        features=config.features,
    )
    model = build_llava(encoder, language_model, processor, features=config.features, layer=config.layer)
    return model, processor


def _from_earlier(config: InstructionRunConfig) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The export of the first stage; pictures may be padded, and chats written in another template, from now on."""
    assistant = open_assistant(config.init)
    model, processor = assistant.model.float(), assistant.processor
    features = getattr(model.config.vision_config, "features", "hidden")
    layer = model.config.vision_feature_layer
    if features != config.features or (features == "hidden" and layer != config.layer):
        options = f"--features {features}" + (f" --layer {layer}" if features == "hidden" else "")
        raise UserError(f"{config.init} reads other features than this run would: give {options}")
    processor.image_processor.do_pad = config.pad_to_square
    if config.chat_template != "auto":
        end_answers_as(model, with_chat_template(processor, config.chat_template))
    return model, processor


def _texts(config: InstructionRunConfig) -> Iterator[str]:
    """All texts of the first conversations."""
    conversations = open_conversations(config.data.conversations)
    for conversation in islice(conversations, TEXTS_FOR_TOKENIZER):
        for message in conversation.messages:
            parts = message["content"]
            yield parts if isinstance(parts, str) else " ".join(part["text"] for part in parts if "text" in part)


def _refuse_impossible(config: InstructionRunConfig) -> None:
    if not config.data.conversations:
        raise UserError("no conversations: give --data.conversations FILE.json (`qlip data conversations` makes one)")
    if config.init:
        if config.tower or config.language_model:
            raise UserError("--init brings tower and language model with it: leave --tower and --language-model out")
    elif not config.tower:
        raise UserError("no vision tower: add --tower QLIP (`make demo` trains one), or --init RUN/export")
    elif not (config.language_model or config.fresh_language_model):
        raise UserError("no language model: add --language-model FOLDER (Vicuna, Llama-3, Qwen), or --init RUN/export")
    if config.features != "hidden" and config.layer != InstructionRunConfig(recipe="").layer:
        raise UserError(f"--layer has no effect on features {config.features}, which lie behind the last: leave it out")
    refuse_small(config, LEAST)
    if config.task.trains == "projector" and config.lora.rank:
        raise UserError("task.trains is projector, so LoRA would not train: set --lora.rank 0")
    if not 0 <= config.lora.dropout < 1:
        raise UserError(f"lora.dropout is {config.lora.dropout}: give 0 or more, below 1")
    if config.trainer.eval_every:
        raise UserError("trainer.eval_every: an assistant is evaluated when its run has ended (qlip eval); set it to 0")
    if config.trainer.images_every:
        raise UserError("trainer.images_every: an assistant draws no pictures; set it to 0")
