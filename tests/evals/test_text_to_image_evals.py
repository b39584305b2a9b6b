"""Generators under protocols: gFID and CLIP figures against explicit loops, draws, refusals, resumption."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sources import Halver, ListSource, random_pictures

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.scenes import SceneConfig, render, sample_scenes, scene_records
from qlip.evals import collect as collecting
from qlip.evals import generation_networks, scene_generation, text_to_image
from qlip.evals.benchmark_files import picture_seed
from qlip.evals.compare import differences
from qlip.evals.generation_networks import NOT_CLEAN_FID, VIT_B_32
from qlip.evals.geneval import TAGS
from qlip.evals.inputs import EvalInput
from qlip.evals.networks import Networks
from qlip.evals.protocols import (
    ALL,
    Preparation,
    Protocol,
    ScenePromptSettings,
    TextToImageSettings,
    find_protocol,
)
from qlip.evals.run import EvalRequest, build_evaluator, warn_of_unused
from qlip.evals.scene_generation import SceneGenerationEvaluator
from qlip.evals.scenes import ground_truth_scenes, judge, objects_of_record, scene_prompts
from qlip.evals.text_to_image import TextToImageEvaluator, draw_captions, resized

CPU = torch.device("cpu")
EVERYTHING = TextToImageSettings(metrics=("gfid", "fd_clip", "clip_cosine", "clipscore"), prefix="A photo depicts ")


class FakeGenerator:
    """Noise whose brightness is the prompt's length; counts what it was asked for."""

    name = "FakeGenerator"
    image_size = 24
    abilities = frozenset(("generate",))
    sampling = {"temperature": 1.0, "guidance": 2.0}

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def identity(self) -> dict[str, Any]:
        return {"model_fingerprint": "fake", "dtype": "float32"}

    def to(self, device: torch.device) -> None:
        pass

    def generate(self, prompts: list[str], *, seeds: list[int]) -> torch.Tensor:
        self.asked += zip(prompts, seeds, strict=True)
        return torch.stack([self.picture(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    def picture(self, prompt: str, seed: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(seed)
        return torch.randint(0, 30 + 10 * len(prompt), (3, self.image_size, self.image_size), generator=noise).byte()


class Brightness(Networks):
    """In place of Inception: one feature, the mean of all pixels."""

    def __init__(self) -> None:
        super().__init__(None)

    def inception(self, device: torch.device, *, metric: str):
        assert metric == "gfid"
        features = lambda pictures: pictures.float().mean((1, 2, 3))[:, None]  # noqa: E731
        features.card = lambda: {"feature_network": "brightness"}
        return features


@pytest.fixture(autouse=True)
def few_are_enough_and_clip_is_a_halver(monkeypatch):
    monkeypatch.setattr(text_to_image, "LEAST_FOR_FID", 4)
    monkeypatch.setattr(generation_networks, "open_measured", lambda folder: Halver())


def captioned(num: int = 13) -> ListSource:
    """Pictures with no, one or several captions."""
    items = [
        replace(item, captions=tuple(f"caption {'a' * (i + j)}" for j in range(i % 3)))
        for i, item in enumerate(random_pictures(num))
    ]
    return ListSource(items)


def protocol(settings: TextToImageSettings = EVERYTHING, **changes) -> Protocol:
    given = {"name": "test-v1", "summary": "", "settings": settings, "preparation": Preparation(size=20)}
    return Protocol(**(given | changes))


def evaluator(source: ListSource, given: Protocol | None = None, **options) -> TextToImageEvaluator:
    data = EvalInput(source=source, **({"batch_size": 4, "networks": Brightness()} | options))
    return TextToImageEvaluator(given or protocol(), data, clip=Path("clip"))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """By eigenvalues of the product of both covariances."""
    roots = np.sqrt(np.linalg.eigvals(np.atleast_2d(np.cov(a.T)) @ np.atleast_2d(np.cov(b.T))).astype(complex)).real
    traces = np.trace(np.atleast_2d(np.cov(a.T))) + np.trace(np.atleast_2d(np.cov(b.T)))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + traces - 2 * roots.sum())


def by_hand(source: ListSource, *, side: int = 20) -> dict[str, float]:
    """Every figure by loops over single pictures with Pillow."""
    drawn, halver, generator = draw_captions(source, num=0, seed=0), Halver(), FakeGenerator()
    fit = lambda image, size: torch.from_numpy(  # noqa: E731
        np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    ).permute(2, 0, 1)[None]
    real, made, images, texts = [], [], [], []
    for item in source.found:
        real.append(fit(Image.open(io.BytesIO(item.image)), side))
        if item.key in drawn:
            place, caption = drawn[item.key]
            picture = generator.picture(caption, picture_seed(0, prompt_index=place, sample_index=0))
            made.append(fit(Image.fromarray(picture.permute(1, 2, 0).numpy()), side))
            in_clip = fit(Image.fromarray(made[-1][0].permute(1, 2, 0).numpy()), 16)
            images.append(halver.image_embeds(in_clip)[0])
            texts.append(halver.text_embeds([f"A photo depicts {caption}"])[0])
    cosines = torch.stack([image @ text for image, text in zip(images, texts, strict=True)]).double()
    others = torch.stack([image @ texts[i - 1] for i, image in enumerate(images)]).double()
    bright = [np.array([[float(p.float().mean())] for p in pictures]) for pictures in (real, made)]
    small = [
        np.concatenate([halver.features(resized(p, size=16))["cls"].numpy() for p in pictures]).astype(np.float64)
        for pictures in (real, made)
    ]
    return {
        "gfid": frechet(*bright),
        "fd_clip": frechet(*small),
        "clip_cosine": float(cosines.mean()),
        "clipscore": float(2.5 * cosines.clamp(min=0).mean()),
        "clip_cosine_baseline": float(others.mean()),
        "clipscore_baseline": float(2.5 * others.clamp(min=0).mean()),
    }


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_figures_are_those_of_explicit_loops_in_any_batch(batch_size):
    source = captioned()
    found = evaluator(source, batch_size=batch_size)
    assert found.run(FakeGenerator(), CPU) == pytest.approx(by_hand(source), rel=1e-4)
    assert set(found.details) == {"clip_cosine_real", "clipscore_real"}


def test_nothing_is_generated_twice_or_for_padding():
    source, generator = captioned(), FakeGenerator()
    evaluator(source).run(generator, CPU)
    drawn = draw_captions(source, num=0, seed=0)
    assert sorted(generator.asked) == sorted(
        (entry.caption, picture_seed(0, prompt_index=entry.place, sample_index=0)) for entry in drawn.values()
    )


def test_the_card_says_how_it_was_measured():
    found = evaluator(captioned(), max_samples=6)
    found.run(FakeGenerator(), CPU)
    card = found.card()
    expected = {
        "protocol": "test-v1",
        "count": 6,
        "complete": False,
        "image_size": 20,
        "generated_size": 24,
        "sampling": {"temperature": 1.0, "guidance": 2.0},
        "model_fingerprint": "fake",
        "feature_network": "brightness",
        "feature_note": NOT_CLEAN_FID,
        "clip_model": "Halver",
        "clip_fingerprint": "halver",
        "reference": "all pictures of list",
        "reference_count": 13,
        "baseline": "another caption",
    }
    assert {name: card[name] for name in expected} == expected
    assert card["protocol_settings"]["prefix"] == "A photo depicts "
    other = card | {"sampling": {"temperature": 1.0, "guidance": 7.5}, "clip_fingerprint": "b", "captions_sha256": "c"}
    said = differences(card, other)
    assert [line.split()[0] for line in said.blocking] == ["captions_sha256", "clip_fingerprint"]
    assert said.notes == ["sampling.guidance 2.0 -> 7.5"]


def test_a_draw_is_one_caption_per_picture_whatever_the_order_of_the_data():
    source = captioned(300)
    drawn = draw_captions(source, num=0, seed=0)
    captions = {item.key: item.captions for item in source.found if item.captions}
    assert drawn.keys() == captions.keys() and len(drawn) == 200
    assert all(entry.caption in captions[key] for key, entry in drawn.items())
    first_of_two = [entry.caption == captions[key][0] for key, entry in drawn.items() if len(captions[key]) == 2]
    assert 30 < sum(first_of_two) < 70  # of 100, fair
    assert draw_captions(ListSource(source.found[::-1]), num=0, seed=0) == drawn
    fewer = draw_captions(source, num=50, seed=0)
    assert fewer == {key: entry for key, entry in drawn.items() if entry.place < 50}  # begins the larger one
    assert draw_captions(source, num=50, seed=1).keys() != fewer.keys()
    best = min(captions, key=lambda key: hashlib.sha256(f"0/{key}".encode()).digest()[8:])
    assert drawn[best].place == 0


def test_a_stopped_evaluation_generates_only_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "PART", 3)
    source, whole = captioned(), FakeGenerator()
    expected = evaluator(source).run(whole, CPU)
    stopping = FakeGenerator()
    generate = stopping.generate

    def stops(prompts, *, seeds):
        if len(stopping.asked) >= 6:
            raise KeyboardInterrupt
        return generate(prompts, seeds=seeds)

    stopping.generate = stops
    with pytest.raises(KeyboardInterrupt):
        evaluator(source, folder=tmp_path).run(stopping, CPU)
    again = FakeGenerator()
    found = evaluator(source, folder=tmp_path)
    assert found.run(again, CPU) == pytest.approx(expected, rel=1e-9)
    assert len(again.asked) == len(whole.asked) - 6 and found.card()["resumed_parts"] == 2
    other = FakeGenerator()
    other.sampling = {"temperature": 0.5}
    evaluator(source, folder=tmp_path).run(other, CPU)
    assert len(other.asked) == len(whole.asked)  # not another sampling's parts


def test_what_is_left_out_is_neither_measured_nor_asked_for():
    found = TextToImageEvaluator(
        protocol(),
        EvalInput(source=captioned(), networks=Brightness(), leave_out=("fd_clip", "clip_cosine")),
        clip=Path(),
    )
    figures = found.run(FakeGenerator(), CPU)
    assert set(figures) == {"gfid", "clipscore", "clipscore_baseline"}
    assert found.card()["left_out"] == ["clip_cosine", "fd_clip"]
    without_clip = ("fd_clip", "clip_cosine", "clipscore")
    data = EvalInput(source=captioned(), networks=Brightness(), leave_out=without_clip)
    assert set(TextToImageEvaluator(protocol(), data, clip=None).run(FakeGenerator(), CPU)) == {"gfid"}
    data.leave_out = (*without_clip, "gfid")
    with pytest.raises(UserError, match="nothing is left to measure"):
        TextToImageEvaluator(protocol(), data, clip=None).run(FakeGenerator(), CPU)


def test_refusals_come_before_any_picture(tmp_path, monkeypatch):
    generator = FakeGenerator()

    def refused(said: str, source: ListSource, given: Protocol, *, clip: Path | None = Path("clip"), **options) -> None:
        data = EvalInput(source=source, **({"networks": Brightness()} | options))
        with pytest.raises(UserError, match=said):
            TextToImageEvaluator(given, data, clip=clip).run(generator, CPU)

    bare = ListSource(random_pictures(9))
    few = ListSource([replace(item, captions=("a",)) for item in random_pictures(3)])
    coco = find_protocol("coco30k-gfid-v1")
    refused("list: 0 pictures with captions.*give at least 4, or --leave-out gfid", bare, protocol())
    refused("list: 3 pictures with captions, fewer than its features", few, protocol())
    refused("give at least 2$", bare, protocol(), leave_out=("gfid",))
    refused(f"CLIP ViT-B/32 .{VIT_B_32}. with --clip FOLDER, or --leave-out", captioned(), coco, clip=None)
    refused("is a Halver of 16 pixels in patches of 8, coco30k-gfid-v1 takes ViT-B/32", captioned(), coco)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    refused("no Inception weights.*--leave-out gfid", captioned(), protocol(), networks=Networks(tmp_path))
    monkeypatch.setattr(Halver, "abilities", frozenset(("reconstruct",)))
    refused("--clip clip: a Halver scores no texts", captioned(), protocol())
    assert not generator.asked


SMALL = replace(
    find_protocol("scenes-geneval-v1"),
    settings=ScenePromptSettings(num_per_category=2, num_samples=2, num_records=20),
)


@cache
def rendered_prompts() -> dict[str, torch.Tensor]:
    prompts = scene_prompts(num_per_category=2, seed=0)
    pictures = render(ground_truth_scenes(prompts, seed=0), image_size=48)
    return {prompt["prompt"]: picture for prompt, picture in zip(prompts, pictures, strict=True)}


class Renderer(FakeGenerator):
    """Paints what the prompt says, or, in one of two pictures of a prompt, an empty picture."""

    def __init__(self, *, lazy: bool = False) -> None:
        super().__init__()
        self.lazy, self.known = lazy, rendered_prompts()

    def picture(self, prompt: str, seed: int) -> torch.Tensor:
        blank = self.lazy and [asked for asked, _ in self.asked].index(prompt) != self.asked.index((prompt, seed))
        return torch.full_like(self.known[prompt], 200) if blank else self.known[prompt]


@pytest.fixture(scope="module")
def scenes() -> ListSource:
    records = scene_records(sample_scenes(30, split="test", shard=0, config=SceneConfig()))
    return ListSource([Item(key=str(i), image=b"", record={"scene": record}) for i, record in enumerate(records)])


def scene_figures(source: ListSource, generator: FakeGenerator, **options) -> SceneGenerationEvaluator:
    found = SceneGenerationEvaluator(SMALL, EvalInput(source=source, **options))
    found.figures = found.run(generator, CPU)
    return found


def test_true_scenes_are_right_and_chance_is_that_of_the_data(scenes):
    found = scene_figures(scenes, Renderer())
    baselines = {name for name in found.figures if name.endswith("_baseline")}
    assert {name: found.figures[name] for name in found.figures.keys() - baselines} == dict.fromkeys(
        (*TAGS, "overall"), 1.0
    )
    by_hand = {tag: [] for tag in TAGS}
    for prompt in scene_prompts(num_per_category=2, seed=0):
        for item in scenes.found[:20]:
            by_hand[prompt["tag"]].append(judge(prompt, objects_of_record(item.record["scene"])).correct)
    for tag in TAGS:
        assert found.figures[f"{tag}_baseline"] == pytest.approx(np.mean(by_hand[tag]))
    assert found.figures["overall_baseline"] == pytest.approx(np.mean([np.mean(hits) for hits in by_hand.values()]))
    assert 0 < found.figures["overall_baseline"] < 0.3
    card = found.card()
    assert (card["count"], card["num_prompts"], card["num_scenes"], card["baseline"]) == (24, 12, 20, "chance")
    assert card["sampling"] == FakeGenerator.sampling and card["protocol_settings"]["num_samples"] == 2


def test_half_the_pictures_give_half_the_score_in_any_batch(scenes):
    for batch_size in (5, 100):
        found = scene_figures(scenes, Renderer(lazy=True), batch_size=batch_size)
        assert all(found.figures[tag] == 0.5 for tag in (*TAGS, "overall"))
    assert len(found.details["prompts"]) == 12
    first = found.details["prompts"][0]
    assert (first["tag"], first["correct"], first["pictures"]) == ("single_object", 1, 2)
    assert first["reasons"] == [f"expected {first['prompt'].split()[-1]}>=1, found 0"]
    colours = [entry for entry in found.details["prompts"] if entry["tag"] == "single_object"]
    assert not any(entry["unseen_pair"] for entry in colours)


def test_ranks_share_the_prompts_of_scenes(scenes, monkeypatch):
    alone = scene_figures(scenes, Renderer())
    prompts, judged = scene_prompts(num_per_category=2, seed=0), []
    for rank in range(2):
        monkeypatch.setattr(scene_generation.distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(scene_generation.distributed, "world_size", lambda: 2)
        evaluator = SceneGenerationEvaluator(SMALL, EvalInput(source=scenes))
        judged.append(evaluator._judge_own(Renderer(), prompts))
    assert [len(own) for own in judged] == [6, 6]
    assert [counts for _, counts in sorted(judged[0] + judged[1])] == alone.details["prompts"]


def test_data_that_are_no_scenes_are_refused():
    generator = Renderer()
    for source, said in ((captioned(), "needs scene shards"), (ListSource([]), "holds no scenes; make some")):
        with pytest.raises(UserError, match=said):
            scene_figures(source, generator)
    assert not generator.asked


def test_models_are_measured_by_what_they_can_do():
    images = [Item(key="a", image=b"", record={"scene": {"objects": []}})]
    for given in ALL:
        found = build_evaluator(given.name, EvalInput(source=ListSource(images), train_source=ListSource(images)))
        generates = given.kind in ("text_to_image", "scene_prompts")
        with pytest.raises(UserError, match=f"leave {given.name} out of --evals"):
            found.run(Halver() if generates else FakeGenerator(), CPU)


def test_options_without_effect_are_said(capsys):
    warn_of_unused(EvalRequest(data="x", evals=("images-zeroshot-v1",), clip=Path("c"), leave_out=("gfid",)))
    said = capsys.readouterr().out
    assert "--clip has no effect" in said and "--leave-out gfid has no effect" in said
    warn_of_unused(EvalRequest(data="x", evals=("coco30k-gfid-v1",), clip=Path("c"), reference="r", networks=Path("n")))
    assert not capsys.readouterr().out


def test_the_published_protocol_is_that_of_the_paper():
    given = find_protocol("coco30k-gfid-v1")
    assert (given.preparation.size, given.preparation.filter, given.count) == (256, "lanczos", 30_000)
    assert given.settings.prefix == "A photo depicts " and given.settings.num_captions == 30_000
