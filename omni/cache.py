"""The decoder's key/value cache: of static shape, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from omni.layers import compiles

CHUNK = 128
"""Capacities are multiples of this, so that decoding attends to the cache in equal parts."""
LEAST_CAPACITY = 2 * CHUNK
"""One part alone is another shape to the compiler, which would need code for it."""


def places(stored: list[Tensor]) -> list[list[int]]:
    """Of each tensor (batch, kv_heads, capacity, head_dim) its address, strides and capacity: where a position goes."""
    return [[each.data_ptr(), *each.stride(), each.shape[2]] for each in stored]


class Cache:
    """Keys and values of every layer, each (batch, kv_heads, capacity, head_dim).

    lengths: (layers, batch) int64, on the device: how many positions are written. Storage is sized for the prompt and
    all tokens to come, so that decoding never copies what is there. After a prefill with token selection layers may
    differ in length and in capacity.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths
        self._places: list[list[int]] = []

    @classmethod
    def of_prefill(cls, keys: list[Tensor], values: list[Tensor], lengths: list[Tensor], new: int) -> Cache:
        """What the layers of a prefill wrote, with room for `new` more positions. Empties `keys` and `values`.

        keys, values: per layer, (batch, kv_heads, slots, head_dim). lengths: per layer, (batch,) of slots written.
        """
        stored: tuple[list[Tensor], list[Tensor]] = ([], [])
        room: dict[int, Tensor] = {}
        for source, padded in zip((keys, values), stored, strict=True):
            while source:  # one layer at a time exists twice
                layer = source.pop(0)
                batch, heads, slots, dim = layer.shape
                capacity = max(LEAST_CAPACITY, slots + new + -(slots + new) % CHUNK)
                if slots not in room:  # layers of one length share what is put behind them
                    room[slots] = layer.new_zeros(batch, heads, capacity - slots, dim)
                padded.append(torch.cat((layer, room[slots]), dim=2))
        return cls(stored[0], stored[1], torch.stack(lengths))

    def written(self) -> list[Tensor]:
        """Per layer, (batch, capacity): which positions are there."""
        sizes = [keys.shape[2] for keys in self.keys]
        positions = torch.arange(max(sizes), device=self.lengths.device)
        there = {size: positions[:size] < self.lengths[..., None] for size in set(sizes)}
        return [there[size][layer] for layer, size in enumerate(sizes)]

    def append(self, keys: list[Tensor], values: list[Tensor]) -> None:
        """Puts one position more into every layer, in place. Per layer: (batch, kv_heads, 1, head_dim)."""
        if self.lengths.is_cuda and compiles():
            from omni.cache_kernels import append_by_kernel

            append_by_kernel([*self.keys, *self.values], self.places_on_device(), self.lengths, [*keys, *values])
            return
        rows = torch.arange(self.lengths.shape[1], device=self.lengths.device)
        for stored, new in ((self.keys, keys), (self.values, values)):
            for layer, length, position in zip(stored, self.lengths, new, strict=True):
                layer[rows, :, length] = position[:, :, 0]
        self.lengths += 1

    def places_on_device(self) -> Tensor:
        """`places` of keys, then values, (2 * layers, 6) int64, looked at anew: a copied cache has other tensors.

        They come from the host, and so before a graph is captured that appends.
        """
        found = places([*self.keys, *self.values])
        if found != self._places:
            self._table, self._places = torch.tensor(found, device=self.lengths.device), found
        return self._table

    def row(self, row: int) -> Cache:
        """One sequence of the batch, in the same memory."""
        keys, values = ([layer[row : row + 1] for layer in stored] for stored in (self.keys, self.values))
        return Cache(keys, values, self.lengths[:, row : row + 1])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
