"""Which tar files a user's words mean: braces, globs, folders, local or remote, several sources joined by `::`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from qlip.core.errors import UserError
from qlip.data.remote import RemoteShard, Shard, check_reachable, has_wildcard, list_remote
from qlip.data.shard_cache import cached_path

MAX_SHARDS = 10_000_000  # the largest DataComp pool has 1.28 M; a typo in a range must not fill the memory


def expand_shards(spec: str, *, shard_cache: str = "") -> list[Shard]:
    """`PATH/{00000..00009}.tar`, `{a,b}/*.tar`, a folder (its *.tar by name), or several of these joined by `::`.

    PATH may be an address that fsspec knows (`s3://bucket/pool`, `gs://`, `https://`, `hf://`); folders and globs then
    need a file system that lists. Every local file must be there; of remote ranges the first and the last are asked
    for, unless `shard_cache` holds them: a million requests would take longer than an epoch.

    Raises `UserError` for pipes, nothing found, missing files (the first one and how many), and what is out of reach.
    """
    return [shard for _, shards in expand_sources(spec, shard_cache=shard_cache) for shard in shards]


def expand_sources(spec: str, *, shard_cache: str = "") -> list[tuple[str, list[Shard]]]:
    """The parts between `::`, each with its shards, as `expand_shards` reads them. Raises as it does."""
    sources = []
    for source in split_sources(spec):
        if source.startswith("pipe:"):
            raise UserError(f"shards {source!r}: commands are not run; give files, or s3://bucket/{{00000..00009}}.tar")
        source = source.removeprefix("file://")
        remote = "://" in source
        sources.append((source, _remote_shards(source, shard_cache) if remote else _local_shards(source)))
    if not sources:
        raise UserError("no shards given: pass a folder, PATH/{00000..00009}.tar, or several joined by ::")
    local = [shard for _, shards in sources for shard in shards if isinstance(shard, Path)]
    missing = [path for path in local if not path.is_file()]
    if missing:
        raise UserError(
            f"shard {missing[0]} is not there ({len(missing)} of {len(local)} missing); mend the path or the range"
        )
    return sources


def check_shard_split(num_shards: int, *, num_ranks: int, num_workers: int, source: str = "") -> None:
    """Raise `UserError` when some (rank, worker) would get no shard: it would wait for ever, or train on nothing.

    Every rank finds the same and says the same. `source` names one of several that are mixed.
    """
    workers = max(1, num_workers)
    if num_shards < num_ranks * workers:
        fewer = f"{num_shards // num_ranks} workers" if num_shards >= num_ranks else f"{num_shards} ranks"
        raise UserError(
            f"{source + ': ' if source else ''}{num_shards} shards for {num_ranks} ranks x {workers} workers: "
            f"give at least {num_ranks * workers} shards, or at most {fewer}"
        )


def split_sources(spec: str) -> list[str]:
    """`a::b` -> a, b; empty parts are left out."""
    return [part.strip() for part in spec.split("::") if part.strip()]


def _local_shards(source: str) -> list[Shard]:
    names = [source] if Path(source).expanduser().exists() else _expand_braces(source)
    return list(itertools.chain.from_iterable(_files_of(Path(name).expanduser()) for name in names))


def _remote_shards(source: str, shard_cache: str) -> list[Shard]:
    shards, named = list[Shard](), list[RemoteShard]()
    for url in _expand_braces(source):
        if has_wildcard(url) or not RemoteShard(url).name.endswith(".tar"):
            shards += list_remote(url)
        else:
            named.append(RemoteShard(url))
            shards.append(named[-1])
    for shard in named[:1] + named[1:][-1:]:
        if not (shard_cache and cached_path(shard, Path(shard_cache).expanduser()).exists()):
            check_reachable(shard)
    return shards


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
