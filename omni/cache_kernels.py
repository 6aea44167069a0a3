"""Writing one position into the caches of all layers at once, in Triton: a decoding step is short of launches."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from omni.kernels import await_inputs, overlapping


def append_by_kernel(stored: list[Tensor], places: Tensor, lengths: Tensor, new: list[Tensor]) -> None:
    """`Cache.append`, lengths included, by two launches: one brings together what is new (`torch.cat`, of up to 128
    tensors), one writes it. Past a capacity it stops with an error of the device.

    stored: keys of every layer, then values. places: `cache.places` of these very tensors. new: in the same order.
    """
    kinds = {(each.dtype, each.device, each.shape[:2], each.shape[3]) for each in (*stored, *new)}
    alike = len(kinds) == 1 and len(stored) == len(new) and lengths.shape == (len(stored) // 2, new[0].shape[0])
    if not alike or {each.shape[2] for each in new} != {1}:
        raise ValueError("a cache takes one position of every layer, of the shapes and the dtype that it holds.")
    (layers, batch), (_, heads, _, dim) = lengths.shape, new[0].shape
    append_kernel[(layers, batch)](
        places,
        torch.cat(new).contiguous(),
        lengths,
        *lengths.stride(),
        heads,
        dim,
        triton.next_power_of_2(heads * dim),
        **overlapping(lengths.device),
        debug=True,  # for the assertion, and it alone
        sanitize_overflow=False,
    )


@triton.jit(do_not_specialize=["lengths", "layer_stride", "row_stride"])  # those of any row: none is compiled later on
def append_kernel(
    places,
    new,
    lengths,
    layer_stride,
    row_stride,
    HEADS: tl.constexpr,  # noqa: N803
    DIM: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Keys and values of one row in one layer, and its length, which no other program reads."""
    layer, row = tl.program_id(0), tl.program_id(1)
    layers, batch = tl.num_programs(0), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    head, channel, real = lane // DIM, lane % DIM, lane < HEADS * DIM
    await_inputs(OVERLAPS)
    length_at = lengths + layer * layer_stride + row * row_stride
    length = tl.load(length_at)
    for half in tl.static_range(2):
        number = half * layers + layer
        place = places + 6 * number
        fits = length < tl.load(place + 5)
        tl.device_assert(fits, "the cache is full")
        value = tl.load(new + (number * batch + row).to(tl.int64) * (HEADS * DIM) + lane, mask=real)
        first = tl.load(place).to(tl.pointer_type(new.dtype.element_ty))
        first += row * tl.load(place + 1) + length * tl.load(place + 3)
        tl.store(first + head * tl.load(place + 2) + channel * tl.load(place + 4), value, mask=real & fits)
    tl.debug_barrier()  # all threads have read the length
    tl.store(length_at, length + 1)
