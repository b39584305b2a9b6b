"""An EVA file or option that does not fit is one line that names the first wrong tensor; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from eva_files import clip_state, import_states, mim_state, text_state
from qlip.core.errors import UserError


def refused(folder: Path, state: dict[str, Tensor], text: dict[str, Tensor] | None = None, **options) -> str:
    with pytest.raises(UserError) as error:
        import_states(folder, state, text, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return clip_state()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual.blocks.0.attn.k_bias": torch.zeros(32)}, "visual.blocks.0.attn.k_bias is no tensor of EVA-02"),
        ({"visual.fc_norm.weight": torch.zeros(32)}, "visual.fc_norm.weight is no tensor of EVA-02"),
        ({"head.weight": torch.zeros(24, 32)}, "head.weight is no tensor of EVA-02"),
        ({"visual.blocks.00.norm1.bias": torch.zeros(32)}, "visual.blocks.00.norm1.bias is no tensor of EVA-02"),
        ({"two\nlines": torch.zeros(2)}, r"'two\nlines' is no tensor of EVA-02"),
        ({"norm.bias": torch.zeros(32)}, "visual.norm.bias and norm.bias both stand for vision_model.post_layernorm"),
        ({"visual.blocks.1.attn.qkv.weight": torch.zeros(96, 32)}, "both stand for vision_model.encoder.layers.1.self"),
        ({"visual.blocks.1.norm2.bias": None}, "has no blocks.1.norm2.bias (for vision_model.encoder.layers.1.layer_n"),
        ({"visual.blocks.0.attn.inner_attn_ln.bias": None}, "has no blocks.0.attn.inner_attn_ln.bias"),
        ({"visual.blocks.1.attn.q_bias": None}, "has no blocks.1.attn.q_bias"),
        ({"visual.cls_token": None}, "has no cls_token"),
        ({"text.token_embedding.weight": None}, "has no token_embedding.weight"),
        ({"text.transformer.resblocks.0.attn.in_proj_bias": None}, "has no transformer.resblocks.0.attn.in_proj_bias"),
        ({"text.text_projection": None}, "has no text_projection (for text_projection.weight)"),
        ({"visual.blocks.7.norm1.bias": torch.zeros(32)}, "has no blocks.2.norm1.weight"),
        ({"visual.blocks.2.norm1.bias": torch.zeros(32)}, "has no blocks.2.norm1.weight"),
        ({"visual.norm.bias": torch.zeros(31)}, "visual.norm.bias is (31,), expected (32,)"),
        ({"visual.cls_token": torch.zeros(1, 2, 32)}, "visual.cls_token is (2, 32), expected 1 axes"),
        ({"visual.pos_embed": torch.zeros(1, 15, 32)}, "visual.pos_embed is (15, 32), expected CLS and a square grid"),
        ({"visual.patch_embed.proj.weight": torch.zeros(32, 3, 14, 16)}, "expected a kernel of square patches"),
        (
            {"visual.patch_embed.proj.weight": torch.zeros(32, 4, 16, 16)},
            "is (32, 4, 16, 16), expected (32, 3, 16, 16)",
        ),
        ({"text.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(95)}, "expected q, k and v of one size"),
        ({"text.transformer.resblocks.0.attn.in_proj_bias": torch.tensor(1.0)}, "expected q, k and v of one size"),
        ({"text.token_embedding.weight": torch.zeros(100, 32)}, "expected (49408, width), the vocabulary of CLIP's"),
        ({"logit_scale": torch.tensor([1.0, 2.0])}, "logit_scale is (2,), expected ()"),
        ({"visual.norm.bias": torch.zeros(32, dtype=torch.int64)}, "visual.norm.bias holds torch.int64, not weights"),
        ({"visual.norm.bias": torch.full((32,), torch.nan)}, "visual.norm.bias holds NaN or infinite values"),
    ],
)
def test_a_wrong_tensor_is_named_in_one_line(clip, tmp_path, change, said):
    state = {name: tensor for name, tensor in (clip | change).items() if tensor is not None}
    message = refused(tmp_path, state)
    assert said in message and str(tmp_path / "vision.pt") in message and "; " in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 65}, "image_size 65 is no multiple of patch_size 16"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"decoder_layers": 0}, "decoder_layers is 0"),
        ({"head_dim": 64}, "width 32 is no multiple of head_dim 64"),
        ({"head_dim": 2}, "head_dim 2 is no multiple of 4"),
    ],
)
def test_options_that_do_not_fit(clip, tmp_path, options, said):
    assert said in refused(tmp_path, clip, **options)


def test_a_text_file_without_text(tmp_path):
    assert "text.pt has no text tower" in refused(tmp_path, mim_state(), mim_state())
    incomplete = {name: t for name, t in text_state().items() if name != "text.ln_final.bias"}
    message = refused(tmp_path, mim_state(), incomplete)
    assert message.startswith(f"{tmp_path / 'text.pt'} has no ln_final.bias")


def test_a_head_of_another_width_than_the_files_own_text(clip, tmp_path):
    head = {"visual.head.weight": torch.zeros(12, 32), "visual.head.bias": torch.zeros(12)}
    assert "visual.head.weight is (12, 32), expected (24, 32)" in refused(tmp_path, clip | head)
