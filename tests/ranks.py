"""Run a function in several real processes that talk through gloo, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlip.core import distributed


def on_ranks(function: Callable[..., Any], *arguments: Any, num_ranks: int, folder: Path) -> list[Any]:
    """`function(*arguments)` in every process; what each returned, in rank order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(
        _rank, args=(function, arguments, num_ranks, port, str(folder)), nprocs=num_ranks, join=True
    )
    return [torch.load(folder / f"returned_{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _rank(rank: int, function: Callable[..., Any], arguments: tuple, num_ranks: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    distributed.start(device_type="cpu")
    torch.save(function(*arguments), Path(folder) / f"returned_{rank}.pt")
    distributed.stop()
