"""Stories of scenes: closed forms of a model that is uniform, brute-force frequencies, and a whole tiny UM3."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_sources import Halver, ListSource

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.scene_shards import write_scene_shards
from qlip.data.scenes import SceneConfig
from qlip.evals import run as running
from qlip.evals.compare import compare_results
from qlip.evals.inputs import EvalInput
from qlip.evals.protocols import SCENES_UNIFIED, Protocol, ScenePromptSettings, find_protocol
from qlip.evals.run import EvalRequest, default_batch_size, default_evals, run_evals
from qlip.evals.stories import StoryEvaluator
from qlip.models.qlip.processing import QLIPProcessor
from qlip.models.unified_model import WritingSettings
from tiny_unified import tiny_unified_folder

CPU = torch.device("cpu")
STORIES = [
    f"Once there was a small {colour} star. And the star stayed {colour} for ever."
    for colour in ("red", "red", "blue", "green", "red")
]


class Tokens:
    """A token is a word."""

    eos_token_id = 0

    def __init__(self) -> None:
        self.tokenizer, self.words = self, dict[str, int]()

    def encode_text(self, text: str) -> list[int]:
        return [self.words.setdefault(word, len(self.words) + 1) for word in text.split()]


class Teller:
    """Takes all of a thousand words for equally probable; the last colour is what `says` makes of the beginning."""

    name, image_size, abilities, context_length = "Teller", 16, frozenset(("continue",)), 64

    def __init__(self, says: Any = lambda start: [" red for ever."]) -> None:
        self.says, self.processor, self.asked = says, Tokens(), list[str]()
        self.model = SimpleNamespace(config=SimpleNamespace(softmax="separate"))

    def identity(self) -> dict[str, Any]:
        return {"model_fingerprint": "teller", "dtype": "float32"}

    def text_nll(self, texts: list[str]) -> list[tuple[float, int]]:
        counts = [len(text.split()) + 1 for text in texts]
        return [(count * math.log(1000), count) for count in counts]

    def continue_from(self, parts: list[str], settings: WritingSettings) -> list[Any]:
        assert settings.temperature == 0 and settings.max_new_tokens == 8
        self.asked += parts
        return self.says(parts[0])


def source_of(stories: list[Any]) -> ListSource:
    return ListSource(
        [Item(key=f"{i}", image=b"broken", record={} if s is None else {"story": s}) for i, s in enumerate(stories)]
    )


def run(stories: list[Any], model: Any, **options: Any) -> tuple[dict[str, float], StoryEvaluator]:
    evaluator = StoryEvaluator(find_protocol("scenes-stories-v1"), EvalInput(source=source_of(stories), **options))
    return evaluator.run(model, CPU), evaluator


def test_a_uniform_model_has_its_closed_form_beside_counted_frequencies():
    model = Teller()
    figures, evaluator = run([*STORIES, None, "  "], model, batch_size=3)
    tokens = [word for story in STORIES for word in [*story.split(), "END"]]
    num_bytes = sum(len(story.encode()) for story in STORIES)
    entropy = -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())
    assert figures == pytest.approx(
        {
            "perplexity": 1000,
            "perplexity_baseline": math.exp(entropy),
            "bits_per_byte": len(tokens) * math.log2(1000) / num_bytes,
            "bits_per_byte_baseline": len(tokens) * entropy / math.log(2) / num_bytes,
            "continued": 3 / 5,
            "continued_baseline": 3 / 5,
        }
    )
    assert model.asked == [story.rsplit(" ", 3)[0] for story in STORIES]
    card = evaluator.card()
    assert (card["count"], card["num_tokens"], card["num_bytes"]) == (5, len(tokens), num_bytes)
    assert (card["skipped"], card["softmax"]) == (0, "separate"), "pictures are broken, and are not read"
    assert not {"duplicates", "pixels_sha256"} & set(card)
    assert evaluator.details["colours"] == {"red": 3, "blue": 1, "green": 1}


@pytest.mark.parametrize(
    ("says", "share"),
    [
        (lambda start: [f" {start.split()[5]} for ever."], 1.0),
        (lambda start: [f"...{start.split()[5]}"], 1.0),
        (lambda start: [" redder"], 0.0),
        (lambda start: [" Red"], 0.0),
        (lambda start: [], 0.0),
        (lambda start: [object()], 0.0),
    ],
    ids=["all", "after marks", "longer word", "capital", "nothing", "a picture"],
)
def test_the_next_word_must_be_the_colour(says, share):
    assert run(STORIES, Teller(says))[0]["continued"] == share


def test_stories_of_another_ending_are_not_continued():
    model = Teller()
    figures, _ = run(["A star was here.", "ümlaut"], model)
    assert "continued" not in figures and not model.asked and figures["perplexity"] == pytest.approx(1000)


def test_an_endless_perplexity_is_no_crash():
    model = Teller()
    model.text_nll = lambda texts: [(1e6, 2)] * len(texts)  # type: ignore[method-assign]
    assert run(STORIES, model)[0]["perplexity"] == math.inf


def test_other_models_and_other_data_are_refused_before_any_work():
    with pytest.raises(UserError, match=r"a Halver continues no texts: leave scenes-stories-v1 out.*unified model"):
        run(STORIES, Halver())
    with pytest.raises(UserError, match="list: 0 stories; give scene shards"):
        run([None, 3], Teller())
    with pytest.raises(UserError, match="story of 1 has 64 tokens, the context 64"):
        run([STORIES[0], "word " * 63], Teller())


@pytest.mark.parametrize(
    ("key", "words"),
    [("text_tokens_sha256", ("other tokenizer", "A")), ("softmax", ("other softmax", "other softmax"))],
)
def test_likelihoods_of_other_events_are_not_called_better(tmp_path, capsys, key, words):
    figures = {"perplexity": 9.0, "bits_per_byte": 1.0, "continued": 0.5}
    card = {"protocol": "scenes-stories-v1", "count": 5, "model_fingerprint": "a", "complete": True, "data": "scenes"}
    for name, factor in (("a", 1), ("b", 2)):
        values = {figure: value * factor for figure, value in figures.items()}
        found = {"eval": "stories", "figures": values, "card": card | {key: name * 64}}
        (tmp_path / f"{name}.json").write_text(json.dumps([found]))
    compare_results(tmp_path / "a.json", tmp_path / "b.json")
    out = capsys.readouterr().out
    lines = [line.strip(" \N{BOX DRAWINGS LIGHT VERTICAL}") for line in out.split("\n")]
    better = {cells[0]: cells[-1] for cells in (re.split(r"\W{2,}", line) for line in lines)}
    assert tuple(better[name] for name in figures) == (*words, "B")
    assert f"also different, may move last digits: {key} " in out


def test_a_whole_um3_is_measured_by_its_default_protocols(tmp_path, monkeypatch):
    processor = QLIPProcessor.for_size(16, context_length=16)  # reading CLIP's vocabulary once is enough
    monkeypatch.setattr("qlip.models.opening.load_processor", lambda source: processor)
    folder, data, out = tiny_unified_folder(tmp_path / "um3"), tmp_path / "data", tmp_path / "out"
    write_scene_shards(data, num=6, split="test", config=SceneConfig(image_size=16))
    assert default_evals(folder) == SCENES_UNIFIED and default_batch_size(folder) == 32
    few = replace(find_protocol("scenes-geneval-v1"), settings=ScenePromptSettings(num_per_category=1, num_samples=1))
    short = Protocol(
        name="scenes-captions-v1",
        summary="A test.",
        settings=replace(find_protocol("scenes-captions-v1").settings, max_new_tokens=6),
    )
    monkeypatch.setattr("qlip.evals.scene_generation.read_scenes", lambda pictures: [[]] * len(pictures))  # too small
    for given in (few, short):
        monkeypatch.setitem(running.protocols.PROTOCOLS, given.name, given)
    request = EvalRequest(data=str(data), evals=SCENES_UNIFIED, folder=out, batch_size=4)
    results = {result["card"]["protocol"]: result for result in run_evals(folder, request, device="cpu")}
    assert [result["eval"] for result in results.values()] == ["scene_captions", "stories", "scene_prompts"]
    stories = results["scenes-stories-v1"]
    assert 1 < stories["figures"]["perplexity"] < math.inf and stories["card"]["num_tokens"] > 6 * 20
    assert results["scenes-captions-v1"]["figures"]["all"] == 0
    assert len({result["card"]["model_fingerprint"] for result in results.values()}) == 1
    assert len(json.loads((out / "scenes-captions-v1_captions.json").read_text())) == 6
    assert len(json.loads((out / "results.json").read_text())) == 3 and not (out / ".parts").exists()
