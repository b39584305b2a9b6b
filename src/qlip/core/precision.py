"""Regions that must compute in float32 whatever autocast the caller is in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def float32_region(device_type: str) -> AbstractContextManager:
    """Autocast off; where it is not on there is nothing to enter, so that exporters and compilers see no context."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):  # not on meta
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
