"""What encoders and decoder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seats.operators import operator

Call = Callable[..., Any]
"""How an encoder calls those of its methods that see tensors of static shape: (method, *arguments) → its result."""


def directly(method: Callable[..., Any], *arguments: Any) -> Any:
    """The plain `Call`: runs a method as it is, where nothing is compiled."""
    return method(*arguments)


P = ParamSpec("P")
R = TypeVar("R")
_compiler: ContextVar[Call | None] = ContextVar("compiler", default=None)


def part(function: Callable[P, R]) -> Callable[P, R]:
    """Marks what a model does again and again, with tensors of any length: its unit of machine code.

    Inside of `compiling` such a function is called through what was given there, elsewhere as it is.
    """

    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        call = None if torch.compiler.is_compiling() else _compiler.get()
        return function(*arguments, **named) if call is None else call(function, *arguments, **named)

    return run


@contextmanager
def compiling(call: Call) -> Iterator[None]:
    """Parts that this thread runs inside go through call(function, *arguments)."""
    before = _compiler.set(call)
    try:
        yield
    finally:
        _compiler.reset(before)


def compiles() -> bool:
    """Whether this thread is inside of `compiling`."""
    return _compiler.get() is not None


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last axis, the mean of squares in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


_by_sum: dict[torch.dtype, bool] = {}


def by_sum(dtype: torch.dtype) -> bool:
    """Whether one row is multiplied by `matrix_vector` on this CPU: `gemv.choose` measures it."""
    return _by_sum.get(dtype, True)


def sum_one_row(dtype: torch.dtype, is_faster: bool) -> None:
    _by_sum[dtype] = is_faster


LONGEST_SUM = 2048
"""Addends that the compiler sums in one go: past 4096 it takes a slower, more careful way (torch 2.13)."""


def matrix_vector(weight: Tensor, x: Tensor) -> Tensor:
    """(..., out, in) · (..., in) → (..., out), summed in float32: for the compiler, which makes one pass of it.

    On a CPU that reads the weight at the memory rate, PyTorch's own product at half of it (`bench.py`, decode).
    """
    size = x.shape[-1]
    parts = next(parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= LONGEST_SUM)
    products = weight.float() * x.float().unsqueeze(-2)
    return products.unflatten(-1, (parts, size // parts)).sum(-1).sum(-1).to(x.dtype)


def one_row_on_a_cpu(x: Tensor) -> bool:
    """Whether x is one row, compiled, on a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and x.shape[:-1].numel() == 1


def compiled_on_a_gpu(x: Tensor) -> bool:
    """Whether x is of 16 bits, compiled, on a GPU, without a gradient: for kernels of our own."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.is_cuda and x.dtype in HALVES


def one_row_on_a_gpu(x: Tensor) -> bool:
    """Whether x is one row, compiled, on a GPU: `row_product` takes it, and what comes before and after."""
    return compiled_on_a_gpu(x) and x.shape[:-1].numel() == 1


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: RMSNorm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + norm(x) · weightᵀ + bias: the decoder's products, also of one row."""
    if one_row_on_a_gpu(x):
        added = bias if residual is None else residual.flatten() if bias is None else residual.flatten() + bias
        return product_of_one_row(x, weight, added, norm).view(*x.shape[:-1], -1)
    x = x if norm is None else norm(x)
    if weight.is_contiguous() and by_sum(weight.dtype) and one_row_on_a_cpu(x):
        out = matrix_vector(weight, x.flatten()).view(*x.shape[:-1], -1)
        out = out if bias is None else out + bias
    else:
        out = F.linear(x, weight, bias)
    return out if residual is None else residual + out


def product_of_one_row(
    x: Tensor,
    weight: Tensor,
    added: Tensor | None = None,
    norm: RMSNorm | None = None,
    *,
    gated: bool = False,
    float32: bool = False,
) -> Tensor:
    """`row_product` of the one row in x."""
    factor, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return row_product(x.flatten(), weight, added, factor, eps, gated, float32)


@operator("omni::row_product", device_types="cuda")
def row_product(
    x: Tensor, weight: Tensor, added: Tensor | None, norm: Tensor | None, eps: float, gated: bool, float32: bool
) -> Tensor:
    """weight · x + added, of x divided by its root mean square and times `norm` where that is given.

    x: (in,). weight: (out, in). added: (out,). gated: silu of the product's first half times the second, (out / 2,).
    float32: in float32 from the product on, else rounded to the dtype of x at the end. weight and norm are not what
    the kernel right before wrote (`kernels.await_inputs`).
    """
    from omni.gemv_kernels import product_on_device

    return product_on_device(x, weight, added, norm, eps, gated, float32)


@row_product.register_fake
def _(
    x: Tensor, weight: Tensor, added: Tensor | None, norm: Tensor | None, eps: float, gated: bool, float32: bool
) -> Tensor:
    rows = weight.shape[0] // 2 if gated else weight.shape[0]
    return x.new_empty(rows, dtype=torch.float32 if float32 else x.dtype)


HALVES = (torch.bfloat16, torch.float16)
BLOCK_BYTES = 2**21
"""Of what is brought to float32 at a time: it stays in the cache of a CPU."""


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` in float32 from the product on: of what goes into a softmax or a comparison, whatever dtype is stored.

    In bfloat16 sums around 20 would be multiples of 1/8, and a good many tokens, or experts, the likeliest at once.
    """
    if x.dtype != weight.dtype or x.dtype not in HALVES:
        return linear(x, weight).float()
    if one_row_on_a_gpu(x):
        return product_of_one_row(x, weight, float32=True).view(*x.shape[:-1], -1)
    if one_row_on_a_cpu(x):
        return matrix_vector(weight, x.flatten().float()).view(*x.shape[:-1], -1)
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[:-1].numel() == 1:
        # Kernels on a CPU sum in float32, the bias too, and round at the end: what rounding took, by a second product.
        # Twice the fast one is faster than bringing a vocabulary to float32.
        rounded = F.linear(x, weight)
        return rounded.float() + F.linear(x, weight, -rounded.flatten()).float()
    return float32_product(x.reshape(1, -1, x.shape[-1]), weight.unsqueeze(0)).view(*x.shape[:-1], -1)


def float32_product(x: Tensor, y: Tensor) -> Tensor:
    """(n, rows, in) · (n, out, in)ᵀ → (n, rows, out) float32: products of 16 bits are exact there, and summed there."""
    return _float32_product(x, y) if x.dtype in HALVES else (x @ y.mT).float()


@operator("omni::float32_product")
def _float32_product(x: Tensor, y: Tensor) -> Tensor:
    """Without a copy of y in float32. An operator of its own, as the compiler would keep one on a CPU."""
    if x.is_cuda:
        return torch.bmm(x, y.mT, out_dtype=torch.float32)
    x, out = x.float(), x.new_empty(*x.shape[:2], y.shape[1], dtype=torch.float32)
    step = max(1, BLOCK_BYTES // (4 * y.shape[0] * y.shape[2]))
    for start in range(0, y.shape[1], step):
        out[..., start : start + step] = x @ y[:, start : start + step].float().mT
    return out


@_float32_product.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], y.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    gradient = gradient.to(x.dtype)
    return gradient @ y, gradient.mT @ x


_float32_product.register_autograd(_backward, setup_context=_save)


class Linear(nn.Linear):
    """nn.Linear by `linear`."""

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, norm=norm, residual=residual)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)); gate and up are the halves of one product."""

    def __init__(self, size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * intermediate_size, bias=bias)
        self.down = Linear(intermediate_size, size, bias=bias)

    def forward(self, x: Tensor, *, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
        """residual + this of norm(x)."""
        if self.gate_up.bias is None and one_row_on_a_gpu(x):
            inner = product_of_one_row(x, self.gate_up.weight, norm=norm, gated=True).view(*x.shape[:-1], -1)
        else:
            gate, up = self.gate_up(x, norm=norm).chunk(2, dim=-1)
            inner = F.silu(gate).mul_(up)  # in place: a third less memory for long prompts
        return self.down(inner, residual=residual)
