"""The sequential part of Stage I in Triton."""
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor


def pick_on_device(
    cosines: Tensor, weights: Tensor, first: Tensor, sizes: Tensor, counts: Tensor, keep: Tensor
) -> None:
    """Writes the max-min picks of every window into `keep`, without a host read: one program per window.

    cosines: (W, n, n) float32 between a window's tokens. weights: (W, n) float32. first: (W,) int64, the first picks.
    sizes, counts: (W,) int64, a window's tokens and how many to keep. keep: (W, n) bool. All contiguous.
    """
    windows, tokens = weights.shape
    block = triton.next_power_of_2(tokens)
    pick_kernel[(windows,)](cosines, weights, first, sizes, counts, keep.view(torch.uint8), tokens, block)


@triton.jit
def pick_kernel(cosines, weights, first, sizes, counts, keep, tokens, BLOCK: tl.constexpr):  # noqa: N803
    window = tl.program_id(0).to(tl.int64)
    size = tl.load(sizes + window)
    count = tl.load(counts + window)
    token = tl.arange(0, BLOCK)
    real = token < size
    weight = tl.load(weights + window * tokens + token, mask=real, other=0.0)
    kept = real & (count >= size)
    nearest = tl.where(real, float("inf"), float("-inf"))
    picked = tl.load(first + window)
    left = tl.where(count >= size, 0, count)
    while left > 0:
        left -= 1
        here = token == picked
        kept = kept | here
        cosine = tl.load(cosines + (window * tokens + picked) * tokens + token, mask=real, other=0.0)
        nearest = tl.minimum(nearest, (1.0 - cosine) * weight * 1e6)
        nearest = tl.where(here, float("-inf"), nearest)
        picked = tl.argmax(nearest, axis=0).to(tl.int64)
    tl.store(keep + window * tokens + token, kept.to(tl.uint8), mask=token < tokens)
