"""How much attention each position of an encoder's last block receives, for the selection before the decoder."""

from __future__ import annotations

import torch
from torch import Tensor


def received_attention(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """softmax(q·kᵀ / √dim) inside each window, averaged over heads and summed over queries (arXiv 2605.20035, Stage I).

    q, k: (windows, heads, n, dim). valid: (windows, n), positions that ask and are asked; None: all.
    Returns (windows, n) float32. One window's attention of one head is in memory at a time.
    """
    windows, heads, positions, dim = q.shape
    received = q.new_zeros(windows, positions, dtype=torch.float32)
    for window in range(windows):
        for head in range(heads):
            scores = (q[window, head].float() * dim**-0.5) @ k[window, head].float().T
            if valid is None:
                received[window] += scores.softmax(dim=-1).sum(dim=0)
            else:
                # A window without a valid position yields no NaN: all of its scores are equal, and count nothing.
                scores = scores.masked_fill(~valid[window], torch.finfo(torch.float32).min)
                received[window] += valid[window].float() @ scores.softmax(dim=-1)
    return received / heads
