"""Attention against the explicit softmax matrix; rotary positions against complex numbers, in float64."""

import math

import pytest
import torch
from einops import rearrange
from torch import Tensor
from transformers import AttentionInterface

from qlip.nn.attention import Attention, Rotary, eager_attention, rotary_2d, rotate, sdpa_attention

CPU = torch.device("cpu")


def naive_angles(grid_size: int, head_dim: int) -> Tensor:
    """(n, h/2) float64, one angle per pair: ``t = i / g * 16`` times ``10000^(-2j / (h/2))``, rows then columns."""
    table = []
    for row in range(grid_size):
        for column in range(grid_size):
            angles = []
            for index in (row, column):
                coordinate = index / grid_size * 16
                angles += [coordinate * 10_000 ** (-2 * j / (head_dim / 2)) for j in range(head_dim // 4)]
            table.append(angles)
    return torch.tensor(table, dtype=torch.float64)


def naive_rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Each pair (x[2m], x[2m + 1]) as a complex number, turned by its angle."""
    pairs = torch.view_as_complex(rearrange(x.double(), "... (m two) -> ... m two", two=2).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


@pytest.mark.parametrize(("grid_size", "head_dim"), [(4, 16), (16, 64), (28, 64)])
def test_rotation_equals_complex_multiplication(grid_size, head_dim):
    x = torch.randn(2, 3, grid_size**2, head_dim)
    rotated = rotate(x, rotary_2d((grid_size, grid_size), head_dim, device=CPU))
    expected = naive_rotate(x, naive_angles(grid_size, head_dim))
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=2e-5)


def test_table_is_float32_one_row_per_patch_and_each_angle_twice():
    rotary = rotary_2d((4, 4), 16, device=CPU)
    assert torch.equal(rotary.signed_sin[:, 0::2], -rotary.sin[:, 0::2])
    assert torch.equal(rotary.signed_sin[:, 1::2], rotary.sin[:, 1::2])
    for table in (rotary.cos, rotary.sin):
        assert table.dtype == torch.float32
        assert table.shape == (16, 16)
        assert torch.equal(table[:, 0::2], table[:, 1::2])
    assert torch.equal(rotary.cos[4:8, :8], rotary.cos[4:5, :8].expand(4, -1))  # first half: equal along a row
    assert torch.equal(rotary.cos[1::4, 8:], rotary.cos[1:2, 8:].expand(4, -1))  # second half: equal along a column


def test_scores_depend_only_on_the_offset_between_patches():
    grid_size = 5
    q, k = torch.randn(16), torch.randn(16)
    rotary = rotary_2d((grid_size, grid_size), 16, device=CPU)
    rotated_q, rotated_k = (rotate(x.expand(1, 1, grid_size**2, 16), rotary)[0, 0] for x in (q, k))
    scores = rearrange(rotated_q @ rotated_k.T, "(r c) (s d) -> r c s d", r=grid_size, s=grid_size)
    by_offset: dict[tuple[int, int], list[float]] = {}
    for r in range(grid_size):
        for c in range(grid_size):
            for s in range(grid_size):
                for d in range(grid_size):
                    by_offset.setdefault((s - r, d - c), []).append(scores[r, c, s, d].item())
    assert len(by_offset) == (2 * grid_size - 1) ** 2
    assert max(max(values) - min(values) for values in by_offset.values()) < 1e-4
    assert max(scores.flatten()) - min(scores.flatten()) > 0.1  # and offsets do matter


def test_cls_is_not_rotated():
    x = torch.randn(2, 3, 17, 16)
    rotated = rotate(x, rotary_2d((4, 4), 16, device=CPU, num_unrotated=1))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotated[:, :, 1:], rotate(x[:, :, 1:], rotary_2d((4, 4), 16, device=CPU)))


def test_rows_and_columns_of_a_rectangle_each_span_the_base_grid():
    """The first half of the head turns as in the square of as many rows, the second as in that of as many columns."""
    rectangle = rotary_2d((3, 5), 16, device=CPU)
    tall, wide = rotary_2d((3, 3), 16, device=CPU), rotary_2d((5, 5), 16, device=CPU)
    for table, by_row, by_column in zip(rectangle, tall, wide, strict=True):
        grid = rearrange(table, "(r c) h -> r c h", r=3)
        assert torch.equal(grid[:, 2, :8], rearrange(by_row, "(r c) h -> r c h", r=3)[:, 0, :8])
        assert torch.equal(grid[1, :, 8:], rearrange(by_column, "(r c) h -> r c h", r=5)[0, :, 8:])


@pytest.mark.parametrize(("grid_size", "step"), [(16, 1.0), (32, 0.5), (28, 4 / 7)])
def test_every_grid_spans_the_base_grid(grid_size, step):
    cos, sin, _ = rotary_2d((grid_size, grid_size), 64, device=CPU)
    first_frequency = torch.atan2(sin[1, 32], cos[1, 32])  # theta_0 = 1, so the angle of column 1 is the step
    assert abs(first_frequency.item() - step) < 1e-6


def test_half_steps_of_grid_32_land_on_grid_16():
    fine, coarse = rotary_2d((32, 32), 64, device=CPU), rotary_2d((16, 16), 64, device=CPU)
    for fine_table, coarse_table in zip(fine, coarse, strict=True):
        every_second = rearrange(fine_table, "(r c) h -> r c h", r=32)[::2, ::2].flatten(0, 1)
        assert torch.equal(every_second, coarse_table)


def test_rotation_keeps_the_dtype_and_the_norm():
    x = torch.randn(1, 2, 16, 16)
    rotary = rotary_2d((4, 4), 16, device=CPU)
    assert rotate(x.bfloat16(), rotary).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, rotary).norm(dim=-1), x.norm(dim=-1))


def test_a_head_width_not_divisible_by_four_is_refused():
    with pytest.raises(ValueError, match="head width divisible by 4, got 6"):
        rotary_2d((4, 4), 6, device=CPU)


def explicit_attention(module: Attention, x: Tensor, rotary: Rotary | None) -> Tensor:
    """Head by head and query by query in float64: scale, rotate, softmax over what may be seen, average."""
    module = module.double()
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    head_dim = x.shape[-1] // module.num_heads
    merged = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for head in range(module.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            queries, keys = q[image, :, part] / math.sqrt(head_dim), k[image, :, part]
            if rotary is not None:
                angles = naive_angles(4, head_dim)
                shift = x.shape[1] - angles.shape[0]
                queries, keys = (
                    torch.cat([tokens[:shift], naive_rotate(tokens[shift:], angles)]) for tokens in (queries, keys)
                )
            for i in range(x.shape[1]):
                visible = i + 1 if module.is_causal else x.shape[1]
                weights = (queries[i] @ keys[:visible].T).softmax(-1)
                merged[image, i, part] = weights @ v[image, :visible, part]
    return module.out_proj(module.inner_attn_ln(merged))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("inner_norm_eps", [None, 1e-6])
@pytest.mark.parametrize("num_tokens", [16, 17])
def test_attention_equals_the_explicit_softmax_matrix(num_tokens, inner_norm_eps, causal, implementation):
    rotary = rotary_2d((4, 4), 8, device=CPU, num_unrotated=num_tokens - 16)
    attention = Attention(32, 4, k_bias=False, inner_norm_eps=inner_norm_eps, causal=causal)
    x = torch.randn(2, num_tokens, 32)
    with torch.no_grad():
        for position in (rotary, None):
            got = attention.float()(x, position, implementation=implementation)
            torch.testing.assert_close(
                got.double(), explicit_attention(attention, x.double(), position), rtol=0, atol=1e-5
            )


def test_causal_tokens_do_not_see_later_ones_and_others_do():
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    for causal in (True, False):
        attention = Attention(16, 2, causal=causal)
        same = torch.isclose(attention(x), attention(changed)).all(-1)[0]
        assert same[:4].all() == causal


def test_sub_layer_norm_sits_between_heads_and_output_projection():
    attention = Attention(16, 2, inner_norm_eps=1e-6)
    seen = []
    attention.out_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    attention(torch.randn(1, 5, 16) * 7)
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(1, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(seen[0].var(-1, unbiased=False), torch.ones(1, 5), rtol=0, atol=1e-3)


def test_biases_are_there_when_asked_for():
    attention = Attention(16, 2, q_bias=True, k_bias=False, v_bias=False)
    assert attention.q_proj.bias is not None
    assert attention.k_proj.bias is None
    assert attention.v_proj.bias is None


def test_sdpa_keeps_bfloat16_and_computes_in_float32_on_cpu():
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16() for _ in range(3))
    out = sdpa_attention(q, k, v, causal=False)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, sdpa_attention(q.float(), k.float(), v.float(), causal=False).bfloat16())


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    attention = Attention(16, 2, dropout=0.5).eval()
    x = torch.randn(1, 6, 16)
    for implementation in ("sdpa", "eager"):
        with torch.no_grad():
            still = attention.eval()(x, implementation=implementation)
            assert torch.equal(still, attention(x, implementation=implementation))
            attention.train()
            drawn = torch.stack([attention(x, implementation=implementation) for _ in range(4000)])
        assert (drawn[0] - still).abs().max() > 1e-3
        torch.testing.assert_close(drawn.mean(0), still, rtol=0, atol=0.05)


def test_any_attention_of_transformers_registry_can_be_named():
    def registered(module, q, k, v, mask, *, scaling, dropout, is_causal):
        assert mask is None and is_causal and dropout == 0 and scaling == 8**-0.5 and module.num_heads == 2
        return eager_attention(q, k, v, causal=is_causal).transpose(1, 2), None

    AttentionInterface.register("written_out", registered)
    attention = Attention(16, 2, causal=True).eval()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(attention(x, implementation="written_out"), attention(x))
