"""Received attention in Triton, two passes over the scores of a window, which are never in memory; and layer norms."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor


def received_on_device(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """What `received.received_attention` computes, without a host read.

    q, k: (windows, heads, n, dim). valid: (windows, n) bool. Returns (windows, n) float32. Products of the inputs are
    exact in float32 and summed there, as are the softmax and the sums over queries; the order of all is fixed.
    """
    windows, heads, positions, dim = q.shape
    q, k, valid = q.contiguous(), k.contiguous(), valid.contiguous().view(torch.uint8)
    scales = torch.empty(windows, heads, positions, dtype=torch.float32, device=q.device)
    received = torch.empty_like(scales)
    block = 64
    grid = (triton.cdiv(positions, block), heads, windows)
    sizes = (positions, dim, dim**-0.5, block, max(16, triton.next_power_of_2(dim)))
    scale_kernel[grid](q, k, valid, scales, *sizes)
    received_kernel[grid](q, k, valid, scales, received, *sizes)
    return received.mean(dim=1)


@triton.jit
def load_rows(start, rows, positions, dim, DIM: tl.constexpr):  # noqa: N803
    """Rows of (positions, dim), zero where there are none."""
    channel = tl.arange(0, DIM)
    there = (rows < positions)[:, None] & (channel < dim)[None, :]
    return tl.load(start + rows[:, None] * dim + channel[None, :], mask=there, other=0.0)


@triton.jit
def scale_kernel(q, k, valid, scales, positions, dim, factor, BLOCK: tl.constexpr, DIM: tl.constexpr):  # noqa: N803
    """For a block of queries of one head and window: the logarithm of what their softmax divides by; +∞ where a query
    is not valid, so that all of its shares are 0."""
    window, heads = tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first = (window * heads + tl.program_id(1)) * positions
    asking = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    queries = load_rows(q + first * dim, asking, positions, dim, DIM)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    at = 0
    while at < positions:
        asked = at + tl.arange(0, BLOCK)
        keys = load_rows(k + first * dim, asked, positions, dim, DIM)
        counts = tl.load(valid + window * positions + asked, mask=asked < positions, other=0) != 0
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        scores = tl.where(counts[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing valid so far
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(scores - base[:, None]), axis=1)
        largest = higher
        at += BLOCK
    counts = tl.load(valid + window * positions + asking, mask=asking < positions, other=0) != 0
    divisor = tl.where(counts, largest + tl.log(total), float("inf"))
    tl.store(scales + first + asking, divisor, mask=asking < positions)


@triton.jit
def received_kernel(q, k, valid, scales, received, positions, dim, factor, BLOCK: tl.constexpr, DIM: tl.constexpr):  # noqa: N803
    """For a block of keys of one head and window: the sum of the shares that all queries give them."""
    window, heads = tl.program_id(2).to(tl.int64), tl.num_programs(1)
    first = (window * heads + tl.program_id(1)) * positions
    asked = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = load_rows(k + first * dim, asked, positions, dim, DIM)
    total = tl.zeros((BLOCK,), tl.float32)
    at = 0
    while at < positions:
        asking = at + tl.arange(0, BLOCK)
        queries = load_rows(q + first * dim, asking, positions, dim, DIM)
        divisor = tl.load(scales + first + asking, mask=asking < positions, other=float("inf"))
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        total += tl.sum(tl.exp(scores - divisor[:, None]), axis=0)
        at += BLOCK
    counts = tl.load(valid + window * positions + asked, mask=asked < positions, other=0) != 0
    tl.store(received + first + asked, tl.where(counts, total, 0.0), mask=asked < positions)


def layer_norm_on_device(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """What `layers.layer_norm` computes, a program to each row, which stays in registers."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    lanes = triton.next_power_of_2(size)
    warps = min(16, max(1, lanes // 1024))
    layer_norm_kernel[(x.numel() // size,)](x, weight, bias, out, eps, size, lanes, num_warps=warps)
    return out


@triton.jit
def layer_norm_kernel(x, weight, bias, out, eps, SIZE: tl.constexpr, LANES: tl.constexpr):  # noqa: N803
    """One row, the mean taken off before squares are summed."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    real = lane < SIZE
    value = tl.load(x + row * SIZE + lane, mask=real, other=0.0).to(tl.float32)
    value = tl.where(real, value - tl.sum(value, axis=0) / SIZE, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / SIZE + eps)
    value *= tl.load(weight + lane, mask=real, other=0.0).to(tl.float32)
    value += tl.load(bias + lane, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + lane, value.to(out.dtype.element_ty), mask=real)
