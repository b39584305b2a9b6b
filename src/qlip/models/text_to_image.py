"""A LlamaGen-style text-to-image model: caption features, then image tokens, predicted one after the other.

QLIP section 8, Eq 9: ``p(k_n | G_proj(E_t(text)), k_<n)``. The trunk is transformers' Llama; images get 2-D rotary
positions (LlamaGen, arXiv 2406.06525). Sequence: `t` caption slots, padded on the left, then ``n P`` positions of image
tokens in row-major order (`visual_tokens.py`). Shapes: `b` pictures, `d` width, `n` tokens, `L` bits, `c` width of
caption features. Annotations stay objects in this file: `strict` checks no field whose annotation is a string.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Cache, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from qlip.models.visual_tokens import HEAD_KINDS, MAX_SUBCODE_BITS, HeadKind, build_head, flip_bits

ROPE_THETA = 10_000.0
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
CAPTION_ENCODERS = ("learned", "qlip", "t5")
COUNTS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_bits", "depth_layers"),
    *("caption_width", "caption_length", "caption_vocab_size"),
)
SIZES = {  # LlamaGen's
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048},
    "l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816},
    "xl": {"hidden_size": 1280, "num_hidden_layers": 36, "num_attention_heads": 20, "intermediate_size": 3584},
}


@strict
class TextToImageConfig(PreTrainedConfig):
    """Sizes, head, caption side, and which tokenizer's tokens are drawn. Defaults: LlamaGen-XL on QLIP-B-16-256."""

    model_type = "qlip_text_to_image"

    hidden_size: int = 1280
    num_hidden_layers: int = 36
    num_attention_heads: int = 20
    intermediate_size: int = 3584
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    dropout: float = 0.1  # of input embeddings, attention outputs and feed-forward outputs, as LlamaGen's
    grid: Any = None  # rows and columns of tokens, [16, 16] if not given
    num_bits: int = 28
    head: str = "flat"  # or depth, bitwise
    division: Any = None  # bits of each sub-code as a list; halves if not given
    depth_layers: int = 4  # blocks of the depth head
    bit_flips: float = 0.0  # bitwise head: up to this share of the history is flipped in training
    caption_encoder: str = "t5"  # or qlip (text tower of the tokenizer), learned (a table trained with the model)
    caption_source: str = ""  # where the T5 encoder was read from
    caption_width: int = 2048  # c
    caption_length: int = 120  # t, longer captions are cut
    caption_vocab_size: int = 49408  # rows of the learned table
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for guidance
    guidance: float = 7.5  # default scale in sampling
    image_tokenizer: str = ""  # encoder fingerprint of the tokenizer whose tokens these are
    image_tokenizer_name: str = "QLIPModel"
    image_size: int = 256  # side of the tokenizer's pictures in pixels

    def __post_init__(self, **kwargs: Any) -> None:
        self.grid = list(self.grid or (16, 16))
        self.division = list(self.division or (self.num_bits - self.num_bits // 2, self.num_bits // 2))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Called by `strict` on construction; raises `ValueError` naming the field."""
        if self.head not in HEAD_KINDS:
            raise ValueError(f"head {self.head!r} is unknown; known: {', '.join(HEAD_KINDS)}")
        if self.caption_encoder not in CAPTION_ENCODERS:
            raise ValueError(f"caption_encoder {self.caption_encoder!r} is unknown; known: {CAPTION_ENCODERS}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid {self.grid} must be numbers of rows and columns")
        if self.hidden_size % self.num_attention_heads or self.head_width % 4:
            raise ValueError(
                "hidden_size / num_attention_heads must be a whole multiple of 4, for 2-D rotary positions"
            )
        if self.head != "bitwise" and sum(self.division) != self.num_bits:
            raise ValueError(f"division {self.division} does not make num_bits {self.num_bits}")
        if self.head != "bitwise" and not 1 <= min(self.division) <= max(self.division) <= MAX_SUBCODE_BITS:
            raise ValueError(f"division {self.division}: give sub-codes of 1 to {MAX_SUBCODE_BITS} bits each")
        for name in ("caption_dropout", "dropout", "bit_flips"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or more, below 1")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_tokens(self) -> int:
        """n."""
        return self.grid[0] * self.grid[1]

    def trunk_config(self) -> LlamaConfig:
        """transformers' Llama of this size; its token table has one row, since inputs come embedded."""
        return LlamaConfig(
            vocab_size=1,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_attention_heads,
            rms_norm_eps=self.rms_norm_eps,
            initializer_range=self.initializer_range,
            max_position_embeddings=65_536,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


class ImageRotary(nn.Module):
    """Llama's rotary angles, 2-D: half of a head turns by the row, half by the column; captions do not turn.

    LlamaGen's public code fills the caption's rows of its table with zeros for cosine *and* sine, which makes caption
    keys zero; here they turn by nothing (cosine 1).
    """

    def __init__(self, config: TextToImageConfig, *, positions_per_token: int) -> None:
        super().__init__()
        self.prefix, self.columns = config.caption_length, config.grid[1]
        self.positions_per_token, self.head_width = positions_per_token, config.head_width

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (b, s) in the sequence -> cosine and sine, (b, s, head width) in the dtype of x.

        Computed in float32 at use, never stored.
        """
        quarter = self.head_width // 4
        exponents = torch.arange(quarter, dtype=torch.float32, device=x.device) / quarter
        frequencies = ROPE_THETA**-exponents
        token = (position_ids - self.prefix) // self.positions_per_token
        is_image = (position_ids >= self.prefix)[..., None]
        rows = (token // self.columns)[..., None] * frequencies
        columns = (token % self.columns)[..., None] * frequencies
        angles = torch.cat([rows, columns], dim=-1) * is_image  # (b, s, h/2)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


@dataclass
class TextToImageOutput(ModelOutput):
    """What `TextToImageModel` returns."""

    loss: Tensor | None = None
    """Scalar: mean -ln p of a token, in nats."""
    nll: Tensor | None = None
    """(b, n P) float32: -ln p of every piece given the caption and all before it."""
    hidden_states: Tensor | None = None
    """(b, n P, d): the states from which pieces were predicted."""


class TextToImageModel(PreTrainedModel):
    """Caption features and image bits -> likelihood of the bits; `sampling.py` draws from it."""

    config_class = TextToImageConfig
    base_model_prefix = "model"
    main_input_name = "caption"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, config: TextToImageConfig) -> None:
        super().__init__(config)
        trunk = config.trunk_config()
        trunk._attn_implementation = config._attn_implementation
        self.head = build_head(
            _kind(config.head),
            hidden_size=config.hidden_size,
            num_bits=config.num_bits,
            division=config.division,
            depth_layers=config.depth_layers,
            trunk=trunk,
        )
        self.trunk = LlamaModel(trunk)
        self.trunk.embed_tokens = nn.Identity()  # inputs come embedded
        self.trunk.rotary_emb = ImageRotary(config, positions_per_token=self.head.positions_per_token)
        if config.caption_encoder == "learned":
            self.caption_embedding = nn.Embedding(config.caption_vocab_size, config.caption_width)
            self.caption_positions = nn.Parameter(torch.zeros(config.caption_length, config.caption_width))
        self.caption_projector = nn.Sequential(
            nn.Linear(config.caption_width, config.hidden_size, bias=False),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.hidden_size, config.hidden_size, bias=False),
        )
        self.register_buffer("empty_caption", torch.zeros(config.caption_length, config.caption_width))
        for layer in self.trunk.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.register_forward_hook(self._drop)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """| weight | start |
        |---|---|
        | linear layers, tables | normal, standard deviation `initializer_range`; biases 0 |
        | output layers of the head | 0, so that the first loss is that of a uniform guess |
        | `empty_caption` | normal / sqrt(c), then fixed: what stands for a caption that was dropped |
        | caption positions | 0; norms 1 |
        """
        super()._init_weights(module)
        for name, part in self.head.named_modules():
            if part is module and name.endswith("output"):
                nn.init.zeros_(part.get_parameter("weight"))
        if module is self:
            nn.init.normal_(self.empty_caption, std=self.config.caption_width**-0.5)

    def _drop(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.dropout(output, self.config.dropout, self.training)

    def prefix(self, caption: Tensor, caption_mask: Tensor, *, dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Captions -> embeddings (b, t, d) and mask (b, t) bool of the sequence's first t slots.

        `caption`: features (b, t, c), or ids (b, t) for a learned table; padded on the left. `dropped` (b,) bool takes
        the empty caption instead, all of whose slots count. Raises `ValueError` for another number of slots.
        """
        length = self.config.caption_length
        if caption.shape[1] != length:
            raise ValueError(f"captions of {caption.shape[1]} slots, but this model takes {length}, padded on the left")
        features = caption
        if self.config.caption_encoder == "learned":
            features = self.caption_embedding(caption) + self.caption_positions
        features, mask = features.to(self.empty_caption.dtype), caption_mask.to(torch.bool)
        if dropped is not None:
            features = torch.where(dropped[:, None, None], self.empty_caption, features)
            mask = mask | dropped[:, None]
        return self.caption_projector(features), mask

    def forward(
        self, caption: Tensor, caption_mask: Tensor, bits: Tensor, *, dropped: Tensor | None = None
    ) -> TextToImageOutput:
        """Captions as `prefix` takes them and bits (b, n, L) bool -> `TextToImageOutput`.

        In training `caption_dropout` drops captions, unless `dropped` says which; `ValueError` for another grid.
        """
        if bits.shape[1:] != (self.config.num_tokens, self.config.num_bits):
            raise ValueError(
                f"bits of {tuple(bits.shape[1:])}, not of {self.config.num_tokens} tokens for each picture"
            )
        if self.training and dropped is None:
            dropped = torch.rand(len(bits), device=bits.device) < self.config.caption_dropout
        prefix, mask = self.prefix(caption, caption_mask, dropped=dropped)
        pieces = self.head.pieces(bits)
        seen = pieces
        if self.training and self.config.bit_flips:
            seen = self.head.pieces(flip_bits(bits, largest_share=self.config.bit_flips))
        inputs = torch.cat([prefix, self.head.embed(seen[:, :-1])], dim=1)
        inputs = F.dropout(inputs, self.config.dropout, self.training)
        states = self.run_trunk(inputs, attention_mask=causal_mask(mask, length=inputs.shape[1]))
        hidden = states[:, self.config.caption_length - 1 :]
        nll = self.head.nll(hidden, pieces)
        return TextToImageOutput(loss=nll.sum(1).mean() / bits.shape[1], nll=nll, hidden_states=hidden)

    def run_trunk(
        self, inputs: Tensor, *, attention_mask: Tensor, start: Tensor | int = 0, cache: Cache | None = None
    ) -> Tensor:
        """Embeddings (b, s, d) of positions `start`, start + 1, ... -> states (b, s, d); keys and values go to `cache`.

        `attention_mask` (b, 1, s, keys) bool: what each position may look at.
        """
        positions = (torch.arange(inputs.shape[1], device=inputs.device) + start)[None]
        output = self.trunk(
            inputs_embeds=inputs,
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE_ARGUMENT: cache},
        )
        return output.last_hidden_state


def causal_mask(caption_mask: Tensor, *, length: int, num_keys: int = 0) -> Tensor:
    """(b, t) bool -> (b, 1, length, keys) bool: the past but for padding, and each position itself.

    `num_keys` counts the slots of a cache, `length` if not given.
    """
    keys = num_keys or length
    device = caption_mask.device
    allowed = torch.ones(length, keys, dtype=torch.bool, device=device).tril()
    real = F.pad(caption_mask, (0, keys - caption_mask.shape[1]), value=True)  # (b, keys)
    itself = torch.eye(length, keys, dtype=torch.bool, device=device)
    return ((allowed & real[:, None]) | itself)[:, None]


def _kind(name: str) -> HeadKind:
    return next(kind for kind in HEAD_KINDS if kind == name)


AutoConfig.register(TextToImageConfig.model_type, TextToImageConfig, exist_ok=True)
AutoModel.register(TextToImageConfig, TextToImageModel, exist_ok=True)
