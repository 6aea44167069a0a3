"""VisionZip: the tokens that an encoder looks at most, and means of the others (arXiv 2412.04467)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seats.method import Kept, Media, Needs
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import apart, highest, intact, part, sound_intact, unit

CONTEXTUAL = 0.05
"""Of a window's tokens, that others are merged into (the authors' code for Qwen2.5-VL)."""


@dataclass(frozen=True, kw_only=True)
class VisionZip(BeforeDecoder):
    """VisionZip (arXiv 2412.04467, section 3) for video and sound together, as in the comparison of arXiv 2605.20035.

    In windows of one temporal grid and of 50 tokens of sound: the dominant tokens, which receive the most attention in
    the encoder's last block, stay as they are. Of the others, every so many-th is an anchor that the mean of those is
    added to whose keys are most like its own. No token but these is left; they keep their places.
    both: of video and of sound; else sound stays whole and the whole budget is taken from video, and where that does
    not suffice any tokens of sound go (`sound_intact`).

    What Qwen3-Omni adds to pictures in its first layers is not merged: an anchor keeps its own.
    """

    both: bool = True

    needs: ClassVar[Needs | None] = Needs(grids=1, keys=True)

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        of_video, of_audio = (torch.tensor([sizes], dtype=torch.long) for sizes in (video, audio))
        if self.both:
            kept = [window_counts(of_video, self.video_ratio), window_counts(of_audio, self.audio_ratio)]
            return sum(int(counts.sum()) for pair in kept for counts in pair), 0
        ratios = sound_intact(of_video.sum(-1), of_audio.sum(-1), self.video_ratio, self.audio_ratio)
        dominant, contextual = window_counts(of_video, ratios[0])
        return int((dominant + contextual).sum() + part(of_audio.sum(-1), ratios[1]).sum()), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        share_out = apart if self.both else intact
        return share_out(zipped, video, audio, (self.video_ratio, self.audio_ratio))


def window_counts(sizes: Tensor, ratio: float | Tensor) -> tuple[Tensor, Tensor]:
    """Dominant and contextual tokens of windows of these sizes, (B, W) int64 each. ratio: a number or (B,) float64.

    Truncated in float32, as the comparison's code does it: 0.65 of 40 is 26 then, not 25.
    """
    share = torch.as_tensor(ratio, dtype=torch.float64, device=sizes.device)[..., None] - CONTEXTUAL
    dominant = (share.float() * sizes.float()).long().clamp(min=1).minimum(sizes)
    dominant = torch.where(share > 0, dominant, 0)
    contextual = (CONTEXTUAL * sizes.double()).round().long().clamp(min=1).minimum(sizes - dominant)
    return dominant, contextual


def zipped(media: Media, ratio: float | Tensor) -> Kept:
    """The dominant tokens of each window, and anchors with the means of their members added."""
    assert media.keys is not None
    there = media.there
    counts, contextual = window_counts(media.sizes, ratio)
    dominant = highest(media.received, there, counts)
    rest = there & ~dominant
    number = rest.cumsum(dim=-1) - 1
    step = (rest.sum(dim=-1) // contextual.clamp(min=1)).clamp(min=1)[..., None]
    anchor = rest & (number % step == 0) & (number // step < contextual[..., None])
    member = rest & ~anchor

    keys = unit(media.keys.masked_fill(~there[..., None], 0))
    likeness = (keys @ keys.mT).masked_fill(~anchor[..., None, :], float("-inf"))
    joins = torch.nn.functional.one_hot(likeness.argmax(dim=-1), likeness.shape[-1]).bool() & member[..., None]
    share = joins.mT.float() / joins.sum(dim=-2).clamp(min=1)[..., None]  # of each token in each anchor's mean
    features = media.features.float().masked_fill(~there[..., None], 0)
    return Kept(dominant | anchor, features + share @ features)
