"""What an evaluation reads, whatever it is stored in: items in a fixed order, each once, pictures still encoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qlip.data.tar_reader import Skip


@dataclass(kw_only=True, slots=True, frozen=True)
class Item:
    """One picture with all that its source says of it."""

    key: str
    """Its name, unique within the source and the same wherever the data are stored: no absolute path."""
    image: bytes | Path
    """The encoded picture, or the file that holds it."""
    captions: tuple[str, ...] = ()
    """Texts that describe it, in the source's order, not empty."""
    label: int | None = None
    """Index into the source's `class_names`."""
    record: dict[str, Any] = field(default_factory=dict)
    """The json member or the row's other columns; scenes keep their ground truth in it."""


class Source(Protocol):
    """Pictures to measure on."""

    name: str
    """For cards and tables: the file or folder's own name, and the split."""
    class_names: tuple[str, ...]
    """What `Item.label` counts: folder names in sorted order, or the names that a file lists; empty without classes."""
    num_items: int | None
    """How many items and skips `items` yields, None where only reading tells."""

    def identity(self) -> str:
        """sha256 over names, sizes and times of the files, without reading pictures: which work may be resumed."""

    def items(self) -> Iterator[Item | Skip]:
        """Every item once, in an order that depends on the data alone; what has no usable picture comes as a skip."""
