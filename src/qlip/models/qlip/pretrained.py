"""What all QLIP models share: initialisation, and reading and writing folders without surprises.

`from_pretrained` examines config and safetensors headers first and says in one line what does not fit, instead of
printing a table and going on with fresh tensors as transformers does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from qlip.core.errors import UserError
from qlip.models.qlip.card import model_card
from qlip.models.qlip.configuration import QLIPConfig
from qlip.models.qlip.official import COMPUTED_TENSORS
from qlip.models.qlip.weight_files import (
    HUB_OPTIONS,
    StoredTensor,
    find_weight_files,
    not_on_hub,
    read_headers,
    refuse_non_finite,
    refuse_unfit,
    refuse_what_is_no_source,
)
from qlip.nn.vision import VisionEmbeddings
from qlip.quantizers.others import VectorQuantizer

CONFIG_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, StrictDataclassError)
NO_CONFIG_FIELDS = ("dtype", "torch_dtype", "attn_implementation")  # options of loading that configs have as well


class QLIPPreTrainedModel(PreTrainedModel):
    """Initialisation and loading shared by all QLIP models."""

    config_class = QLIPConfig
    base_model_prefix = "qlip"
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "VisionEmbeddings", "TextEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_unexpected = [COMPUTED_TENSORS]

    _part_name = ""
    """What this model is called inside a whole QLIP, whose other parts it leaves in the file."""
    _parts: tuple[str, ...] = ()
    """The parts of a whole QLIP that this model has, where it has not all."""
    _may_be_fresh: tuple[str, ...] = ()
    """Parts that are initialised when the file has none."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Every tensor of every module, by these rules.

        | tensor | rule |
        |---|---|
        | Linear, Conv2d and Embedding weights, CLS | truncated normal, std `initializer_range` (0.02) |
        | every bias, the decoder's position table | 0 |
        | LayerNorm | weight 1, bias 0 |
        | output projections of attention and feed-forward in layer k = 1..L | std divided by sqrt(2k) (EVA) |
        | `logit_scale` | ln(1/0.07) = 2.6592 |
        | codebooks of a VectorQuantizer | its own rule |
        """
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            layer = getattr(module, "residual_layer", None)
            init.trunc_normal_(module.weight, std=std if layer is None else std / (2 * layer) ** 0.5)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VisionEmbeddings):
            init.trunc_normal_(module.class_embedding, std=std)
        elif isinstance(module, VectorQuantizer):
            module.reset_parameters()
        elif "position_embeddings" in module._parameters:
            init.zeros_(module.position_embeddings)
        elif "logit_scale" in module._parameters:
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Self:
        """transformers' `from_pretrained` for our folders, released ones and hub ids, in evaluation mode.

        Only safetensors are read. Raises `UserError` before memory is filled when config.json or the weights are
        missing, damaged, do not fit together or hold NaN; the one line names the first tensor or field.
        """
        source = pretrained_model_name_or_path
        if source is None:  # weights come as `state_dict=`
            return super().from_pretrained(source, *args, **kwargs)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        config, kwargs = cls._read_config(source, hub, kwargs)
        if getattr(config, "transformers_weights", None) is not None:
            raise UserError(f"{source}: config.json names another weight file (transformers_weights); remove the field")
        stored = cls._stored_for_me(read_headers(find_weight_files(source, variant=kwargs.get("variant"), **hub)))
        with torch.device("meta"):
            needed = cls(config).state_dict()
        any_shape = bool(kwargs.get("ignore_mismatched_sizes"))
        refuse_unfit(stored, needed, source=source, may_be_fresh=cls._may_be_fresh, any_shape=any_shape)
        refuse_non_finite(stored, source=source)
        return super().from_pretrained(source, *args, **(kwargs | {"config": config, "use_safetensors": True}))

    @classmethod
    def _read_config(
        cls, source: str | os.PathLike, hub: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The config, changed by those options that are fields of it, and the other options."""
        given = kwargs.get("config")
        if isinstance(given, PreTrainedConfig):
            return given, kwargs
        kept = {name: kwargs[name] for name in (*NO_CONFIG_FIELDS, *HUB_OPTIONS) if name in kwargs}
        changes = {name: value for name, value in kwargs.items() if name not in kept and name != "config"}
        refuse_what_is_no_source(given or source)
        try:
            config, others = cls.config_class.from_pretrained(
                given or source, return_unused_kwargs=True, **hub, **changes
            )
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except CONFIG_ERRORS as error:
            if isinstance(error, OSError) and not Path(given or source).exists():
                raise not_on_hub(given or source, error) from error
            raise UserError(f"cannot load {source}: {one_line(error)}; export or download it again") from error
        return config, {name: value for name, value in others.items() if name not in HUB_OPTIONS} | kept

    @classmethod
    def _stored_for_me(cls, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """By the names of this model's own tensors: without what is computed, and parts of no concern here."""
        own = {name: tensor for name, tensor in stored.items() if not re.search(COMPUTED_TENSORS, name)}
        if cls._parts:
            own = {name: tensor for name, tensor in own.items() if name.split(".")[0] in cls._parts}
        prefix = f"{cls._part_name}."
        if cls._part_name and any(name.startswith(prefix) for name in own):
            own = {name.removeprefix(prefix): own[name] for name in own if name.startswith(prefix)}
        return own

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', and a model card where there is none yet."""
        super().save_pretrained(save_directory, *args, **kwargs)
        card = Path(save_directory) / "README.md"
        if kwargs.get("is_main_process", True) and not card.exists():
            card.write_text(model_card(self))


def one_line(error: Exception) -> str:
    """What went wrong; transformers' configs put the reason last, everything else first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[-1 if isinstance(error, StrictDataclassError) else 0].strip()
    return line.removeprefix("ValueError: ").removeprefix("TypeError: ")
