"""Pictures that are files: class folders, flat folders, and folders whose metadata file gives captions.

Also what all sources of evaluation share: their names on cards, relative names checked, captions cleaned.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qlip.core.errors import UserError
from qlip.data.items import Item
from qlip.data.tar_reader import Skip

PICTURE_ENDINGS = frozenset(
    (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "captions", "sentences")
MAX_CAPTION_CHARS = 5000  # as shards cut them
SAYS_NOTHING = frozenset(("train", "val", "valid", "validation", "test", "data", "images", "shards"))


@dataclass(kw_only=True, slots=True)
class PictureFolder:
    """Every picture below a folder; with classes when all of them lie in its subfolders."""

    root: Path
    """The folder."""
    folders: tuple[str, ...]
    """Sorted names of the subfolders that are classes; empty for a folder with pictures of its own."""
    keys: list[str]
    """Paths below `root` with `/`, sorted. A training set has a million: no objects here."""
    name: str = field(init=False)
    class_names: tuple[str, ...] = field(init=False)
    num_items: int | None = field(init=False)
    _identity: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name, self.class_names, self.num_items = card_name(self.root), self.folders, len(self.keys)

    @property
    def has_labels(self) -> bool:
        """Whether pictures have classes that names can be given to."""
        return bool(self.folders)

    def identity(self) -> str:
        """sha256 over names, sizes and times of all files."""
        if not self._identity:
            self._identity = sha256_of(f"{key}\0{stamp_of(self.root / key)}" for key in self.keys)
        return self._identity

    def items(self) -> Iterator[Item | Skip]:
        """In the order of their names' sha256, so that the first so many are of all classes."""
        labels = {folder: label for label, folder in enumerate(self.folders)}
        for key in shuffled_keys(self.keys):
            if not _is_text(key):
                yield Skip(key=os.fsencode(key).decode("ascii", "backslashreplace"), reason="name not UTF-8", shard="")
            else:
                yield Item(key=key, image=self.root / key, label=labels.get(key.partition("/")[0]))


@dataclass(kw_only=True, slots=True)
class CaptionedFiles:
    """Picture files that a table lists with their captions."""

    name: str
    listed: list[Item]
    """All of them, in the table's order; every file was there when it was read."""
    table_sha256: str
    """Of the table's bytes and of what was chosen from it."""
    class_names: tuple[str, ...] = ()
    num_items: int | None = field(init=False)
    has_labels: bool = field(init=False, default=False)
    """Tables of captions know no classes."""

    def __post_init__(self) -> None:
        self.num_items = len(self.listed)

    def identity(self) -> str:
        """sha256 over the table, and names, sizes and times of all files."""
        sizes = (f"{item.key}\0{stamp_of(item.image)}" for item in self.listed if isinstance(item.image, Path))
        return sha256_of([self.table_sha256, *sizes])

    def items(self) -> Iterator[Item | Skip]:
        """In the table's order."""
        yield from self.listed


def shuffled_keys(keys: list[str]) -> list[str]:
    """Names of files in the order of their sha256, whatever bytes they are made of."""
    return sorted(keys, key=lambda key: hashlib.sha256(os.fsencode(key)).digest())


def open_picture_folder(root: Path) -> PictureFolder | None:
    """Pictures below a folder, subfolders included; None without any. Hidden files and other files are left out.

    Raises `UserError` for a class folder without a picture, and for what cannot be read.
    """
    try:
        names = [entry.name for entry in sorted(os.scandir(root), key=_by_name) if _is_shown_folder(entry)]
        keys = list(_pictures_below(str(root), "", ()))
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror}; mend it or give it away") from None
    if not keys:
        return None
    if not all("/" in key for key in keys):
        return PictureFolder(root=root, folders=(), keys=keys)
    filled = {key.partition("/")[0] for key in keys}
    empty = [name for name in names if name not in filled]
    if empty:
        raise UserError(
            f"class folder {root / empty[0]} holds no picture ({len(empty)} of {len(names)} are empty): classes would "
            "be counted wrong; fill it or take it away"
        )
    return PictureFolder(root=root, folders=tuple(names), keys=keys)


def open_metadata(table: Path) -> CaptionedFiles:
    """A folder with `metadata.jsonl` or `metadata.csv` of `file_name` and `text` (Hugging Face's convention).

    Lines of the same file are its captions; columns other than captions become `record`, that of the first line.
    Raises `UserError` with the line number for broken lines and names that leave the folder, and for missing files.
    """
    captions: dict[str, list[str]] = {}
    records: dict[str, dict[str, Any]] = {}
    content = _read(table)
    for line, row in _json_rows(table, content) if table.suffix == ".jsonl" else _csv_rows(table, content):
        where = f"{table} line {line}"
        if not isinstance(row.get("file_name"), str) or not row["file_name"]:
            raise UserError(f"{where} has no file_name; give every line the name of its picture")
        key = relative_name(row["file_name"], where=where)
        column = next((name for name in CAPTION_COLUMNS if name in row), None)
        texts = caption_texts(row[column] if column else None)
        if texts is None:
            raise UserError(f"{where}: {column} is neither a text nor a list of texts; mend the line")
        captions.setdefault(key, []).extend(texts)
        records.setdefault(key, {name: value for name, value in row.items() if name not in ("file_name", column)})
    missing = [key for key in captions if not (table.parent / key).is_file()]
    if missing:
        raise UserError(
            f"{table} names {missing[0]}, which is not there ({len(missing)} of {len(captions)} pictures missing); "
            f"put them below {table.parent} or take their lines away"
        )
    if not captions:
        raise UserError(f"{table} lists no pictures; give it lines with file_name and text")
    listed = [
        Item(key=key, image=table.parent / key, captions=tuple(texts), record=records[key])
        for key, texts in captions.items()
    ]
    return CaptionedFiles(name=card_name(table.parent), listed=listed, table_sha256=hashlib.sha256(content).hexdigest())


def relative_name(name: str, *, where: str) -> str:
    """`name` as a path below its folder, with `/`. Raises `UserError` beginning with `where` if it leads out."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{where}: {name!r} leads out of the folder of pictures; give names below it")
    return str(path)


def caption_texts(value: object) -> tuple[str, ...] | None:
    """A text or a list of texts (None for none) -> captions, cleaned as those of shards, empty ones left out.

    None for anything else.
    """
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return None
    cleaned = (text.replace("\0", " ").strip()[:MAX_CAPTION_CHARS].strip() for text in texts)
    return tuple(text for text in (text.encode("utf-8", "ignore").decode() for text in cleaned) if text)


def card_name(path: Path) -> str:
    """What a card calls a path: its own name, after its folder's where that alone says nothing (`imagenet/val`)."""
    path = path.absolute()
    plain = path.name not in SAYS_NOTHING and not set("*?[{") & set(path.name)
    return path.name if plain else f"{path.parent.name}/{path.name}"


def checked_label(label: int | None, *, class_names: tuple[str, ...], key: str, source: str) -> int | None:
    """`label`. Raises `UserError` when it counts beyond the names: all of them may then be wrong."""
    if label is not None and class_names and label >= len(class_names):
        raise UserError(
            f"{source}: {key} has label {label}, but there are only {len(class_names)} class names; give the file of "
            "names that belongs to these data (--labels FILE)"
        )
    return label


def sha256_of(lines: Iterable[str]) -> str:
    """sha256 of lines, whatever bytes file names are made of."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\n")
    return digest.hexdigest()


def _pictures_below(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:  # a link to a folder that holds it
        return
    for entry in sorted(os.scandir(folder), key=_by_name):
        if _is_shown_folder(entry):
            yield from _pictures_below(entry.path, f"{prefix}{entry.name}/", (*above, here))
        elif not entry.name.startswith(".") and Path(entry.name).suffix.lower() in PICTURE_ENDINGS:
            yield prefix + entry.name  # a broken link too: it is counted as unreadable, not forgotten


def _is_shown_folder(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_dir()


def _by_name(entry: os.DirEntry[str]) -> str:
    return entry.name


def stamp_of(path: Path) -> str:
    """Size and time of a file: two files of one name may be as large, as shards of scenes often are."""
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend its permissions") from None


def _json_rows(table: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{table} line {line} is not a json object; write one object per line")
        yield line, row


def _csv_rows(table: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for row in rows:
            if None in row or None in row.values():
                raise UserError(f"{table} line {rows.line_num} has not as many cells as the first line; mend it")
            yield rows.line_num, dict(row)
    except UnicodeDecodeError:
        raise UserError(f"{table} is not UTF-8; save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{table} line {rows.reader.line_num}: {error}; mend it") from None
