"""The released layout: the fixture's outputs, every flag against a second implementation, and the way back."""

from __future__ import annotations

import json

import plain_qlip
import pytest
import torch
from official_folders import OFFICIAL, official_config, random_weights, write_official
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from qlip.apps.export import export_model
from qlip.core.errors import UserError
from qlip.models.qlip.configuration import QLIPConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.official import is_official, official_tensors
from qlip.models.qlip.towers import QLIPDecoder, QLIPTextModel, QLIPVisionModel

FLAGS = {
    "as released": {},
    "no rope": {"both__rope": False},
    "rope in the encoder alone": {"decoder__rope": False},
    "no sub-LN": {"both__subln": False},
    "MLP": {"both__swiglu": False},
    "MLP without sub-LN": {"both__swiglu": False, "both__subln": False},
    "k bias": {"both__k_bias": True},
    "k bias by default": {"both__k_bias": None},
    "no biases": {"both__q_bias": False, "both__v_bias": False},
    "text biases off": {"text__q_bias": False, "text__k_bias": False, "text__v_bias": False},
    "group size 7": {"quantizer__group_size": 7},
    "one group": {"quantizer__group_size": 28},
    "an activation without effect": {"both__hidden_act": "swish"},
    "12 bits, group size 4": {"quantizer__embed_dim": 12, "quantizer__group_size": 4},
    "18 bits by default": {"quantizer__embed_dim": None, "quantizer__group_size": None},
    "latents not normed": {"vision__quantizer_l2_norm": None},
    "codes of +-1": {"quantizer__l2_norm": False},
    "temperature": {"quantizer__inv_temperature": 10, "quantizer__gamma_1": 2, "quantizer__beta": 1},
    "pooling at the end id": {"text__eos_token_id": 250},
    "both projections biased": {"text_projection_bias": True},
    "no projection biased": {"vision_projection_bias": False},
    "wide decoder": {"vision__hidden_size_post_q": 48, "decoder__hidden_size": 48, "decoder__num_attention_heads": 3},
    "grid of 5": {"both__image_size": 40},
    "grid of 8, patch 4": {"both__patch_size": 4},
    "grid of 1": {"both__image_size": 8},
    "one channel": {"both__num_channels": 1},
    "other sizes": {
        "vision__num_hidden_layers": 1,
        "decoder__num_hidden_layers": 3,
        "text__max_position_embeddings": 20,
    },
    "head width 8": {"both__num_attention_heads": 4},
    "eps by default": {"both__layer_norm_eps": None},
    "no quantizer": {"vision__quantizer": None, "vision__quantizer_embed_type": None, "vision__quantizer_cfg": None},
    "quantizer none": {"vision__quantizer": "none", "vision__quantizer_embed_type": "identity"},
    "fields without effect": {"auto_map": {"AutoModel": "x.Y"}, "both__use_rms_norm": True, "vision__rope_shift": 9},
}


def inputs(config: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    vision = config["vision_config"]
    size = (2, vision.get("num_channels", 3), vision["image_size"], vision["image_size"])
    ids = torch.randint(3, 240, (3, 9), generator=generator)
    ids[0, 4], ids[1, 8], ids[2, 2], ids[2, 5] = 250, 250, 250, 250
    ids[2, 7] = 299  # the largest id is not the first end marker
    return {"pixel_values": torch.randn(size, generator=generator), "input_ids": ids}


def assert_equal_to_plain(model: QLIPModel, config: dict, weights: dict) -> None:
    batch = inputs(config)
    expected = plain_qlip.run(config, weights, batch["pixel_values"], batch["input_ids"])
    with torch.inference_mode():
        got = model(**batch, output_hidden_states=True)
    vision = got.vision_model_output
    for name in ("image_embeds", "text_embeds", "logits_per_image", "reconstructions"):
        torch.testing.assert_close(
            got[name].double(), expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )
    torch.testing.assert_close(vision.pooler_output.double(), expected["pooler_output"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vision.last_hidden_state.double(), expected["post_quant_features"], rtol=1e-4, atol=1e-4)
    states = torch.stack(vision.hidden_states).double()
    torch.testing.assert_close(states, expected["hidden_states"], rtol=1e-4, atol=1e-4)
    if "bits" in expected:
        assert torch.equal(got.bits, expected["bits"])


@torch.inference_mode()
def test_the_fixture_gives_its_expected_outputs():
    expected = load_file(OFFICIAL / "expected.safetensors")
    model = QLIPModel.from_pretrained(OFFICIAL)
    output = model(expected["pixel_values"], expected["input_ids"], output_hidden_states=True)
    vision = output.vision_model_output
    got = {
        "hidden_state_minus_2": vision.hidden_states[-2],
        "pooler_output": vision.pooler_output,
        "post_quant_features": vision.last_hidden_state,
        "pre_quant_latents": F.normalize(vision.latents, dim=-1),
    }
    got |= {name: output[name] for name in ("image_embeds", "text_embeds", "logits_per_image", "reconstructions")}
    assert set(got) == set(expected) - {"bits", "pixel_values", "input_ids"}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert torch.equal(output.bits, expected["bits"].bool())


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_every_flag_equals_the_model_written_out_a_second_time(tmp_path, flags):
    config = official_config(**flags)
    weights = random_weights(config)
    model = QLIPModel.from_pretrained(write_official(tmp_path, config, weights))
    assert not model.training
    assert_equal_to_plain(model, config, weights)


@pytest.mark.parametrize("names", ["vision_model.rope", "vision_model.encoder.layers.2.self_attn.rope", "rope"])
def test_stored_rotary_tables_may_have_any_towers_name(tmp_path, names):
    config = official_config()
    weights = random_weights(config)
    nonsense = {f"{names}.freqs_{part}": torch.full((16, 16), float("nan")) for part in ("cos", "sin")}
    nonsense["text_model.embeddings.position_ids"] = torch.arange(20)[None]  # older transformers stored them
    model = QLIPModel.from_pretrained(write_official(tmp_path, config, weights | nonsense))
    assert_equal_to_plain(model, config, weights)
    assert isinstance(QLIPVisionModel.from_pretrained(tmp_path), QLIPVisionModel)


@pytest.mark.parametrize(("vision", "text"), [(True, False), (False, True), (False, False), (True, True)])
def test_projection_biases_absent_from_the_config_are_read_from_the_tensors(tmp_path, vision, text):
    config = official_config(vision_projection_bias=vision, text_projection_bias=text)
    weights = random_weights(config)
    for field in ("vision_projection_bias", "text_projection_bias"):
        del config[field]
    model = QLIPModel.from_pretrained(write_official(tmp_path, config, weights))
    assert (model.config.vision_projection_bias, model.config.text_projection_bias) == (vision, text)
    assert_equal_to_plain(model, config | {"vision_projection_bias": vision}, weights)


def test_absent_fields_have_the_defaults_of_the_released_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "decoder_config": {}}))
    config = QLIPConfig.from_pretrained(tmp_path)
    vision, decoder, text = config.vision_config, config.decoder_config, config.text_config
    for tower in (vision, decoder):
        assert (tower.image_size, tower.patch_size, tower.num_channels) == (224, 32, 3)
        assert (tower.hidden_size, tower.intermediate_size, tower.num_hidden_layers) == (768, 3072, 12)
        assert (tower.num_attention_heads, tower.layer_norm_eps, tower.hidden_act) == (12, 1e-5, "gelu")
        assert (tower.rope, tower.subln, tower.swiglu) == (False, False, False)
        assert (tower.q_bias, tower.k_bias, tower.v_bias) == (True, True, True)
    assert (vision.quantizer, vision.quantizer_embed_type, vision.quantizer_l2_norm) == ("none", "identity", False)
    assert (vision.num_bits, vision.quantizer_group_size, vision.quantizer_inv_temperature) == (18, 9, 100.0)
    assert (vision.quantizer_unit_codes, vision.quantizer_beta, vision.hidden_size_post_q) == (True, 0.0, 768)
    assert (vision.quantizer_gamma_0, vision.quantizer_gamma) == (1.0, 1.0)
    assert (text.vocab_size, text.max_position_embeddings, text.hidden_size) == (49408, 77, 512)
    assert (text.intermediate_size, text.num_hidden_layers, text.num_attention_heads) == (2048, 12, 8)
    assert (text.layer_norm_eps, text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1e-5, 49406, 49407, 1)
    assert (config.projection_dim, config.logit_scale_init_value) == (512, 2.6592)
    assert (config.vision_projection_bias, config.text_projection_bias) == (True, False)


def test_the_parts_read_the_released_layout_too():
    expected = load_file(OFFICIAL / "expected.safetensors")
    whole = QLIPModel.from_pretrained(OFFICIAL)
    assert QLIPVisionConfig.from_pretrained(OFFICIAL).num_hidden_layers == 3
    assert QLIPTextConfig.from_pretrained(OFFICIAL).vocab_size == 300
    with torch.inference_mode():
        vision = QLIPVisionModel.from_pretrained(OFFICIAL)(expected["pixel_values"])
        assert torch.equal(vision.quantized.bits, expected["bits"].bool())
        text = QLIPTextModel.from_pretrained(OFFICIAL)(expected["input_ids"])
        assert torch.equal(text.pooler_output, whole.text_model(expected["input_ids"]).pooler_output)
        pixels = QLIPDecoder.from_pretrained(OFFICIAL)(vision.last_hidden_state)
        torch.testing.assert_close(pixels, expected["reconstructions"], rtol=0, atol=1e-4)


def test_the_layout_is_recognised_by_its_decoder_config():
    config = official_config()
    assert is_official(config)
    assert is_official(config | {"model_type": "anything", "auto_map": None})
    assert not is_official(QLIPModel.from_pretrained(OFFICIAL).config.to_dict())
    assert not is_official({"model_type": "clip", "vision_config": {}, "text_config": {}})


def test_loading_says_nothing_alarming(capfd, caplog):
    QLIPModel.from_pretrained(OFFICIAL)
    QLIPVisionModel.from_pretrained(OFFICIAL)
    out, err = capfd.readouterr()
    assert "UNEXPECTED" not in out + err and "MISSING" not in out + err
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == []


# --- the way back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["as released", "no rope", "MLP", "18 bits by default", "no quantizer", "wide decoder"]
)
def test_an_official_folder_survives_our_layout_and_the_way_back(tmp_path, name):
    flags = official_config(**FLAGS[name])
    weights = random_weights(flags)
    model = QLIPModel.from_pretrained(write_official(tmp_path / "released", flags, weights))
    model.save_pretrained(tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "again", layout="official", step=None)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert is_official(written)
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    assert {n for n in tensors if "rope" not in n} == set(weights)
    assert all(torch.equal(tensors[n], tensor) for n, tensor in weights.items())
    again = QLIPModel.from_pretrained(tmp_path / "again")
    for part in ("text_config", "vision_config", "decoder_config"):
        ours, theirs = (getattr(config, part).to_dict() for config in (model.config, again.config))
        where = ("_name_or_path", "architectures", "transformers_version", "dtype")
        assert {k: v for k, v in ours.items() if k not in where} == {k: v for k, v in theirs.items() if k not in where}
    batch = inputs(flags)
    with torch.inference_mode():
        before, after = model(**batch), again(**batch)
    for field in ("reconstructions", "image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(before[field], after[field]), field
    assert_equal_to_plain(again, written, tensors)


def test_the_written_tensors_are_the_released_ones():
    """All 170 names, shapes and values of the fixture, its rotary tables among them, and its metadata."""
    released = load_file(OFFICIAL / "model.safetensors")
    written = official_tensors(QLIPModel.from_pretrained(OFFICIAL))
    assert written.keys() == released.keys()
    for name, tensor in released.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6 if "rope" in name else 0)


def test_the_exported_file_carries_the_metadata_that_transformers_asks_for(tmp_path):
    export_model(OFFICIAL, tmp_path / "again", layout="official", step=None)
    with safe_open(tmp_path / "again" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"vision__quantizer": "vq"}, "vision_config.quantizer 'vq' is unknown in the released layout"),
        ({"vision__quantizer_embed_type": None}, "quantizer_embed_type identity quantizes 32 dimensions"),
        ({"vision__hidden_size_post_q": 31}, "hidden_size_post_q 31 must equal decoder_config.hidden_size 32"),
        ({"vision__hidden_size": "32"}, "hidden_size"),
        ({"quantizer__layer": 1, "vision__quantizer_cfg": [1]}, "quantizer_cfg must be an object"),
        ({"text_config": "abc"}, "text_config must be an object, got 'abc'"),
        ({"both__layer_norm_eps": float("nan")}, "layer_norm_eps must be from 0 to 1, got nan"),
        ({"vision__num_hidden_layers": 10**9}, "num_hidden_layers must be at least 1 and at most 1024"),
        ({"text__vocab_size": -1}, "vocab_size must be at least 1"),
        ({"both__patch_size": 7}, "image_size 32 is not a multiple of patch_size 7"),
        ({"both__k_bias": True}, "missing keys, first vision_decoder.encoder.layers.0.self_attn.k_proj.bias"),
        ({"both__swiglu": False}, "missing keys, first vision_decoder.encoder.layers.0.mlp.fc1.bias"),
        ({"both__subln": False}, "unexpected keys, first vision_decoder.encoder.layers.0.mlp.ffn_ln.bias"),
        ({"vision__quantizer": None}, "unexpected keys, first vision_model.quant_embed.c_fc.bias"),
        ({"quantizer__embed_dim": 14}, "mismatched keys, first vision_model.quant_embed.c_proj.bias"),
        ({"text_projection_bias": True}, "1 missing keys, first text_projection.bias"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_first_wrong_name(tmp_path, flags, said):
    write_official(tmp_path, official_config(**flags), random_weights(official_config()))
    with pytest.raises(UserError) as error:
        QLIPModel.from_pretrained(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_released_layout_takes_no_other_quantizer(tmp_path):
    config = QLIPModel.from_pretrained(OFFICIAL).config
    config.vision_config.quantizer = "lfq"
    QLIPModel(config).save_pretrained(tmp_path / "lfq")
    with pytest.raises(UserError, match="the released layout knows the quantizers bsq and none, not lfq"):
        export_model(tmp_path / "lfq", tmp_path / "out", layout="official", step=None)
    assert [path.name for path in tmp_path.iterdir()] == ["lfq"]
