"""Experts in Triton: the choice of them, tokens sorted by counting, two grouped products, and a sum for each token."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from omni.gemv_kernels import experts_of_rows
from omni.kernels import INTERPRETED, await_inputs, overlapping


@dataclass(frozen=True)
class Tile:
    """What one program of a grouped product computes: `rows` rows of an expert times `columns` rows of its matrix."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swapped: bool = False
    """The matrix is the left operand: matrix units take 64 rows of the left one at a time, and of the right one 8."""


FEW_TOKENS = 16
"""So few tokens are a tile of every expert that one of them chose, and need no sorting."""

VERY_FEW_TOKENS = 4
"""So few seldom choose the same expert: each is multiplied by itself, on an H200 faster than in tiles; eight were
slower so."""

NARROW = Tile(FEW_TOKENS, 64, 128, 4, 4, swapped=True)
TILES = (
    (12, NARROW, NARROW),
    (40, Tile(32, 128, 128, 4, 3, swapped=True), Tile(32, 128, 128, 4, 3, swapped=True)),
    (72, Tile(64, 128, 64, 4, 4, swapped=True), Tile(64, 128, 64, 4, 4, swapped=True)),
    (10**9, Tile(128, 256, 64, 8, 4), Tile(128, 128, 64, 8, 3)),
)
"""Up to so many rows per expert on average, the tiles of the first and of the second product, of equally many rows:
about as many as an expert has, so that its weights are read once. The fastest of up to five measured on one H200 with
the experts of Qwen3-Omni-30B-A3B and 1, 8, 102, 441, 1530, 3000 and 10150 tokens, all in one run."""

FLOAT32 = Tile(16, 64, 32, 4, 2)
"""The tile of float32, whose products are exact and slow: for comparisons."""


def choose_tiles(x: Tensor, rows_per_expert: float) -> tuple[Tile, Tile]:
    if x.element_size() > 2:
        return FLOAT32, FLOAT32
    if len(x) <= FEW_TOKENS:
        return NARROW, NARROW
    return next((first, second) for most, first, second in TILES if rows_per_expert <= most)


def choose_on_device(logits: Tensor, per_token: int, normalise: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `moe.choose` computes, in one pass: (n, experts) → (n, per_token) twice."""
    tokens, experts = logits.shape
    shares = logits.new_empty(tokens, per_token, dtype=dtype)
    chosen = torch.empty(tokens, per_token, dtype=torch.int32, device=logits.device)
    lanes = triton.next_power_of_2(experts)
    choose_kernel[(tokens,)](
        logits.contiguous(), shares, chosen, experts, lanes, per_token, normalise, num_warps=max(1, lanes // 32),
        **overlapping(logits.device),
    )  # fmt: skip
    return shares, chosen


def experts_on_device(
    x: Tensor,
    shares: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    down: Tensor,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    tiles: tuple[Tile, Tile] | None = None,
) -> Tensor:
    """What `moe.weighted_experts` computes, without a host read; the launches depend on shapes alone.

    Sums are in float32 and in the same order on every run; in memory are, in the dtype of x, the SwiGLU's results and
    each expert's part of a token: (n · num_experts_per_tok) rows of either.
    """
    x, shares, chosen = x.contiguous(), shares.contiguous(), chosen.contiguous()
    residual = None if residual is None else residual.contiguous()
    if len(x) <= VERY_FEW_TOKENS and tiles is None:
        return experts_of_rows(x, shares, chosen, gate_up, down, residual, norm, eps)
    x = x if norm is None else F.rms_norm(x, norm.shape, norm, eps)
    (tokens, hidden), per_token = x.shape, chosen.shape[1]
    experts, _, size = down.shape
    rows, overlap = tokens * per_token, overlapping(x.device)
    first, second = tiles or choose_tiles(x, rows / experts)
    is_sorted = tokens > FEW_TOKENS
    # Of these many tiles some are empty: see `sort_kernel`.
    slots = rows // first.rows + experts if is_sorted else rows
    order, places = torch.empty(2, rows if is_sorted else 0, dtype=torch.int32, device=x.device)
    table = torch.empty(slots if is_sorted else 0, 3, dtype=torch.int32, device=x.device)
    if is_sorted:
        sort_kernel[(experts,)](chosen, order, places, table, rows, first.rows, 8192, num_warps=16, **overlap)
    inner, parts = x.new_empty(rows, size), x.new_empty(rows, hidden)
    # Gate and up take turns, so that one thread has both of a channel; the second product's rows are as they are.
    turns = gate_up.unflatten(1, (2, size)).transpose(1, 2)
    pairs = down.unflatten(1, (hidden // 2, 2))
    for kernel, tile, weights, arguments in (
        (gate_up_kernel, first, turns, (x, inner, chosen, order, table, tokens)),
        (down_kernel, second, pairs, (inner, parts, chosen, table, tokens)),
    ):
        sizes = (per_token, triton.next_power_of_2(per_token), hidden, size, is_sorted)
        blocks = (tile.rows, tile.columns, tile.depth, tile.swapped)
        grid = (slots * triton.cdiv(2 * weights.shape[1], tile.columns),)
        weights = TensorDescriptor.from_tensor(weights, [1, tile.columns // 2, 2, tile.depth])
        options = {"num_warps": tile.warps, "num_stages": stages_that_fit(tile, x), **overlap}
        kernel[grid](weights, *arguments, *sizes, *blocks, **options)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    sum_kernel[(tokens,)](
        parts, shares, places, residual, out, per_token, hidden, is_sorted, block, num_warps=4, **overlap
    )
    return out


def stages_that_fit(tile: Tile, x: Tensor) -> int:
    """Tiles on their way to a multiprocessor at once: what the table says, or as many as its shared memory holds."""
    if not x.is_cuda:
        return tile.stages
    a_stage = (tile.rows + tile.columns) * tile.depth * x.element_size()
    return max(1, min(tile.stages, shared_memory(x.device.index) // a_stage))


@cache
def shared_memory(device: int) -> int:
    """Bytes that a program may have. Asked for once: the driver looks up clock rates, too, which takes longer than all
    launches of a layer."""
    return int(triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"])


@triton.jit
def choose_kernel(
    logits,
    shares,
    chosen,
    EXPERTS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    PER_TOKEN: tl.constexpr,  # noqa: N803
    NORMALISE: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """The largest shares of a token's softmax, in order; equal ones by number. All different even if not numbers.

    An expert's rank is how many are before it, counted by a thread each, so that all places are known at once: one
    after another, the largest of what is left would each wait for the one before.
    """
    await_inputs(OVERLAPS)
    token, expert = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    score = tl.load(logits + token * EXPERTS + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    score = tl.exp(score - tl.max(score, axis=0))
    share = score / tl.sum(score, axis=0)
    share = tl.where(share >= 0, share, 0.0)
    share = tl.where(expert < EXPERTS, share, -1.0)
    other = share[:, None]
    is_before = (other > share[None, :]) | ((other == share[None, :]) & (expert[:, None] < expert[None, :]))
    rank = tl.sum(is_before.to(tl.int32), axis=0)
    if NORMALISE:
        share /= tl.sum(tl.where(rank < PER_TOKEN, share, 0.0), axis=0)
    to = token * PER_TOKEN + rank
    tl.store(shares + to, share.to(shares.dtype.element_ty), mask=rank < PER_TOKEN)
    tl.store(chosen + to, expert, mask=rank < PER_TOKEN)


@triton.jit(do_not_specialize=["rows"])
def sort_kernel(
    chosen,
    order,
    places,
    table,
    rows,
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Finds the rows of an expert, one program for each: counts those of lower experts, then puts its own behind them.

    chosen: (rows,) experts. order: (rows,) int32, the rows sorted by expert, each expert's as they were; places:
    (rows,) int32, where in it a row is. table: (rows // ROWS + experts, 3) int32, for each tile its expert, its first
    place in `order` and how many rows it has.
    Tiles of expert e begin at (rows of lower experts) // ROWS + e, so that no expert need know the tiles of another:
    there is room for all, and the rest have no rows.
    """
    await_inputs(OVERLAPS)
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, rows, BLOCK):
        picked = tl.load(chosen + at + lane, mask=at + lane < rows, other=2147483647)
        lower += (picked < expert).to(tl.int32)
        own += (picked == expert).to(tl.int32)
    start = tl.sum(lower)
    count = tl.sum(own)
    place = start
    for at in range(0, rows, BLOCK):
        picked = tl.load(chosen + at + lane, mask=at + lane < rows, other=2147483647)
        is_own = (picked == expert).to(tl.int32)
        to = place + tl.cumsum(is_own, axis=0) - 1
        tl.store(order + to, at + lane, mask=is_own != 0)
        tl.store(places + at + lane, to, mask=is_own != 0)
        place += tl.sum(is_own)
    begin = start // ROWS + expert
    end = (start + count) // ROWS + expert + 1
    for at in range(begin, end, 64):
        slot = at + tl.arange(0, 64)
        before = (slot - begin) * ROWS
        tl.store(table + 3 * slot, tl.zeros((64,), tl.int32) + expert, mask=slot < end)
        tl.store(table + 3 * slot + 1, start + before, mask=slot < end)
        tl.store(table + 3 * slot + 2, tl.minimum(tl.maximum(count - before, 0), ROWS), mask=slot < end)


@triton.jit
def sorted_tile(table, slot, ROWS: tl.constexpr):  # noqa: N803
    """A tile of the table: its expert, how many rows it has, their places in `order` and which of them are there."""
    count = tl.load(table + 3 * slot + 2)
    row = tl.arange(0, ROWS)
    place = tl.load(table + 3 * slot + 1) + row
    return tl.load(table + 3 * slot), count, place, row < count


@triton.jit
def token_tile(chosen, slot, tokens, PER_TOKEN: tl.constexpr, PICKS: tl.constexpr, ROWS: tl.constexpr):  # noqa: N803
    """As `sorted_tile`, but row i is token i, if it chose the expert of the slot; without rows if an earlier slot has
    the expert."""
    expert = tl.load(chosen + slot)
    token, pick = tl.arange(0, ROWS), tl.arange(0, PICKS)
    place = token[:, None] * PER_TOKEN + pick[None, :]
    real = (token < tokens)[:, None] & (pick < PER_TOKEN)[None, :]
    same = tl.load(chosen + place, mask=real, other=-1) == expert
    earlier = tl.sum(tl.sum((same & (place < slot)).to(tl.int32), axis=1), axis=0)
    own = tl.sum(tl.where(same, place, 0), axis=1)
    there = tl.sum(same.to(tl.int32), axis=1) > 0
    return expert.to(tl.int32), tl.where(earlier > 0, 0, 1), own, there


@triton.jit
def product(
    left,
    there,
    weights,
    expert,
    first,
    SIZE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    SWAPPED: tl.constexpr,  # noqa: N803
):
    """ROWS rows of SIZE values at `left`, where `there`, times COLUMNS rows of an expert's matrix from pair `first`.

    weights: (experts, pairs, 2, SIZE), which the copy engine fetches, and zeros past its end. Returns (ROWS, COLUMNS)
    float32.
    """
    lane = tl.arange(0, DEPTH)
    total = tl.zeros((COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS), tl.float32)
    for at in range(0, SIZE, DEPTH):
        real = there[:, None]
        if SIZE % DEPTH != 0:
            real = real & (at + lane < SIZE)[None, :]
        a = tl.load(left[:, None] + (at + lane)[None, :], mask=real, other=0.0)
        b = weights.load([expert, first, 0, at]).reshape(COLUMNS, DEPTH)
        if INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if SWAPPED:
            total = tl.dot(b, tl.trans(a), total, input_precision="ieee")
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if SWAPPED:
        total = tl.trans(total)
    return total


@triton.jit(do_not_specialize=["tokens"])
def gate_up_kernel(
    weights,
    x,
    inner,
    chosen,
    order,
    table,
    tokens,
    PER_TOKEN: tl.constexpr,  # noqa: N803
    PICKS: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    SORTED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    SWAPPED: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """silu(gate) · up of a tile's rows, COLUMNS / 2 channels of it, into `inner` at the rows' places."""
    await_inputs(OVERLAPS)
    blocks: tl.constexpr = (2 * SIZE + COLUMNS - 1) // COLUMNS
    slot = tl.program_id(0) // blocks
    if SORTED:
        expert, count, place, there = sorted_tile(table, slot, ROWS)
    else:
        expert, count, place, there = token_tile(chosen, slot, tokens, PER_TOKEN, PICKS, ROWS)
    if count == 0:
        return
    first = (tl.program_id(0) % blocks) * (COLUMNS // 2)
    row = place
    if SORTED:
        row = tl.load(order + place, mask=there, other=0)
    left = x + (row // PER_TOKEN).to(tl.int64) * HIDDEN
    total = product(left, there, weights, expert, first, HIDDEN, ROWS, COLUMNS, DEPTH, SWAPPED)
    gate, up = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
    value = gate / (1.0 + tl.exp(-gate)) * up
    channel = first + tl.arange(0, COLUMNS // 2)
    to = inner + place.to(tl.int64)[:, None] * SIZE + channel[None, :]
    tl.store(to, value.to(inner.dtype.element_ty), mask=there[:, None] & (channel < SIZE)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def down_kernel(
    weights,
    inner,
    parts,
    chosen,
    table,
    tokens,
    PER_TOKEN: tl.constexpr,  # noqa: N803
    PICKS: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    SORTED: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    DEPTH: tl.constexpr,  # noqa: N803
    SWAPPED: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A tile's rows of `inner` times the expert's second matrix, COLUMNS channels, into `parts` at the rows' places."""
    await_inputs(OVERLAPS)
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    slot = tl.program_id(0) // blocks
    if SORTED:
        expert, count, place, there = sorted_tile(table, slot, ROWS)
    else:
        expert, count, place, there = token_tile(chosen, slot, tokens, PER_TOKEN, PICKS, ROWS)
    if count == 0:
        return
    first = (tl.program_id(0) % blocks) * (COLUMNS // 2)
    left = inner + place.to(tl.int64) * SIZE
    total = product(left, there, weights, expert, first, SIZE, ROWS, COLUMNS, DEPTH, SWAPPED)
    column = 2 * first + tl.arange(0, COLUMNS)
    to = parts + place.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    tl.store(to, total.to(parts.dtype.element_ty), mask=there[:, None] & (column < HIDDEN)[None, :])


@triton.jit
def sum_kernel(
    parts,
    shares,
    places,
    residual,
    out,
    PER_TOKEN: tl.constexpr,  # noqa: N803
    HIDDEN: tl.constexpr,  # noqa: N803
    SORTED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Adds up the parts of a token by share, in float32 and in the order of its experts."""
    await_inputs(OVERLAPS)
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if residual is not None:
        total += tl.load(residual + token * HIDDEN + channel, mask=channel < HIDDEN, other=0.0).to(tl.float32)
    for pick in tl.static_range(PER_TOKEN):
        row = token * PER_TOKEN + pick
        share = tl.load(shares + row).to(tl.float32)
        if SORTED:
            row = tl.load(places + row).to(tl.int64)
        part = tl.load(parts + row * HIDDEN + channel, mask=channel < HIDDEN, other=0.0)
        total += share * part.to(tl.float32)
    tl.store(out + token * HIDDEN + channel, total.to(out.dtype.element_ty), mask=channel < HIDDEN)
