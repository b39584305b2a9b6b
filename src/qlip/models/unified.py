"""UM3: one autoregressive model of text and images (QLIP section 9, Tables 5 and 9), on transformers' Qwen3.

Qwen3 is Llama 3 with an RMSNorm on the queries and keys of every head (QK-norm); the vocabulary is widened by visual
ids (`modality.py`). The softmax is taken within the modality of the target (Eq 6): for target i of V_t text and V_v
visual ids, ``-log softmax(x[:V_t])[i]`` or ``-log softmax(x[V_t:])[i - V_t]``, so that neither modality's logits can
push the other's down. The weights keep Qwen3's names and shapes.

Shapes: `b` sequences, `s` their length, `d` width, `V` = V_t + V_v. Annotations stay objects in this file: `strict`
checks no field whose annotation is a string.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import ModelOutput

from qlip.models.modality import ModalityLogitsProcessor, Vocabulary, hide_other_modality, ids_since_begin
from qlip.models.visual_tokens import MAX_SUBCODE_BITS

IGNORED = -100  # transformers' label of a token that is not learned
SOFTMAXES = ("separate", "joint")
POSITIONS_AT_ONCE = 2048  # whose logits are in memory together: 1 GB of float32 at Llama 3's vocabulary


@strict
class UM3Config(Qwen3Config):
    """Qwen3's config, and what its vocabulary holds of images. Defaults: QLIP-B-16-256, two tokens a patch."""

    model_type = "um3"

    text_vocab_size: int = 128_256  # V_t; the rest of vocab_size is visual
    visual_division: Any = None  # bits of each sub-code as a list, [14, 14] if not given
    num_bits: int = 28
    grid: Any = None  # rows and columns of tokens, [16, 16] if not given
    image_begin_id: int = 128_002  # Llama 3's <|reserved_special_token_0|>
    image_end_id: int = 128_003  # ... _1
    softmax: str = "separate"  # Eq 6; or joint, one softmax over all ids
    qk_norm: bool = True
    guidance: float = 1.0  # default scale in drawing; above 1 needs a model whose captions were dropped in training
    image_tokenizer: str = ""  # encoder fingerprint of the tokenizer whose tokens these are
    image_tokenizer_name: str = "QLIPModel"
    image_size: int = 256  # side of the tokenizer's pictures in pixels

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid = list(self.grid or (16, 16))
        self.visual_division = list(self.visual_division or (14, 14))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        if self.softmax not in SOFTMAXES:
            raise ValueError(f"softmax {self.softmax!r} is unknown; known: {', '.join(SOFTMAXES)}")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} must be numbers of rows and columns")
        if sum(self.visual_division) != self.num_bits:
            raise ValueError(f"visual_division {self.visual_division} does not make num_bits {self.num_bits}")
        if not 1 <= min(self.visual_division) <= max(self.visual_division) <= MAX_SUBCODE_BITS:
            raise ValueError(f"visual_division {self.visual_division}: give sub-codes of 1 to {MAX_SUBCODE_BITS} bits")
        for name in ("image_begin_id", "image_end_id"):
            if not 0 <= getattr(self, name) < self.text_vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}, no id of text_vocab_size {self.text_vocab_size}")
        if self.image_begin_id == self.image_end_id:
            raise ValueError("image_begin_id and image_end_id are the same")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: input and output tables are separate in this model")

    @property
    def vocabulary(self) -> Vocabulary:
        """Which ids are what. Raises `ValueError` when `vocab_size` is not V_t + V_v."""
        vocabulary = Vocabulary(
            text_size=self.text_vocab_size,
            division=tuple(self.visual_division),
            num_tokens=self.grid[0] * self.grid[1],
            image_begin=self.image_begin_id,
            image_end=self.image_end_id,
        )
        if self.vocab_size != vocabulary.size:
            raise ValueError(f"vocab_size {self.vocab_size} is not {vocabulary.size}, text and visual ids together")
        return vocabulary


@dataclass
class UM3Output(ModelOutput):
    """What `UM3ForCausalLM` returns when it is given labels."""

    loss: Tensor | None = None
    """() mean of `nll` over the targets, in nats."""
    nll: Tensor | None = None
    """(b, s) float32, -ln p of the *next* token within its softmax; 0 where that is not learned."""
    log_normalizer: Tensor | None = None
    """(b, s) float32, ln of the sum of that softmax, which z-loss keeps near 0; 0 where not learned."""


class UM3ForCausalLM(Qwen3ForCausalLM):
    """Next-token prediction over text and visual ids."""

    config_class = UM3Config
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: UM3Config) -> None:
        super().__init__(config)
        self.vocabulary = config.vocabulary
        if not config.qk_norm:
            for layer in self.model.layers:
                layer.self_attn.q_norm, layer.self_attn.k_norm = torch.nn.Identity(), torch.nn.Identity()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """(b, s) ids -> logits (b, s, V), those of the modality that cannot follow at -inf under separate softmaxes.

        So a softmax over all logits is Eq 6, for whoever scores text. Where only part of an image is given, as in a
        step with cached keys, nothing is hidden: `generate` knows the whole sequence.

        With `labels` (b, s), the ids themselves or -100, it returns `UM3Output` and no logits, of which a long sequence
        over a large vocabulary would not fit. Position ids that begin anew at 0 begin a document that sees nothing of
        those before it in the row, if neither `attention_mask` nor a cache is given (`use_cache=False`).
        """
        whole = kwargs.pop("return_dict", True) is not False
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache if labels is None else False,
            **kwargs,
        }
        if labels is not None:
            hidden = self.model(**inputs).last_hidden_state
            return self._score(hidden, F.pad(labels[:, 1:], (0, 1), value=IGNORED))
        output = super().forward(**inputs, logits_to_keep=logits_to_keep, return_dict=True)
        if self.config.softmax == "separate" and input_ids is not None:
            counts = ids_since_begin(input_ids, self.vocabulary)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = hide_other_modality(output.logits, counts[:, kept], self.vocabulary)
        return output if whole else output.to_tuple()

    def generate(self, inputs: Tensor | None = None, *, images: bool = True, **kwargs: Any) -> Any:
        """transformers' `generate`; every id stays in its modality, and an image is closed after exactly m ids.

        `images` says whether the model may begin images by itself. Of an image that `max_new_tokens` cuts off there are
        too few ids for a picture.
        """
        own = ModalityLogitsProcessor(self.vocabulary, images=images)
        processors = LogitsProcessorList([own, *(kwargs.pop("logits_processor", None) or ())])
        return super().generate(inputs, logits_processor=processors, **kwargs)

    def _score(self, hidden: Tensor, targets: Tensor) -> UM3Output:
        """States (b, s, d) and what follows each (b, s) -> losses, by chunks of positions."""
        weight, text_size = self.lm_head.weight, self.vocabulary.text_size
        states, wanted = hidden.flatten(0, 1), targets.flatten()
        if self.config.softmax == "joint":
            groups = [(wanted >= 0, weight, 0)]
        else:
            text = (wanted >= 0) & (wanted < text_size)
            groups = [(text, weight[:text_size], 0), (wanted >= text_size, weight[text_size:], text_size)]
        nll = torch.zeros(wanted.shape, device=hidden.device)
        normalizer = torch.zeros_like(nll)
        for chosen, rows, first in groups:
            for places in chosen.nonzero().squeeze(1).split(POSITIONS_AT_ONCE):
                loss, log_sum = checkpoint(_nll, states[places], rows, wanted[places] - first, use_reentrant=False)
                nll = nll.index_copy(0, places, loss)
                normalizer = normalizer.index_copy(0, places, log_sum)
        count = (wanted >= 0).sum().clamp(min=1)
        shape = targets.shape
        return UM3Output(loss=nll.sum() / count, nll=nll.view(shape), log_normalizer=normalizer.view(shape))


def _nll(states: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(k, d), (v, d), (k,) -> -ln p and ln of the normaliser, (k,) float32 each."""
    logits = F.linear(states, rows).float()
    log_sum = logits.logsumexp(-1)
    return log_sum - logits.gather(1, targets[:, None]).squeeze(1), log_sum


AutoConfig.register(UM3Config.model_type, UM3Config, exist_ok=True)
AutoModelForCausalLM.register(UM3Config, UM3ForCausalLM, exist_ok=True)
