"""QLIP's three towers: vision encoder with the quantized bottleneck, text encoder, visual decoder (arXiv 2502.05178).

Shapes: `b` images or texts, `t` text tokens, `n` patches, `d` width, `L` bits per patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.nn.attention import Attention, rotary_2d
from qlip.nn.blocks import Block, BlockStack, Mlp, SwiGLU
from qlip.nn.text import TextEmbeddings, pooled_positions
from qlip.nn.vision import BottleneckMlp, VisionEmbeddings, unpatchify
from qlip.quantizers.base import Quantized
from qlip.quantizers.bsq import BinarySphericalQuantizer


def build_blocks(config: QLIPTextConfig | QLIPVisionConfig | QLIPDecoderConfig) -> BlockStack:
    """The transformer of any of the three towers, from plain numbers of its config."""
    is_text = isinstance(config, QLIPTextConfig)
    eps = config.layer_norm_eps
    inner_eps = None if is_text or not config.subln else eps

    def build_mlp() -> SwiGLU | Mlp:
        if not is_text and config.swiglu:
            return SwiGLU(config.hidden_size, config.intermediate_size, norm_eps=inner_eps)
        return Mlp(config.hidden_size, config.intermediate_size, norm_eps=inner_eps, hidden_act=config.hidden_act)

    def build_block() -> Block:
        attention = Attention(
            config.hidden_size,
            config.num_attention_heads,
            q_bias=config.q_bias,
            k_bias=config.k_bias,
            v_bias=config.v_bias,
            inner_norm_eps=inner_eps,
            causal=is_text,
        )
        return Block(attention, build_mlp(), hidden_size=config.hidden_size, norm_eps=eps)

    blocks = [build_block() for _ in range(config.num_hidden_layers)]
    for layer, block in enumerate(blocks, start=1):
        mlp_output = block.mlp.w3 if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
        for linear in (block.self_attn.out_proj, mlp_output):
            linear.residual_layer = layer  # type: ignore[assignment]  # read by _init_weights
    return BlockStack(blocks)


class QLIPPreTrainedModel(PreTrainedModel):
    """Initialisation and loading shared by all QLIP models."""

    config_class = QLIPConfig
    base_model_prefix = "qlip"
    main_input_name = "pixel_values"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

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
        elif isinstance(module, QLIPDecoder):
            init.zeros_(module.position_embeddings)
        elif "logit_scale" in module._parameters:
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)


@dataclass
class QLIPVisionOutput(BaseModelOutputWithPooling):
    """What the vision tower returns.

    `last_hidden_state` (b, n, d') is taken **after** the quantizer, without CLS (Z^); `pooler_output` (b, d) is the
    CLS state after `post_layernorm`; `hidden_states`, if asked for, are L + 1 states (b, 1 + n, d) with CLS first
    and no final norm.
    """

    pre_quant: Tensor | None = None
    """(b, n, d) patch states before the bottleneck, Z."""
    latents: Tensor | None = None
    """(b, n, L) bottleneck output before normalisation and sign."""
    quantized: Quantized | None = None
    """Code vectors, bits, losses and stats; None without a quantizer."""


class QLIPVisionModel(QLIPPreTrainedModel):
    """Vision encoder with the quantized bottleneck behind it."""

    config_class = QLIPVisionConfig

    def __init__(self, config: QLIPVisionConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.embeddings = VisionEmbeddings(
            hidden_size=width,
            image_size=config.image_size,
            patch_size=config.patch_size,
            num_channels=config.num_channels,
        )
        self.encoder = build_blocks(config)
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if config.quantizer == "bsq":
            self.quant_embed = BottleneckMlp(width, width, config.num_bits)
            self.quantizer = BinarySphericalQuantizer(
                config.num_bits,
                group_size=config.quantizer_group_size,
                inv_temperature=config.quantizer_inv_temperature,
                gamma=config.quantizer_gamma,
                l2_norm=config.quantizer_l2_norm,
            )
            self.quant_embed_post = BottleneckMlp(config.num_bits, config.hidden_size_post_q, config.hidden_size_post_q)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool | int | list[int] | None = None, **_: object
    ) -> QLIPVisionOutput:
        """(b, 3, S, S) CLIP-normalised pixels -> `QLIPVisionOutput`.

        `output_hidden_states` may be a bool or layer indices (transformers' LLaVA passes either); all are returned.
        Raises `ValueError` for pictures of another size than the config's.
        """
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(f"pixel_values are {tuple(pixel_values.shape[-2:])}, this model takes ({size}, {size})")
        keep_states = output_hidden_states is not None and output_hidden_states is not False
        x, states = self._encode(pixel_values, keep_states=keep_states)
        pooled = self.post_layernorm(x[:, 0])
        patches = x[:, 1:]
        output = QLIPVisionOutput(pooler_output=pooled, hidden_states=states, pre_quant=patches)
        if self.config.quantizer == "none":
            output.last_hidden_state = patches
            return output
        output.latents = self.quant_embed(patches)
        output.quantized = self.quantizer(output.latents)
        output.last_hidden_state = self.embed_codes(output.quantized.z_q)
        return output

    def _encode(self, pixel_values: Tensor, *, keep_states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        config = self.config
        x = self.embeddings(pixel_values)
        rotary = None
        if config.rope:
            rotary = rotary_2d(config.grid_size, config.hidden_size // config.num_attention_heads, device=x.device)
        return self.encoder(x, rotary, keep_states=keep_states)

    def patch_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(b, 3, S, S) -> states (b, n, d) of the patches after each of the L blocks, without CLS and bottleneck."""
        _, states = self._encode(pixel_values, keep_states=True)
        assert states is not None
        return tuple(state[:, 1:] for state in states[1:])

    def embed_codes(self, z_q: Tensor) -> Tensor:
        """(b, n, L) code vectors -> (b, n, d') decoder input: the upper half of the bottleneck."""
        return self.quant_embed_post(z_q.to(self.quant_embed_post.c_fc.weight.dtype))


class QLIPTextModel(QLIPPreTrainedModel):
    """CLIP's causal text transformer."""

    config_class = QLIPTextConfig
    main_input_name = "input_ids"

    def __init__(self, config: QLIPTextConfig) -> None:
        super().__init__(config)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_positions=config.max_position_embeddings
        )
        self.encoder = build_blocks(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutputWithPooling:
        """(b, t) int64 ids, padded on the right -> states (b, t, d) and the pooled end-of-text state (b, d).

        `attention_mask` is accepted for the processor's sake and has no effect: under a causal mask, padding on the
        right is invisible to the pooled position.
        """
        x, _states = self.encoder(self.embeddings(input_ids))
        x = self.final_layer_norm(x)
        positions = pooled_positions(input_ids, eos_token_id=self.config.eos_token_id)
        pooled = x[torch.arange(x.shape[0], device=x.device), positions]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


class QLIPDecoder(QLIPPreTrainedModel):
    """Patch features behind the quantizer -> CLIP-normalised pixels."""

    config_class = QLIPDecoderConfig
    main_input_name = "hidden_states"

    def __init__(self, config: QLIPDecoderConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.grid_size**2, config.hidden_size))
        self.encoder = build_blocks(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(nn.Linear(config.hidden_size, config.intermediate_size), nn.Tanh())
        self.conv_out = nn.Linear(config.intermediate_size, config.num_channels * config.patch_size**2)
        self.post_init()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(b, n, d) -> (b, 3, S, S), CLIP-normalised units, unclamped."""
        config = self.config
        rotary = None
        if config.rope:
            head_dim = config.hidden_size // config.num_attention_heads
            rotary = rotary_2d(config.grid_size, head_dim, device=hidden_states.device)
        x, _ = self.encoder(hidden_states + self.position_embeddings, rotary)
        patches = self.conv_out(self.ffn(self.norm(x)))
        return unpatchify(patches, patch_size=config.patch_size, grid_size=config.grid_size)
