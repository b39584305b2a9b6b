"""What the playground takes from a browser and from its command line, and what it refuses; no browser here."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from playground_visitor import open_models, png_of, save_models

from qlip.apps.playground import launch_playground
from qlip.apps.playground_models import Playground, folder_examples, labels_of, scene_examples, stroked
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Playground:
    return open_models(save_models(tmp_path_factory.mktemp("models")))


def test_a_missing_gradio_and_impossible_numbers_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, line in (
        ({"port": 0}, "--port is 0: give a number from 1 to 65535"),
        ({"max_upload_mb": 0}, "--max-upload-mb is 0: give a number from 1 to 1000"),
    ):
        with pytest.raises(UserError, match=line):
            launch_playground("nowhere", **options)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install 'qlip[app]'")):
        launch_playground("nowhere")


def test_examples_are_scenes_or_usable_pictures_of_a_folder(playground: Playground, tmp_path: Path) -> None:
    assert playground.examples == scene_examples(playground.tokenizer) and len(set(playground.examples)) == 12
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"no usable picture in .*: give --images a folder"):
        folder_examples(tmp_path, limits=ImageLimits())
    for seed in range(14):
        (tmp_path / f"{seed}.png").write_bytes(png_of(seed))
    found = folder_examples(tmp_path, limits=ImageLimits())
    assert len(set(found)) == 12 and tmp_path / "broken.png" not in found


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (" , \n,", "no labels given"),
        (",".join(map(str, range(101))), "101 labels, at most 100"),
        ("x" * 101, "a label has 101 characters"),
    ],
    ids=["none", "many", "long"],
)
def test_labels_that_are_not_compared(text: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        labels_of(text)


def test_labels_are_lines_or_between_commas_each_once() -> None:
    assert labels_of(" a cat,dog\n\nbird , a cat") == ["a cat", "dog", "bird"]


@pytest.mark.parametrize(
    "event",
    [
        None,
        {},
        {"points": [], "diameter": 0.5},
        {"points": [[0.5, 0.5]], "diameter": 0},
        {"points": [[0.5, 0.5]], "diameter": 2},
        {"points": [[0.5, 0.5]], "diameter": "0.5"},
        {"points": [[0.5, 1e300]], "diameter": 0.5},
        {"points": [[0.5, float("nan")]], "diameter": 0.5},
        {"points": [[0.5, 0.5, 0.5]], "diameter": 0.5},
        {"points": ["ab"], "diameter": 0.5},
        {"points": [[0.5, 0.5]] * 5001, "diameter": 0.5},
    ],
    ids=["nothing", "empty", "no points", "thin", "wide", "text", "far", "nan", "three", "letters", "long"],
)
def test_what_is_no_stroke_is_refused(event: Any) -> None:
    with pytest.raises(UserError, match="that is no stroke"):
        stroked(event, grid=(2, 2))


def test_texts_of_any_length_reach_no_model(playground: Playground) -> None:
    chosen = playground.choose(png_of(0))
    with pytest.raises(UserError, match="the text has 2001 characters"):
        playground.draw("UM3", "x" * 2001, seed=0, guidance=1.0)
    with pytest.raises(UserError, match="--seed is -1"):
        playground.draw("UM3", "a star", seed=-1, guidance=1.0)
    with pytest.raises(UserError, match="guidance is nan"):
        playground.draw("UM3", "a star", seed=0, guidance=float("nan"))
    assert playground.caption(chosen) == playground.caption(chosen)
