"""LoRA on the language model of an assistant, through peft: low-rank updates beside frozen weights (arXiv 2106.09685).

peft is optional: `pip install 'qlip[lora]'`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import LlavaForConditionalGeneration

from qlip.core.errors import UserError


@dataclass(kw_only=True, slots=True)
class LoraSettings:
    """How the language model is adapted; with rank 0 all its weights train."""

    rank: int = 0
    """Rank of the update of every linear layer; LLaVA-1.5's recipe takes 128."""
    alpha: float = 256.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.05
    """Of what enters the update."""


def add_lora(model: LlavaForConditionalGeneration, settings: LoraSettings) -> None:
    """Put fresh updates (zero at the start) beside every linear layer of the language model, whose weights are frozen.

    Drawn from PyTorch's random state. Raises `UserError` without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs peft: pip install 'qlip[lora]', or set --lora.rank 0") from None
    language_model = model.model.language_model
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a scale: any number is meant
        lora_dropout=settings.dropout,
        target_modules=sorted({name.split(".")[-1] for name, _ in _linear_layers(language_model)}),
    )
    inject_adapter_in_model(config, language_model)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merge_lora(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The same model with the updates added to its weights and peft's layers gone; without any it stays as it is."""
    layers = [
        (parent, name, child)
        for parent in model.model.language_model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "base_layer") and hasattr(child, "merge")
    ]
    for parent, name, child in layers:
        child.merge(safe_merge=True)
        setattr(parent, name, child.get_base_layer())
    return model


def _linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
