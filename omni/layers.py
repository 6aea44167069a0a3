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


LONGEST_SUM = 2048
"""Addends that the compiler sums in one go: past 4096 it takes a slower, more careful way (torch 2.13)."""


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """(..., out, in) · (..., in) → (..., out), summed in float32: for the compiler, which makes one pass of it.

    On a CPU that reads the weight at the memory rate, PyTorch's own product at half of it (`scripts/bench.py`, decode).
    """
    size = x.shape[-1]
    parts = next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= LONGEST_SUM)
    products = weight.float() * x.float().unsqueeze(-2)
    return products.unflatten(-1, (parts, size // parts)).sum(-1).sum(-1).to(x.dtype)


def one_row_on_a_cpu(x: Tensor) -> bool:
    """Whether `matrix_vector` is the faster product: a single row, compiled, on a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `F.linear`: the decoder's products, also of one row."""
    if not (weight.is_contiguous() and one_row_on_a_cpu(x)):
        return F.linear(x, weight, bias)
    product = matrix_vector(weight, x.flatten()).view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are the halves of one product."""

    def __init__(self, size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate).mul_(up))  # in place: a third less memory for long prompts
