"""The fastest matrix-vector product (GEMV), that of one row, on this CPU, measured: decoding is little else."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omni import layers

BYTES = 2**26
"""Of the larger of the two matrices that are multiplied in turns: more than a processor's cache holds of a thread."""

ROUNDS = 5

SMALL = 2**28
"""Bytes of a model that is not worth measuring for."""


@dataclass(frozen=True)
class GemvLayout:
    """How matrices lie for matrix-vector products, and what multiplies them.

    transposed: tall matrices lie with contiguous outputs. by_sum: those that lie the usual way are multiplied by
    `layers.matrix_vector`, where that is compiled.
    """

    transposed: bool
    by_sum: bool


def for_model(model: nn.Module, dtype: torch.dtype, *, compiled: bool) -> GemvLayout:
    """What a model with parameters of this dtype is laid out for."""
    if sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize < SMALL:
        return GemvLayout(transposed=dtype == torch.float32 and not compiled, by_sum=compiled)
    return choose(dtype, compiled=compiled)


@cache
def choose(dtype: torch.dtype, *, compiled: bool) -> GemvLayout:
    """Measures PyTorch's product of a tall and a wide matrix as in a SwiGLU, the tall one lying either way, and what
    the compiler makes of the sum; takes a quarter of a second, and some more to compile. Once per process.

    No way is faster on every processor: on one with AVX2 (AMD EPYC, two cores) the compiled sum read float32 at the
    memory's rate and PyTorch's product at half of it; on one with AVX-512 (Intel Xeon, two cores) a step took 116 ms by
    the sum and 89 ms by PyTorch's product of transposed matrices.
    """
    size = 2048
    wide = torch.full((size, BYTES // size // dtype.itemsize // 2), 0.01, dtype=dtype)
    tall = torch.full((2 * wide.shape[1], size), 0.01, dtype=dtype)
    lying = tall.view(size, -1).t()
    x, inner = (torch.full((1, width), 0.01, dtype=dtype) for width in (size, wide.shape[1]))
    ways: dict[str, Callable[[], Tensor]] = {
        "tall": lambda: F.linear(x, tall),
        "transposed": lambda: F.linear(x, lying),
        "wide": lambda: F.linear(inner, wide),
    }
    if compiled:
        summed = torch.compile(layers.matrix_vector, dynamic=False)
        ways["sum"] = lambda: summed(tall, x[0])
    with torch.inference_mode():
        if compiled:
            ways["sum"]()
        seconds = measure(ways)
    # Of the sum only the tall matrix is measured: what it takes is by the byte.
    totals = {
        GemvLayout(transposed=False, by_sum=False): seconds["tall"] + seconds["wide"],
        GemvLayout(transposed=True, by_sum=False): seconds["transposed"] + seconds["wide"],
    }
    if compiled:
        totals[GemvLayout(transposed=False, by_sum=True)] = 1.5 * seconds["sum"]
        totals[GemvLayout(transposed=True, by_sum=True)] = seconds["transposed"] + 0.5 * seconds["sum"]
    best = min(totals, key=lambda way: totals[way])
    if compiled:
        layers.sum_one_row(dtype, best.by_sum)
    return best


def measure(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The shortest time of each, in turns. One that takes four times as long as the fastest has no second turn."""
    seconds = dict.fromkeys(ways, float("inf"))
    for number in range(ROUNDS):
        for name, run in ways.items():
            if number > 0 and seconds[name] > 4 * min(seconds.values()):
                continue
            begin = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds
