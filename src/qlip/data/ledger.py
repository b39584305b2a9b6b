"""The ledger of skipped samples: one JSON line {shard, key, reason, epoch, count} each; too many stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from qlip.core.errors import UserError
from qlip.data.tar_reader import Skip

CHECK_EVERY = 200  # samples seen


def kind_of(reason: str) -> str:
    """`too many pixels: 9000 x 9000` -> `too many pixels`: what reasons are counted by."""
    return reason.partition(":")[0]


class Ledger:
    """Counts good and skipped samples of one reader; several readers may append to one file."""

    def __init__(self, path: Path | None, *, max_skip_share: float, listed: str = "") -> None:
        """`path` None only counts. `max_skip_share` of all samples seen may be skipped before `check` stops the run.

        `listed` says where somebody else lists them, for its message.
        """
        self.path = path
        self._listed = f"every one is in {path or listed}" if path or listed else "`qlip data inspect` lists them"
        self.max_skip_share = max_skip_share
        self.num_good = 0
        self.skipped: Counter[str] = Counter()

    def good(self) -> None:
        """One usable sample. May raise as `check` does."""
        self.num_good += 1
        self._check_if_due(added=1)

    def skip(self, skip: Skip, *, epoch: int) -> None:
        """Write and count one skip. Raises `UserError` when the file cannot be written, or as `check` does."""
        if self.path is not None:
            line = {"shard": skip.shard, "key": skip.key, "reason": skip.reason, "epoch": epoch, "count": skip.count}
            self._append(self.path, (json.dumps(line) + "\n").encode())
        self.skipped[kind_of(skip.reason)] += skip.count
        self._check_if_due(added=skip.count)

    def add(self, *, num_good: int, skipped: dict[str, int]) -> None:
        """Samples that somebody else has counted, the skipped ones by kind. May raise as `check` does."""
        self.num_good += num_good
        self.skipped.update(skipped)
        self._check_if_due(added=num_good + sum(skipped.values()))

    def check(self) -> None:
        """Raise `UserError` with the most frequent reasons when too large a share is skipped."""
        num_skipped = self.skipped.total()
        num_seen = self.num_good + num_skipped
        if num_skipped <= self.max_skip_share * num_seen:
            return
        reasons = ", ".join(f"{kind} ({count})" for kind, count in self.skipped.most_common(3))
        raise UserError(
            f"{num_skipped} of {num_seen} samples skipped, more than max_skip_share {self.max_skip_share:g}: "
            f"{reasons}; {self._listed}; mend the data or raise max_skip_share"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts, as JSON values."""
        return {"num_good": self.num_good, "skipped": dict(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from saved counts."""
        self.num_good = state["num_good"]
        self.skipped = Counter(state["skipped"])

    def _check_if_due(self, *, added: int) -> None:
        num_seen = self.num_good + self.skipped.total()
        if num_seen // CHECK_EVERY > (num_seen - added) // CHECK_EVERY:
            self.check()

    @staticmethod
    def _append(path: Path, line: bytes) -> None:
        try:
            file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.write(file, line)  # one write: lines of several workers never mix
            finally:
                os.close(file)
        except OSError as error:
            raise UserError(f"cannot write the ledger {path}: {error.strerror}; free disk space or move it") from None


def read_ledger(path: Path) -> dict[str, int]:
    """Skipped samples by kind, most frequent first; the same (shard, key, reason) logged again counts once."""
    seen: dict[tuple[str, str, str], int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill
        seen[entry["shard"], entry["key"], entry["reason"]] = entry["count"]
    counts: Counter[str] = Counter()
    for (_, _, reason), count in seen.items():
        counts[kind_of(reason)] += count
    return dict(counts.most_common())
