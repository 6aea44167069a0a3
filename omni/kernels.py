"""What the Triton kernels of decoder and experts share: what the interpreter lacks, and launches that overlap."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Triton's interpreter, without a GPU, takes bfloat16 in products for integers: they are widened there."""


@cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """Arguments of a kernel that calls `await_inputs`: where the device can (Hopper and later), it begins while the one
    launched before it still runs (programmatic dependent launch), reads weights, and waits for the rest.

    A decoding step is some hundred short kernels, each of which waits for the one before: what a launch takes, and
    the first bytes of memory, then pass meanwhile.
    """
    able = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"OVERLAPS": True, "launch_pdl": True} if able else {"OVERLAPS": False}


@triton.jit
def await_inputs(OVERLAPS: tl.constexpr):  # noqa: N803
    """Waits until the kernel before has written all it writes, then lets the next one begin.

    In this order, so that at its beginning a kernel knows that all but the one before it have ended: there it may read
    weights, and what was written two kernels ago. What it writes, it writes after this. Kernels that are none of these
    do not overlap (`runtime/graphs.py`: OPTIONS).
    """
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
