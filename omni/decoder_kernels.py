"""Attention of a decoding step in Triton, all that lies between its two products: norms, rotary, scores of a cache,
which are never in memory, and what they take of it."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni.kernels import INTERPRETED, await_inputs, overlapping

CHUNKS = 32
"""That are joined at a time."""


def cached_attention_by_kernels(
    qkv: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    written: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `decoder.cached_attention` computes, in two launches: a program to each chunk of each head of keys, then one
    to each head, which joins them. What chunks yield stays in float32. Memory that is not written is not read."""
    batch, kv_heads, capacity, dim = keys.shape
    # They are read before the wait for the kernel before: a copy of them, made right here, would not be there yet.
    if capacity % chunk or not all(stored.is_contiguous() for stored in (keys, values, written)):
        raise ValueError(f"a cache must be contiguous and hold a multiple of {chunk} positions, not {capacity}.")
    chunks, group = capacity // chunk, (qkv.shape[1] // dim - 2 * kv_heads) // kv_heads
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    mixed = qkv.new_empty(batch, kv_heads, chunks, group, dim, dtype=torch.float32)
    weights = qkv.new_empty(batch, kv_heads, chunks, group, dtype=torch.float32)
    key, value = (qkv.new_empty(batch, kv_heads, 1, dim) for _ in range(2))
    out = qkv.new_empty(batch, kv_heads * group * dim)
    half = triton.next_power_of_2(dim // 2)
    # A product of tensor cores has 16 rows at least, and as many of what is summed.
    padded = (max(16, triton.next_power_of_2(group)), max(16, half), max(16, triton.next_power_of_2(dim)))
    overlap, factor = overlapping(qkv.device), dim**-0.5
    chunk_kernel[(chunks, batch * kv_heads)](
        qkv, query_norm, cos, sin, keys, values, written.view(torch.uint8), mixed, weights, kv_heads, eps, factor,
        group, dim, chunk, *padded, num_warps=8, **overlap,
    )  # fmt: skip
    join_kernel[(group, batch * kv_heads)](
        qkv, query_norm, key_norm, cos, sin, mixed, weights, out, key, value, kv_heads, chunks, eps, factor,
        group, dim, CHUNKS, half, num_warps=4, **overlap,
    )  # fmt: skip
    return out, key, value


@triton.jit
def turned(
    heads,
    norm,
    cos,
    sin,
    real,
    eps,
    DIM: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
):
    """Heads at these places, (ROWS, 1), where `real`, normed where there is a norm and turned by the angles at `cos`
    and `sin`: the two halves of their channels, (ROWS, HALF) each, rounded as they are kept."""
    lane = tl.arange(0, HALF)[None, :]
    known = lane < DIM // 2
    angle_cos, angle_sin = tl.load(cos + lane, mask=known, other=0.0), tl.load(sin + lane, mask=known, other=0.0)
    mask = real & known
    first = tl.load(heads + lane, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(heads + DIM // 2 + lane, mask=mask, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / DIM + eps)[:, None]
        first *= scale * tl.load(norm + lane, mask=known, other=0.0).to(tl.float32)
        second *= scale * tl.load(norm + DIM // 2 + lane, mask=known, other=0.0).to(tl.float32)
    kept = heads.dtype.element_ty
    return (first * angle_cos - second * angle_sin).to(kept), (second * angle_cos + first * angle_sin).to(kept)


@triton.jit(do_not_specialize=["kv_heads"])
def chunk_kernel(
    qkv,
    query_norm,
    cos,
    sin,
    keys,
    values,
    written,
    mixed,
    weights,
    kv_heads,
    eps,
    factor,
    GROUP: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """One chunk of one head of keys: attention of the queries that share it, and the logarithm of the sum that their
    softmax divides by; the lowest number and zeros where nothing is written. The cache is older than the kernel before,
    which makes qkv, and is read while that one ends."""
    chunk, chunks, head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    row, half, lane, at = tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, LANES), tl.arange(0, CHUNK)
    sequence = head // kv_heads
    there = tl.load(written + (sequence * chunks + chunk) * CHUNK + at) != 0
    stored = (head * chunks + chunk) * CHUNK * DIM + at[:, None] * DIM
    known = there[:, None] & (half < DIM // 2)[None, :]
    key_first = tl.load(keys + stored + half[None, :], mask=known, other=0.0)
    key_second = tl.load(keys + stored + DIM // 2 + half[None, :], mask=known, other=0.0)
    value = tl.load(values + stored + lane[None, :], mask=there[:, None] & (lane < DIM)[None, :], other=0.0)
    await_inputs(OVERLAPS)
    asking = qkv + (sequence * (GROUP + 2) * kv_heads + (head % kv_heads) * GROUP + row)[:, None] * DIM
    angles = sequence * (DIM // 2)
    query_first, query_second = turned(
        asking, query_norm, cos + angles, sin + angles, (row < GROUP)[:, None], eps, DIM, HALF
    )
    share_type = value.dtype
    if INTERPRETED:
        query_first, query_second = query_first.to(tl.float32), query_second.to(tl.float32)
        key_first, key_second, value = key_first.to(tl.float32), key_second.to(tl.float32), value.to(tl.float32)
    scores = tl.dot(query_first, tl.trans(key_first), input_precision="ieee")
    scores = tl.dot(query_second, tl.trans(key_second), scores, input_precision="ieee") * factor
    scores = tl.where(there[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.exp(scores - largest[:, None])
    total = tl.sum(shares, axis=1)
    shares = (shares / tl.where(total > 0, total, 1.0)[:, None]).to(share_type)
    result = tl.dot(shares.to(value.dtype), value, input_precision="ieee")
    first = (head * chunks + chunk) * GROUP
    to = mixed + (first + row)[:, None] * DIM + lane[None, :]
    tl.store(to, result, mask=(row < GROUP)[:, None] & (lane < DIM)[None, :])
    lowest = -3.4028234663852886e38  # of float32: not -∞, of which a difference would be no number
    weight = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), lowest)
    tl.store(weights + first + row, weight, mask=row < GROUP)


@triton.jit(do_not_specialize=["kv_heads", "chunks"])
def join_kernel(
    qkv,
    query_norm,
    key_norm,
    cos,
    sin,
    mixed,
    weights,
    out,
    key,
    value,
    kv_heads,
    chunks,
    eps,
    factor,
    GROUP: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    CHUNKS: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """One head: what its chunks yield and its own value, by their weight. The first of those that share a head of keys
    also puts its own key, normed and turned, and value where the cache gets them from. qkv was there before
    `chunk_kernel` let this one begin."""
    row, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = head // kv_heads
    lane, number = tl.arange(0, HALF), tl.arange(0, CHUNKS)
    known = lane < DIM // 2
    begin = sequence * (GROUP + 2) * kv_heads
    angles = sequence * (DIM // 2)
    one = tl.zeros((1, 1), tl.int64)
    there = one == 0
    asking = qkv + (begin + (head % kv_heads) * GROUP + row) * DIM + one
    query_first, query_second = turned(asking, query_norm, cos + angles, sin + angles, there, eps, DIM, HALF)
    asked = qkv + (begin + GROUP * kv_heads + head % kv_heads) * DIM + one
    key_first, key_second = turned(asked, key_norm, cos + angles, sin + angles, there, eps, DIM, HALF)
    products = query_first.to(tl.float32) * key_first.to(tl.float32)
    products += query_second.to(tl.float32) * key_second.to(tl.float32)
    largest = tl.sum(products) * factor
    given = qkv + (begin + (GROUP + 1) * kv_heads + head % kv_heads) * DIM + lane
    value_first = tl.load(given, mask=known, other=0.0)
    value_second = tl.load(given + DIM // 2, mask=known, other=0.0)
    await_inputs(OVERLAPS)
    if row == 0:
        to = head * DIM + lane
        tl.store(key + to[None, :], key_first, mask=known[None, :])
        tl.store(key + DIM // 2 + to[None, :], key_second, mask=known[None, :])
        tl.store(value + to, value_first, mask=known)
        tl.store(value + DIM // 2 + to, value_second, mask=known)
    total = 1.0
    first, second = value_first.to(tl.float32), value_second.to(tl.float32)
    for at in range(0, chunks, CHUNKS):
        real = at + number < chunks
        place = (head * chunks + at + number) * GROUP + row
        weight = tl.load(weights + place, mask=real, other=float("-inf"))
        new = tl.maximum(largest, tl.max(weight, axis=0))
        shares = tl.exp(weight - new)
        mask = real[:, None] & known[None, :]
        part = mixed + place[:, None] * DIM + lane[None, :]
        before = tl.exp(largest - new)
        first = first * before + tl.sum(tl.load(part, mask=mask, other=0.0) * shares[:, None], axis=0)
        second = second * before + tl.sum(tl.load(part + DIM // 2, mask=mask, other=0.0) * shares[:, None], axis=0)
        total = total * before + tl.sum(shares, axis=0)
        largest = new
    to = out + (head * GROUP + row) * DIM + lane
    tl.store(to, (first / total).to(out.dtype.element_ty), mask=known)
    tl.store(to + DIM // 2, (second / total).to(out.dtype.element_ty), mask=known)
