"""What ends a training is one line with a remedy; with many ranks it says whose, but not what all of them meet."""

from __future__ import annotations

import errno

import pytest
import torch

from qlip.core import distributed
from qlip.core.errors import RankError, UserError
from qlip.engine.guards import NonFiniteStepError
from qlip.recipes.endings import said_in_one_line

ENDINGS = {
    "lower --data.batch-size": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    "No space left on device; free disk space": OSError(errno.ENOSPC, "No space left on device"),
    "another process has gone": RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
    "mend the shards": UserError("one shard; mend the shards"),
}


@pytest.mark.parametrize("said", ENDINGS)
@pytest.mark.parametrize("num_ranks", [1, 4])
def test_mistakes_are_said_by_the_rank_that_met_them(monkeypatch, said, num_ranks):
    monkeypatch.setattr(distributed, "world_size", lambda: num_ranks)
    monkeypatch.setattr(distributed, "rank", lambda: 3)
    problem = said_in_one_line(ENDINGS[said])
    assert isinstance(problem, UserError) and said in str(problem) and "\n" not in str(problem)
    assert isinstance(problem, RankError) == str(problem).startswith("rank 3: ") == (num_ranks > 1)


def test_what_all_ranks_meet_and_what_nobody_can_mend_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for error in (NonFiniteStepError("NaN"), RuntimeError("shapes differ"), OSError(errno.EIO, "broken")):
        assert said_in_one_line(error) is error
