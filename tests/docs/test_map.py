"""docs/files.md names every source file, and neither it nor docs/map.md a file that is not there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "docs" / "map.md").read_text()
FILES = (ROOT / "docs" / "files.md").read_text()


def tree() -> dict[str, str]:
    """Path under src/qlip -> purpose, from the page's tree of rooms and their files."""
    block = FILES.split("```")[1]
    found, room = {}, ""
    for line in block.splitlines():
        entry = re.fullmatch(r"( *)([\w/]+(?:/|\.py)) *(.*)", line)
        if entry is None or entry[2] == "src/qlip/":
            continue
        indent, name, purpose = len(entry[1]), entry[2], entry[3]
        if name.endswith("/"):
            room = name
        else:
            found[(room if indent > 2 else "") + name] = purpose
    return found


def test_every_source_file_has_a_purpose_and_every_named_file_exists():
    source = ROOT / "src" / "qlip"
    files = {str(path.relative_to(source)) for path in source.rglob("*.py")}
    empty = {name for name in files if name.endswith("__init__.py") and not (source / name).read_text().strip()}
    assert files - empty - set(tree()) == set()
    assert set(tree()) - files == set()
    assert [name for name, purpose in tree().items() if len(purpose.split()) < 2] == []


def test_files_named_in_the_text_exist():
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", MAP + FILES))
    assert len(named) > 10
    roots = (ROOT, ROOT / "src" / "qlip", ROOT / "docs")
    assert [name for name in named if not any((root / name).exists() for root in roots)] == []


def test_each_can_be_read_in_one_sitting():
    assert len(MAP.splitlines()) < 140
    assert len(FILES.splitlines()) < 300  # a list to look things up in
