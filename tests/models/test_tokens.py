"""Bits and pictures: golden bits, ids and sub-codes, batch-invariant encoding, other resolutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import pictures, tiny_config, tiny_model
from torch.nn import functional as F

from qlip import bits_to_ids, bits_to_subcodes
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.attention import rotary_2d

GOLDEN_IDS = [
    [
        95795131,
        221696378,
        158816154,
        158564291,
        89093826,
        60127121,
        230119354,
        99908806,
        100130491,
        87299987,
        95231743,
        219493506,
        233708540,
        221419415,
        60113579,
        221648786,
    ],
    [
        86482591,
        18102163,
        157646778,
        230085182,
        95786687,
        258168798,
        225657818,
        95925407,
        100079514,
        95795095,
        268375006,
        228984754,
        196305550,
        133498843,
        26559008,
        261371534,
    ],
]


def frozen_noise(shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Standard normal numbers of NumPy's legacy generator, whose stream never changes between versions."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def golden_model() -> QLIPModel:
    """Weights that depend on names and a seed alone, not on anybody's initialisation."""
    model = QLIPModel(tiny_config()).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(sorted(model.named_parameters())):
            noise = 0.2 * frozen_noise(tuple(parameter.shape), seed=i)
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model


@torch.inference_mode()
def test_golden_bits():
    """The same ids as on the day they were written down: on any machine, with any version of what lies below."""
    model = golden_model()
    pixels = frozen_noise((2, 3, 32, 32), seed=1243)
    margins = F.normalize(model.vision_model(pixels).latents, dim=-1).abs()
    assert margins.min() > 1e-3  # rounding moves latents by about 1e-7, so that no bit is a matter of luck
    for batch_invariant in (False, True):
        assert bits_to_ids(model.encode(pixels, batch_invariant=batch_invariant)).tolist() == GOLDEN_IDS


@torch.inference_mode()
def test_ids_and_sub_codes_decode_to_the_pixels_of_their_bits():
    model = tiny_model()
    bits = model.encode(pictures())
    expected = model.decode(bits)
    assert torch.equal(model.decode_ids(bits_to_ids(bits)), expected)
    for division in (2, 4, 7, 14, 28):
        assert torch.equal(model.decode_ids(bits_to_subcodes(bits, division)), expected)
    with pytest.raises(ValueError, match="outside the 28-bit range"):
        model.decode_ids(torch.full((1, 16), 2**28))
    with pytest.raises(ValueError, match="ids must be int64"):
        model.decode_ids(torch.zeros(1, 16))


# --- batch-invariant encoding ----------------------------------------------------------------------------------


@torch.inference_mode()
def test_batch_invariant_encoding_depends_on_nothing_but_the_picture():
    """Alone, in any batch, in any place, and under autocast: the very same latents, hence the same bits."""
    model = tiny_model()
    seen = []
    model.vision_model.quantizer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    batch = pictures(7)
    alone = torch.cat([model.encode(picture[None], batch_invariant=True) for picture in batch])
    latents, seen[:] = torch.cat(seen), []
    assert torch.equal(model.encode(batch, batch_invariant=True), alone)
    assert torch.equal(torch.cat(seen), latents)
    assert torch.equal(model.encode(batch.flip(0), batch_invariant=True), alone.flip(0))
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(batch, batch_invariant=True), alone)
    assert torch.equal(torch.cat(seen), latents)


@torch.inference_mode()
def test_batch_invariant_encoding_restores_the_precision_of_the_process():
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        tiny_model().encode(pictures(1), batch_invariant=True)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(precision)
    with pytest.raises(ValueError, match=r"needs float32 weights: call model\.float\(\) first"):
        tiny_model().bfloat16().encode(pictures(1), batch_invariant=True)


# --- other resolutions -----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_another_resolution_interpolates_positions_and_spans_the_base_grid():
    model = tiny_model()
    large = pictures(2, size=48)
    assert "pass interpolate_pos_encoding=True" in message(lambda: model.encode(large))
    bits = model.encode(large, interpolate_pos_encoding=True)
    assert bits.shape == (2, 36, 28)
    assert "pass interpolate_pos_encoding=True" in message(lambda: model.decode(bits))
    pixels = model.decode(bits, interpolate_pos_encoding=True)
    output = model(large, interpolate_pos_encoding=True)
    assert torch.equal(output.bits, bits) and torch.equal(output.reconstructions, pixels)
    assert pixels.shape == large.shape
    same = pictures()
    assert torch.equal(model.encode(same, interpolate_pos_encoding=True), model.encode(same))


@torch.inference_mode()
def test_interpolation_equals_a_model_whose_tables_were_interpolated_by_hand():
    """A model of the larger size with the same weights and bicubic positions computes the same."""
    model = tiny_model()
    large = tiny_config()
    large.vision_config.image_size = large.decoder_config.image_size = 48
    by_hand = QLIPModel(large).eval()
    state = model.state_dict()

    def bicubic(table: torch.Tensor) -> torch.Tensor:
        picture = table.reshape(4, 4, 32).permute(2, 0, 1)[None]
        return (
            F.interpolate(picture, size=(6, 6), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).flatten(0, 1)
        )

    positions = state["vision_model.embeddings.position_embedding.weight"]
    state["vision_model.embeddings.position_embedding.weight"] = torch.cat([positions[:1], bicubic(positions[1:])])
    state["vision_decoder.position_embeddings"] = bicubic(state["vision_decoder.position_embeddings"][0])[None]
    by_hand.load_state_dict(state)
    pixels = pictures(2, size=48)
    ours, theirs = model(pixels, interpolate_pos_encoding=True), by_hand(pixels)
    assert torch.equal(ours.bits, theirs.bits)
    torch.testing.assert_close(ours.reconstructions, theirs.reconstructions)
    torch.testing.assert_close(ours.image_embeds, theirs.image_embeds)


@torch.inference_mode()
def test_rectangles():
    model = tiny_model()
    wide = torch.randn(1, 3, 24, 48)
    bits = model.encode(wide, interpolate_pos_encoding=True)
    assert bits.shape == (1, 18, 28)
    assert "18 tokens are no square: pass grid=" in message(lambda: model.decode(bits, interpolate_pos_encoding=True))
    pixels = model.decode(bits, grid=(3, 6), interpolate_pos_encoding=True)
    assert torch.equal(pixels, model(wide, interpolate_pos_encoding=True).reconstructions)
    assert pixels.shape == wide.shape
    assert "are not the 3 x 5 of the grid" in message(
        lambda: model.decode(bits, grid=(3, 5), interpolate_pos_encoding=True)
    )
    uneven = torch.randn(1, 3, 20, 32)
    assert "multiples of 8" in message(lambda: model.encode(uneven, interpolate_pos_encoding=True))


def test_the_rotary_table_of_a_finer_grid_contains_that_of_the_coarser():
    fine, coarse = (rotary_2d((g, g), 16, device=torch.device("cpu")).cos for g in (8, 4))
    assert torch.equal(fine.reshape(8, 8, 16)[::2, ::2].flatten(0, 1), coarse)


def message(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_batch_invariant_encoding_works_beside_the_newer_precision_switches():
    backends = torch.backends
    before = backends.cuda.matmul.fp32_precision
    try:
        backends.cuda.matmul.fp32_precision = "tf32"
        tiny_model().encode(pictures(1), batch_invariant=True)
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        backends.cuda.matmul.fp32_precision = before


def test_encoding_keeps_nothing_for_a_gradient():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        tiny_model().encode(pictures(1))
    assert saved == []
