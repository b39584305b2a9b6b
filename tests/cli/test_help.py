"""Help answers without torch, names are lazy, and every mistake in a command is one line that names the remedy."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qlip as package
from qlip.cli import COMMANDS
from qlip.recipes import RECIPES

LIGHT = """
import contextlib, io, sys
from qlip.cli import COMMANDS, dispatch
import qlip
helps = [[*name.split(), "--help"] for name in COMMANDS]
for arguments in [[], ["--help"], ["--version"], ["data"], ["train"], *helps]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            dispatch(arguments)
        except SystemExit as stop:
            assert not stop.code, arguments
    assert len(printed.getvalue()) > 10 or arguments == ["--version"], arguments
    for heavy in ("torch", "transformers", "torchvision", "pyarrow", "matplotlib"):
        assert heavy not in sys.modules, (arguments, heavy)
from qlip import QLIPModel, bits_to_ids
assert "torch" in sys.modules and QLIPModel.__name__ == "QLIPModel"
print("light")
"""


def test_every_help_and_the_import_leave_torch_out():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("light\n", "")


def test_public_names_load_on_first_use():
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'QLIPModell'"):
        package.QLIPModell  # noqa: B018 - reading it is the test
    with pytest.raises(ImportError):
        from qlip import nothing_of_the_kind  # noqa: F401


def test_help_names_every_command_and_recipe(qlip):
    out = qlip.works("--help")
    assert out == qlip.works()
    assert all(f"  {name} " in out for name in COMMANDS)
    out = qlip.works("data")
    assert "data scenes" in out and "data inspect" in out and "reconstruct" not in out
    out = qlip.works("train", "--help")
    assert all(f"  {name} " in out for name in RECIPES) and "--out" in out and "--accept-changes" in out
    assert package.__version__ in qlip.works("--version")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_a_commands_help_has_its_example_and_every_option_explained(qlip, name):
    out = qlip.works(*name.split(), "--help")
    assert f"usage: qlip {name}" in out
    assert f"Example: qlip {name}" in out or name == "doctor"


def test_a_recipes_help_lists_its_fields(qlip):
    out = qlip.works("train", "scenes_tiny", "--help")
    for option in ("--data.train", "--trainer.steps", "--model.encoder.hidden-size", "--out", "--accept-changes"):
        assert option in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["reconstrukt"], "command 'reconstrukt' is unknown: did you mean 'reconstruct'?"),
        (["data", "scene", "out"], "command 'data scene' is unknown: did you mean 'data scenes'?"),
        (["xyzzy"], "command 'xyzzy' is unknown: known: app, ask, balance, caption, check"),
        (["train", "scenes_tinny"], "recipe 'scenes_tinny' is unknown: did you mean 'scenes_tiny'?"),
        (["train", "scenes_tiny", "--trainer.step", "3"], "option --trainer.step is unknown: did you mean '--trainer."),
        (["eval", "m", "--data", "d", "--max-sample", "3"], "option --max-sample is unknown: did you mean '--max-samp"),
        (["data", "scenes", "out"], "missing"),
        (["data", "scenes", "out", "--num", "many"], "many"),
        (["data", "scenes", "out", "--num", "5", "--split", "validation"], "validation"),
        (["doctor", "please"], "too many arguments: please"),
        (["train", "scenes_tiny"], "no training data: add --data.train"),
        (["train", "um3_1_5b"], "no model to start from: add --init FOLDER"),
        (["check", "um3_1_5b"], "um3_1_5b trains a model of text and of images over one: docs/unified.md"),
        (["balance", "scenes_um3_tiny"], "`qlip balance` knows recipes of tokenizers"),
        (["export", "nowhere", "out"], "nowhere is not a model folder: there is nothing at that path"),
    ],
)
def test_mistakes_are_one_line(qlip, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in qlip.refused(*arguments)
    assert list(tmp_path.iterdir()) == []
