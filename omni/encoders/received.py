"""How much attention each position of an encoder's last block receives, for the selection before the decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from seats.operators import operator

SCORES_AT_A_TIME = 2**20
"""What stays in the cache of a CPU."""


class Signals(NamedTuple):
    """What `seats.method.Needs` asks for, of each token. received: (..., n) float32; keys: (..., n, dim) or None."""

    received: Tensor
    keys: Tensor | None = None

    def first(self, count: int) -> Signals:
        """Of the first tokens."""
        return Signals(self.received[:count], None if self.keys is None else self.keys[:count])


def joined(signals: Iterable[Signals | None]) -> Signals | None:
    """One after another; None where there are none."""
    some = [signal for signal in signals if signal is not None]
    if not some:
        return None
    keys = [signal.keys for signal in some if signal.keys is not None]
    return Signals(torch.cat([signal.received for signal in some]), torch.cat(keys) if keys else None)


def mean_keys(k: Tensor, group: int) -> Tensor:
    """(windows, heads, n, dim) → (windows, n / group, dim) float32, means over heads and over adjacent positions."""
    return reduce(k.float(), "w h (n group) d -> w n d", "mean", group=group)


def received_attention(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √dim) inside each window, averaged over heads and summed over queries (arXiv 2605.20035, Stage I).

    q, k: (windows, heads, n, dim). valid: (windows, n), positions that ask and are asked; None: all.
    Returns (windows, n) float32. At most one head's attention of one window is in memory at a time, on a GPU none.
    """
    if valid is None:
        valid = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    return _received(q, k, valid)


@operator("omni::received_attention", device_types="cpu")
def _received(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """An operator of its own: window by window and head by head it would unroll into a graph."""
    windows, heads, positions, dim = q.shape
    step = max(1, SCORES_AT_A_TIME // positions)
    received = q.new_zeros(windows, positions, dtype=torch.float32)
    for window in range(windows):
        for head in range(heads):
            keys = k[window, head].float().T * dim**-0.5
            for asking, counts in zip(q[window, head].split(step), valid[window].split(step), strict=True):
                # A window without a valid position yields no NaN: its scores are equal, and count nothing.
                scores = (asking.float() @ keys).masked_fill_(~valid[window], torch.finfo(torch.float32).min)
                received[window] += counts.float() @ scores.softmax(dim=-1)
    return received / heads


@_received.register_kernel("cuda")
def _(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    from omni.encoders.kernels import received_on_device

    return received_on_device(q, k, valid)


@_received.register_fake
def _(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)
