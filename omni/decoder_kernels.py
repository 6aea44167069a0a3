"""Attention of a decoding step in Triton: scores of a cache, which are never in memory, and what they take of it."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni.kernels import INTERPRETED


def chunks_by_kernel(q: Tensor, keys: Tensor, values: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """What `decoder.chunks_on_a_device` computes, in one pass, a program to each chunk of each head of keys; what it
    yields stays in float32. Memory that is not written is not read."""
    (batch, kv_heads, group, dim), (_, chunks, size) = q.shape, written.shape
    q, keys, values, written = (tensor.contiguous() for tensor in (q, keys, values, written.view(torch.uint8)))
    mixed = q.new_empty(batch, kv_heads, chunks, group, dim, dtype=torch.float32)
    weights = q.new_empty(batch, kv_heads, chunks, group, dtype=torch.float32)
    # A product of tensor cores has 16 rows at least.
    padded = (max(16, triton.next_power_of_2(group)), max(16, triton.next_power_of_2(dim)))
    chunk_kernel[(chunks, batch * kv_heads)](
        q, keys, values, written, mixed, weights, kv_heads, dim**-0.5, group, dim, size, *padded, num_warps=8
    )
    return mixed, weights


@triton.jit(do_not_specialize=["kv_heads"])
def chunk_kernel(
    q,
    keys,
    values,
    written,
    mixed,
    weights,
    kv_heads,
    factor,
    GROUP: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
):
    """One chunk of one head of keys: attention of the queries that share it, and the logarithm of the sum that their
    softmax divides by; the lowest number and zeros where nothing is written."""
    chunk, chunks, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    row, lane, at = tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, CHUNK)
    real, known = row < GROUP, lane < DIM
    there = tl.load(written + ((head // kv_heads) * chunks + chunk) * CHUNK + at) != 0
    begin = (head * chunks + chunk) * CHUNK * DIM
    stored = begin + at[:, None] * DIM + lane[None, :]
    mask = there[:, None] & known[None, :]
    key = tl.load(keys + stored, mask=mask, other=0.0)
    value = tl.load(values + stored, mask=mask, other=0.0)
    asking = q + (head * GROUP + row)[:, None] * DIM + lane[None, :]
    query = tl.load(asking, mask=real[:, None] & known[None, :], other=0.0)
    share_type = value.dtype
    if INTERPRETED:
        query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * factor
    scores = tl.where(there[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.exp(scores - largest[:, None])
    total = tl.sum(shares, axis=1)
    shares = (shares / tl.where(total > 0, total, 1.0)[:, None]).to(share_type)
    result = tl.dot(shares.to(value.dtype), value, input_precision="ieee")
    first = (head * chunks + chunk) * GROUP
    to = mixed + (first + row)[:, None] * DIM + lane[None, :]
    tl.store(to, result, mask=real[:, None] & known[None, :])
    lowest = -3.4028234663852886e38  # of float32: not -∞, of which a difference would be no number
    weight = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), lowest)
    tl.store(weights + first + row, weight, mask=real)
