"""What ends a training, as one line with a remedy wherever the user can do something about it."""

from __future__ import annotations

import errno

import torch

from qlip.core import distributed
from qlip.core.errors import RankError, UserError
from qlip.data.loaders import killed_worker
from qlip.engine.guards import NonFiniteStepError


def said_in_one_line(error: Exception) -> Exception:
    """What a training was ended by, as a `UserError` where the user can do something, with the rank if there are many.

    What all ranks meet alike, such as losses that stay NaN, is left to the first one to say.
    """
    problem = error if isinstance(error, UserError) else None
    if isinstance(error, torch.OutOfMemoryError):
        problem = UserError("the GPU's memory is full: lower --data.batch-size (`qlip check` says what fits)")
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        problem = UserError(f"cannot write: {error.strerror}; free disk space and start again to resume")
    elif isinstance(error, RuntimeError):
        problem = killed_worker(error)
        if problem is None and distributed.is_lost_peer(error):
            problem = UserError("another process has gone; what it said is above or below; start again to resume")
    if problem is None or isinstance(problem, NonFiniteStepError) or distributed.world_size() == 1:
        return problem or error
    return RankError(f"rank {distributed.rank()}: {problem}")
