"""Every `path::name` that the documentation points at exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
REFERENCE = re.compile(r"\b((?:src|tests|benchmarks)/[\w./-]+\.py)::(\w+(?:\.\w+)*)")


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods and module constants of a file; methods and fields as `Class.name`."""
    found: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                found.update(prefix + target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(prefix + node.target.id)

    visit(ast.parse(path.read_text()).body, "")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_references_exist(page):
    missing = [
        f"{path}::{name}"
        for path, name in REFERENCE.findall(page.read_text())
        if not (ROOT / path).is_file() or name not in names_in(ROOT / path)
    ]
    assert missing == []


def test_the_page_on_bsq_points_at_code_and_tests():
    references = REFERENCE.findall((ROOT / "docs" / "bsq.md").read_text())
    assert len([path for path, _ in references if path.startswith("src/")]) > 5
    assert len([path for path, _ in references if path.startswith("tests/")]) > 10
