"""CLIP, SigLIP and autoencoders of others: what evaluations get equals the library called directly, or is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from qlip.core.errors import UserError
from qlip.models.measured import MeasuredModel, MeasuredQLIP
from qlip.models.opening import open_measured
from qlip.models.qlip.fingerprint import model_fingerprint
from qlip.models.qlip.tokenizer import clip_tokenizer
from qlip.quantizers.ids import bits_to_ids

TOWER = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXTS = ["A red CIRCLE", "photo of the circle: red", "red " * 100]
BLOCKS: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
}


def pictures(num: int = 3, *, side: int = 32) -> Tensor:
    """(num, 3, side, side) uint8 noise."""
    return torch.randint(0, 256, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module) -> Any:
    """Every weight moved, so that no bias is 0 and no norm an identity."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("clip")
    text = TOWER | {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 49408, "max_position_embeddings": 77}
    shaken(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8))).save_pretrained(folder)
    CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=[0.1, 0.2, 0.3]),
        clip_tokenizer(context_length=77),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("siglip")
    words = ["<unk>", "</s>", "<pad>", "a", "red", "circle", "photo", "of", "the"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special).save_pretrained(folder)
    config = SiglipConfig(
        text_config=TOWER | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 1}, vision_config=VISION
    )
    shaken(SiglipModel(config)).save_pretrained(folder)
    settings = SiglipImageProcessor(size={"height": 32, "width": 32}).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))  # as before version 5
    return folder


@pytest.fixture(scope="module")
def autoencoders(tmp_path_factory) -> dict[str, Path]:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("autoencoders")
    built: dict[str, Any] = {
        "vq": VQModel(**BLOCKS, latent_channels=6, num_vq_embeddings=37, vq_embed_dim=5),
        "spatial": VQModel(
            **BLOCKS | {"block_out_channels": (32,) * 3}, latent_channels=6, num_vq_embeddings=64, norm_type="spatial"
        ),
        "kl": AutoencoderKL(**BLOCKS, latent_channels=4),
    }
    for name, model in built.items():
        if name != "kl":
            nn.init.normal_(model.quantize.embedding.weight)
        shaken(model).save_pretrained(folder / name)
    return {name: folder / name for name in built}


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return found.dtype == torch.float32 and torch.allclose(found, wanted, atol=tolerance, rtol=0)


@torch.inference_mode()
def test_clip_is_what_transformers_makes_of_it(clip):
    model = open_measured(clip)
    assert isinstance(model, MeasuredModel)
    assert (model.name, model.image_size, model.patch_size) == ("CLIPModel", 32, 8)
    assert model.abilities == {"match_text", "features"} and model.bits_per_token is None and model.num_bits == 0
    reference, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    inputs = processor(images=list(pictures()), return_tensors="pt")
    pooled = reference.get_image_features(**inputs).pooler_output
    assert close(model.image_embeds(pictures()), pooled / pooled.norm(dim=-1, keepdim=True))
    vision = reference.vision_model(**inputs)
    features = model.features(pictures())
    assert close(features["cls"], reference.vision_model.post_layernorm(vision.last_hidden_state[:, 0]))
    assert close(features["mean"], vision.last_hidden_state[:, 1:].mean(1))
    ids = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    pooled = reference.get_text_features(**ids).pooler_output
    assert close(model.text_embeds(TEXTS), pooled / pooled.norm(dim=-1, keepdim=True))
    identity = model.identity()
    assert identity["model_fingerprint"] == model_fingerprint(reference)
    assert (identity["dtype"], identity["source_family"]) == ("float32", "transformers")
    assert identity["parameters"] == {
        "encoder": sum(p.numel() for p in reference.vision_model.parameters()),
        "text": sum(p.numel() for p in reference.text_model.parameters()),
    }


@torch.inference_mode()
def test_siglip_is_what_transformers_makes_of_it(siglip):
    model = open_measured(siglip)
    assert isinstance(model, MeasuredModel) and model.name == "SiglipModel"
    reference = SiglipModel.from_pretrained(siglip).eval()
    values = SiglipImageProcessor.from_pretrained(siglip)(list(pictures()), return_tensors="pt")
    vision = reference.vision_model(**values)
    pooled = vision.pooler_output
    assert close(model.image_embeds(pictures()), pooled / pooled.norm(dim=-1, keepdim=True))
    features = model.features(pictures())
    assert close(features["cls"], pooled) and close(features["mean"], vision.last_hidden_state.mean(1))
    rows = [[3, 4, 5], [6, 7, 8, 0, 4], [4] * 63]  # lower-cased, cut
    ids = torch.tensor([[*row, 1, *[2] * (63 - len(row))] for row in rows])  # full length, padded on the right
    pooled = reference.get_text_features(input_ids=ids).pooler_output
    assert close(model.text_embeds(TEXTS), pooled / pooled.norm(dim=-1, keepdim=True))
    assert close(model.text_embeds(TEXTS[:1]), model.text_embeds(TEXTS)[:1])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["vq", "spatial"])
def test_a_vq_autoencoder_is_what_diffusers_makes_of_it(autoencoders, kind):
    model = open_measured(autoencoders[kind])
    assert isinstance(model, MeasuredModel)
    reference = VQModel.from_pretrained(autoencoders[kind]).eval()
    num_codes = reference.config.num_vq_embeddings
    assert (model.name, model.image_size, model.patch_size) == ("VQModel", 0, 4)
    assert model.num_bits == 6 and model.bits_per_token == math.log2(num_codes)
    found, inputs = model.reconstruct(pictures(side=24)), pictures(side=24).float() / 127.5 - 1
    assert close(found.unit_pixels, (reference(inputs).sample + 1) / 2)
    ids = reference.quantize(reference.encode(inputs).latents)[2][2].reshape(3, 36)
    assert found.bits is not None and torch.equal(bits_to_ids(found.bits), ids) and ids.unique().numel() > 5
    assert model.identity()["parameters"]["quantizer"] == reference.quantize.embedding.weight.numel()
    assert "latent_bits" not in model.identity()


@torch.inference_mode()
def test_a_kl_autoencoder_decodes_the_mean_in_the_bits_it_counts(autoencoders):
    model = open_measured(autoencoders["kl"])
    reference = AutoencoderKL.from_pretrained(autoencoders["kl"]).eval()
    assert (model.name, model.num_bits, model.bits_per_token) == ("AutoencoderKL", 0, 64.0)
    assert model.identity()["latent_bits"] == 16 and model.identity()["source_family"] == "diffusers"
    latents = reference.encode(pictures(side=24).float() / 127.5 - 1).latent_dist.mean
    found = model.reconstruct(pictures(side=24))
    assert close(found.unit_pixels, (reference.decode(latents.bfloat16().float()).sample + 1) / 2)
    assert found.bits is None
    assert close(found.unit_pixels, (reference.decode(latents).sample + 1) / 2, tolerance=0.02)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_groups_of_pictures_change_nothing(autoencoders, kind, monkeypatch):
    model = open_measured(autoencoders[kind])
    whole: Any = model.reconstruct(pictures(5))
    monkeypatch.setattr("qlip.models.autoencoders.PIXELS_AT_ONCE", 2 * 32**2 + 1)
    parts = model.reconstruct(pictures(5))
    assert close(parts.unit_pixels, whole.unit_pixels)
    if parts.bits is not None:
        assert torch.equal(parts.bits, whole.bits)


def test_the_old_names_of_attention_weights_are_read(autoencoders, tmp_path):
    folder = copied(autoencoders["kl"], tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(new, old)
        tensors[name] = tensor
    save_file(tensors, file)
    assert open_measured(folder).identity() == open_measured(autoencoders["kl"]).identity()


def test_half_precision_is_kept_and_position_ids_of_old_files_are_not_missed(clip, tmp_path):
    folder = copied(clip, tmp_path)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    half, full = open_measured(folder), open_measured(clip)
    assert half.identity()["dtype"] == "float16"
    assert half.identity()["model_fingerprint"] != full.identity()["model_fingerprint"]
    with torch.inference_mode():
        assert close(half.image_embeds(pictures()), full.image_embeds(pictures()), tolerance=0.01)


def test_what_a_model_cannot_do_is_said(clip, autoencoders):
    towers, autoencoder = open_measured(clip), open_measured(autoencoders["kl"])
    with pytest.raises(UserError, match="CLIPModel has no decoder: "):
        towers.reconstruct(pictures())
    for call in (autoencoder.image_embeds, autoencoder.features):
        with pytest.raises(UserError, match=r"^AutoencoderKL .*: .*SigLIP"):
            call(pictures())
    with pytest.raises(UserError, match="has no text tower"):
        autoencoder.text_embeds(["a"])
    with pytest.raises(UserError, match="multiple of 4, not 30"):
        autoencoder.reconstruct(pictures(side=30))


def refused(source: str | Path) -> str:
    with pytest.raises(UserError) as error:
        open_measured(source)
    message = str(error.value)
    assert "\n" not in message and ("; " in message or ": " in message)
    return message


def change_json(name: str, **changes: Any) -> Callable[[Path], None]:
    """Fields of a file changed, or taken out where they are None."""

    def change(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return change


def change_tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    """Tensors put into the weight file, or taken out where they are None; `__` stands for a dot."""

    def change(folder: Path) -> None:
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, file, metadata={"format": "pt"})

    return change


def without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def pickled_only(folder: Path) -> None:
    without("model.safetensors")(folder)
    torch.save({}, folder / "pytorch_model.bin")


def cut_short(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


PIXELS, OLD_PIXELS = "processor_config.json", "preprocessor_config.json"
DAMAGE = {
    "clip lacks a tensor": ("clip", change_tensors(logit_scale=None), "1 missing keys, first logit_scale"),
    "clip has one more": ("clip", change_tensors(extra=torch.ones(1)), "1 unexpected keys, first extra"),
    "clip misshapen": ("clip", change_tensors(logit_scale=torch.ones(2)), "1 mismatched keys, first logit_scale"),
    "clip not finite": ("clip", change_tensors(logit_scale=torch.tensor(math.nan)), "logit_scale holds NaN"),
    "clip cut short": ("clip", cut_short, "is cut off"),
    "clip pickled": ("clip", pickled_only, "a pickle"),
    "clip without scale": ("clip", without(PIXELS), "does not say how it scales pictures; download preprocessor"),
    "clip scale of another form": ("clip", change_json(PIXELS, image_processor=[]), "does not say how it scales"),
    "siglip without std": ("siglip", change_json(OLD_PIXELS, image_std=None), "image_mean and image_std are no three"),
    "siglip std 0": ("siglip", change_json(OLD_PIXELS, image_std=[0, 1, 1]), "image_mean and image_std are no three"),
    "siglip raw pixels": ("siglip", change_json(OLD_PIXELS, rescale_factor=1), "rescale_factor of its image processor"),
    "siglip scale no JSON": ("siglip", lambda folder: (folder / OLD_PIXELS).write_text("{"), "cannot read"),
    "clip no tokenizer": ("clip", without("tokenizer.json"), "has no tokenizer.json; download the tokenizer's files"),
    "clip broken tokenizer": ("clip", lambda f: (f / "tokenizer.json").write_text("{}"), "broken tokenizer files"),
    "siglip sentencepiece": (
        *("siglip", change_json("tokenizer_config.json", tokenizer_class="SiglipTokenizer")),
        "needs sentencepiece: pip install 'qlip[baselines]'",
    ),
    "siglip other tokenizer": (
        *("siglip", lambda folder: clip_tokenizer(context_length=64).save_pretrained(folder)),
        "its tokenizer has 49408 tokens, its model 9",
    ),
    "siglip config of another": ("siglip", change_json("config.json", text_config={"hidden_size": "a"}), "cannot load"),
    "vq lacks a tensor": ("vq", change_tensors(quant_conv__bias=None), "1 missing keys, first quant_conv.bias"),
    "vq has one more": ("vq", change_tensors(extra=torch.ones(1)), "1 unexpected keys, first extra"),
    "vq misshapen": ("vq", change_tensors(quant_conv__bias=torch.ones(1)), "quant_conv.bias expected shape"),
    "vq not finite": ("vq", change_tensors(quant_conv__bias=torch.full((5,), math.inf)), "holds NaN or infinite"),
    "vq cut short": ("vq", cut_short, "is cut off"),
    "vq no weights": ("vq", without("diffusion_pytorch_model.safetensors"), "has no diffusion_pytorch_model.safetens"),
    "vq newer field": ("vq", change_json("config.json", wavelets=3), "does not know wavelets of config.json; upgrade"),
    "vq not RGB": ("kl", change_json("config.json", block_out_channels=[]), "cannot load"),
    "kl no groups": ("kl", change_json("config.json", norm_num_groups=0), "cannot load"),
    "another diffusers class": (
        "kl",
        change_json("config.json", _class_name="UNet2DModel"),
        "UNet2DModel, which cannot",
    ),
    "another transformer": ("clip", change_json("config.json", model_type="bert"), "bert, which cannot be measured"),
    "no type": ("clip", change_json("config.json", model_type=None), "no known kind, which cannot be measured"),
    "config a list": ("clip", lambda folder: (folder / "config.json").write_text("[]"), "must hold an object"),
    "no config": ("clip", without("config.json"), "holds no model: give a QLIP folder (ours or the released layout)"),
}


@pytest.mark.parametrize(("kind", "damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_what_is_missing_or_broken_is_one_line(clip, siglip, autoencoders, tmp_path, capfd, kind, damage, said):
    folder = copied({"clip": clip, "siglip": siglip, **autoencoders}[kind], tmp_path)
    damage(folder)
    assert said in refused(folder)
    assert capfd.readouterr().err == ""


def test_what_is_no_model_lists_what_can_be_opened(tmp_path):
    assert "is not there: give a QLIP folder" in refused(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no model")
    assert "is no model file: give a QLIP folder" in refused(tmp_path / "notes.txt")
    assert "holds no model: give a QLIP folder" in refused(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert f"give the folder of its autoencoder ({tmp_path}/vae)" in refused(tmp_path)


def test_without_diffusers_the_extra_is_named(autoencoders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "pip install 'qlip[baselines]'" in refused(autoencoders["kl"])


def test_ours_the_released_layout_and_cached_ids_are_opened(clip, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "ours")
    released = Path(__file__).parents[1] / "data" / "official_layout"
    for folder in (tmp_path / "ours", released):
        model = open_measured(str(folder))
        assert isinstance(model, MeasuredQLIP) and isinstance(model, MeasuredModel) and model.num_bits == 28
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")  # where no path looks like the id
    monkeypatch.setattr("qlip.models.opening.try_to_load_from_cache", lambda *_: str(clip / "config.json"))
    assert open_measured("someone/clip").name == "CLIPModel"
    monkeypatch.setattr("qlip.models.opening.try_to_load_from_cache", lambda *_: None)
    assert "someone/clip is no folder here, and the hub did not give it" in refused("someone/clip")
