"""QLIP as transformers v5 expects a model: Auto classes, shards, devices, dtypes, checkpointing, attention, towers."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import assert_same, pictures, texts, tiny_config, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from qlip.core.errors import UserError
from qlip.models import (
    QLIPConfig,
    QLIPDecoder,
    QLIPForImageClassification,
    QLIPModel,
    QLIPProcessor,
    QLIPTextModel,
    QLIPVisionConfig,
    QLIPVisionModel,
)
from qlip.nn.attention import eager_attention
from qlip.nn.blocks import BlockStack


@pytest.fixture(scope="module")
def model() -> QLIPModel:
    return tiny_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    QLIPProcessor.for_size(32, context_length=20).save_pretrained(folder)
    return folder


# --- files -----------------------------------------------------------------------------------------------------


def test_saved_and_loaded_models_are_equal_and_nothing_is_left_uninitialised(model, saved):
    """Freed memory is filled with NaN first, so that a tensor nobody writes would show it."""
    for _ in range(20):
        dirt = [torch.full((size,), float("nan")) for size in (16, 64, 1024, 9600, 40_000)]
        del dirt
    gc.collect()
    loaded = QLIPModel.from_pretrained(saved)
    assert_same(model, loaded)
    assert list(loaded.buffers()) == []  # so none can be left uninitialised


def test_the_auto_classes_know_every_type(model, saved):
    assert isinstance(AutoConfig.from_pretrained(saved), QLIPConfig)
    assert_same(model, AutoModel.from_pretrained(saved))
    assert isinstance(AutoModelForZeroShotImageClassification.from_pretrained(saved), QLIPModel)
    classifier = AutoModelForImageClassification.from_pretrained(saved, num_labels=7)
    assert isinstance(classifier, QLIPForImageClassification) and classifier.classifier.out_features == 7
    assert isinstance(AutoProcessor.from_pretrained(saved), QLIPProcessor)
    types = {"qlip", "qlip_text_model", "qlip_vision_model", "qlip_decoder"}
    assert {AutoConfig.for_model(name).model_type for name in types} == types


FRESH = """
import sys, torch
import qlip
assert "torch.nn" not in sys.modules or "transformers" not in sys.modules
from qlip import QLIPModel  # registers the types
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1])
assert type(model) is QLIPModel
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(processor).__name__ == "QLIPProcessor"
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    bits = model.encode(inputs)
    torch.save({"bits": bits, "pixels": model.decode(bits)}, sys.argv[3])
"""


def test_a_fresh_process_gives_the_same_bits_and_pixels(model, saved, tmp_path):
    torch.save(pictures(), tmp_path / "in.pt")
    command = [sys.executable, "-c", FRESH, saved, tmp_path / "in.pt", tmp_path / "out.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.inference_mode():
        bits = model.encode(pictures())
        assert torch.equal(theirs["bits"], bits)
        assert torch.equal(theirs["pixels"], model.decode(bits))


def test_sharded_weights(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert_same(model, QLIPModel.from_pretrained(tmp_path))
    (tmp_path / shards[1]).unlink()
    with pytest.raises(UserError, match=rf"lacks {shards[1]}, which holds") as error:
        QLIPModel.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_index_cannot_lead_out_of_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    index["weight_map"]["logit_scale"] = "../elsewhere.safetensors"
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside its folder"):
        QLIPModel.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(model, saved, device_map):
    assert_same(model, QLIPModel.from_pretrained(saved, device_map=device_map))


def test_a_model_partly_on_disk_computes_the_same(model, saved, tmp_path):
    parts = [name for name, _ in model.named_children()]
    device_map = dict.fromkeys(parts, "cpu") | {"logit_scale": "cpu", "vision_decoder": "disk", "text_model": "disk"}
    offloaded = QLIPModel.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path)
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    with torch.inference_mode():
        ours, theirs = model(pictures(), texts()), offloaded(pictures(), texts())
        assert torch.equal(ours.bits, theirs.bits)
        torch.testing.assert_close(theirs.reconstructions, ours.reconstructions)
        torch.testing.assert_close(theirs.logits_per_image, ours.logits_per_image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.inference_mode()
def test_dtypes(model, saved, dtype):
    loaded = QLIPModel.from_pretrained(saved, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    output = loaded(pictures(), texts())
    assert output.logits_per_image.dtype == torch.float32 and output.logits_per_image.isfinite().all()
    assert output.vision_model_output.quantized.z_q.dtype == torch.float32
    assert (output.bits == model(pictures()).bits).float().mean() > 0.9
    assert loaded.decode(output.bits).dtype == dtype


def test_a_half_precision_file_keeps_its_dtype(model, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path)
    assert QLIPModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert QLIPModel.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32


# --- training --------------------------------------------------------------------------------------------------


def gradients(model: QLIPModel) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(pictures(), texts())
    (output.reconstructions.square().mean() + output.logits_per_image.square().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradient_checkpointing_recomputes_every_block_and_changes_no_gradient():
    model = tiny_model().train()
    plain = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    calls = []

    def counted(function, *args, **kwargs):
        calls.append(function)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    for module in model.modules():
        if isinstance(module, BlockStack):
            assert module.gradient_checkpointing
            module._gradient_checkpointing_func = counted
    recomputed = gradients(model)
    assert len(calls) == 6
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=lambda text, n=name: f"{n}: {text}")
    model.eval()
    gradients(model)
    assert len(calls) == 6


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "counting"])
def test_attention_implementations_agree(model, saved, implementation):
    calls = []

    def counting(module, q, k, v, mask, *, scaling, dropout, is_causal):
        calls.append(is_causal)
        return eager_attention(q, k, v, causal=is_causal).transpose(1, 2), None

    AttentionInterface.register("counting", counting)
    loaded = QLIPModel.from_pretrained(saved, attn_implementation=implementation)
    parts = (loaded, loaded.vision_model, loaded.text_model, loaded.vision_decoder)
    assert [part.config._attn_implementation for part in parts] == [implementation] * 4
    with torch.inference_mode():
        ours, theirs = model(pictures(), texts()), loaded(pictures(), texts())
    assert calls == ([False] * 4 + [True] * 2 if implementation == "counting" else [])
    torch.testing.assert_close(theirs.reconstructions, ours.reconstructions, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.logits_per_image, ours.logits_per_image, rtol=0, atol=1e-4)
    loaded.set_attn_implementation("sdpa")
    with torch.inference_mode():
        assert torch.equal(loaded(pictures(), texts()).logits_per_image, ours.logits_per_image)


def test_a_classifier_learns_from_a_saved_model_with_transformers_trainer(model, saved, tmp_path):
    classifier = QLIPForImageClassification.from_pretrained(saved, num_labels=2)
    assert torch.equal(
        classifier.vision_model.post_layernorm.weight, model.vision_model.post_layernorm.weight
    ) and not any("decoder" in name or "text" in name for name in classifier.state_dict())
    data = [{"pixel_values": picture * 0.1 + (i % 2), "labels": i % 2} for i, picture in enumerate(pictures(32))]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=12, per_device_train_batch_size=16, learning_rate=3e-3, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(classifier, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    trainer.save_model(str(tmp_path / "classifier"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    with torch.inference_mode():
        assert torch.equal(again(pictures()).logits, classifier(pictures()).logits)


@pytest.mark.parametrize(("pooling", "width"), [("cls", 32), ("mean", 32), ("cls+mean", 64)])
@torch.inference_mode()
def test_what_the_classifier_reads(model, saved, pooling, width):
    classifier = QLIPForImageClassification.from_pretrained(saved, num_labels=3, classifier_pooling=pooling)
    vision = model.vision_model(pictures())
    parts = {"cls": vision.pooler_output, "mean": vision.pre_quant.mean(1)}
    features = torch.cat([parts[name] for name in pooling.split("+")], dim=-1)
    assert classifier.classifier.in_features == width
    torch.testing.assert_close(classifier(pictures()).logits, classifier.classifier(features))


# --- parts -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_parts_stand_alone(model, saved, tmp_path):
    vision, text = QLIPVisionModel.from_pretrained(saved), QLIPTextModel.from_pretrained(saved)
    decoder = QLIPDecoder.from_pretrained(saved)
    whole = model(pictures(), texts())
    assert torch.equal(vision(pictures()).pooler_output, whole.vision_model_output.pooler_output)
    assert torch.equal(text(texts()).pooler_output, whole.text_model_output.pooler_output)
    assert torch.equal(decoder(vision(pictures()).last_hidden_state), whole.reconstructions)
    for part in (vision, text, decoder):
        folder = tmp_path / type(part).__name__
        part.save_pretrained(folder)
        again = AutoModel.from_pretrained(folder)
        assert type(again) is type(part)
        state = again.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in part.state_dict().items())
    with pytest.raises(UserError, match="holds a 'qlip_vision_model' model, not 'qlip'"):
        QLIPModel.from_pretrained(tmp_path / "QLIPVisionModel")


@pytest.mark.parametrize("select", ["default", "full"])
def test_the_vision_model_is_a_llava_tower(saved, select):
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=QLIPVisionConfig.from_pretrained(saved), text_config=text, image_token_index=63,
        vision_feature_layer=-2, vision_feature_select_strategy=select,
    )  # fmt: skip
    llava = LlavaForConditionalGeneration(config).eval()
    count = 16 if select == "default" else 17
    ids = torch.tensor([[1] + [63] * count + [2]])
    with torch.inference_mode():
        assert llava(input_ids=ids, pixel_values=pictures(1)).logits.shape == (1, count + 2, 64)
    tower = next(module for module in llava.modules() if isinstance(module, QLIPVisionModel))
    states = tower(pictures(1), output_hidden_states=True, return_dict=True).hidden_states
    assert len(states) == 3 and states[-2].shape == (1, 17, 32)


@torch.inference_mode()
def test_return_dict_false_gives_a_tuple_and_extra_arguments_are_swallowed(model):
    output = model(pictures(), texts(), return_loss=False)
    as_tuple = model(pictures(), texts(), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.logits_per_image)


# --- construction ----------------------------------------------------------------------------------------------


def test_models_can_be_described_on_the_meta_device():
    with torch.device("meta"):
        for described in (QLIPModel(tiny_config()), QLIPForImageClassification(tiny_config())):
            assert all(parameter.is_meta for parameter in described.parameters())


@pytest.mark.parametrize("kind", ["vq", "lfq", "fsq"])
def test_other_quantizers_are_saved_and_loaded_too(kind, tmp_path):
    options = {"quantizer": kind, "quantizer_group_size": 7 if kind != "fsq" else 1}
    if kind == "fsq":
        options |= {"fsq_levels": [16] * 7}
    model = tiny_model(**options)
    model.save_pretrained(tmp_path)
    loaded = QLIPModel.from_pretrained(tmp_path)
    assert_same(model, loaded)
    assert all(buffer.isfinite().all() for buffer in loaded.buffers())
    bits = loaded.encode(pictures())
    assert torch.equal(loaded.decode(bits), loaded(pictures()).reconstructions)
    assert loaded.vision_model.quant_embed.c_proj.out_features == (7 if kind == "fsq" else 28)


# --- card ------------------------------------------------------------------------------------------------------


def test_a_model_card_is_written_and_never_overwritten(model, tmp_path):
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: zero-shot-image-classification" in card and "library_name: qlip" in card
    assert "32 px pictures, 16 tokens of 28 bits each" in card and "{" not in card
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.vision_model.save_pretrained(tmp_path / "tower")
    assert "from qlip.models import QLIPVisionModel" in (tmp_path / "tower" / "README.md").read_text()


def test_stored_names_are_parameter_names(saved, model):
    assert set(load_file(saved / "model.safetensors")) == {name for name, _ in model.named_parameters()}
