"""What the playground takes from a browser and from its command line, and what it refuses; no browser here."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import re
import signal
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
from playground_visitor import Models, open_models, png_of, save_models

from qlip.apps.playground import ended_by_signals, free_port, launch_playground
from qlip.apps.playground_folder import temporary_folder
from qlip.apps.playground_models import Playground, folder_examples, open_any_size, scene_examples
from qlip.apps.playground_sent import labels_of, limited, pixel_in, seed_of, stroked, uploaded
from qlip.core.errors import UserError
from qlip.core.images import ImageLimits, open_image
from qlip.models.unified_model import WritingSettings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def playground(models: Models) -> Playground:
    return open_models(models)


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
        (None, "no labels given"),
        ("a star\ud800", "half of a character"),
    ],
    ids=["none", "many", "long", "null", "lone surrogate"],
)
def test_labels_that_are_not_compared(text: str | None, line: str) -> None:
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
        {"points": [[10**400, 0.5]], "diameter": 0.5},
        {"points": [[0.5, 0.5]], "diameter": 10**400},
        {"points": [[0.5, 0.5, 0.5]], "diameter": 0.5},
        {"points": ["ab"], "diameter": 0.5},
        {"points": [[0.5, 0.5]] * 5001, "diameter": 0.5},
    ],
    ids=[
        "nothing",
        "empty",
        "no points",
        "thin",
        "wide",
        "text",
        "far",
        "nan",
        "huge",
        "huge brush",
        "three",
        "letters",
        "long",
    ],
)
def test_what_is_no_stroke_is_refused(event: Any) -> None:
    with pytest.raises(UserError, match="that is no stroke"):
        stroked(event, grid=(2, 2))


def test_texts_of_any_length_reach_no_model(playground: Playground) -> None:
    chosen = playground.choose(png_of(0))
    with pytest.raises(UserError, match="the text has 2001 characters"):
        playground.draw("UM3", "x" * 2001, seed=0, guidance=1.0)
    with pytest.raises(UserError, match="the seed is no whole number from 0"):
        playground.draw("UM3", "a star", seed=-1, guidance=1.0)
    with pytest.raises(UserError, match="guidance is nan"):
        playground.draw("UM3", "a star", seed=0, guidance=float("nan"))
    with pytest.raises(UserError, match=r"the prompt is empty: say what the picture should show$"):
        playground.draw("UM3", " \u200b\n", seed=0, guidance=1.0)
    with pytest.raises(UserError, match="no model is chosen"):
        playground.guidance(None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the question is empty"):
        playground.ask(chosen, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="half of a character"):
        limited("\udfff")


def test_a_caption_is_the_um3s_own(playground: Playground) -> None:
    source = png_of(0)
    assert playground.unified is not None
    expected = playground.unified.caption(
        [open_image(source, limits=playground.limits)], WritingSettings(temperature=0)
    )
    assert [playground.caption(playground.choose(source))] == expected


@pytest.mark.parametrize("value", [None, "", "3", -1, 0.5, 2**63, float("nan"), float("inf"), True, []], ids=repr)
def test_what_is_no_seed_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="the seed is no whole number"):
        seed_of(value)


def test_seeds_are_whole_numbers() -> None:
    assert [seed_of(0), seed_of(3.0), seed_of(2**63 - 1)] == [0, 3, 2**63 - 1]


@pytest.mark.parametrize(
    "event",
    [None, [], {}, {"index": 3}, {"index": [1]}, {"index": ["1", 2]}, {"index": [True, 2]}, {"index": [None, None]}],
    ids=json.dumps,
)
def test_what_is_no_place_is_refused(event: Any) -> None:
    with pytest.raises(UserError, match="no place on the picture"):
        pixel_in(event)


@pytest.mark.parametrize("bit", [None, -2, 28, 1.0, "all", True, []], ids=repr)
def test_what_is_no_choice_of_a_bit_is_refused(bit: Any) -> None:
    painting = pytest.importorskip("qlip.apps.playground_painting")
    assert [list(painting.chosen_of(each, num_bits=28)) for each in (-1, 3)] == [list(range(28)), [3]]
    with pytest.raises(UserError, match="no bit is chosen"):
        painting.chosen_of(bit, num_bits=28)


@pytest.mark.parametrize("index", [-1, 12, None, "0", 0.0, True, [0, 0]], ids=repr)
def test_what_is_no_example_is_refused(index: Any) -> None:
    gradio, tabs = pytest.importorskip("gradio"), pytest.importorskip("qlip.apps.playground_tabs")
    assert tabs.place_in(gradio.EventData(None, {"index": 11}), num=12) == 11
    for sent in ({"index": index}, {}, None):
        with pytest.raises(UserError, match="none of the pictures"):
            tabs.place_in(gradio.EventData(None, sent), num=12)


@pytest.mark.parametrize("path", [None, "", 3, []], ids=repr)
def test_no_file_is_a_message(path: Any) -> None:
    with pytest.raises(UserError, match="no file has come"):
        uploaded(path)


def test_remedies_name_what_the_playground_takes(models: Models) -> None:
    for source in ("nowhere", str(models.assistant)):
        with pytest.raises(UserError, match="give a QLIP folder or hub id, a VQModel folder") as refused:
            open_any_size(source)
        assert "CLIP or SigLIP" not in str(refused.value)
    for source in (models.unified, models.assistant):
        with pytest.raises(UserError, match=r"no text-to-image model: .* and a UM3 with --unified$"):
            launch_playground(str(models.tokenizer), generator=str(source), device="cpu")


def test_a_port_that_only_the_administrator_has_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", bind)
    with pytest.raises(UserError, match="port 80 needs more rights than yours: take one above 1023"):
        free_port(80)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_signals_end_it_as_ctrl_c_does(number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = signal.signal(number, signal.SIG_DFL)  # the suite itself may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signals(), temporary_folder() as folder:
            (folder / "upload.png").touch()
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL and list(tmp_path.iterdir()) == []
    finally:
        signal.signal(number, before)


def test_folders_of_killed_owners_are_removed_and_no_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("qlip-app-dead", "qlip-app-alive", "qlip-app-young", "qlip-app-unknown", "other"):
        (tmp_path / name / "files").mkdir(parents=True)
        if name != "qlip-app-unknown":
            (tmp_path / name / "lock").touch()
        if name != "qlip-app-young":
            os.utime(tmp_path / name, (0, 0))
    (tmp_path / "qlip-app-link").symlink_to(tmp_path / "other")
    os.utime(tmp_path / "qlip-app-link", (0, 0), follow_symlinks=False)
    kept = {path.name for path in tmp_path.iterdir()} - {"qlip-app-dead"}
    with (tmp_path / "qlip-app-alive" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with temporary_folder() as folder:
            assert {path.name for path in tmp_path.iterdir()} == kept | {folder.parent.name}
    assert {path.name for path in tmp_path.iterdir()} == kept
