"""Stage I: the tokens of a window that differ most, before the decoder (winDivPrune, arXiv 2605.20035)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seats.budget import keep_counts
from seats.method import Media, require_ratio
from seats.operators import operator

BLOCK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Windows are taken in blocks whose float32 features and similarities fit in this."""


def win_div_prune(features: Tensor, attention: Tensor, window_tokens: int, ratio: float) -> Tensor:
    """The tokens of one modality that Stage I keeps: sorted indices, int64.

    features: (N, D) embeddings as they enter the decoder. attention: (N,) not negative, the attention that each token
    receives in its encoder's last block. Each window of `window_tokens` in a row, the last perhaps shorter, keeps
    max(1, round(ratio · its tokens)) of them. Raises ValueError for sizes that do not fit or a ratio outside (0, 1].
    """
    if features.dim() != 2 or attention.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (N, D) and attention (N,), not {tuple(features.shape)} and {tuple(attention.shape)}."
        )
    if window_tokens < 1:
        raise ValueError(f"window_tokens must be at least 1, not {window_tokens}.")
    require_ratio("ratio", ratio)
    tokens = len(features)
    windows = -(-tokens // window_tokens)
    padding = windows * window_tokens - tokens
    first_tokens = torch.arange(windows, device=features.device) * window_tokens
    sizes = (tokens - first_tokens).clamp(max=window_tokens)
    keep = max_min_keep(
        rearrange(F.pad(features, (0, 0, 0, padding)), "(w n) d -> w n d", n=window_tokens),
        rearrange(F.pad(attention, (0, padding)), "(w n) -> w n", n=window_tokens),
        sizes,
        keep_counts(sizes, ratio),
    )
    return keep.flatten().nonzero().squeeze(-1)


def keep_most_diverse(media: Media, ratio: float) -> Tensor:
    """Stage I on windows of one modality, which keep so large a share: (B, W, n) bool."""
    sizes = media.sizes.flatten()
    features, weights = media.features.flatten(0, 1), media.received.flatten(0, 1)
    return max_min_keep(features, weights, sizes, keep_counts(sizes, ratio)).view(media.received.shape)


@operator("seats::max_min_keep", device_types="cpu")
def max_min_keep(features: Tensor, weights: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """Weighted max-min diversity, every window for itself: each pick is the token farthest from those picked.

    features: (W, n, D) embeddings, weights: (W, n) not negative, both of any float type; all is computed in float32.
    sizes, counts: (W,) int64, the tokens of each window and how many to keep; the rest of the n is padding, is never
    picked and changes nothing. Returns (W, n) bool, exactly min(counts, sizes) of a window true.

    The distance from token i to token j is (1 - cos(i, j)) · weight of j · 1e6. The first pick has the largest
    second smallest distance to it (the smallest is its own); ties go to the lower index. One operator of its own,
    since the picks follow one after another and would unroll into a graph.
    """
    keep = torch.zeros(weights.shape, dtype=torch.bool)
    there = sizes.nonzero().squeeze(-1)  # windows of a plan that its prompts do not fill cost nothing
    for block in blocks(len(there), features):
        some = there[block]
        keep[some] = pick(*begin(features[some], weights[some], sizes[some]), sizes[some], counts[some])
    return keep


@max_min_keep.register_fake
def _(features: Tensor, weights: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(weights, dtype=torch.bool)


@max_min_keep.register_kernel("cuda")
def _(features: Tensor, weights: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    from seats.kernels import pick_on_device

    keep = torch.empty(weights.shape, dtype=torch.bool, device=weights.device)
    for block in blocks(len(features), features):
        begun = begin(features[block], weights[block], sizes[block])
        pick_on_device(*begun, sizes[block], counts[block], keep[block])
    return keep


def blocks(windows: int, features: Tensor) -> list[slice]:
    """Slices of so many windows of these features, each within BLOCK_BYTES."""
    _, tokens, channels = features.shape
    step = max(1, BLOCK_BYTES[features.device.type] // (4 * tokens * (2 * channels + tokens)))
    return [slice(start, start + step) for start in range(0, windows, step)]


def begin(features: Tensor, weights: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines between a window's tokens (W, n, n) float32, their weights (W, n) float32, first picks (W,) int64."""
    padding = torch.arange(features.shape[1], device=features.device) >= sizes[:, None]
    weights = weights.float().masked_fill(padding, 0)
    cosines = cosines_between(features).masked_fill_(padding[:, None], -2)  # less than any cosine
    # Rounding keeps order, so the second smallest distance comes from the second largest cosine.
    neighbours = cosines.topk(min(2, cosines.shape[-1]), dim=-1).values[..., -1]
    first = distances(neighbours, weights).masked_fill(padding, float("-inf")).argmax(dim=-1)
    return cosines, weights, first


def cosines_between(features: Tensor) -> Tensor:
    """(W, n, D) → (W, n, n) float32."""
    if features.is_cuda and features.dtype == torch.bfloat16:
        # Products of bfloat16 are exact in float32, in which matrix units add them: many times the speed of float32's.
        norms = torch.linalg.vector_norm(features, dim=-1, dtype=torch.float32) + 1e-8
        products = torch.bmm(features, features.mT, out_dtype=torch.float32)
        return products.div_(norms[:, :, None]).div_(norms[:, None, :])
    features = features.float()
    features = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    return features @ features.mT


def distances(cosines: Tensor, weights: Tensor) -> Tensor:
    """Distances to tokens with these weights."""
    return (1 - cosines) * weights * 1e6


def pick(cosines: Tensor, weights: Tensor, first: Tensor, sizes: Tensor, counts: Tensor) -> Tensor:
    """The picks one after another, in all windows at once: (W, n) bool. The CPU's side of `pick_on_device`.

    A token that was picked falls to -∞, so that it is never picked again, not even among copies of one another.
    """
    windows = torch.arange(len(cosines))
    padding = torch.arange(cosines.shape[1]) >= sizes[:, None]
    everything = counts >= sizes
    steps = counts.masked_fill(everything, 0)
    keep = everything[:, None] & ~padding
    nearest = torch.full_like(weights, float("inf")).masked_fill_(padding, float("-inf"))
    picked = first
    for step in range(int(steps.max())):
        keep[windows, picked] |= step < steps
        nearest = nearest.minimum(distances(cosines[windows, picked], weights))
        nearest[windows, picked] = float("-inf")
        picked = nearest.argmax(dim=-1)
    return keep
