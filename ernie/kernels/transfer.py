"""Tensors of the host's memory on a device, without waiting for what the device does now."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device) -> Tensor:
    """The same on `device`. From memory that may be paged out, torch copies only once the device
    has done all it was asked for; this copies through memory that may not."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def places(indices: Sequence[int] | Sequence[list[int]], device: torch.device) -> Tensor:
    """Indices as a tensor on `device`, int64."""
    return moved(torch.tensor(indices, dtype=torch.int64), device)
