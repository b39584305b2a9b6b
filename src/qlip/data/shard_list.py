"""Which tar files a user's words mean: braces, globs, folders, several sources joined by `::`. Local files only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from qlip.core.errors import UserError

MAX_SHARDS = 10_000_000  # the largest DataComp pool has 1.28 M; a typo in a range must not fill the memory


def expand_shards(spec: str) -> list[Path]:
    """`PATH/{00000..00009}.tar`, `{a,b}/*.tar`, a folder (its *.tar by name), or several of these joined by `::`.

    Raises `UserError` for remote urls, pipes, nothing found, and missing files (the first one and how many).
    """
    paths: list[Path] = []
    for source in filter(None, (part.strip() for part in spec.split("::"))):
        if "://" in source or source.startswith("pipe:"):
            raise UserError(f"shards {source!r}: only local files are read; download them first and give their folder")
        names = [source] if Path(source).expanduser().exists() else _expand_braces(source)
        paths += itertools.chain.from_iterable(_files_of(Path(name).expanduser()) for name in names)
    if not paths:
        raise UserError("no shards given: pass a folder, PATH/{00000..00009}.tar, or several joined by ::")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"shard {missing[0]} is not there ({len(missing)} of {len(paths)} missing); mend the path or the range"
        )
    return paths


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(file for file in path.glob("*.tar") if not file.name.startswith("."))
        if not found:
            raise UserError(f"folder {path} holds no .tar files; give the folder that does")
        return found
    if path.exists() or not re.search(r"[*?\[]", str(path)):
        return [path]
    first = next(i for i, part in enumerate(path.parts) if re.search(r"[*?\[]", part))
    found = sorted(Path(*path.parts[:first]).glob("/".join(path.parts[first:])))
    if not found:
        raise UserError(f"no file matches {path}; mend the pattern")
    return found


def _expand_braces(text: str) -> list[str]:
    if re.search(r"\{[^{}]*\{", text):
        raise UserError(f"shards {text!r}: braces inside braces are not read; join several sources with ::")
    parts = re.split(r"\{([^{}]*)\}", text)  # text, group, text, group, ..., text
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    num = 1
    for choice in choices:
        num *= len(choice)
    if num > MAX_SHARDS:
        raise UserError(f"shards {text!r}: {num} files, more than {MAX_SHARDS}; mend the range")
    return ["".join(combination) for combination in itertools.product(*choices)]


def _choices(group: str) -> list[str]:
    """`00..02` -> 00, 01, 02; `a,b` -> a, b; anything else stays as it is written."""
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", group)
    if numbers is None:
        return group.split(",") if "," in group else [f"{{{group}}}"]
    first, last = numbers.groups()
    if abs(int(last) - int(first)) >= MAX_SHARDS:
        raise UserError(f"shards {{{group}}}: more than {MAX_SHARDS} files; mend the range")
    return list(_counted(int(first), int(last), digits=max(len(first), len(last)) if _padded(first, last) else 1))


def _padded(*numbers: str) -> bool:
    return any(len(number) > 1 and number.startswith("0") for number in numbers)


def _counted(first: int, last: int, *, digits: int) -> Iterator[str]:
    step = 1 if last >= first else -1
    for number in range(first, last + step, step):
        yield f"{number:0{digits}d}"
