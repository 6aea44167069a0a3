"""What encoders need and the compiler makes slow code of for a GPU: layer norms, and GELU by tanh."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni.layers import compiled_on_a_gpu
from seats.operators import operator


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the last axis, on a GPU in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if compiled_on_a_gpu(x):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


@operator("omni::layer_norm", device_types="cuda")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(..., size) → the same, in float32 inside. The compiler would take mean and variance together, value by value,
    and read wide rows twice."""
    from omni.encoders.kernels import layer_norm_on_device

    return layer_norm_on_device(x, weight, bias, eps)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gelu_by_tanh(x: Tensor) -> Tensor:
    """GELU, approximated by tanh; compiled for a GPU by the exponential that this is made of: half of 1 + tanh(y) is
    1 / (1 + exp(-2y)), and the device's tanh takes longer than reading and writing."""
    if not compiled_on_a_gpu(x):
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)
