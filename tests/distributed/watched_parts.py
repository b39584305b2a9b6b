"""A part whose reading can be held up or kill its process; workers of Ray import it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlip.data.items import Item, Source
from qlip.data.tar_reader import Skip


@dataclass(kw_only=True)
class WatchedPart:
    """Another source; its third entry waits or kills when a file in `signs` says so."""

    name: str
    source: Source
    signs: Path
    """`kill-NAME` kills; `hold-NODE` holds the reading on that node of Ray, which makes `held`; others wait for it."""

    def __post_init__(self) -> None:
        self.class_names, self.num_items = self.source.class_names, self.source.num_items

    def identity(self) -> str:
        return self.source.identity()

    def items(self) -> Iterator[Item | Skip]:
        for number, entry in enumerate(self.source.items()):
            if number == 2:
                self.half_way()
            yield entry

    def half_way(self) -> None:
        import ray

        if (self.signs / f"kill-{self.name}").exists():
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is full
        hold = self.signs / f"hold-{ray.get_runtime_context().get_node_id()}"
        held = self.signs / "held"
        while hold.exists() or (any(self.signs.glob("hold-*")) and not held.exists()):
            if hold.exists():
                held.write_text(self.name)
            time.sleep(0.05)
