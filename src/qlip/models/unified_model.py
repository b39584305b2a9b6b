"""A UM3 as a folder and as something that draws, captions and continues: the network, both tokenizers.

config.json  generation_config.json  model.safetensors  tokenizer*  README.md  image_tokenizer/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlip.core.errors import UserError
from qlip.core.precision import cast_parameters
from qlip.models.baselines import read_config, whole_model
from qlip.models.image_tokenizer import TOKENIZER_FOLDER, copy_tokenizer
from qlip.models.measured import Ability, sha256_of_config
from qlip.models.modality import SeededChoice
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.loading import quiet_transformers, write_export
from qlip.models.qlip.weight_files import find_weight_files, read_headers
from qlip.models.sampling import OnTokens, SamplingConfig
from qlip.models.unified import UM3Config, UM3ForCausalLM
from qlip.models.unified_processor import Part, UM3Processor


@dataclass(kw_only=True, slots=True, frozen=True)
class WritingSettings:
    """How the next id is drawn. Defaults are the paper's (Table 9)."""

    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the most probable id."""
    top_p: float = 0.95
    """Only the most probable ids that together reach this probability can be drawn."""
    top_k: int = 0
    """Only so many most probable ids can be drawn; 0 is all."""
    guidance: float = 1.0
    """Classifier-free guidance of pictures; 1 is none. It needs a model whose captions were dropped in training."""
    max_new_tokens: int = 128
    """Longer texts are cut; pictures are as long as they are."""

    def sampling(self) -> SamplingConfig:
        """What chooses among logits. Raises `UserError` for impossible numbers."""
        config = SamplingConfig(
            guidance=self.guidance, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        config.check()
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        return replace(config, guidance=1.0)  # transformers' own guidance comes before the choice


class Unified:
    """Text, image-to-text and text-to-image with one model (`models.measured.MeasuredGenerator` among others)."""

    name = "UM3ForCausalLM"

    def __init__(self, model: UM3ForCausalLM, processor: UM3Processor, settings: WritingSettings | None = None) -> None:
        """Both belong together, on one device; `settings` are those of `generate`."""
        self.model, self.processor = model.eval(), processor
        self.settings = settings or WritingSettings(guidance=model.config.guidance)
        self.settings.sampling()
        self.image_size = processor.image_tokenizer.image_size
        self.abilities: frozenset[Ability] = frozenset(("generate", "caption", "continue"))
        self._identity: dict[str, Any] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.model.lm_head.weight.dtype

    @property
    def context_length(self) -> int:
        """Ids of a whole sequence."""
        return int(self.model.config.max_position_embeddings)

    @property
    def sampling(self) -> dict[str, Any]:
        """For cards."""
        settings = self.settings
        return {
            "guidance": settings.guidance,
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "head": f"flat {self.model.config.visual_division}",
        }

    def identity(self) -> dict[str, Any]:
        """Fingerprints of model and image tokenizer, dtype, number of parameters; of the weights as they were saved."""
        self._identity = self._identity or {
            "model_fingerprint": model_fingerprint(self.model),
            "encoder_fingerprint": self.processor.image_tokenizer.encoder_fingerprint,
            "config_sha256": sha256_of_config(self.model.config),
            "parameters": {"unified": sum(parameter.numel() for parameter in self.model.parameters())},
        }
        return self._identity | {"dtype": str(self.dtype).removeprefix("torch.")}

    def to(self, device: torch.device, *, dtype: torch.dtype | None = None) -> None:
        """Move it there; `dtype` is what the model computes in, its weights' own if not given."""
        self.identity()
        self.model.to(device)
        if dtype is not None:
            cast_parameters(self.model, dtype)
        self.processor.image_tokenizer.to(device)

    @torch.inference_mode()
    def bits(self, prompts: list[str], *, seeds: list[int], on_tokens: OnTokens | None = None) -> Tensor:
        """b prompts and seeds -> (b, n, L) bool; a picture depends on its own prompt and seed alone.

        `on_tokens` is called once, at the end. Raises `UserError` for a prompt that leaves no room for a picture.
        """
        rows = self.processor([[prompt] for prompt in prompts], continue_image=True).to(self.model.device)
        length, count = rows["input_ids"].shape[1], self.processor.vocabulary.image_length
        if length + count > self.context_length:
            raise UserError(
                f"a prompt of {length} tokens leaves no room for a picture of {count} in {self.context_length}: "
                "shorten it"
            )
        choice = SeededChoice(seeds, start=length, count=count, config=self.settings.sampling())
        written = self._generate(rows, logits_processor=[choice], max_new_tokens=count, guidance=self.settings.guidance)
        bits = self.processor.ids_to_bits(written[:, length:])
        if on_tokens is not None:
            on_tokens(self.processor.vocabulary.num_tokens, bits)
        return bits

    def generate(self, prompts: list[str], *, seeds: list[int]) -> Tensor:
        """b prompts and as many seeds -> (b, 3, S, S) uint8."""
        return self.processor.image_tokenizer.decode(self.bits(prompts, seeds=seeds))

    @torch.inference_mode()
    def caption(
        self, pictures: list[Image.Image], settings: WritingSettings | None = None, *, seeds: list[int] | None = None
    ) -> list[str]:
        """b pictures, RGB -> b captions of one line. `seeds` are 0 if not given."""
        ids = self.processor.image_ids(self.processor.pixels(pictures).to(self.model.device))
        vocabulary, start = self.processor.vocabulary, self.processor.encode([])
        before = torch.tensor([[*start, vocabulary.image_begin]] * len(ids), device=ids.device)
        behind = torch.full((len(ids), 1), vocabulary.image_end, device=ids.device)
        prompt = torch.cat([before, ids, behind], dim=1)
        written = self._write(prompt, settings or WritingSettings(), seeds or [0] * len(ids), images=False)
        texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def continue_from(
        self, parts: Sequence[Any], settings: WritingSettings | None = None, *, images: bool = False, seed: int = 0
    ) -> list[Part]:
        """Texts and pictures -> what the model writes behind them: texts, and pictures if `images` lets it draw.

        A picture that `max_new_tokens` cuts off is left out.
        """
        return self.processor.decode(self.continue_ids(parts, settings, images=images, seed=seed))

    @torch.inference_mode()
    def continue_ids(
        self, parts: Sequence[Any], settings: WritingSettings | None = None, *, images: bool = False, seed: int = 0
    ) -> Tensor:
        """As `continue_from`, the ids (s,) themselves."""
        prompt = torch.tensor([self.processor.encode(parts)], device=self.model.device)
        return self._write(prompt, settings or WritingSettings(), [seed], images=images)[0]

    @torch.inference_mode()
    def text_nll(self, texts: list[str]) -> list[tuple[float, int]]:
        """Texts -> for each, -ln p in nats of its tokens and the end behind it, and how many those are.

        Each is scored by itself as ``BOS text EOS``, of which BOS is given; what is beyond the context is left out.
        """
        scored = []
        for text in texts:
            ids = [*self.processor.encode([text]), int(self.processor.tokenizer.eos_token_id)][: self.context_length]
            row = torch.tensor([ids], device=self.model.device)
            nll = self.model(input_ids=row, labels=row).nll
            scored.append((float(nll.double().sum()), len(ids) - 1))
        return scored

    def _write(self, prompt: Tensor, settings: WritingSettings, seeds: list[int], *, images: bool) -> Tensor:
        """Prompts (b, s) of one length -> what is written behind them (b, at most max_new_tokens)."""
        room = self.context_length - prompt.shape[1]
        if room < 1:
            raise UserError(f"the prompt has {prompt.shape[1]} tokens, the context {self.context_length}: shorten it")
        count = min(settings.max_new_tokens, room)
        choice = SeededChoice(seeds, start=prompt.shape[1], count=count, config=settings.sampling())
        rows = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
        written = self._generate(rows, logits_processor=[choice], max_new_tokens=count, images=images)
        return written[:, prompt.shape[1] :]

    def _generate(self, rows: Mapping[str, Tensor], *, guidance: float = 1.0, **options: Any) -> Tensor:
        """transformers' `generate`, where the last processor has already chosen."""
        if guidance != 1:
            empty = self.processor([[]] * len(rows["input_ids"]), continue_image=True)["input_ids"]
            options |= {"guidance_scale": guidance, "negative_prompt_ids": empty.to(self.model.device)}
        return self.model.generate(**rows, do_sample=False, pad_token_id=self.processor.pad_id, **options)


def is_unified(source: str | Path) -> bool:
    """Whether a folder holds a UM3."""
    folder = Path(source)
    return (folder / "config.json").is_file() and read_config(folder).get("model_type") == UM3Config.model_type


def open_unified(source: str | Path) -> Unified:
    """The UM3 in a folder that `save_unified` wrote, on the CPU, in the dtype of its file, in evaluation mode.

    Raises `UserError` for any other folder, damaged files and missing parts.
    """
    folder = Path(source)
    if not is_unified(folder):
        of_run = folder / "export"
        remedy = str(of_run) if is_unified(of_run) else "the export of `qlip train scenes_um3_tiny`"
        raise UserError(f"{source} holds no unified model: give {remedy}")
    read_headers(find_weight_files(folder))

    def load() -> tuple[Any, Mapping[str, Any]]:
        with quiet_transformers():
            return UM3ForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype="auto", attn_implementation="sdpa", output_loading_info=True
            )

    model = whole_model(folder, load)
    return Unified(model, UM3Processor.from_pretrained(folder))


def save_unified(
    model: nn.Module, *, folder: Path, tokenizer: PreTrainedTokenizerBase, image_tokenizer: str, step: int | None
) -> None:
    """Write the model, its text tokenizer and a copy of `image_tokenizer`; the folder appears whole or not at all.

    Raises `UserError` for a folder that holds anything else or cannot be written.
    """
    assert isinstance(model, UM3ForCausalLM)

    def write(temporary: Path) -> None:
        with quiet_transformers():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        copy_tokenizer(image_tokenizer, temporary)
        (temporary / "README.md").write_text(_card(model, step), encoding="utf-8")

    write_export(folder, write, step=step, subfolders=(TOKENIZER_FOLDER,))


def _card(model: UM3ForCausalLM, step: int | None) -> str:
    config = model.config
    trained = f", trained for {step} steps" if step else ", imported and not trained on images yet"
    return f"""---
license: apache-2.0
library_name: qlip
pipeline_tag: any-to-any
---
# UM3: text and images in one autoregressive model

{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters{trained}. {config.text_vocab_size}
text ids, {config.vocab_size - config.text_vocab_size} visual ids of {config.image_tokenizer_name} (encoder fingerprint
{config.image_tokenizer[:12]}), which lies in `{TOKENIZER_FOLDER}`; an image is {model.vocabulary.image_length} ids.

    qlip generate THIS_FOLDER "a prompt" --out pictures
    qlip caption THIS_FOLDER picture.png
    qlip complete THIS_FOLDER "Once upon a time"
"""
