"""What encoders and decoder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Call = Callable[..., Any]
"""How an encoder calls those of its methods that see tensors of static shape: (method, *arguments) → its result."""


def directly(method: Callable[..., Any], *arguments: Any) -> Any:
    return method(*arguments)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, the mean of squares in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are the halves of one product."""

    def __init__(self, size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = nn.Linear(size, 2 * intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))  # in place: a third less memory for long prompts
