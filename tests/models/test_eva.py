"""EVA files become QLIPs: the same features as timm and open_clip compute from them, and no tensor unaccounted for."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import TextTransformer
from safetensors.torch import save_file
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor
from torch.nn import functional as F

from eva_files import HEAD_DIM, PROJECTION_DIM, WIDTH, clip_state, import_states, mim_state, text_state
from qlip.models.qlip.eva import Imported, import_eva
from qlip.models.qlip.eva_keys import KEYS, source_of, targets_of
from qlip.models.qlip.eva_sizes import EvaImportConfig

LAYER = "vision_model.encoder.layers.1"
TEXT_LAYER = "text_model.encoder.layers.1"


def timm_tower(state: dict[str, Tensor], **options) -> Eva:
    """timm's EVA-02 with these tensors, renamed by timm itself."""
    tower = Eva(
        img_size=64,
        patch_size=16,
        embed_dim=WIDTH,
        depth=2,
        num_heads=WIDTH // HEAD_DIM,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        **options,
    )
    tower.load_state_dict(checkpoint_filter_fn(state, tower))
    return tower.eval()


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return clip_state()


@pytest.fixture(scope="module")
def imported(clip, tmp_path_factory) -> Imported:
    return import_states(tmp_path_factory.mktemp("clip"), clip)


@torch.inference_mode()
def test_image_embeddings_equal_timms(clip, imported):
    tower = timm_tower(
        clip,
        qkv_fused=False,
        scale_mlp=True,
        scale_attn_inner=True,
        global_pool="token",
        num_classes=PROJECTION_DIM,
    )
    pixel_values = torch.randn(3, 3, 64, 64)
    embedding = imported.model.get_image_features(pixel_values).pooler_output
    torch.testing.assert_close(embedding, tower(pixel_values), rtol=1e-4, atol=1e-5)
    states = imported.model.vision_model(pixel_values, output_hidden_states=True).hidden_states
    torch.testing.assert_close(tower.norm(states[-1]), tower.forward_features(pixel_values), rtol=1e-4, atol=1e-5)
    assert embedding.std() > 0.1  # the towers do not merely agree on nothing


@torch.inference_mode()
def test_text_embeddings_equal_open_clips(clip, imported):
    tower = TextTransformer(context_length=8, vocab_size=49408, width=32, heads=2, layers=2, output_dim=PROJECTION_DIM)
    tower.load_state_dict({name.removeprefix("text."): t for name, t in clip.items() if name.startswith("text.")})
    ids = torch.tensor([[49406, 320, 2368, 49407, 0, 0, 0, 0], [49406, 5, 6, 7, 8, 9, 10, 49407]])
    embedding = imported.model.get_text_features(ids).pooler_output
    torch.testing.assert_close(embedding, tower.eval()(ids), rtol=1e-4, atol=1e-5)
    assert embedding.std() > 0.1 and imported.model.logit_scale.item() == pytest.approx(4.6)


@torch.inference_mode()
def test_the_small_layout_has_fused_projections_and_no_inner_norms(tmp_path):
    state = mim_state(ffn_norm=False, fused=True)
    model, report = import_states(tmp_path, state, text_state())
    # swiglu_align_to=1 has timm keep w1 and w2 apart, as the file does
    tower = timm_tower(
        {k: v for k, v in state.items() if k != "mask_token" and not k.startswith("lm_head.")},
        qkv_fused=True,
        swiglu_align_to=1,
        global_pool="token",
        num_classes=0,
    )
    assert not model.config.vision_config.subln and not model.config.decoder_config.subln
    pixel_values = torch.randn(2, 3, 64, 64)
    pooled = model.vision_model(pixel_values).pooler_output
    torch.testing.assert_close(pooled, tower(pixel_values), rtol=1e-4, atol=1e-5)
    assert not any("inner_attn_ln" in name for name in report.fresh)


def test_tensors_are_cut_turned_and_squeezed(clip, imported):
    state = dict(imported.model.named_parameters())
    block = "text.transformer.resblocks.1.attn.in_proj"
    for i, name in enumerate("qkv"):
        rows = slice(32 * i, 32 * i + 32)
        assert torch.equal(state[f"{TEXT_LAYER}.self_attn.{name}_proj.weight"], clip[f"{block}_weight"][rows])
        assert torch.equal(state[f"{TEXT_LAYER}.self_attn.{name}_proj.bias"], clip[f"{block}_bias"][rows])
    assert torch.equal(state["text_projection.weight"], clip["text.text_projection"].T)
    assert torch.equal(state["vision_model.embeddings.class_embedding"], clip["visual.cls_token"][0, 0])
    assert torch.equal(state["vision_model.embeddings.position_embedding.weight"], clip["visual.pos_embed"][0])
    assert torch.equal(state[f"{LAYER}.self_attn.q_proj.bias"], clip["visual.blocks.1.attn.q_bias"])
    assert f"{LAYER}.self_attn.k_proj.bias" not in state
    assert torch.equal(
        state[f"{LAYER}.self_attn.inner_attn_ln.weight"], clip["visual.blocks.1.attn.inner_attn_ln.weight"]
    )
    config = imported.model.config
    assert (config.projection_dim, config.text_config.max_position_embeddings) == (PROJECTION_DIM, 8)
    assert (config.vision_config.intermediate_size, config.decoder_config.num_hidden_layers) == (85, 2)


def test_every_tensor_is_accounted_for(clip, imported):
    report = imported.report
    targets = [*(row.target for row in report.taken), *report.fresh]
    assert sorted(targets) == sorted(name for name, _ in imported.model.named_parameters())
    assert report.resized == []
    sources = {row.source.partition("[")[0] for row in report.taken} | {row.source for row in report.ignored}
    assert sources == set(clip)
    assert {name.split(".")[0] for name in report.fresh} == {"vision_decoder", "vision_model"}
    assert all(name.startswith(("vision_decoder.", "vision_model.quant_embed")) for name in report.fresh)
    assert {row.source for row in report.ignored} == {name for name in clip if "rope" in name}
    thirds = {
        row.source for row in report.taken if row.source.startswith("text.transformer.resblocks.0.attn.in_proj_bias")
    }
    assert {source.partition("[")[2] for source in thirds} == {"0:32]", "32:64]", "64:96]"}


@pytest.mark.parametrize(
    ("grid", "patch", "image_size", "patch_size", "resized"),
    [
        (4, 14, 64, 16, {"patch_embedding"}),  # patch 14 at 56 px has the grid of patch 16 at 64 px
        (7, 16, 64, 16, {"position_embedding"}),
        (4, 14, 96, 8, {"patch_embedding", "position_embedding"}),
        (4, 16, 64, 16, set()),
    ],
)
def test_positions_and_kernel_are_resized_independently(tmp_path, grid, patch, image_size, patch_size, resized):
    state = clip_state(grid=grid, patch=patch)
    model, report = import_states(tmp_path, state, image_size=image_size, patch_size=patch_size)
    assert {row.target.split(".")[-2] for row in report.resized} == resized
    embeddings = model.vision_model.embeddings
    kernel = F.interpolate(
        state["visual.patch_embed.proj.weight"], size=patch_size, mode="bicubic", align_corners=False
    )
    assert torch.equal(embeddings.patch_embedding.weight, kernel)
    cls, table = state["visual.pos_embed"][0, :1], state["visual.pos_embed"][0, 1:]
    table = table.reshape(grid, grid, WIDTH).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=image_size // patch_size, mode="bicubic", align_corners=False)
    expected = torch.cat([cls, table[0].flatten(1).T])
    torch.testing.assert_close(embeddings.position_embedding.weight, expected, rtol=0, atol=1e-6)
    for row in report.resized:
        size = patch if "patch" in row.target.split(".")[-2] else grid**2 + 1
        assert size in row.from_shape and row.to_shape == tuple(model.get_parameter(row.target).shape)


def test_a_mim_file_alone_leaves_text_projections_and_inner_norms_fresh(tmp_path):
    state = mim_state()
    model, report = import_states(tmp_path, state, decoder_layers=1)
    inner = [name for name in report.fresh if name.endswith(("inner_attn_ln.weight", "inner_attn_ln.bias"))]
    assert len([name for name in inner if name.startswith("vision_model.")]) == 2 * 2
    for name in inner:
        assert torch.equal(model.get_parameter(name), torch.full((WIDTH,), float(name.endswith("weight")))), name
    text, config = model.config.text_config, model.config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers, config.projection_dim) == (
        512,
        8,
        12,
        512,
    )
    assert config.decoder_config.num_hidden_layers == 1 and text.eos_token_id == 49407
    fresh = {name.split(".")[0] for name in report.fresh}
    assert fresh == {
        "vision_decoder",
        "vision_model",
        "visual_projection",
        "text_model",
        "text_projection",
        "logit_scale",
    }
    assert {row.source for row in report.taken} | {row.source for row in report.ignored} == set(state)
    assert {row.source for row in report.ignored} >= {"mask_token", "lm_head.weight", "lm_head.bias"}
    assert (
        model.logit_scale.item() == pytest.approx(2.6592) and model.vision_decoder.position_embeddings.abs().max() == 0
    )


@pytest.mark.parametrize("prefix", ["text.", ""])
def test_text_from_another_file(tmp_path, prefix):
    openai = {"visual.conv1.weight": torch.randn(4), "visual.proj": torch.randn(4), "context_length": torch.tensor(8)}
    text = text_state(prefix) | openai
    model, report = import_states(tmp_path, mim_state(), text)
    assert torch.equal(model.text_projection.weight, text[f"{prefix}text_projection"].T)
    assert model.logit_scale.item() == pytest.approx(4.6) and model.config.projection_dim == PROJECTION_DIM
    assert f"text.pt:{prefix}ln_final.weight" in {row.source for row in report.taken}
    assert {row.source for row in report.ignored} >= {f"text.pt:{name}" for name in openai}
    assert {"visual_projection.weight", "visual_projection.bias"} <= set(report.fresh)


def test_two_clip_files_share_a_projection_only_of_one_width(tmp_path):
    vision, text = clip_state(), clip_state(text_prefix="")
    model, report = import_states(tmp_path, vision, text)
    assert torch.equal(model.visual_projection.bias, vision["visual.head.bias"])
    assert torch.equal(model.text_model.final_layer_norm.bias, text["ln_final.bias"])
    ignored = {row.source for row in report.ignored}
    assert "text.ln_final.bias" in ignored and "text.pt:visual.norm.bias" in ignored
    vision["visual.head.weight"], vision["visual.head.bias"] = torch.randn(12, WIDTH), torch.randn(12)
    model, report = import_states(tmp_path, vision, text)
    reasons = {row.source: row.reason for row in report.ignored}
    assert reasons["visual.head.weight"] == reasons["visual.head.bias"] == "projects to another width than text.pt"
    assert model.config.projection_dim == PROJECTION_DIM and "visual_projection.weight" in report.fresh


def test_the_same_tensors_from_every_kind_of_file(clip, imported, tmp_path):
    half = {name: tensor.half() for name, tensor in clip.items()}
    config = EvaImportConfig(image_size=64, head_dim=HEAD_DIM)
    wrapped = {"epoch": 3, "args": None, "model": {"state_dict": {f"module.{name}": t for name, t in half.items()}}}
    torch.save(wrapped, tmp_path / "wrapped.bin")
    torch.save({"module": half, "step": 5}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(half, tmp_path / "plain.safetensors")
    states = [
        import_eva(tmp_path / name, config=config).model.state_dict()
        for name in ("wrapped.bin", "old.pth", "plain.safetensors")
    ]
    for state in states:
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    for name, tensor in imported.model.state_dict().items():
        if not name.startswith(("vision_decoder.", "vision_model.quant_embed")):
            assert torch.equal(states[0][name], tensor.half().float()), name


def test_the_seed_decides_the_fresh_part_and_leaves_the_callers_alone(clip, imported, tmp_path):
    torch.manual_seed(7)
    again = import_states(tmp_path, clip)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    other = import_states(tmp_path, clip, seed=1)
    name = "vision_decoder.conv_out.weight"
    assert torch.equal(again.model.get_parameter(name), imported.model.get_parameter(name))
    assert not torch.equal(again.model.get_parameter(name), other.model.get_parameter(name))


def test_names_are_matched_whole_and_every_row_of_the_map_can_be_named_back():
    assert targets_of("visual.blocks.3.attn.inner_attn_ln.bias") == [
        "vision_model.encoder.layers.3.self_attn.inner_attn_ln.bias"
    ]
    for key in (
        "attn",
        "blocks.0.attn",
        "blocks.norm1.weight",
        "blocks.0.1.norm1.weight",
        "blocks.0.norm1.gamma",
        "",
        "xblocks.0.norm1.weight",
        "visual.text.ln_final.bias",
        "text.visual.norm.bias",
        "blocks.12345.norm1.bias",
    ):
        assert targets_of(key) == [], key
    for name in KEYS:
        targets = targets_of(name.replace("#", "11").replace("*", "bias"))
        assert len(targets) == (3 if "qkv" in KEYS[name] else 1)
        assert all(target in targets_of(source_of(target)) for target in targets)
