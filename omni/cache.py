"""The decoder's key/value cache: allocated once, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from omni.config import DecoderConfig


class Cache:
    """Keys and values per layer, each (batch, kv_heads, capacity, head_dim); `length` positions are written.

    Storage is sized for the prompt and all tokens to come, so that decoding never copies what is there.
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
        self.capacity = capacity
        self.length = 0

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends (batch, kv_heads, new, head_dim) after `length`; returns views of all that is now there.

        `length` itself moves on once per step, by `advance`, when every layer has written.
        """
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, new: int) -> None:
        self.length += new

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))
