"""QLIP's three towers: vision encoder with the quantized bottleneck, text encoder, visual decoder (arXiv 2502.05178).

Shapes: `b` images or texts, `t` text tokens, `n` patches, `d` width, `L` bits per patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from qlip.models.qlip.configuration import QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.pretrained import QLIPPreTrainedModel
from qlip.nn.attention import Attention, Rotary, rotary_2d
from qlip.nn.blocks import Block, BlockStack, Mlp, SwiGLU
from qlip.nn.text import TextEmbeddings, pooled_positions
from qlip.nn.vision import BottleneckMlp, VisionEmbeddings, resize_positions, unpatchify
from qlip.quantizers.base import Quantized
from qlip.quantizers.build import QuantizerConfig, build_quantizer


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
            dropout=config.attention_dropout,
        )
        return Block(attention, build_mlp(), hidden_size=config.hidden_size, norm_eps=eps)

    blocks = [build_block() for _ in range(config.num_hidden_layers)]
    for layer, block in enumerate(blocks, start=1):
        mlp_output = block.mlp.w3 if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
        for linear in (block.self_attn.out_proj, mlp_output):
            linear.residual_layer = layer  # type: ignore[assignment]  # read by _init_weights
    return BlockStack(blocks)


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


def _rotary(
    config: QLIPVisionConfig | QLIPDecoderConfig, grid: tuple[int, int], *, device: torch.device, num_unrotated: int = 0
) -> Rotary | None:
    head_dim = config.hidden_size // config.num_attention_heads
    return rotary_2d(grid, head_dim, device=device, num_unrotated=num_unrotated) if config.rope else None


class QLIPVisionModel(QLIPPreTrainedModel):
    """Vision encoder with the quantized bottleneck behind it."""

    config_class = QLIPVisionConfig
    base_model_prefix = _part_name = "vision_model"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [
        *(QLIPPreTrainedModel._keys_to_ignore_on_load_unexpected or ()),
        r"^(text_model|vision_decoder|visual_projection|text_projection|classifier)\.|^logit_scale$",
    ]

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
        if config.quantizer != "none":
            self.quantizer = build_quantizer(_quantizer_config(config))
            self.quant_embed: nn.Module = nn.Identity()
            self.quant_embed_post: nn.Module = nn.Identity()
            if config.quantizer_embed_type == "mlp":
                self.quant_embed = BottleneckMlp(width, width, config.latent_dim)
                out = config.hidden_size_post_q
                self.quant_embed_post = BottleneckMlp(config.latent_dim, out, out)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The patch convolution."""
        return self.embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        *,
        output_hidden_states: bool | int | list[int] | None = None,
        interpolate_pos_encoding: bool = False,
        **_: object,
    ) -> QLIPVisionOutput:
        """(b, 3, S, S) CLIP-normalised pixels -> `QLIPVisionOutput`.

        `output_hidden_states` may be a bool or layer indices (transformers' LLaVA passes either); all are returned.
        `interpolate_pos_encoding` allows any sides that are multiples of the patch size: learned positions are
        interpolated (bicubic) and rotary ones span the new grid. The model was not trained for it: expect less.
        Raises `ValueError` for pictures of another size than the config's without it.
        """
        self._check_size(pixel_values, interpolate=interpolate_pos_encoding)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x, states = self._encode(pixel_values, keep_states=output_hidden_states is not False)
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

    def _check_size(self, pixel_values: Tensor, *, interpolate: bool) -> None:
        size, patch = self.config.image_size, self.config.patch_size
        height, width = pixel_values.shape[-2:]
        if interpolate and (height % patch or width % patch):
            raise ValueError(f"pixel_values are ({height}, {width}): give sides that are multiples of {patch}")
        if not interpolate and (height, width) != (size, size):
            raise ValueError(
                f"pixel_values are ({height}, {width}), this model takes ({size}, {size}); "
                "resize them, or pass interpolate_pos_encoding=True"
            )

    def _encode(self, pixel_values: Tensor, *, keep_states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        config = self.config
        grid = (pixel_values.shape[-2] // config.patch_size, pixel_values.shape[-1] // config.patch_size)
        x = self.embeddings(pixel_values)
        rotary = _rotary(config, grid, device=x.device, num_unrotated=1)  # CLS stays as it is
        return self.encoder(x, rotary, attention=config._attn_implementation or "sdpa", keep_states=keep_states)

    def patch_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """(b, 3, S, S) -> states (b, n, d) of the patches after each of the L blocks, without CLS and bottleneck."""
        _, states = self._encode(pixel_values, keep_states=True)
        assert states is not None
        return tuple(state[:, 1:] for state in states[1:])

    def quantize(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Quantized:
        """(b, 3, S, S) -> codes and bits, without what only the decoder needs.

        Raises `ValueError` for a model without quantizer.
        """
        if self.config.quantizer == "none":
            raise ValueError("this model has no quantizer (quantizer: none), so it has no bits")
        self._check_size(pixel_values, interpolate=interpolate_pos_encoding)
        x, _ = self._encode(pixel_values, keep_states=False)
        return self.quantizer(self.quant_embed(x[:, 1:]))

    def embed_codes(self, z_q: Tensor) -> Tensor:
        """(b, n, latent_dim) code vectors -> (b, n, d') decoder input: the upper half of the bottleneck."""
        return self.quant_embed_post(z_q.to(self.post_layernorm.weight.dtype))


def _quantizer_config(config: QLIPVisionConfig) -> QuantizerConfig:
    return QuantizerConfig(
        kind=config.quantizer,
        num_bits=config.num_bits,
        group_size=config.quantizer_group_size,
        inv_temperature=config.quantizer_inv_temperature,
        gamma_0=config.quantizer_gamma_0,
        gamma=config.quantizer_gamma,
        beta=config.quantizer_beta,
        l2_norm=config.quantizer_l2_norm,
        unit_codes=config.quantizer_unit_codes,
        fsq_levels=tuple(config.fsq_levels or ()),
    )


class QLIPTextModel(QLIPPreTrainedModel):
    """CLIP's causal text transformer."""

    config_class = QLIPTextConfig
    base_model_prefix = _part_name = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [
        *(QLIPPreTrainedModel._keys_to_ignore_on_load_unexpected or ()),
        r"^(vision_model|vision_decoder|visual_projection|text_projection)\.|^logit_scale$",
    ]

    def __init__(self, config: QLIPTextConfig) -> None:
        super().__init__(config)
        self.embeddings = TextEmbeddings(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_positions=config.max_position_embeddings
        )
        self.encoder = build_blocks(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token table."""
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token table."""
        self.embeddings.token_embedding = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        **_: object,
    ) -> BaseModelOutputWithPooling:
        """(b, t) int64 ids, padded on the right -> states (b, t, d) and the pooled end-of-text state (b, d).

        `attention_mask` is accepted for the processor's sake and has no effect: under a causal mask, padding on the
        right is invisible to the pooled position.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        attention = self.config._attn_implementation or "sdpa"
        x, states = self.encoder(
            self.embeddings(input_ids), attention=attention, keep_states=bool(output_hidden_states)
        )
        x = self.final_layer_norm(x)
        positions = pooled_positions(input_ids, eos_token_id=self.config.eos_token_id)
        pooled = x[torch.arange(x.shape[0], device=x.device), positions]
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled, hidden_states=states)


class QLIPDecoder(QLIPPreTrainedModel):
    """Patch features behind the quantizer -> CLIP-normalised pixels."""

    config_class = QLIPDecoderConfig
    base_model_prefix = _part_name = "vision_decoder"
    main_input_name = "hidden_states"
    _keys_to_ignore_on_load_unexpected = [
        *(QLIPPreTrainedModel._keys_to_ignore_on_load_unexpected or ()),
        r"^(text_model|vision_model|visual_projection|text_projection)\.|^logit_scale$",
    ]

    def __init__(self, config: QLIPDecoderConfig) -> None:
        super().__init__(config)
        self.position_embeddings = nn.Parameter(torch.empty(1, config.grid_size**2, config.hidden_size))
        self.encoder = build_blocks(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn = nn.Sequential(nn.Linear(config.hidden_size, config.intermediate_size), nn.Tanh())
        self.conv_out = nn.Linear(config.intermediate_size, config.num_channels * config.patch_size**2)
        self.post_init()

    def forward(self, hidden_states: Tensor, *, grid: tuple[int, int] | None = None) -> Tensor:
        """(b, n, d) -> (b, 3, S, S), CLIP-normalised units, unclamped.

        Another `grid` of (rows, columns) patches than the trained one interpolates positions, as the encoder does.
        Raises `ValueError` when n is not the number of its patches.
        """
        config = self.config
        rows, columns = grid = grid or (config.grid_size, config.grid_size)
        if hidden_states.shape[1] != rows * columns:
            raise ValueError(f"{hidden_states.shape[1]} tokens are not the {rows} x {columns} of the grid")
        positions: Tensor = self.position_embeddings
        if grid != (config.grid_size, config.grid_size):
            positions = resize_positions(positions[0], grid)[None]
        rotary = _rotary(config, grid, device=hidden_states.device)
        attention = config._attn_implementation or "sdpa"
        x, _ = self.encoder(hidden_states + positions, rotary, attention=attention)
        patches = self.conv_out(self.ffn(self.norm(x)))
        return unpatchify(patches, patch_size=config.patch_size, grid=grid)
