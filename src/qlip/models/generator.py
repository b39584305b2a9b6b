"""A text-to-image model as a folder: the generator, the image tokenizer it draws for, and what reads its captions.

config.json  model.safetensors  README.md  image_tokenizer/      (a T5 encoder stays where it is: `caption_source`)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlip.core.errors import UserError
from qlip.models.baselines import read_config, whole_model
from qlip.models.caption_encoder import CaptionEncoder, cleaned_prompt, open_caption_encoder
from qlip.models.image_tokenizer import (
    TOKENIZER_FOLDER,
    ImageTokenizer,
    QLIPTokenizer,
    copy_tokenizer,
    open_image_tokenizer,
)
from qlip.models.measured import Ability, sha256_of_config
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import quiet_transformers, write_export
from qlip.models.qlip.weight_files import find_weight_files, read_headers
from qlip.models.sampling import OnTokens, Sampler, SamplingConfig
from qlip.models.text_to_image import TextToImageConfig, TextToImageModel


class Generator:
    """Prompts and seeds -> pictures (`models.measured.MeasuredGenerator`)."""

    name = "TextToImageModel"

    def __init__(
        self,
        model: TextToImageModel,
        *,
        captions: CaptionEncoder,
        tokenizer: ImageTokenizer,
        sampling: SamplingConfig,
        compile: bool | None = None,
    ) -> None:
        """All parts on one device, in evaluation mode; `compile` is `Sampler`'s.

        Raises `UserError` for another tokenizer than trained with.
        """
        refuse_other_tokenizer(model.config, tokenizer)
        self.model, self.captions, self.tokenizer = model.eval(), captions, tokenizer
        self.image_size = tokenizer.image_size
        self.abilities: frozenset[Ability] = frozenset(("generate",))
        self.settings, self.compile = sampling, compile
        self._sampler: Sampler | None = None
        self._identity: dict[str, Any] = {}

    @property
    def sampling(self) -> dict[str, Any]:
        """For cards."""
        settings = self.settings
        return {
            "guidance": settings.guidance,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "head": self.model.config.head,
        }

    def identity(self) -> dict[str, Any]:
        """Fingerprints of generator and tokenizer, dtype, number of parameters."""
        self._identity = self._identity or {
            "model_fingerprint": model_fingerprint(self.model),
            "encoder_fingerprint": self.tokenizer.encoder_fingerprint,
            "config_sha256": sha256_of_config(self.model.config),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": {"generator": sum(parameter.numel() for parameter in self.model.parameters())},
        }
        return dict(self._identity)

    def to(self, device: torch.device, *, dtype: torch.dtype | None = None) -> None:
        """Move all parts there; `dtype` is what the generator computes in, its weights' own if not given."""
        identity = self.identity()  # of the weights as they were saved
        self.model.to(device, dtype)
        self._identity = identity | {"dtype": str(self.model.dtype).removeprefix("torch.")}
        self.captions.to(device)
        self.tokenizer.to(device)
        self._sampler = None

    def bits(self, prompts: list[str], *, seeds: list[int], on_tokens: OnTokens | None = None) -> Tensor:
        """b prompts and seeds -> (b, n, L) bool. Raises `UserError` for an empty prompt."""
        if self._sampler is None:
            self._sampler = Sampler(self.model, self.settings, compile=self.compile)
        ids = self.captions.tokenize([cleaned_prompt(prompt) for prompt in prompts])
        device = self.model.device
        caption, mask = self.captions.encode(ids["input_ids"].to(device), ids["attention_mask"].to(device))
        return self._sampler.sample(caption, mask, seeds=seeds, on_tokens=on_tokens)

    def generate(self, prompts: list[str], *, seeds: list[int]) -> Tensor:
        """b prompts and as many seeds -> (b, 3, S, S) uint8; a picture depends on its own prompt and seed alone."""
        return self.tokenizer.decode(self.bits(prompts, seeds=seeds))


def refuse_other_tokenizer(config: TextToImageConfig, tokenizer: ImageTokenizer) -> None:
    """Raise `UserError`, with both fingerprints, unless `config` was made for the tokens of `tokenizer`."""
    if config.image_tokenizer != tokenizer.encoder_fingerprint:
        raise UserError(
            f"the generator draws tokens of {config.image_tokenizer_name} {config.image_tokenizer[:12]}, but this is "
            f"{tokenizer.name} {tokenizer.encoder_fingerprint[:12]}: give the tokenizer that it was trained with"
        )
    if (tuple(config.grid), config.num_bits) != (tuple(tokenizer.grid), tokenizer.num_bits):
        raise UserError(
            f"the generator draws {config.grid} tokens of {config.num_bits} bits, but its tokenizer has "
            f"{list(tokenizer.grid)} of {tokenizer.num_bits}: export it again"
        )


def is_generator(source: str | Path) -> bool:
    """Whether a folder holds a text-to-image model of ours."""
    folder = Path(source)
    has_config = (folder / "config.json").is_file()
    return has_config and read_config(folder).get("model_type") == TextToImageConfig.model_type


def open_generator(
    source: str | Path, *, sampling: SamplingConfig | None = None, caption_encoder: str = ""
) -> Generator:
    """The generator in a folder that `save_generator` wrote, on the CPU, in evaluation mode.

    `sampling` is the model's own with LlamaGen's other defaults if not given; `caption_encoder` a folder of T5 if it
    lies elsewhere than in training. Raises `UserError` for any other folder, damaged files and missing parts.
    """
    folder = Path(source)
    if not is_generator(folder):
        raise UserError(
            f"{source} holds no text-to-image model: give the export of `qlip train scenes_t2i_tiny`, or a UM3"
        )
    read_headers(find_weight_files(folder))

    def load() -> tuple[Any, Mapping[str, Any]]:
        with quiet_transformers():
            return TextToImageModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)

    model = whole_model(folder, load)
    config = model.config
    tokenizer = open_image_tokenizer(
        folder / TOKENIZER_FOLDER, image_size=config.image_size if config.image_tokenizer_name != "QLIPModel" else 0
    )
    captions = open_caption_encoder(config, tokenizer_model=text_side(tokenizer), source=caption_encoder)
    settings = sampling or SamplingConfig(guidance=config.guidance)
    return Generator(model, captions=captions, tokenizer=tokenizer, sampling=settings)


def text_side(tokenizer: ImageTokenizer) -> Any:
    """The QLIP behind a tokenizer, whose text tower can read captions; None for others."""
    return tokenizer.measured.model if isinstance(tokenizer, QLIPTokenizer) else None


def save_generator(model: nn.Module, *, folder: Path, tokenizer: str, step: int | None) -> None:
    """Write the generator with a copy of its image tokenizer; the folder appears whole or not at all.

    Raises `UserError` for a folder that holds anything else or cannot be written.
    """
    assert isinstance(model, TextToImageModel)

    def write(temporary: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(temporary)
        copy_tokenizer(tokenizer, temporary)
        (temporary / "README.md").write_text(_card(model, step), encoding="utf-8")

    write_export(folder, write, step=step, subfolders=(TOKENIZER_FOLDER,))


def _card(model: TextToImageModel, step: int | None) -> str:
    config = model.config
    rows, columns = config.grid
    trained = f", trained for {step} steps" if step else ""
    return f"""# A text-to-image model over the tokens of {config.image_tokenizer_name}

{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters{trained}. It draws {rows} x {columns}
tokens of {config.num_bits} bits with the {config.head} head; captions are read by `{config.caption_encoder}`.
The image tokenizer lies in `{TOKENIZER_FOLDER}` (encoder fingerprint {config.image_tokenizer[:12]}).

    qlip generate THIS_FOLDER "a prompt" --num 4 --out pictures
"""
