"""The README's commands are ones that `qlip` takes, and the files and pages it names exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

import qlip
from qlip.apps.balance import BalanceOptions
from qlip.apps.check import CheckOptions
from qlip.cli import COMMANDS, dispatch
from qlip.core.arguments import parse_arguments
from qlip.recipes import find_recipe
from qlip.recipes.generation_run import GenerationOptions, GenerationRunConfig
from qlip.recipes.instruction_run import InstructionOptions, InstructionRunConfig
from qlip.recipes.run import RunConfig, TrainOptions
from qlip.recipes.unified_run import UnifiedOptions, UnifiedRunConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "bash", "console", "shell"}
README = (ROOT / "README.md").read_text()


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of every fenced code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(text: str) -> list[list[str]]:
    """Words of every command line in a page's shell blocks, comments and prompts left out."""
    lines = [
        line.strip().removeprefix("$ ")
        for language, content in blocks(text)
        if language in SHELL
        for line in content.replace("\\\n", " ").splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def qlip_commands() -> list[str]:
    found = [
        shlex.join(words[1:])
        for page in PAGES
        for words in shell_commands(page.read_text())
        if Path(words[0]).name == "qlip"
    ]
    return list(dict.fromkeys(found))


TRAINED = {
    RunConfig: TrainOptions,
    GenerationRunConfig: GenerationOptions,
    InstructionRunConfig: InstructionOptions,
    UnifiedRunConfig: UnifiedOptions,
}
OF_A_RECIPE = {  # command -> its options, with the recipe's values as defaults
    "train": lambda run: TRAINED[type(run)](run=run, out=Path("run")),
    "balance": lambda run: BalanceOptions(run=run, out=Path("run")),
    "check": lambda run: CheckOptions(run=run),
}


def check(arguments: list[str]) -> None:
    """Parse a command without making its call; raises what a user would see."""
    if arguments[0] in OF_A_RECIPE and len(arguments) > 1 and not arguments[1].startswith("-"):
        default = OF_A_RECIPE[arguments[0]](find_recipe(arguments[1]))
        parse_arguments(type(default), arguments[2:], prog=f"qlip {arguments[0]}", default=default)
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    if "--help" in arguments or " ".join(arguments[:words]) not in COMMANDS:
        dispatch(arguments)  # help, or the error for an unknown command
    else:
        parse_arguments(COMMANDS[" ".join(arguments[:words])], arguments[words:], prog="qlip")


@pytest.mark.parametrize("command", qlip_commands())
def test_commands_parse(command):
    try:
        check(shlex.split(command))
    except SystemExit as stop:
        assert not stop.code


def test_the_readme_shows_how_to_start():
    words = shell_commands(README)
    assert ["make", "demo"] in words and ["make", "test"] in words
    assert any(line[:2] == ["qlip", "train"] for line in words)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = {words[1] for page in PAGES for words in shell_commands(page.read_text()) if words[0] == "make"}
    used |= {name for page in PAGES for name in re.findall(r"`make (\w+)`", page.read_text())}
    assert used and used <= targets


def tree_paths(text: str) -> list[str]:
    """Paths of an indented tree under `src/qlip/`: names ending in / or .py with a purpose behind them."""
    paths: list[str] = []
    root = None
    for line in text.splitlines():
        plain = re.sub(r"[│├└─]", " ", line)
        indent = len(plain) - len(plain.lstrip())
        if plain.strip().startswith("src/qlip/"):
            root = indent
        elif root is not None and plain.strip() and indent > root:
            paths += [f"src/qlip/{name}" for name in re.findall(r"(?:^|\s)([\w/]+(?:/|\.py))\s{2,}", plain)]
        elif root is not None:
            root = None
    return paths


def test_every_path_of_the_tree_exists():
    paths = tree_paths(README)
    assert "src/qlip/cli.py" in paths and "src/qlip/engine/" in paths and len(paths) > 8
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text()
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    named = re.findall(r"`((?:docs|benchmarks|tests|src)/[\w./-]+\.\w+)`", text)
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


def test_python_blocks_use_public_names():
    for page in PAGES:
        for language, content in blocks(page.read_text()):
            if language != "python":
                continue
            for node in ast.walk(ast.parse(content)):
                if isinstance(node, ast.ImportFrom) and node.module == "qlip":
                    assert {alias.name for alias in node.names} <= set(qlip.__all__), page
