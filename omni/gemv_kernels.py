"""Matrix-vector products (GEMV) in Triton, which read each weight once: of dense layers and of a token's experts."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from omni.kernels import await_inputs, overlapping

Tile = tuple[int, int, int]
"""Rows of a matrix that a program multiplies, columns that it reads at a time, and its warps."""

TILES: tuple[Tile, ...] = ((8, 512, 4), (4, 1024, 4))
"""Of ten on an H200, before launches overlapped, one of these was the fastest of the released models' matrices or close
to it."""

_fastest: dict[tuple[object, ...], Tile | None] = {}


def product_on_device(
    x: Tensor, weight: Tensor, added: Tensor | None, norm: Tensor | None, eps: float, gated: bool, float32: bool
) -> Tensor:
    """What `layers.row_product` computes, the fastest way on this device for a matrix of this shape.

    Each way is measured when a shape is first met, in some tens of milliseconds, with memory for a few copies of the
    matrix; inside of a CUDA graph's capture, where nothing can be, it is PyTorch's own product.
    """
    key = (x.device, x.dtype, weight.shape, gated)
    arguments = (added, norm, eps, gated, float32)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return product_by_library(x, weight, *arguments)
        _fastest[key] = fastest(x, weight, *arguments)
    tile = _fastest[key]
    if tile is None:
        return product_by_library(x, weight, *arguments)
    return product_by_kernel(x, weight, *arguments, tile)


def product_by_kernel(
    x: Tensor,
    weight: Tensor,
    added: Tensor | None,
    norm: Tensor | None,
    eps: float,
    gated: bool,
    float32: bool,
    tile: Tile,
) -> Tensor:
    (rows, columns), (block, depth, warps) = weight.shape, tile
    rows = rows // 2 if gated else rows
    out = x.new_empty(rows, dtype=torch.float32 if float32 else x.dtype)
    grid = (triton.cdiv(rows, block),)
    row_kernel[grid](
        x, norm, weight, added, out, rows, columns, eps, gated, block, depth, num_warps=warps, **overlapping(x.device)
    )
    return out


def product_by_library(
    x: Tensor, weight: Tensor, added: Tensor | None, norm: Tensor | None, eps: float, gated: bool, float32: bool
) -> Tensor:
    if norm is not None:
        x = F.rms_norm(x, norm.shape, norm, eps)
    if float32 and x.dtype != torch.float32:
        out = torch.mm(x[None], weight.mT, out_dtype=torch.float32)[0]
        return out if added is None else out + added
    if gated:
        gate, up = F.linear(x[None], weight)[0].chunk(2)
        return F.silu(gate).mul_(up)
    return F.linear(x[None], weight, added)[0]


def fastest(x: Tensor, weight: Tensor, *arguments: Any) -> Tile | None:
    """The fastest tile of a product; None for PyTorch's own.

    Each takes turns over copies of the matrix that together are larger than the cache.
    """
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    wanted, room = -(-3 * cache // weight.nbytes), torch.cuda.mem_get_info(x.device)[0] // 2 // weight.nbytes
    matrices = [weight, *(weight.clone() for _ in range(max(0, min(wanted, room, 32) - 1)))]
    turns = (matrices * -(-8 // len(matrices)))[: max(8, len(matrices))]

    def seconds(tile: Tile | None) -> float:
        by_tile: tuple[Any, ...] = (product_by_library,) if tile is None else (product_by_kernel, tile)

        def run(matrix: Tensor) -> None:
            by_tile[0](x, matrix, *arguments, *by_tile[1:])

        run(weight)  # compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # two milliseconds, in which all of it is launched
        begin.record()
        for matrix in turns:
            run(matrix)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    tiles = (None, *TILES)
    return min(tiles, key=lambda tile: min(seconds(tile) for _ in range(3)))


@triton.jit
def read_once(rows, there, column, columns):
    """Columns of the rows that begin at these places and are there: (ROWS, COLUMNS), zeros past the last one."""
    mask = there[:, None] & (column < columns)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def weights_at(rows, norm, there, column, columns, to_up, GATED: tl.constexpr):  # noqa: N803
    """What a program reads of the matrix, of its other half, `to_up` later, and of the norm: of what is not there,
    something else."""
    part = read_once(rows, there, column, columns)
    part_up, factor = part, part
    if GATED:
        part_up = read_once(rows + to_up, there, column, columns)
    if norm is not None:
        factor = tl.load(norm + column, mask=column < columns, other=0.0)
    return part, part_up, factor


@triton.jit
def add_products(total, total_up, squares, x, norm, read, column, columns, GATED: tl.constexpr):  # noqa: N803
    """Adds to the sums these columns of x times what `weights_at` read, and to the squares if there is a norm."""
    part, part_up, factor = read
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    if norm is not None:
        squares += value * value
        value *= factor.to(tl.float32)
    total += part.to(tl.float32) * value[None, :]
    if GATED:
        total_up += part_up.to(tl.float32) * value[None, :]
    return total, total_up, squares


@triton.jit(do_not_specialize=["rows"])
def row_kernel(
    x,
    norm,
    weight,
    added,
    out,
    rows,
    columns,
    eps,
    GATED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """ROWS results. The norm's divisor is that of the whole row, so it comes after the product. The first
    weights are read while the kernel before ends."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    there = row < rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    begin = weight + row.to(tl.int64) * columns
    to_up = rows.to(tl.int64) * columns
    read = weights_at(begin, norm, there, lane, columns, to_up, GATED)
    await_inputs(OVERLAPS)
    if added is not None:
        more = tl.load(added + row, mask=there, other=0.0).to(tl.float32)
    total, total_up, squares = add_products(total, total_up, squares, x, norm, read, lane, columns, GATED)
    for at in range(COLUMNS, columns, COLUMNS):
        read = weights_at(begin, norm, there, at + lane, columns, to_up, GATED)
        total, total_up, squares = add_products(total, total_up, squares, x, norm, read, at + lane, columns, GATED)
    scale = 1.0
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / columns + eps)
    result = tl.sum(total, axis=1) * scale
    if GATED:
        result = result / (1.0 + tl.exp(-result)) * (tl.sum(total_up, axis=1) * scale)
    if added is not None:
        result += more
    tl.store(out + row, result.to(out.dtype.element_ty), mask=there)


GATE_UP: Tile = (2, 2048, 4)
DOWN: Tile = (4, 256, 4)
"""The tiles of experts: of eight pairs on an H200 none was much faster for one token."""


def experts_of_rows(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None,
    norm: Tensor | None,
    eps: float,
    tiles: tuple[Tile, Tile] = (GATE_UP, DOWN),
) -> Tensor:
    """What `moe.weighted_experts` computes, where hardly two tokens choose the same expert: a token at a time, each
    program the rows of some channels whole. Sums are in float32 and in the same order on every run.
    """
    (tokens, hidden), (_, per_token), size = x.shape, chosen.shape, down.shape[2]
    inner, out = x.new_empty(tokens, per_token, size), torch.empty_like(x)
    overlap = overlapping(x.device)
    rows, depth, warps = tiles[0]
    grid = (triton.cdiv(size, rows), tokens * per_token)
    gate_up_rows_kernel[grid](
        x, norm, gate_up, chosen, inner, eps, per_token, hidden, size, rows, depth, num_warps=warps, **overlap
    )
    rows, depth, warps = tiles[1]
    down_rows_kernel[(triton.cdiv(hidden, rows), tokens)](
        inner, down, chosen, shares, residual, out, per_token, hidden, size, rows, depth, num_warps=warps, **overlap
    )
    return out


@triton.jit
def gate_up_rows_kernel(
    x,
    norm,
    weights,
    chosen,
    inner,
    eps,
    PER_TOKEN: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """silu(gate) · up in ROWS channels of one expert of a token."""
    await_inputs(OVERLAPS)  # the kernel before chose the experts
    place = tl.program_id(1)
    expert = tl.load(chosen + place).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    there = row < SIZE
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((COLUMNS,), tl.float32)
    begin = weights + expert * (2 * SIZE * HIDDEN) + row * HIDDEN
    row_of_x = x + (place // PER_TOKEN) * HIDDEN
    for at in tl.static_range(0, HIDDEN, COLUMNS):
        read = weights_at(begin, norm, there, at + lane, HIDDEN, SIZE * HIDDEN, True)
        gate, up, squares = add_products(gate, up, squares, row_of_x, norm, read, at + lane, HIDDEN, True)
    scale = 1.0
    if norm is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)
    result = tl.sum(gate, axis=1) * scale
    result = result / (1.0 + tl.exp(-result)) * (tl.sum(up, axis=1) * scale)
    tl.store(inner + place * SIZE + row, result.to(inner.dtype.element_ty), mask=there)


@triton.jit
def tiles_of_expert(
    weights,
    chosen,
    row,
    there,
    HIDDEN: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Rows of the second matrix of the expert whose number is at `chosen`: (ROWS, COLUMNS) each."""
    begin = weights + tl.load(chosen).to(tl.int64) * (HIDDEN * SIZE) + row * SIZE
    parts = ()
    for at in tl.static_range(0, SIZE, COLUMNS):
        parts += (read_once(begin, there, at + tl.arange(0, COLUMNS), SIZE),)  # type: ignore[assignment]
    return parts


@triton.jit
def down_rows_kernel(
    inner,
    weights,
    chosen,
    shares,
    residual,
    out,
    PER_TOKEN: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """ROWS channels of a token's sum over its experts, by share and in their order. The first one's weights are read
    while the kernel before ends, which itself waited for the one that wrote `chosen` and `shares`."""
    token = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, COLUMNS)
    there = row < HIDDEN
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    parts = tiles_of_expert(weights, chosen + token * PER_TOKEN, row, there, HIDDEN, SIZE, COLUMNS)
    await_inputs(OVERLAPS)
    if residual is not None:
        more = tl.load(residual + token * HIDDEN + row, mask=there, other=0.0).to(tl.float32)
    for pick in tl.static_range(PER_TOKEN):
        place = token * PER_TOKEN + pick
        share = tl.load(shares + place).to(tl.float32)
        if pick > 0:
            parts = tiles_of_expert(weights, chosen + place, row, there, HIDDEN, SIZE, COLUMNS)
        for at in tl.static_range(0, SIZE, COLUMNS):
            real = at + lane < SIZE
            value = tl.load(inner + place * SIZE + at + lane, mask=real, other=0.0).to(tl.float32) * share
            total += parts[at // COLUMNS].to(tl.float32) * value[None, :]
    result = tl.sum(total, axis=1)
    if residual is not None:
        result += more
    tl.store(out + token * HIDDEN + row, result.to(out.dtype.element_ty), mask=there)
