"""Pictures that are asked for by name: files below a folder, or members of tar shards, read without extracting.

Shards are gone through once, headers only, for an index of name -> (shard, offset, size). It is four arrays of numbers:
a million pictures take 50 MB, pass to worker processes by fork or pickle, and no file stays open.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from qlip.core.errors import UserError
from qlip.core.log import console, progress
from qlip.data.folders import PICTURE_ENDINGS
from qlip.data.shard_list import expand_shards
from qlip.data.tar_reader import MAX_SAMPLE_BYTES, TAR_ERRORS, SampleRejected

BLOCK = tarfile.BLOCKSIZE
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)


class ImageFiles(Protocol):
    """Encoded pictures by name."""

    def read(self, name: str, *, max_bytes: int = MAX_SAMPLE_BYTES) -> bytes:
        """The encoded picture. Raises `SampleRejected`: `missing image: NAME`, too large, a path that leaves, ..."""


def open_image_files(spec: str) -> ImageFiles:
    """A folder of picture files at any depth, or tar shards as `expand_shards` reads them, local only.

    A folder is taken for shards when it holds .tar files and neither pictures nor subfolders. Raises `UserError` for
    what is not there or remote.
    """
    if not spec:
        raise UserError(
            "no images given: pass the folder that the names in the conversations start from, or tar shards"
        )
    if "://" in re.sub(r"(^|::)\s*file://", "", spec):
        raise UserError(
            f"images {spec}: pictures are asked for one by one; copy the shards or the folder to this machine"
        )
    folder = Path(spec.removeprefix("file://")).expanduser()
    if folder.is_dir() and not _holds_shards(folder):
        return FolderImages(folder.resolve())
    if not folder.exists() and "::" not in spec and not re.search(r"\.tar$|[*?\[{]", spec):
        raise UserError(f"images {spec} is not there; give the folder that the names in the conversations start from")
    return ShardImages([path for path in expand_shards(spec) if isinstance(path, Path)])


def leaves_folder(name: str) -> bool:
    """Whether a relative name is absolute, goes up, or holds characters that no file name should."""
    parts = re.split(r"[/\\]", name)
    drive = re.match(r"[A-Za-z]:", name) is not None
    return not parts[0] or ".." in parts or drive or any(ord(character) < 32 for character in name)


@dataclass(frozen=True, slots=True)
class FolderImages:
    """Files below a folder, whose subfolders may be links to other places; a picture that is a link out is refused."""

    root: Path
    """Resolved."""

    def read(self, name: str, *, max_bytes: int = MAX_SAMPLE_BYTES) -> bytes:
        """The file's bytes. Raises `SampleRejected` as the protocol says."""
        if leaves_folder(name):
            raise SampleRejected(f"image path leaves the folder: {name!r}")
        try:
            path = self.root / name
            if path.is_symlink() and not path.resolve().is_relative_to(self.root):
                raise SampleRejected(f"image path leaves the folder: {name!r}, a link")
            if not path.is_file():  # a pipe would be waited for
                raise SampleRejected(f"missing image: {name}")
            if (num_bytes := path.stat().st_size) > max_bytes:
                raise SampleRejected(f"image file too large: {name}, {num_bytes} bytes")
            return path.read_bytes()
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise SampleRejected(f"unreadable image file: {name}, {error}") from None


class _Member(NamedTuple):
    name: str
    offset: int
    size: int


class ShardImages:
    """Picture members of tar shards, by whole name (`a/0001.jpg`) or by key, which has no ending (`a/0001`).

    A name that two members have, or a key of two pictures, says nothing and is rejected when it is asked for.
    """

    def __init__(self, shards: list[Path]) -> None:
        """Reads the headers of all shards; damaged ones keep what comes before the damage, which is said once."""
        self.shards = shards
        shard_of, offsets, sizes, hashes = (list[np.ndarray]() for _ in range(4))
        damaged = list[str]()
        with progress("index", len(shards), unit="shards") as bar:
            for number, shard in enumerate(shards):
                members, damage = _pictures(shard)
                damaged += [f"{shard}: {damage}"] if damage else []
                shard_of.append(np.full(len(members), number, dtype=np.int32))
                offsets.append(np.array([member.offset for member in members], dtype=np.int64))
                sizes.append(np.array([member.size for member in members], dtype=np.int64))
                digests = b"".join(_digest(text) for member in members for text in (member.name, _key(member.name)))
                hashes.append(np.frombuffer(digests, dtype=np.uint64).reshape(-1, 2))
                bar.update(number + 1)
        self._shard, self._offset, self._size = (np.concatenate(parts) for parts in (shard_of, offsets, sizes))
        names = np.concatenate(hashes).T.reshape(-1)  # (2 m,): whole names, then keys
        order = np.argsort(names, kind="stable")
        self._names = names[order]
        self._member = (order % max(1, len(self._size))).astype(np.int32)
        if damaged:
            console.print(
                f"images: {len(damaged)} of {len(shards)} shards are damaged and pictures may be missing: {damaged[0]}"
            )
        if not len(self._size):
            raise UserError(f"no pictures in {len(shards)} shards from {shards[0]} on; see `qlip data inspect`")

    def __len__(self) -> int:
        """How many pictures."""
        return len(self._size)

    def read(self, name: str, *, max_bytes: int = MAX_SAMPLE_BYTES) -> bytes:
        """The member's bytes. Raises `SampleRejected` as the protocol says, and for an ambiguous name."""
        sought = np.frombuffer(_digest(name.removeprefix("./")), dtype=np.uint64)[0]
        first, end = (int(np.searchsorted(self._names, sought, side=side)) for side in ("left", "right"))
        if first == end:
            raise SampleRejected(f"missing image: {name}")
        if end - first > 1:
            raise SampleRejected(f"ambiguous image: {name} names {end - first} members of the shards")
        member = self._member[first]
        size = int(self._size[member])
        if size > max_bytes:
            raise SampleRejected(f"image file too large: {name}, {size} bytes")
        shard = self.shards[self._shard[member]]
        try:
            with shard.open("rb") as file:
                file.seek(int(self._offset[member]))
                content = file.read(size)
        except OSError as error:
            raise SampleRejected(f"unreadable image file: {name}, {error}") from None
        if len(content) < size:
            raise SampleRejected(f"unreadable image file: {name}, {shard} has become shorter")
        return content


def _holds_shards(folder: Path) -> bool:
    """Whether a folder is shards and what comes with them (parquet, json), not pictures."""
    has_tar = False
    with os.scandir(folder) as entries:
        for entry in entries:
            ending = Path(entry.name).suffix.lower()
            if ending in PICTURE_ENDINGS or (entry.is_dir() and not entry.name.startswith(".")):
                return False
            has_tar = has_tar or ending == ".tar"
    return has_tar


def _ending(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _pictures(shard: Path) -> tuple[list[_Member], str]:
    """Regular members that are pictures by their ending, and what is wrong with the shard."""
    try:
        members = _plain_members(shard)
        damage = ""
        if members is None:
            members, damage = _any_members(shard)
    except OSError as error:
        return [], f"{error.strerror or error}"
    num_bytes = shard.stat().st_size
    whole = [member for member in members if member.offset + member.size <= num_bytes]
    damage = damage or ("truncated tar" if len(whole) < len(members) else "")
    return [member for member in whole if _ending(member.name) in PICTURE_ENDINGS], damage


def _plain_members(shard: Path) -> list[_Member] | None:
    """Members of a tar that holds nothing but short-named regular files and folders; None for any other.

    Shards of img2dataset and webdataset are such. This takes a third of tarfile's time, which for 1.7 million headers
    is most of a minute.
    """
    members = list[_Member]()
    with shard.open("rb", buffering=0) as file:
        file_number, offset = file.fileno(), 0
        while True:
            block = os.pread(file_number, BLOCK, offset)
            if block.count(0) == BLOCK:
                return members
            kind, digits = block[156:157], block[124:136].strip(b" \0")
            if len(block) < BLOCK or kind not in (*REGULAR, tarfile.DIRTYPE) or not digits.isdigit():
                return None
            if _checksum(block) != block[148:156].strip(b" \0").lstrip(b"0"):
                return None
            size = int(digits, 8) if b"8" not in digits and b"9" not in digits else -1
            name = block[:100].partition(b"\0")[0]
            if block[257:263] == b"ustar\0" and block[345]:
                name = block[345:500].partition(b"\0")[0] + b"/" + name
            if size < 0 or name.endswith(b"/") != (kind == tarfile.DIRTYPE):
                return None
            offset += BLOCK
            if kind != tarfile.DIRTYPE:
                members.append(_Member(name.decode("utf-8", "surrogateescape").removeprefix("./"), offset, size))
                offset += -(-size // BLOCK) * BLOCK


def _checksum(block: bytes) -> bytes:
    """Sum of a header's bytes with the field of the sum itself taken as spaces, in octal digits."""
    return b"%o" % (sum(block) - sum(block[148:156]) + 8 * ord(" "))


def _any_members(shard: Path) -> tuple[list[_Member], str]:
    """Members of any tar, by tarfile: long names, pax headers, links and sparse files, the last two left out."""
    members, end = list[_Member](), 0
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset < end:
                    return members, "members run backwards"  # a crafted size would loop for ever
                end = member.offset_data
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep every header of the shard
                if member.type in REGULAR and not member.issparse():
                    members.append(_Member(member.name.removeprefix("./"), member.offset_data, member.size))
            file.seek(tar.offset)
            return members, "" if file.read(BLOCK) == bytes(BLOCK) else "truncated tar: no end mark"
    except TAR_ERRORS as error:
        return members, " ".join(str(error).split())
