"""DivPrune: the tokens of a clip that differ most (arXiv 2503.02175)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seats.budget import keep_counts
from seats.method import Kept, Media, Needs
from seats.methods.before import BeforeDecoder
from seats.methods.fastvid import FLOOR
from seats.methods.ranking import apart, intact, part, sound_intact, unit
from seats.operators import operator

BLOCK = 2048
"""Tokens whose neighbours are sought at a time."""


@dataclass(frozen=True, kw_only=True)
class DivPrune(BeforeDecoder):
    """DivPrune (arXiv 2503.02175, section 3) for video and sound together.

    Of all the prompt's tokens of a modality, as they enter the decoder, those are picked one after another whose
    cosine distance to the nearest of those picked is the largest; the first is the one farthest from its nearest
    neighbour. Survivors keep their order and their places.
    both: max(1, round(ratio · n)) of video and of sound apart; else sound stays whole and the whole budget is taken
    from video, and where that does not suffice any tokens of sound go (`sound_intact`).
    """

    both: bool = True

    needs: ClassVar[Needs | None] = None

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        of_video, of_audio = torch.tensor([sum(video)]), torch.tensor([sum(audio)])
        if self.both:
            return int(keep_counts(of_video, self.video_ratio) + keep_counts(of_audio, self.audio_ratio)), 0
        ratios = sound_intact(of_video, of_audio, self.video_ratio, self.audio_ratio)
        return int(keep_counts(of_video, ratios[0]) + part(of_audio, ratios[1])), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        share_out = apart if self.both else intact
        return share_out(self.most_diverse, video, audio, (self.video_ratio, self.audio_ratio))

    def most_diverse(self, media: Media, ratio: float | Tensor) -> Kept:
        """ratio: a number or (B,) float64, which `sound_intact` leaves to video: the larger of video_ratio and FLOOR at
        most."""
        there = media.there.flatten(1)
        features = unit(media.features.flatten(1, 2).masked_fill(~there[..., None], 0), 1e-8)
        most = ratio if isinstance(ratio, float) else max(self.video_ratio, FLOOR)
        steps = min(max(1, round(most * there.shape[1])), there.shape[1])
        keep = farthest(features, there, keep_counts(media.sizes.sum(dim=-1), ratio), steps)
        return Kept(keep.view(media.received.shape))


@operator("seats::farthest")
def farthest(features: Tensor, there: Tensor, counts: Tensor, steps: int) -> Tensor:
    """Max-min picks over the whole of a row, without the matrix of all distances: (B, N) bool.

    features: (B, N, D) float32 of length 1. there: (B, N) bool. counts: (B,) int64, `steps` at most. One operator,
    since the picks follow one after another; no host read on a GPU, which does all of `steps`.
    """
    nearest_other = torch.full(there.shape, float("inf"), device=there.device)
    for start in range(0, there.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        cosines = (features[:, block] @ features.mT).masked_fill_(~there[:, None], -2)  # less than any cosine
        # The most like is the token itself; alone, it is as far away as can be.
        second = cosines.topk(min(2, cosines.shape[-1]), dim=-1).values[..., -1]
        nearest_other[:, block] = 1 - second
    picked = nearest_other.masked_fill(~there, float("-inf")).argmax(dim=-1)
    rows = torch.arange(len(there), device=there.device)
    nearest = torch.full_like(nearest_other, float("inf")).masked_fill_(~there, float("-inf"))
    keep = torch.zeros_like(there)
    if there.device.type == "cpu":
        steps = int(counts.max())
    for step in range(steps):
        keep[rows, picked] |= step < counts
        distance = 1 - (features @ features[rows, picked][..., None]).squeeze(-1)
        nearest = nearest.minimum(distance)
        nearest[rows, picked] = float("-inf")  # never picked again, not even among copies of one another
        picked = nearest.argmax(dim=-1)
    return keep


@farthest.register_fake
def _(features: Tensor, there: Tensor, counts: Tensor, steps: int) -> Tensor:
    return torch.empty_like(there)
