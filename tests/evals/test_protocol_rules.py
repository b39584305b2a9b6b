"""What a protocol decides is what happens: filter, crop, rounding, reference, refusals; two ranks equal one."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sources import Halver, ListSource, random_pictures

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.evals import collect as collecting
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import (
    ALL,
    PROTOCOLS,
    Preparation,
    Protocol,
    ReconstructionSettings,
    ZeroShotSettings,
    find_protocol,
)
from qlip.evals.reconstruction import ReconstructionEvaluator
from qlip.evals.run import build_evaluator
from qlip.evals.zero_shot import ZeroShotEvaluator, named_templates, topk_hits
from qlip.models.measured import MeasuredQLIP
from qlip.models.qlip.modeling import QLIPModel
from qlip.models.qlip.processing import QLIPProcessor
from qlip.recipes.model import ModelConfig, TowerSize

CPU = torch.device("cpu")
OFFLINE = ReconstructionSettings(metrics=("psnr", "ssim"))


def protocol(**changes) -> Protocol:
    return Protocol(**({"name": "test-v1", "summary": "A test.", "settings": OFFLINE} | changes))


def score(source: ListSource, given: Protocol, **options) -> tuple[dict[str, float], dict]:
    evaluator = ReconstructionEvaluator(given, EvalInput(source=source, batch_size=4, **options))
    figures = evaluator.run(Halver(), CPU)
    return figures, evaluator.card()


def test_names_are_unique_carry_a_version_and_a_kind():
    assert len(PROTOCOLS) == len(ALL) and all(name.rsplit("-v", 1)[1].isdigit() for name in PROTOCOLS)
    for name in (
        "imagenet-recon-256-bilinear-v1",
        "imagenet-zeroshot-openai80-v1",
        "imagenet-linear-table11-v1",
        "coco-retrieval-5k-v1",
        "scenes-reconstruction-v1",
    ):
        assert find_protocol(name).card()["protocol"] == name
    with pytest.raises(UserError, match="did you mean 'imagenet-recon-256-bilinear-v1'"):
        find_protocol("imagenet-recon-256-bilinar-v1")


def test_protocols_that_have_made_figures_have_not_changed():
    """Whoever changes a protocol must give it a new name; then its line here changes too."""
    settings = find_protocol("imagenet-linear-table11-v1").card()["protocol_settings"]
    assert settings == {
        "positions": ["cls", "mean", "cls+mean"],
        "label": "class",
        "epochs": 10,
        "warmup_epochs": 1,
        "batch_size": 1024,
        "lr": 0.2,
        "batch_norm": True,
        "train_views": 10,
        "max_train_samples": 0,
        "seed": 0,
    }
    card = find_protocol("imagenet-recon-256-bilinear-v1").card()
    assert card["preparation"] == {"size": 256, "filter": "bilinear", "crop": "centre"}
    assert card["protocol_settings"]["metrics"] == ["psnr", "ssim", "lpips_alex", "rfid"]
    assert card["protocol_settings"]["rounding"] == "round"
    assert [find_protocol(name).count for name in ("imagenet-zeroshot-openai80-v1", "coco-retrieval-5k-v1")] == [
        50_000,
        5000,
    ]


@pytest.mark.parametrize(
    ("preparation", "resample"),
    [
        (Preparation(filter="bilinear"), Image.Resampling.BILINEAR),
        (Preparation(filter="lanczos"), Image.Resampling.LANCZOS),
        (Preparation(crop="squash"), Image.Resampling.BICUBIC),
    ],
    ids=["bilinear", "lanczos", "squash"],
)
@pytest.mark.parametrize("rounding", ["round", "truncate"])
def test_psnr_is_that_of_an_explicit_loop_under_each_preparation_and_rounding(preparation, resample, rounding):
    items = random_pictures(9, side=33)
    given = protocol(settings=replace(OFFLINE, rounding=rounding), preparation=preparation)
    figures, card = score(ListSource(items), given)
    expected = []
    for item in items:
        picture = Image.open(io.BytesIO(item.image)).resize((16, 16), resample)
        original = np.asarray(picture).astype(float)
        halved = original.astype(np.float32) / 255 / 2 * 255
        fake = np.rint(halved) if rounding == "round" else np.floor(halved)
        expected.append(10 * np.log10(255**2 / np.mean((original - fake) ** 2)))
    assert figures["psnr"] == pytest.approx(np.mean(expected), rel=1e-6)
    assert figures["bits_per_pixel"] == 6 / 64 and figures["compression_ratio"] == 256
    assert card["preparation"]["crop"] == preparation.crop and card["protocol_settings"]["rounding"] == rounding
    assert card["image_size"] == 16 and card["complete"]


def test_the_pixels_of_the_card_follow_the_preparation_and_not_the_order():
    items = random_pictures(9, side=33)
    pixels = {
        name: score(ListSource(found), protocol(preparation=Preparation(filter=filter)))[1]["pixels_sha256"]
        for name, found, filter in (
            ("base", items, "bicubic"),
            ("reversed", items[::-1], "bicubic"),
            ("bilinear", items, "bilinear"),
            ("fewer", items[1:], "bicubic"),
        )
    }
    assert pixels["base"] == pixels["reversed"]
    assert len(set(pixels.values())) == 3


def test_fewer_pictures_than_the_full_set_are_marked():
    _, card = score(ListSource(random_pictures(9)), protocol(count=10))
    assert (card["count"], card["complete"]) == (9, False)
    assert score(ListSource(random_pictures(10)), protocol(count=10))[1]["complete"]


class Untouchable(ListSource):
    """Fails the test when a picture is asked for."""

    def items(self):
        raise AssertionError("no picture may be read before the refusal")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (
            protocol(settings=ReconstructionSettings(metrics=("psnr", "rfid"))),
            {},
            "rFID of 9 pictures has no meaning.*--leave-out rfid",
        ),
        (protocol(preparation=Preparation(size=256)), {}, "for pictures of 256 pixels, the model takes 16"),
        (protocol(settings=ReconstructionSettings(metrics=("fd_encoder",))), {}, "QLIP's own encoder, a Halver has"),
        (protocol(), {"max_samples": 1}, "1 picture; reconstruction is measured on at least 2"),
        (
            protocol(settings=ReconstructionSettings(metrics=("lpips_alex",))),
            {},
            "lpips_alex needs pictures of at least 31 pixels, these have 16; .*--leave-out lpips_alex",
        ),
    ],
    ids=["few for an FID", "other size", "no own encoder", "one picture", "small for LPIPS"],
)
def test_refusals_come_before_any_work(given, options, message):
    with pytest.raises(UserError, match=message) as error:
        score(Untouchable(random_pictures(9)), given, **options)
    assert "\n" not in str(error.value)


def test_missing_weights_are_refused_before_any_work_and_can_be_left_out(tmp_path, monkeypatch):
    from qlip.evals.networks import Networks

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Halver, "image_size", 32)
    given = protocol(settings=ReconstructionSettings())
    source = Untouchable(random_pictures(9))
    source.num_items = 5000
    options = {"networks": Networks(tmp_path)}
    with pytest.raises(UserError, match=r"alexnet.*--leave-out lpips_alex"):
        score(source, given, **options)
    with pytest.raises(UserError, match=r"inception.*--leave-out rfid"):
        score(source, given, leave_out=("lpips_alex",), **options)
    figures, card = score(
        ListSource(random_pictures(9)), given, leave_out=("rfid", "lpips_alex", "lpips_vgg"), **options
    )
    assert card["left_out"] == ["lpips_alex", "rfid"]
    assert not any("fid" in name or "fd" in name or "lpips" in name for name in figures)


def test_a_model_without_the_ability_is_refused():
    model = Halver()
    model.abilities = frozenset({"features"})
    source = Untouchable(random_pictures(9))
    for name, missing in (("images-recon-offline-v1", "no decoder"), ("images-zeroshot-v1", "scores no texts")):
        with pytest.raises(UserError, match=missing):
            build_evaluator(name, EvalInput(source=source)).run(model, CPU)


CLASSES = ("apple", "pear tree", "eel")


def zero_shot(source: ListSource, **options) -> tuple[dict[str, float], ZeroShotEvaluator]:
    source.class_names = CLASSES
    given = protocol(settings=ZeroShotSettings(templates="simple7"))
    evaluator = ZeroShotEvaluator(given, EvalInput(source=source, batch_size=4, **options))
    return evaluator.run(Halver(), CPU), evaluator


def test_accuracies_equal_a_brute_force_loop():
    items = random_pictures(40)
    items[7] = Item(key="unlabelled", image=items[7].image)
    figures, evaluator = zero_shot(ListSource(items))
    model, hits = Halver(), []
    weights = []
    for name in CLASSES:
        embeds = [model.text_embeds([template(name)])[0].double().numpy() for template in named_templates("simple7")]
        mean = np.mean(embeds, axis=0)
        weights.append(mean / np.linalg.norm(mean))
    for item in items:
        if item.label is not None:
            picture = torch.from_numpy(np.array(Image.open(io.BytesIO(item.image)))).permute(2, 0, 1)[None]
            embed = model.image_embeds(picture)[0].double().numpy()
            hits.append((item.label, int(np.argmax([embed @ weight for weight in weights]))))
    assert len(hits) == 39 == evaluator.card()["count"]
    assert figures["top1"] == np.mean([label == said for label, said in hits])
    assert figures["top5"] == 1.0 == figures["top5_baseline"] and figures["top1_baseline"] == 1 / 3
    by_class = [np.mean([label == said for label, said in hits if label == c]) for c in range(3)]
    assert figures["mean_class"] == pytest.approx(np.mean(by_class))
    assert list(evaluator.details["top1_by_class"].values()) == pytest.approx(by_class)


def test_top_k_equals_sorting():
    scores, labels = torch.randn(50, 12), torch.randint(0, 12, (50,))
    for k in (1, 5, 12, 20):
        expected = [label in row.argsort(descending=True)[:k] for row, label in zip(scores, labels, strict=True)]
        assert topk_hits(scores, labels, k=k).tolist() == expected


def figures_of_all(folder: str) -> dict[str, float]:
    """Several evaluations of parts of four pictures; run alone and on two ranks."""
    collecting.PART = 4
    items = random_pictures(23)
    reference = ListSource(random_pictures(9, seed=5))
    found, _ = score(ListSource(items), protocol(settings=replace(OFFLINE, mean_picture=True)))
    more, _ = zero_shot(ListSource(items), folder=Path(folder))
    torch.manual_seed(0)
    tower = TowerSize(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24)
    sizes = ModelConfig(
        image_size=16, patch_size=8, encoder=tower, decoder=tower, text=tower, context_length=16, projection_dim=16
    )
    model = MeasuredQLIP(QLIPModel(sizes.build_config()).eval(), QLIPProcessor.for_size(16, context_length=16))
    given = protocol(settings=ReconstructionSettings(metrics=("encoder_distance", "fd_encoder")))
    evaluator = ReconstructionEvaluator(given, EvalInput(source=ListSource(items), reference=reference, batch_size=4))
    return found | more | evaluator.run(model, CPU)
