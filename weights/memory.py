"""Whether a device can hold a module's parameters."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from weights.checkpoint import CheckpointError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_memory(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raises CheckpointError where the parameters alone are more than the device can hold. They may be on `meta`."""
    needed = sum(parameter.numel() for parameter in module.parameters()) * dtype.itemsize
    if (free := free_bytes(device)) is not None and needed > free:
        raise CheckpointError(
            f"the parameters take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and {device} can hold "
            f"{free / 1e9:.1f} GB: take another device, a dtype of fewer bytes or a smaller model."
        )


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process can have at most: of a GPU what is free, of the CPU all that the machine or its container
    has. None where the system does not tell.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(installed, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return installed
