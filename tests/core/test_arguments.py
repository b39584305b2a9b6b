"""Every mistake on the command line is one line that names the nearest option, and exit code 2."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from tyro.conf import Positional

from qlip.core.arguments import parse_arguments
from qlip.core.errors import UserError


@dataclass(kw_only=True, slots=True)
class Part:
    patch_size: int = 8
    """Side."""
    kind: Literal["bsq", "none"] = "bsq"
    """Which."""
    flag: bool = False
    """Whether."""


@dataclass(kw_only=True, slots=True)
class Options:
    part: Part = field(default_factory=Part)
    rates: dict[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ("a",)
    pair: tuple[float, float] = (1.0, 2.0)


def look(model: Positional[Path], images: Positional[tuple[Path, ...]], *, out: Path, limit: int | None = None) -> str:
    """Look at pictures."""
    return f"{model} {len(images)} {out} {limit}"


def test_fields_are_changed_from_the_default():
    default = Options(part=Part(patch_size=4), rates={"x": 1.0})
    arguments = [
        "--part.patch-size",
        "16",
        "--part.kind",
        "none",
        "--part.flag",
        "--names",
        "b",
        "c",
        "--pair",
        "3",
        "4",
    ]
    parsed = parse_arguments(Options, arguments, prog="p", default=default)
    expected = Options(
        part=Part(patch_size=16, kind="none", flag=True), rates={"x": 1.0}, names=("b", "c"), pair=(3, 4)
    )
    assert parsed == expected
    assert default.part.patch_size == 4
    assert parse_arguments(Options, ["--part.patch_size", "2"], prog="p").part.patch_size == 2  # underscores too


def test_a_function_is_parsed_but_not_yet_called():
    call = parse_arguments(look, ["m", "a.png", "b.png", "--out", "o"], prog="p")
    assert call() == "m 2 o None"


@pytest.mark.parametrize(
    ("target", "arguments", "said"),
    [
        (Options, ["--part.pach-size", "16"], "option --part.pach-size is unknown: did you mean '--part.patch-size'?"),
        (Options, ["--zzz", "1"], "option --zzz is unknown: known: "),
        (Options, ["--part.patch-size", "big"], "big"),
        (Options, ["--part.patch-size", "1.5"], "1.5"),
        (Options, ["--part.kind", "vq"], "bsq"),
        (Options, ["--pair", "1"], "--pair"),
        (Options, ["--part.patch-size"], "Missing value for argument '--part.patch-size'"),
        (Options, ["stray"], "too many arguments: stray"),
        (look, ["m", "a.png"], "missing --out"),
        (look, [], "missing"),
        (look, ["m", "a.png", "--out", "o", "--limit", "few"], "few"),
    ],
)
def test_a_mistake_is_one_line_that_points_to_the_help(target, arguments, said):
    with pytest.raises(UserError) as refused:
        parse_arguments(target, arguments, prog="qlip p")
    text = str(refused.value)
    assert said in text
    assert "rror " not in text.split("(see")[0].removeprefix("Error parsing ") and "---" not in text
    assert text.endswith("(see `qlip p --help`)")
    assert "\n" not in text and not set("│╭╰─╮╯") & set(text) and len(text) < 400


def test_help_goes_to_standard_output_with_exit_code_0(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Options, ["--help"], prog="qlip p")
    assert stopped.value.code == 0
    printed = capsys.readouterr()
    assert "--part.patch-size" in printed.out and "Side." in printed.out and printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train scenes_tiny --model.image-sise 16", "did you mean '--model.image-size'?"),
        ("train scenes_tiny --trainer.steps many", "many"),
        ("train scenes_tiny --trainer.precision fp8", "fp32"),
        ("train scenes_tiny extra", "too many arguments: extra"),
        ("train scenes_tiny", "no training data: add --data.train"),
        ("train scene_tiny", "did you mean 'scenes_tiny'?"),
        ("trian scenes_tiny", "did you mean 'train'?"),
        ("data scenes out", "missing --num"),
        ("data scense out", "did you mean 'data scenes'?"),
        ("eval", "missing"),
    ],
)
def test_the_command_line_says_it_in_one_line_and_exits_with_2(arguments, said, capsys, monkeypatch, tmp_path):
    from qlip.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qlip", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("qlip: ") and said in printed.err
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert list(tmp_path.iterdir()) == []
