"""QLIPModel: parity with the released layout, the paper's sizes, saving, tokens, initialisation, errors."""

import copy
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from qlip.models.qlip.classification import QLIPForImageClassification
from qlip.models.qlip.configuration import QLIPConfig, QLIPDecoderConfig, QLIPTextConfig, QLIPVisionConfig
from qlip.models.qlip.modeling import QLIPModel
from qlip.nn.attention import rotary_2d
from qlip.nn.vision import unpatchify

OFFICIAL = Path(__file__).parents[1] / "data" / "official_layout"
GRID = {"image_size": 32, "patch_size": 8}
WIDTHS = {"hidden_size": 32, "intermediate_size": 84, "num_attention_heads": 2}
TEXT = {"vocab_size": 300, "max_position_embeddings": 20, "hidden_size": 24, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def tiny_config(*, text: dict | None = None, vision: dict | None = None, decoder: dict | None = None) -> QLIPConfig:
    """The shape of the small random model in tests/data/official_layout, with fields changed."""
    return QLIPConfig(
        text_config=TEXT | (text or {}),
        vision_config=GRID | WIDTHS | {"num_hidden_layers": 3, "hidden_size_post_q": 32} | (vision or {}),
        decoder_config=GRID | WIDTHS | {"num_hidden_layers": 2} | (decoder or {}),
        projection_dim=16,
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(OFFICIAL / "expected.safetensors")


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    """The small random model in the released layout; its rotary tables are computed, not loaded."""
    model = QLIPModel(tiny_config())
    weights = load_file(OFFICIAL / "model.safetensors")
    model.load_state_dict({k: v for k, v in weights.items() if not k.endswith(("rope.freqs_cos", "rope.freqs_sin"))})
    return model.eval()


# --- parity ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_expected_tensor_of_the_released_layout_is_reproduced(model, expected):
    output = model(pixel_values=expected["pixel_values"], input_ids=expected["input_ids"])
    vision = model.vision_model(expected["pixel_values"], output_hidden_states=True)
    got = {
        "hidden_state_minus_2": vision.hidden_states[-2],
        "image_embeds": output.image_embeds,
        "text_embeds": output.text_embeds,
        "logits_per_image": output.logits_per_image,
        "pooler_output": output.vision_model_output.pooler_output,
        "post_quant_features": output.vision_model_output.last_hidden_state,
        "pre_quant_latents": F.normalize(output.vision_model_output.latents, dim=-1),  # on the sphere: u, not a
        "reconstructions": output.reconstructions,
    }
    assert set(got) == set(expected) - {"bits", "pixel_values", "input_ids"}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert torch.equal(output.bits, expected["bits"].bool())


def test_the_stored_rotary_tables_are_the_computed_ones():
    weights = load_file(OFFICIAL / "model.safetensors")
    computed = rotary_2d((4, 4), 16, device=torch.device("cpu"))
    for tower in ("vision_model", "vision_decoder"):
        torch.testing.assert_close(computed.cos, weights[f"{tower}.rope.freqs_cos"])
        torch.testing.assert_close(computed.sin, weights[f"{tower}.rope.freqs_sin"])


# --- sizes -----------------------------------------------------------------------------------------------------


def paper_config(name: str) -> QLIPConfig:
    """B-16-256, B-8-256 and L-14-392 of the paper."""
    if name == "B-16-256":
        return QLIPConfig()
    if name == "B-8-256":
        return QLIPConfig(vision_config={"patch_size": 8}, decoder_config={"patch_size": 8})
    tower = {"image_size": 392, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 2730}
    tower |= {"num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = tower | {"hidden_size_post_q": 1024}
    return QLIPConfig(text_config=text, vision_config=vision, decoder_config=tower, projection_dim=768)


def count(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "encoder", "bottleneck", "decoder", "text", "heads", "total", "num_tensors"),
    [
        ("B-16-256", 85_915_392, 1_224_988, 88_471_808, 63_165_952, 655_873, 239_434_013, 725),
        ("B-8-256", 86_062_848, 1_224_988, 87_881_408, 63_165_952, 655_873, 238_991_069, 725),
        ("L-14-392", 303_858_624, 2_157_596, 307_657_518, 123_060_480, 1_377_025, 738_111_243, 1_229),
    ],
)
def test_parameter_counts_of_the_paper(name, encoder, bottleneck, decoder, text, heads, total, num_tensors):
    with torch.device("meta"):
        model = QLIPModel(paper_config(name))
    vision = model.vision_model
    assert count(vision.embeddings, vision.encoder, vision.post_layernorm) == encoder
    assert count(vision.quant_embed, vision.quant_embed_post) == bottleneck
    assert count(model.vision_decoder) == decoder
    assert count(model.text_model) == text
    assert count(model.visual_projection, model.text_projection) + model.logit_scale.numel() == heads
    assert count(model) == total
    assert len(model.state_dict()) == num_tensors


def test_nothing_but_parameters_is_stored(model):
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# --- tokens and pictures ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_and_decode_are_the_two_halves_of_forward(model, expected):
    pixels = expected["pixel_values"]
    output = model(pixel_values=pixels)
    bits = model.encode(pixels)
    assert bits.dtype == torch.bool
    assert bits.shape == (3, 16, 28)
    assert torch.equal(bits, output.bits)
    assert torch.equal(model.decode(bits), output.reconstructions)


@torch.no_grad()
def test_every_bit_matters_to_the_picture(model, expected):
    bits = expected["bits"][:1].bool()
    flipped = bits.clone()
    flipped[0, 5, 11] ^= True
    assert (model.decode(bits) - model.decode(flipped)).abs().max() > 1e-4


@torch.no_grad()
def test_embeddings_have_norm_1_and_logits_are_their_scaled_products(model, expected):
    output = model(pixel_values=expected["pixel_values"], input_ids=expected["input_ids"])
    for embeds in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(len(embeds)))
    expected_logits = model.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, expected_logits)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)


@torch.no_grad()
def test_features_before_the_norm_are_the_pooler_outputs(model, expected):
    output = model(pixel_values=expected["pixel_values"], input_ids=expected["input_ids"])
    image = model.get_image_features(expected["pixel_values"]).pooler_output
    text = model.get_text_features(expected["input_ids"]).pooler_output
    torch.testing.assert_close(F.normalize(image, dim=-1), output.image_embeds)
    torch.testing.assert_close(F.normalize(text, dim=-1), output.text_embeds)


@torch.no_grad()
def test_forward_of_one_input_alone_leaves_the_other_fields_none(model, expected):
    image_only, text_only = model(pixel_values=expected["pixel_values"]), model(input_ids=expected["input_ids"])
    assert image_only.text_embeds is None
    assert image_only.logits_per_image is None
    assert text_only.bits is None
    assert text_only.reconstructions is None


@torch.no_grad()
def test_hidden_states_are_all_layers_with_cls_first_and_no_final_norm(model, expected):
    vision = model.vision_model(expected["pixel_values"], output_hidden_states=[-2])  # as transformers' LLaVA asks
    assert len(vision.hidden_states) == 4
    assert torch.equal(vision.hidden_states[-1][:, 1:], vision.pre_quant)
    assert torch.equal(model.vision_model.post_layernorm(vision.hidden_states[-1][:, 0]), vision.pooler_output)


@torch.no_grad()
def test_padding_on_the_right_does_not_change_the_text_embedding(model, expected):
    ids = expected["input_ids"]
    end = ids.argmax(-1)
    padded = ids.clone()
    for row, position in enumerate(end.tolist()):
        padded[row, position + 1 :] = 7
    torch.testing.assert_close(model(input_ids=ids).text_embeds, model(input_ids=padded).text_embeds)


@torch.no_grad()
def test_text_is_pooled_at_the_first_end_token():
    model = QLIPModel(tiny_config(text={"eos_token_id": 250})).eval()
    ids = torch.tensor([[1, 299, 250, 250, 3]])  # with eos_token_id 2 the largest id, 299, would be read
    output = model.text_model(ids)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 2])


def test_unpatchify_order_is_channel_row_column():
    g, p = 3, 2
    patches = torch.randn(2, g * g, 3 * p * p)
    expected = torch.empty(2, 3, g * p, g * p)
    for r in range(g):
        for col in range(g):
            for c in range(3):
                for sh in range(p):
                    for sw in range(p):
                        expected[:, c, r * p + sh, col * p + sw] = patches[:, r * g + col, (c * p + sh) * p + sw]
    assert torch.equal(unpatchify(patches, patch_size=p, grid=(g, g)), expected)


# --- saving ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_gives_equal_bits_and_pixels(model, expected, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = QLIPModel.from_pretrained(tmp_path)
    pixels, ids = expected["pixel_values"], expected["input_ids"]
    before, after = model(pixel_values=pixels, input_ids=ids), loaded(pixel_values=pixels, input_ids=ids)
    assert not loaded.training
    for field in ("bits", "reconstructions", "image_embeds", "text_embeds", "logits_per_image"):
        assert torch.equal(before[field], after[field]), field


def test_missing_parts_that_may_be_fresh_are_initialised_and_loaded_ones_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    classifier = QLIPForImageClassification.from_pretrained(tmp_path, num_labels=5)
    state, loaded = classifier.state_dict(), model.state_dict()
    assert {name for name in state if name not in loaded} == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(state[name], loaded[name]) for name in state if name in loaded)
    assert state["classifier.weight"].shape == (5, 32) and 0.005 < state["classifier.weight"].std() < 0.04
    assert not state["classifier.bias"].any()


# --- initialisation --------------------------------------------------------------------------------------------


def expected_std(name: str, std: float) -> float | None:
    """The documented rule for a weight matrix or embedding; None for tensors that are constants."""
    if name.endswith(("out_proj.weight", "w3.weight", "mlp.fc2.weight")):
        layer = int(name.split(".layers.")[1].split(".")[0]) + 1
        return std / math.sqrt(2 * layer)
    if name.endswith("class_embedding") or (name.endswith("weight") and "norm" not in name and "_ln" not in name):
        return std
    return None


def check_initialised(model: QLIPModel) -> None:
    for name, tensor in model.named_parameters():
        std = expected_std(name, 0.02)
        if name == "logit_scale":
            assert tensor.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
        elif std is not None:
            tolerance = 5 / math.sqrt(2 * tensor.numel())  # five standard errors of a sample's standard deviation
            assert tensor.std().item() / std == pytest.approx(1, abs=tolerance), name
        else:
            constant = 0.0 if name.endswith(("bias", "position_embeddings")) else 1.0
            assert torch.equal(tensor, torch.full_like(tensor, constant)), name


def test_every_tensor_follows_its_documented_rule():
    check_initialised(QLIPModel(tiny_config()))


def test_initialisation_leaves_no_tensor_of_an_emptied_model():
    with torch.device("meta"):
        model = QLIPModel(tiny_config())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    check_initialised(model)


def test_initializer_range_reaches_every_part_that_sets_it():
    wide = {"initializer_range": 0.1}
    model = QLIPModel(tiny_config(text=wide, vision=wide, decoder=wide))
    for part in (model.text_model, model.vision_model, model.vision_decoder):
        assert 0.08 < part.encoder.layers[0].self_attn.q_proj.weight.std() < 0.12


def test_training_reaches_every_parameter():
    model = QLIPModel(tiny_config()).train()
    with torch.no_grad():
        model.vision_decoder.position_embeddings.normal_()
    output = model(pixel_values=torch.randn(2, 3, 32, 32), input_ids=torch.randint(3, 299, (3, 20)))
    quantizer_loss = output.vision_model_output.quantized.losses["quantizer"]
    (output.reconstructions.square().mean() + output.logits_per_image.square().mean() + quantizer_loss).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


# --- identity mode ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_a_quantizer_features_pass_through_and_there_are_no_bits():
    model = QLIPModel(tiny_config(vision={"quantizer": "none"})).eval()
    output = model(pixel_values=torch.randn(2, 3, 32, 32))
    assert output.bits is None
    assert output.reconstructions.shape == (2, 3, 32, 32)
    assert torch.equal(output.vision_model_output.last_hidden_state, output.vision_model_output.pre_quant)
    assert not any("quant" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="no quantizer"):
        model.encode(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="no quantizer"):
        model.decode(torch.zeros(1, 16, 28, dtype=torch.bool))


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "changes", "named"),
    [
        (QLIPVisionConfig, {"num_hidden_layers": 0}, "num_hidden_layers"),
        (QLIPVisionConfig, {"num_attention_heads": 7}, "num_attention_heads"),
        (QLIPVisionConfig, {"hidden_act": "swish"}, "hidden_act"),
        (QLIPVisionConfig, {"image_size": 250}, "image_size"),
        (QLIPVisionConfig, {"patch_size": 0}, "patch_size"),
        (QLIPVisionConfig, {"quantizer": "rvq"}, "quantizer"),
        (QLIPVisionConfig, {"quantizer": "fsq", "fsq_levels": [8, 8]}, "num_bits"),
        (QLIPVisionConfig, {"quantizer_embed_type": "linear"}, "quantizer_embed_type"),
        (QLIPVisionConfig, {"hidden_size": 10**9, "num_attention_heads": 1}, "hidden_size"),
        (QLIPVisionConfig, {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        (QLIPVisionConfig, {"num_bits": 0}, "num_bits"),
        (QLIPVisionConfig, {"hidden_size": 36, "num_attention_heads": 6}, "rope"),
        (QLIPDecoderConfig, {"intermediate_size": 0}, "intermediate_size"),
        (QLIPDecoderConfig, {"patch_size": 7}, "patch_size"),
        (QLIPTextConfig, {"hidden_size": 100}, "hidden_size"),
        (QLIPTextConfig, {"hidden_act": "tanh"}, "hidden_act"),
    ],
)
def test_an_impossible_part_is_refused_by_the_name_of_its_field(part, changes, named):
    with pytest.raises(StrictDataclassError, match=named) as error:
        part(**changes)
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder": {"image_size": 64}}, "image_size and patch_size"),
        ({"vision": {"hidden_size_post_q": 64}}, "hidden_size_post_q"),
        ({"decoder": {"hidden_size": 64}, "vision": {"quantizer": "none", "hidden_size_post_q": 64}}, "hidden_size 32"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, named):
    with pytest.raises(StrictDataclassError, match=named):
        tiny_config(**changes)


def one_line(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


def test_wrong_inputs_are_one_line_errors(model):
    assert "(16, 16), this model takes (32, 32)" in one_line(lambda: model.encode(torch.zeros(1, 3, 16, 16)))
    assert "(batch, 16, 28)" in one_line(lambda: model.decode(torch.zeros(1, 9, 28, dtype=torch.bool)))
    assert "texts have 21 tokens" in one_line(lambda: model(input_ids=torch.zeros(1, 21, dtype=torch.int64)))


def test_the_config_survives_its_own_dictionary():
    config = tiny_config(vision={"quantizer_group_size": 4, "quantizer_inv_temperature": 10.0})
    again = QLIPConfig(**copy.deepcopy(config.to_dict()))
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.quantizer_group_size == 4
