"""What a recipe of UM3 returns, and how it becomes a run: documents, tokens and captions in, a UM3 folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor, nn
from torchvision.utils import make_grid
from transformers import PreTrainedTokenizerBase

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.core.log import console
from qlip.data.batches import DataConfig, training_loader
from qlip.data.mixing import MixDataConfig, mixing_loader
from qlip.data.packing import SequenceLayout
from qlip.data.text_files import read_documents, text_files
from qlip.data.token_store import TokenStore
from qlip.engine.interfaces import Loader
from qlip.engine.trainer import TrainerConfig, train
from qlip.evals.sample_grid import save_grid
from qlip.models.image_tokenizer import TOKENIZER_FOLDER, ImageTokenizer, open_image_tokenizer
from qlip.models.language_model import TinyLanguageModel, tiny_language_model
from qlip.models.unified import UM3ForCausalLM
from qlip.models.unified_model import Unified, is_unified, open_unified, save_unified
from qlip.models.unified_processor import UM3Processor
from qlip.models.widening import WideningConfig, widen
from qlip.recipes import RECIPES, find_recipe
from qlip.recipes.running import LEAST_OF_TRAINER, begin, prepare_folder, refuse_small, said_once, tracker_of
from qlip.tasks.unified import UnifiedConfig, UnifiedTask

LEAST = {
    "trainer": LEAST_OF_TRAINER,
    "data": {"batch_size": 1, "global_batch_size": 0, "sequence_length": 8, "calm_down_steps": 0},
    "images": {"num_workers": 0, "shuffle_buffer": 0},
    "tiny": dict.fromkeys(("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"), 1),
}
TEXTS_FOR_TOKENIZER = 2000  # documents, and captions of each store, from which a tiny tokenizer learns


@dataclass(kw_only=True, slots=True)
class UnifiedRunConfig:
    """Everything that decides the training of a UM3."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe this came from."""
    init: str = ""
    """Folder of a UM3 to start from: what `qlip import llama` has made, or the export of another run."""
    tokenizer: str = ""
    """The image tokenizer, a QLIP folder; `init` brings its own."""
    fresh_language_model: bool = False
    """Whether, without `init`, a tiny language model that knows nothing is widened; its tokenizer is learned too."""
    tiny: TinyLanguageModel = field(default_factory=TinyLanguageModel)
    """Its size."""
    widening: WideningConfig = field(default_factory=WideningConfig)
    """How its vocabulary gets visual ids."""
    task: UnifiedConfig = field(default_factory=UnifiedConfig)
    """Losses and rates."""
    data: MixDataConfig = field(default_factory=MixDataConfig)
    """Documents, tokens and captions, and how they are mixed and packed."""
    images: DataConfig = field(default_factory=DataConfig)
    """Without token stores: captioned pictures (`images.train`), encoded on the fly."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and how often."""
    sample_prompts: tuple[str, ...] = ()
    """What `trainer.images_every` draws."""


@dataclass(kw_only=True, slots=True)
class UnifiedOptions:
    """What `qlip train RECIPE` takes for a recipe of UM3: its fields and where to run."""

    run: Annotated[UnifiedRunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    out: Path
    """Run folder; starting again in it resumes."""
    accept_changes: bool = False
    """Resume although the config differs from the one the run was started with."""


def run_unified(config: UnifiedRunConfig, *, folder: Path, accept_changes: bool = False) -> Path:
    """Train what the config describes in `folder`, or resume, and return the export folder.

    Under torchrun all processes call it. Raises `UserError` before training for missing data or parts, and for token
    stores of another tokenizer.
    """
    _refuse_impossible(config)
    batch_size, micro_batches = begin(config.trainer, config.data)
    source, model, tokenizer, images = distributed.on_all_ranks(partial(_parts, config))
    export_folder = folder / "export"
    weights = sum(parameter.numel() for parameter in model.parameters())
    if prepare_folder(folder, config, num_weights=weights, accept_changes=accept_changes):
        return export_folder
    processor = UM3Processor(tokenizer, images, model.config)
    loader = distributed.on_all_ranks(partial(_loader, config, processor, folder, micro_batches))
    with said_once():
        train(
            UnifiedTask(model, config.task, tokenizer=images),
            loader,
            config.trainer,
            folder=folder,
            title=config.recipe,
            batch_size=batch_size,
            micro_batches=micro_batches,
            evaluators={},
            tracker=tracker_of(config, folder),
            pictures=_pictures(config, processor, folder) if config.trainer.images_every else None,
            export=partial(
                save_unified,
                folder=export_folder,
                tokenizer=tokenizer,
                image_tokenizer=source,
                step=config.trainer.steps,
            ),
        )
    if distributed.rank() == 0:
        console.print(f'the model is {export_folder}; try it: qlip complete {export_folder} "Once upon a time"')
    return export_folder


def sequence_layout(processor: UM3Processor) -> SequenceLayout:
    """How the data become ids of this model."""
    vocabulary, tokenizer = processor.vocabulary, processor.tokenizer
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(
            "this text tokenizer has no markers of beginning and end: take a Llama 3 with its own tokenizer"
        )
    return SequenceLayout(
        tokenize=processor.encode_text,
        begin=int(tokenizer.bos_token_id),
        end=int(tokenizer.eos_token_id),
        image_begin=vocabulary.image_begin,
        image_end=vocabulary.image_end,
        image_length=vocabulary.image_length,
        visual_ids=processor.bits_to_ids,
    )


def _parts(
    config: UnifiedRunConfig,
) -> tuple[str, UM3ForCausalLM, PreTrainedTokenizerBase, ImageTokenizer]:
    """Where the image tokenizer lies, the model, and both tokenizers."""
    if config.init:
        unified = open_unified(config.init)
        model, processor = unified.model.float(), unified.processor
        source = str(Path(config.init) / TOKENIZER_FOLDER)
        tokenizer, images = processor.tokenizer, processor.image_tokenizer
    else:
        source, images = config.tokenizer, open_image_tokenizer(config.tokenizer)
        language_model, tokenizer = tiny_language_model(_texts(config), config.tiny)
        model = widen(language_model, tokenizer, images, config.widening)
    longest = int(model.config.max_position_embeddings)
    if config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is more than the model's {longest} positions: lower it"
        )
    return source, model, tokenizer, images


def _texts(config: UnifiedRunConfig) -> Iterator[str]:
    """First documents, and captions of the first pictures of each store."""
    if config.data.text:
        found = (
            entry
            for file in text_files(config.data.text)
            for _, entry in read_documents(file, text_field=config.data.text_field, first=0, wanted=_any_document)
        )
        yield from islice((text for text in found if isinstance(text, str)), TEXTS_FOR_TOKENIZER)
    for path in dict.fromkeys(filter(None, (config.data.tokens, config.data.captioned_tokens))):
        for row in islice(TokenStore(path), TEXTS_FOR_TOKENIZER):
            yield from row.captions


def _any_document(number: int) -> bool:
    return True


def _loader(config: UnifiedRunConfig, processor: UM3Processor, folder: Path, micro_batches: int) -> Loader:
    ranks = {"rank": distributed.rank(), "num_ranks": distributed.world_size()}
    pictures = None
    ledger = folder / "skipped.jsonl"
    if config.images.train:
        pictures = training_loader(
            replace(config.images, batch_size=config.data.batch_size, global_batch_size=0),
            image_size=processor.image_tokenizer.image_size,
            tokenize=_no_ids,
            seed=config.trainer.seed,
            ledger=ledger,
            **ranks,
        )
    return mixing_loader(
        config.data,
        layout=sequence_layout(processor),
        encoder_fingerprint=processor.image_tokenizer.encoder_fingerprint,
        seed=config.trainer.seed,
        micro_batches=micro_batches,
        images=pictures,
        ledger=ledger,
        **ranks,
    )


def _no_ids(texts: list[str]) -> dict[str, Tensor]:
    """Captions are tokenized where rows are packed."""
    return {}


def _pictures(config: UnifiedRunConfig, processor: UM3Processor, folder: Path) -> Callable[[nn.Module, int], Tensor]:
    """What draws samples/step_XXXXXXXX.png: a picture of every sample prompt, always from the same seed."""

    def paint(model: nn.Module, step: int) -> Tensor:
        assert isinstance(model, UM3ForCausalLM)
        processor.image_tokenizer.to(model.device)
        pictures = Unified(model, processor).generate(
            list(config.sample_prompts), seeds=[0] * len(config.sample_prompts)
        )
        grid = make_grid(pictures.cpu(), nrow=4)
        save_grid(folder / "samples" / f"step_{step:08d}.png", grid)
        return grid

    return paint


def _refuse_impossible(config: UnifiedRunConfig) -> None:
    if config.init:
        if config.tokenizer:
            raise UserError("--init brings its image tokenizer with it: leave --tokenizer out")
        base = find_recipe(config.recipe) if config.recipe in RECIPES else config
        if isinstance(base, UnifiedRunConfig) and (config.widening, config.tiny) != (base.widening, base.tiny):
            raise UserError(
                "--init brings its vocabulary with it: leave --widening and --tiny out; `qlip import llama` has options"
            )
        if not is_unified(config.init):
            raise UserError(f"{config.init} is no UM3: make one with qlip import llama LLAMA OUT --tokenizer QLIP")
    elif not config.fresh_language_model:
        raise UserError("no model to start from: add --init FOLDER (qlip import llama LLAMA FOLDER --tokenizer QLIP)")
    elif not config.tokenizer:
        raise UserError("no image tokenizer: add --tokenizer QLIP (`make demo` trains one)")
    refuse_small(config, LEAST)
    if config.task.z_loss < 0:
        raise UserError(f"task.z_loss is {config.task.z_loss}: give 0 or more")
    if config.trainer.eval_every:
        raise UserError("trainer.eval_every: a UM3 is evaluated when its run has ended (qlip eval); set it to 0")
    if config.trainer.images_every and not config.sample_prompts:
        raise UserError("trainer.images_every draws sample prompts: add --sample-prompts, or set it to 0")
