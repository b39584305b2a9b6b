"""A language model's vocabulary widened by visual ids: Llama 3 (or Qwen3) -> UM3, before any training (QLIP section 9).

Every new row, of visual ids and of the two image markers, begins at the mean of the text rows, in both tables; tied
tables come apart. QK-norm begins with weights of one, which changes what a model trained without it computes: queries
and keys then have a root mean square of one. `match_qk_norm` sets the weights to the root mean squares they had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlip.core.errors import UserError
from qlip.models.image_tokenizer import ImageTokenizer
from qlip.models.unified import UM3Config, UM3ForCausalLM

BEGIN, END = "<|image_begin|>", "<|image_end|>"
RESERVED = ("<|reserved_special_token_0|>", "<|reserved_special_token_1|>")  # Llama 3's, never trained
SUBCODE_BITS = 14
KEPT = (  # of the language model's config
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"),
    *("attention_bias", "attention_dropout"),
)


@dataclass(kw_only=True, slots=True)
class WideningConfig:
    """How images enter the vocabulary. Defaults are the paper's."""

    division: tuple[int, ...] = ()
    """Bits of each sub-code; as few of at most 14 bits as it takes if not given: 14 + 14 for QLIP, two ids a patch."""
    softmax: Literal["separate", "joint"] = "separate"
    """One softmax for each modality (Eq 6), or one over all ids."""
    qk_norm: bool = True
    """RMSNorm on queries and keys, weights one."""
    bit_structure: float = 0.0
    """Standard deviation of a random vector for each bit, added with its sign to the rows of visual ids; 0 is none."""


def division_of(num_bits: int, division: Sequence[int] = ()) -> tuple[int, ...]:
    """The division asked for, or as few equal sub-codes of at most 14 bits as make `num_bits`."""
    count = -(-num_bits // SUBCODE_BITS)
    return tuple(division) or tuple(num_bits * (j + 1) // count - num_bits * j // count for j in range(count))


def add_image_markers(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the markers of images: Llama 3's first two reserved tokens, else two that are added to `tokenizer`."""
    known = tokenizer.get_vocab()
    names = RESERVED if all(name in known for name in RESERVED) else (BEGIN, END)
    if names[0] not in known:
        tokenizer.add_special_tokens({"additional_special_tokens": list(names)}, replace_extra_special_tokens=False)
    begin, end = tokenizer.convert_tokens_to_ids(list(names))
    return begin, end


def widen(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    images: ImageTokenizer,
    config: WideningConfig,
) -> UM3ForCausalLM:
    """A UM3 in float32 with the language model's weights; `tokenizer` gets the image markers where it has none.

    Raises `UserError` for a model that is neither Llama nor Qwen3, and for a division that does not make the bits of
    `images`.
    """
    given = language_model.config
    if given.model_type not in ("llama", "qwen3"):
        raise UserError(f"a {given.model_type!r} model cannot be widened: give the folder of a Llama 3 or Qwen3")
    if getattr(given, "mlp_bias", False):
        raise UserError("this Llama has biases in its feed-forward layers, which Qwen3 has not: give another")
    if "sliding_attention" in (getattr(given, "layer_types", None) or ()):
        raise UserError("this model attends within a sliding window, which UM3 does not: give another")
    begin, end = add_image_markers(tokenizer)
    text_size = max(given.vocab_size, len(tokenizer))
    division = division_of(images.num_bits, config.division)
    try:
        widened = UM3Config(
            **{name: getattr(given, name) for name in KEPT},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,  # of the sequences that it is trained on, whatever the given model's
            pad_token_id=tokenizer.pad_token_id,
            head_dim=getattr(given, "head_dim", None) or given.hidden_size // given.num_attention_heads,
            vocab_size=text_size + sum(1 << size for size in division if 0 < size <= 16),
            text_vocab_size=text_size,
            visual_division=list(division),
            num_bits=images.num_bits,
            grid=list(images.grid),
            image_begin_id=begin,
            image_end_id=end,
            softmax=config.softmax,
            qk_norm=config.qk_norm,
            image_tokenizer=images.encoder_fingerprint,
            image_tokenizer_name=images.name,
            image_size=images.image_size,
        )
    except (StrictDataclassError, ValueError) as error:  # transformers' configs wrap theirs in the former
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise UserError(f"{reason}; change --division") from None
    model = UM3ForCausalLM(widened)
    state = {name: tensor.float() for name, tensor in language_model.state_dict().items()}
    embedding = state.pop("model.embed_tokens.weight")
    output = state.pop("lm_head.weight", embedding)
    missing, unexpected = model.load_state_dict(state, strict=False)
    absent = [name for name in missing if not name.endswith(("_norm.weight", "embed_tokens.weight", "lm_head.weight"))]
    assert not absent and not unexpected, (absent, unexpected)
    trained = torch.ones(len(embedding), dtype=torch.bool)
    trained[[place for place in (begin, end) if place < len(embedding)]] = False
    structure = _signed_bits(division) * config.bit_structure
    with torch.no_grad():
        for table, text in ((model.model.embed_tokens.weight, embedding), (model.lm_head.weight, output)):
            mean = text[trained].double().mean(0).float()
            table[:] = mean
            table[: len(text)][trained] = text[trained]
            table[text_size:] += structure @ torch.randn(sum(division), table.shape[1])
    return model.eval()


def _signed_bits(division: Sequence[int]) -> Tensor:
    """(V_v, L) of -1, 0 and 1: the bits of every visual id, 0 for those of other sub-codes."""
    rows = torch.zeros(sum(1 << size for size in division), sum(division))
    row = column = 0
    for size in division:
        codes = torch.arange(1 << size)[:, None] >> torch.arange(size - 1, -1, -1)
        rows[row : row + (1 << size), column : column + size] = 2.0 * (codes & 1) - 1
        row, column = row + (1 << size), column + size
    return rows


@torch.no_grad()
def match_qk_norm(model: UM3ForCausalLM, ids: Tensor) -> None:
    """Set QK-norm's weights, layer by layer, to the root mean square that queries and keys have on `ids` (b, s) text.

    The scale of the attention's logits is then kept on average, so an imported model computes nearly what it did. One
    pass: every norm is set just before it is applied, so each layer is measured behind those that are set already.
    """

    def set_behind(norm: nn.Module, output: Tensor) -> None:
        norm.get_parameter("weight").fill_(output.float().square().mean().sqrt())

    model.eval()
    attentions = [layer.self_attn for layer in model.model.layers]
    pairs = [pair for part in attentions for pair in ((part.q_proj, part.q_norm), (part.k_proj, part.k_norm))]
    hooks = [
        projection.register_forward_hook(lambda module, inputs, output, norm=norm: set_behind(norm, output))
        for projection, norm in pairs
    ]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
