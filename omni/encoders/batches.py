"""How what an encoder sees in parts is cut into batches of few static sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_sizes(count: int, device: torch.device, *, cpu: int, gpu: int, least: int = 1) -> list[int]:
    """How many of `count` parts run together, batch by batch; the last may have room for more than there are.

    On a CPU `cpu` each. On a GPU, which is filled by more, `gpu` each, and last the smallest of `least`, 2 · `least`, …
    that holds the rest: a short clip does not pay for a long one's batch, nor needs many shapes.
    """
    if device.type == "cpu":
        return [cpu] * -(-count // cpu)
    whole, rest = divmod(count, gpu)
    size = least
    while size < rest:
        size *= 2
    return [gpu] * whole + ([min(size, gpu)] if rest else [])


def cut(x: Tensor, lengths: Iterable[int], dim: int) -> Iterator[Tensor]:
    """Parts of so many along an axis, one after another; what the last lacks is zero."""
    start = 0
    for length in lengths:
        part = x.narrow(dim, start, min(length, x.shape[dim] - start))
        start += length
        yield F.pad(part, (0, 0) * (x.dim() - 1 - dim) + (0, length - part.shape[dim]))
