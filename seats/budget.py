"""Stage II: how many tokens each window keeps. Everything is batched, (B, …), and of static shape."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_counts(tokens: Tensor, ratio: float | Tensor) -> Tensor:
    """How many to keep of so many tokens: integers → int64, max(1, round(ratio · tokens)), half to even, 0 of none."""
    return (ratio * tokens.double()).round().long().clamp(min=1).minimum(tokens)


def window_budgets(shares: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """Shares `keep` tokens out between windows, at least 1 and at most all tokens to each: (B, W) int64.

    shares: (B, W) float32, of sum 1. tokens: (B, W) int64, in each window; 0 in windows that are not there.
    keep: (B,) int64. The sum is `keep`, or the number of windows where that is more.
    """
    budgets = (keep[:, None] * shares).round().long().clamp(min=1).minimum(tokens)
    excess = budgets.sum(dim=-1) - keep
    # Taking from the largest is giving to the smallest of the negatives.
    budgets = -pour(-budgets, -tokens.clamp(max=1), excess.clamp(min=0))
    return pour(budgets, tokens, -excess.clamp(max=0))


def pour(levels: Tensor, caps: Tensor, amount: Tensor) -> Tensor:
    """Water-filling: gives 1 to the lowest level below its cap, the first of equals, `amount` times over.

    levels, caps: (B, W) int64, levels at most caps. amount: (B,) int64 not negative; what no cap leaves room for is
    not given. Returns (B, W).
    """
    # Levels rise together from the lowest. Between two neighbouring points (where a level joins at its own height and
    # leaves at its cap) a constant number of them rises, so that the amount poured is linear in the height.
    points, order = torch.cat((levels, caps), dim=-1).sort(dim=-1)
    rising = torch.where(order < levels.shape[-1], 1, -1).cumsum(dim=-1)
    poured = (points.diff(dim=-1) * rising[:, :-1]).cumsum(dim=-1)
    poured = torch.cat((torch.zeros_like(poured[:, :1]), poured), dim=-1)
    last = (poured <= amount[:, None]).sum(dim=-1, keepdim=True) - 1
    rest = amount[:, None] - poured.gather(-1, last)
    height = points.gather(-1, last) + rest // rising.gather(-1, last).clamp(min=1)
    filled = levels.maximum(height.minimum(caps))
    # Too little is left to raise all of the lowest by 1: the first of them get it.
    rest = amount[:, None] - (filled - levels).sum(dim=-1, keepdim=True)
    lowest = (filled == height) & (filled < caps)
    return filled + (lowest & (lowest.cumsum(dim=-1) <= rest))


def split_budgets(budgets: Tensor, video_share: Tensor, video: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Divides each window's budget between its modalities: two of (B, W) int64, for video and audio.

    budgets, video, audio: (B, W) int64, the budget and the tokens of each modality; no budget above their sum.
    video_share: (B, W) float32. A modality that has tokens in a window gets at least 1, even past the budget.
    """
    keep_video = (budgets * video_share).round().long().minimum(video)
    keep_audio = (budgets - keep_video).minimum(audio)
    keep_video = keep_video + (budgets - keep_video - keep_audio).minimum(video - keep_video)
    keep_audio = keep_audio + (budgets - keep_video - keep_audio).minimum(audio - keep_audio)
    keep_video, keep_audio = _rescue(keep_video, keep_audio, video, audio, budgets)
    keep_audio, keep_video = _rescue(keep_audio, keep_video, audio, video, budgets)
    return keep_video, keep_audio


def _rescue(
    keep: Tensor, other: Tensor, tokens: Tensor, other_tokens: Tensor, budgets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives 1 to a modality that would lose every token, from the other one where that has more than 1."""
    wiped = (tokens > 0) & (keep == 0)
    yielded = (budgets - 1).minimum(other_tokens).clamp(min=1)
    return torch.where(wiped, 1, keep), torch.where(wiped & (other > 1), yielded, other)
