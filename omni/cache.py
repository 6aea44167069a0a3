"""The decoder's key/value cache: of static shape, written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.layers import part

CHUNK = 128
"""Capacities are multiples of this, so that decoding attends to the cache in equal parts."""
LEAST_CAPACITY = 2 * CHUNK
"""One part alone is another shape to the compiler, which would need code for it."""


def _append(
    stored_keys: Tensor, stored_values: Tensor, rows: Tensor, length: Tensor, keys: Tensor, values: Tensor
) -> None:
    stored_keys[rows, :, length] = keys[:, :, 0]
    stored_values[rows, :, length] = values[:, :, 0]


_append_by_machine_code = part(_append)
"""Apart from the layer, whose code would copy the cache that it reads; and layer by layer, for which the compiler needs
a second: all at once are hundreds of sizes, and minutes."""


class Cache:
    """Keys and values of every layer, each (batch, kv_heads, capacity, head_dim).

    lengths: (layers, batch) int64, on the device: how many positions are written. Storage is sized for the prompt and
    all tokens to come, so that decoding never copies what is there. After a prefill with token selection layers may
    differ in length and in capacity.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths

    @classmethod
    def of_prefill(cls, keys: list[Tensor], values: list[Tensor], lengths: list[Tensor], new: int) -> Cache:
        """What the layers of a prefill wrote, with room for `new` more positions. Empties `keys` and `values`.

        keys, values: per layer, (batch, kv_heads, slots, head_dim). lengths: per layer, (batch,) of slots written.
        """
        stored: tuple[list[Tensor], list[Tensor]] = ([], [])
        for source, padded in zip((keys, values), stored, strict=True):
            while source:  # one layer at a time exists twice
                layer = source.pop(0)
                capacity = max(LEAST_CAPACITY, layer.shape[2] + new + -(layer.shape[2] + new) % CHUNK)
                padded.append(F.pad(layer, (0, 0, 0, capacity - layer.shape[2])))
        return cls(stored[0], stored[1], torch.stack(lengths))

    def written(self) -> list[Tensor]:
        """Per layer, (batch, capacity): which positions are there."""
        sizes = [keys.shape[2] for keys in self.keys]
        positions = torch.arange(max(sizes), device=self.lengths.device)
        there = {size: positions[:size] < self.lengths[..., None] for size in set(sizes)}
        return [there[size][layer] for layer, size in enumerate(sizes)]

    def append(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Puts one position more into every layer, in place. Per layer: (batch, kv_heads, 1, head_dim)."""
        rows = torch.arange(self.lengths.shape[1], device=self.lengths.device)
        # A GPU launches half as many kernels; on a CPU calling machine code takes longer than what is done.
        append = _append_by_machine_code if rows.is_cuda else _append
        for layer in zip(self.keys, self.values, self.lengths, keys, values, strict=True):
            append(*layer[:2], rows, *layer[2:])
        self.lengths += 1

    def row(self, row: int) -> Cache:
        """One sequence of the batch, in the same memory."""
        keys, values = ([layer[row : row + 1] for layer in stored] for stored in (self.keys, self.values))
        return Cache(keys, values, self.lengths[:, row : row + 1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
