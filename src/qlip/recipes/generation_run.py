"""What a text-to-image recipe returns, and how it becomes a run: tokens and captions in, a generator folder out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torchvision.utils import make_grid

from qlip.core import distributed
from qlip.core.errors import UserError
from qlip.data.batches import DataConfig, training_loader
from qlip.data.token_loader import TokenDataConfig, token_loader
from qlip.engine.interfaces import Loader
from qlip.engine.trainer import TrainerConfig, train
from qlip.evals.sample_grid import save_grid
from qlip.models.caption_encoder import CaptionEncoder, cleaned_prompt, open_caption_encoder
from qlip.models.generator import Generator, save_generator, text_side
from qlip.models.image_tokenizer import ImageTokenizer, open_image_tokenizer
from qlip.models.sampling import SamplingConfig
from qlip.models.text_to_image import TextToImageConfig, TextToImageModel
from qlip.models.visual_tokens import HeadKind
from qlip.recipes.running import (
    LEAST_OF_TRAINER,
    begin,
    prepare_folder,
    refuse_small,
    said_once,
    tracker_of,
)
from qlip.tasks.next_token import NextTokenConfig, NextTokenTask

LEAST = {
    "trainer": LEAST_OF_TRAINER,
    "data": {"batch_size": 1, "global_batch_size": 0, "shuffle_window": 1},
    "images": {"num_workers": 0, "shuffle_buffer": 0},
}
SUBCODE_BITS = 14  # of a sub-code unless told, LlamaGen's vocabulary


@dataclass(kw_only=True, slots=True)
class GeneratorSize:
    """Size of the generator and how it reads captions and writes tokens; defaults are LlamaGen-XL's."""

    hidden_size: int = 1280
    """Width d."""
    num_layers: int = 36
    """Blocks."""
    num_heads: int = 20
    """Attention heads."""
    intermediate_size: int = 3584
    """Feed-forward width."""
    head: HeadKind = "flat"
    """flat (sub-codes as successive positions), depth (one position, a small transformer) or bitwise."""
    division: tuple[int, ...] = ()
    """Bits of each sub-code; as few of at most 14 bits as it takes if not given, 14 + 14 for QLIP."""
    depth_layers: int = 4
    """Blocks of the depth head."""
    bit_flips: float = 0.0
    """bitwise head: up to this share of the history's bits is flipped in training."""
    dropout: float = 0.1
    """Of input embeddings, attention outputs and feed-forward outputs."""
    caption_encoder: Literal["t5", "qlip", "learned"] = "t5"
    """A frozen T5 (`--caption-encoder FOLDER`), the tokenizer's own text tower, or a table that trains too."""
    caption_length: int = 120
    """Slots of a caption; longer ones are cut."""
    caption_width: int = 2048
    """Width of the learned table; of t5 and qlip their own."""
    caption_dropout: float = 0.1
    """Share of captions that are replaced by the empty one, which guidance needs."""
    guidance: float = 7.5
    """Default scale in sampling, written into the export."""
    initializer_range: float = 0.02
    """Standard deviation of fresh weights."""


@dataclass(kw_only=True, slots=True)
class GenerationRunConfig:
    """Everything that decides the training of a text-to-image model."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe this came from."""
    tokenizer: str = ""
    """The image tokenizer: a QLIP folder, a VQModel folder of diffusers, or LlamaGen's VQGAN file."""
    tokenizer_image_size: int = 0
    """Side of the pictures, for VQ tokenizers, which take many."""
    caption_encoder: str = ""
    """Folder of the T5 encoder."""
    model: GeneratorSize = field(default_factory=GeneratorSize)
    """Size, head, captions."""
    task: NextTokenConfig = field(default_factory=NextTokenConfig)
    """Rates."""
    data: TokenDataConfig = field(default_factory=TokenDataConfig)
    """A token store that `qlip tokenize` has made, and batch sizes."""
    images: DataConfig = field(default_factory=DataConfig)
    """Without a token store: pictures (`images.train`), encoded on the fly; its batch sizes are those of `data`."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How long and how often."""
    sample_prompts: tuple[str, ...] = ()
    """What `trainer.images_every` draws."""


@dataclass(kw_only=True, slots=True)
class GenerationOptions:
    """What `qlip train RECIPE` takes for a text-to-image recipe: its fields and where to run."""

    run: Annotated[GenerationRunConfig, tyro.conf.arg(name="")]
    """The recipe."""
    out: Path
    """Run folder; starting again in it resumes."""
    accept_changes: bool = False
    """Resume although the config differs from the one the run was started with."""


def run_generation(config: GenerationRunConfig, *, folder: Path, accept_changes: bool = False) -> Path:
    """Train what the config describes in `folder`, or resume, and return the export folder.

    Under torchrun all processes call it. Raises `UserError` before training for missing data or parts, and for a token
    store of another tokenizer.
    """
    _refuse_impossible(config)
    batch_size, micro_batches = begin(config.trainer, config.data)
    tokenizer, captions, model = distributed.on_all_ranks(partial(_parts, config))
    export_folder = folder / "export"
    weights = sum(parameter.numel() for parameter in model.parameters())
    if prepare_folder(folder, config, num_weights=weights, accept_changes=accept_changes):
        return export_folder
    loader = distributed.on_all_ranks(partial(_loader, config, tokenizer, captions, folder))
    with said_once():
        train(
            NextTokenTask(model, config.task, captions=captions, tokenizer=tokenizer, seed=config.trainer.seed),
            loader,
            config.trainer,
            folder=folder,
            title=config.recipe,
            batch_size=batch_size,
            micro_batches=micro_batches,
            evaluators={},
            tracker=tracker_of(config, folder),
            pictures=_pictures(config, tokenizer, captions, folder) if config.trainer.images_every else None,
            export=partial(save_generator, folder=export_folder, tokenizer=config.tokenizer, step=config.trainer.steps),
        )
    return export_folder


def generator_config(size: GeneratorSize, tokenizer: ImageTokenizer, *, caption_encoder: str) -> TextToImageConfig:
    """The transformers config of a fresh generator for the tokens of `tokenizer`. Raises `UserError` for sizes that do
    not fit together."""
    bits = tokenizer.num_bits
    count = -(-bits // SUBCODE_BITS)
    division = size.division or tuple(bits * (j + 1) // count - bits * j // count for j in range(count))
    try:
        return TextToImageConfig(
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            intermediate_size=size.intermediate_size,
            initializer_range=size.initializer_range,
            dropout=size.dropout,
            grid=list(tokenizer.grid),
            num_bits=bits,
            head=size.head,
            division=list(division),
            depth_layers=size.depth_layers,
            bit_flips=size.bit_flips,
            caption_encoder=size.caption_encoder,
            caption_source=str(Path(caption_encoder).resolve()) if caption_encoder else "",
            caption_width=_caption_width(size, tokenizer, caption_encoder),
            caption_length=size.caption_length,
            caption_dropout=size.caption_dropout,
            guidance=size.guidance,
            image_tokenizer=tokenizer.encoder_fingerprint,
            image_tokenizer_name=tokenizer.name,
            image_size=tokenizer.image_size,
        )
    except (StrictDataclassError, ValueError) as error:  # transformers' configs wrap theirs in the former
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"model: {reason}; change the --model options") from None


def _caption_width(size: GeneratorSize, tokenizer: ImageTokenizer, caption_encoder: str) -> int:
    qlip = text_side(tokenizer)
    if size.caption_encoder == "qlip" and qlip is not None:
        return qlip.config.text_config.hidden_size
    if size.caption_encoder == "t5":
        path = Path(caption_encoder) / "config.json"
        try:
            return int(json.loads(path.read_text())["d_model"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"no T5 encoder in {caption_encoder or 'the empty path'}: download google/flan-t5-xl and give its "
                "folder with --caption-encoder"
            ) from None
    return size.caption_width


def _parts(config: GenerationRunConfig) -> tuple[ImageTokenizer, CaptionEncoder, TextToImageModel]:
    tokenizer = open_image_tokenizer(config.tokenizer, image_size=config.tokenizer_image_size)
    described = generator_config(config.model, tokenizer, caption_encoder=config.caption_encoder)
    captions = open_caption_encoder(described, tokenizer_model=text_side(tokenizer))
    return tokenizer, captions, TextToImageModel(described)


def _loader(config: GenerationRunConfig, tokenizer: ImageTokenizer, captions: CaptionEncoder, folder: Path) -> Loader:
    ranks = {"rank": distributed.rank(), "num_ranks": distributed.world_size()}
    if config.data.tokens:
        loader = token_loader(
            config.data,
            tokenize=captions.tokenize,
            encoder_fingerprint=tokenizer.encoder_fingerprint,
            seed=config.trainer.seed,
            **ranks,
        )
        if tuple(loader.store.info.grid) != tuple(tokenizer.grid):  # of one VQ model there are stores of many sizes
            raise UserError(
                f"{config.data.tokens} holds {loader.store.info.grid} tokens a picture, the tokenizer makes "
                f"{tokenizer.grid}: set --tokenizer-image-size to that of `qlip tokenize`"
            )
        return loader
    config.images.batch_size, config.images.global_batch_size = config.data.batch_size, config.data.global_batch_size
    return training_loader(
        config.images,
        image_size=tokenizer.image_size,
        tokenize=captions.tokenize,
        seed=config.trainer.seed,
        ledger=folder / "skipped.jsonl",
        **ranks,
    )


def _pictures(
    config: GenerationRunConfig, tokenizer: ImageTokenizer, captions: CaptionEncoder, folder: Path
) -> Callable[[nn.Module, int], Tensor]:
    """What draws samples/step_XXXXXXXX.png: a picture of every sample prompt, always from the same seed."""

    def paint(model: nn.Module, step: int) -> Tensor:
        assert isinstance(model, TextToImageModel)
        sampling = SamplingConfig(guidance=model.config.guidance)
        tokenizer.to(model.device)
        captions.to(model.device)
        generator = Generator(model, captions=captions, tokenizer=tokenizer, sampling=sampling, compile=False)
        pictures = generator.generate(list(config.sample_prompts), seeds=[0] * len(config.sample_prompts))
        grid = make_grid(pictures.cpu(), nrow=4)
        save_grid(folder / "samples" / f"step_{step:08d}.png", grid)
        return grid

    return paint


def _refuse_impossible(config: GenerationRunConfig) -> None:
    if not config.tokenizer:
        raise UserError("no image tokenizer: add --tokenizer RUN/export (`make demo` trains one)")
    if not Path(config.tokenizer).exists():  # the export has a copy of it
        raise UserError(
            f"no tokenizer at {config.tokenizer}: give a folder or file; download it first if it is a hub's"
        )
    if bool(config.data.tokens) == bool(config.images.train):
        both = "both --data.tokens and --images.train are given" if config.data.tokens else "no training data"
        raise UserError(f"{both}: give --data.tokens STORE (`qlip tokenize` makes it), or --images.train SHARDS alone")
    refuse_small(config, LEAST)
    if config.trainer.images_every and not config.sample_prompts:
        raise UserError("trainer.images_every has nothing to draw: add --sample-prompts 'a prompt', or set it to 0")
    if config.trainer.eval_every:
        raise UserError(
            "trainer.eval_every: a text-to-image run is evaluated when it has ended (qlip eval); set it to 0"
        )
    for prompt in config.sample_prompts:
        cleaned_prompt(prompt)
