"""The decoder's key/value cache: allocated once, written in place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import DecoderConfig


class Cache:
    """Keys and values per layer, each (batch, kv_heads, capacity, head_dim); `lengths` of its positions are written.

    Storage is sized for the prompt and all tokens to come, so that decoding never copies what is there. After a
    prefill with token selection layers may differ in length.
    """

    def __init__(
        self,
        config: DecoderConfig,
        capacity: int,
        *,
        batch: int = 1,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (batch, config.num_kv_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.lengths = [0] * config.num_layers

    @classmethod
    def of_prefill(cls, keys: list[Tensor], values: list[Tensor], lengths: list[int], new: int) -> Cache:
        """The first `lengths` positions of (batch, kv_heads, slots, head_dim) per layer, with room for `new` more."""
        cache = cls.__new__(cls)
        cache.lengths = lengths
        cache.keys, cache.values = (
            [F.pad(tensor[:, :, :length], (0, 0, 0, new)) for tensor, length in zip(stored, lengths, strict=True)]
            for stored in (keys, values)
        )
        return cache

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (batch, kv_heads, new, head_dim) to a layer; returns views of all that is now there."""
        start = self.lengths[layer]
        end = self.lengths[layer] = start + keys.shape[2]
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


class Recorder:
    """Stands in for the cache while a prompt runs through the stages: keeps keys and values as they come."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Layers come in order, each once."""
        self.keys.append(keys)
        self.values.append(values)
        return keys, values
