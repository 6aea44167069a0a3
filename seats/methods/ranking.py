"""What several methods are made of: the highest scores, at random, and budgets that leave sound whole."""

from __future__ import annotations

import torch
from torch import Tensor


def highest(scores: Tensor, there: Tensor, counts: Tensor) -> Tensor:
    """The highest `counts` scores of every row, among those that are there: (..., N) bool.

    scores, there: (..., N). counts: (...) int64. Ties go to the lower index.
    """
    order = scores.masked_fill(~there, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter(-1, order, place)
    return there & (rank < counts[..., None])


def noise(count: int, device: torch.device) -> Tensor:
    """(count,) float32, shuffled but the same whenever it is asked for: the choice of what is left to chance.

    Arithmetic on indices, since a random generator of the device would be a state of the graph.
    """
    bits = torch.arange(1, count + 1, device=device)
    for _ in range(2):
        bits = ((bits >> 16) ^ bits) * 0x45D9F3B & 0xFFFFFFFF
    return ((bits >> 16) ^ bits).float()


def part(tokens: Tensor, ratio: float | Tensor) -> Tensor:
    """max(1, int(ratio · tokens)) of so many tokens, all at most, 0 of none: int64."""
    return (ratio * tokens.double()).long().clamp(min=1).minimum(tokens)


def sound_intact(
    video: Tensor, audio: Tensor, video_ratio: float, audio_ratio: float, floor: float = 0.05
) -> tuple[Tensor, Tensor]:
    """The ratios of a method made for pictures, at the budget of these two ratios (arXiv 2605.20035, its code).

    video, audio: (B,) int64 tokens. All of the sound is kept, and of video what the budget leaves, but not less than
    `floor`; sound gives the difference. Returns the ratios of video and of sound, (B,) float64.
    """
    v, a = video.double(), audio.double()
    total = (v * video_ratio + a * audio_ratio).trunc()
    of_video = ((total - a) / v.clamp(min=1)).clamp(min=floor)
    of_audio = torch.where(of_video > floor, 1.0, (total - floor * v) / a.clamp(min=1))
    of_audio = torch.where(of_video > 1, (total - v) / a.clamp(min=1), of_audio).clamp(max=1)
    # Without one of them, the ratios stay as they are.
    both = (video > 0) & (audio > 0)
    return torch.where(both, of_video.clamp(max=1), video_ratio), torch.where(both, of_audio, audio_ratio)
