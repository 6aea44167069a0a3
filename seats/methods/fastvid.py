"""FastVID: segments of like frames, their salient tokens, and anchors that gather the rest (arXiv 2503.11187)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seats.diversity import BLOCK_BYTES, blocks
from seats.method import Kept, Media, Needs
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import highest, intact, part, sound_intact, unit
from seats.operators import operator
from seats.selection import compact, rank_in_group

FLOOR = 0.05
"""The least share of video where sound takes the rest of the budget (`sound_intact`)."""

NEIGHBOURS = 4
"""Nearest tokens that a density is of, the token itself among them."""


@dataclass(frozen=True, kw_only=True)
class FastVID(BeforeDecoder):
    """FastVID (arXiv 2503.11187, section 3), as in the authors' code for Qwen2.5-VL, on the video of a prompt.

    A frame is a temporal grid, of N tokens; its mean token is what it is compared by. A clip is cut into segments
    after the min_segments - 1 frames that are least like the next, and wherever that cosine is below `threshold`.
    Within a segment, frames in a row are one run while that cosine is at least `duplicate`, and only the last frame of
    a run keeps tokens. A segment of P frames may keep P · int(video_ratio · N), at least P. Of these

    - the share 1 - context_share, spread over the frames that keep, goes to the tokens that the frame's mean query
      pays most attention to, in the encoder's last block;
    - context_share, at least one token, goes to every anchor_step-th of these frames, counted from the last, in each
      of which density peaks among its other tokens are anchors. All of the segment but its salient tokens and the
      frame's anchors join, in each such frame, the anchor most like them. An anchor with m of them becomes the larger
      of anchor_weight and 1 / (m + 1) of itself and, for the rest, their mean.

    What a frame cannot hold is lost: anchors are half of it at most, unless it is a segment of its own. So less is kept
    than video_ratio, the more so the stiller the picture. Survivors keep their order and their places.

    What differs: a clip of fewer frames than min_segments is cut after each, where the authors' code fails. Each clip
    of a prompt is taken for itself. Of equal densities the first is the higher, where that code adds a random number.
    Sound, which the paper does not have, stays whole and the whole budget is taken from video; where that does not
    suffice any tokens of sound go (`sound_intact`). What Qwen3-Omni adds to pictures in its first layers is not merged:
    an anchor keeps its own.

    min_segments, anchor_step: at least 1. context_share, anchor_weight: in [0, 1]. threshold, duplicate: cosines.
    Raises ValueError for others, and for a ratio outside (0, 1].
    """

    min_segments: int = 8
    threshold: float = 0.84
    duplicate: float = 0.95
    context_share: float = 0.4
    anchor_step: int = 4
    anchor_weight: float = 0.6

    needs: ClassVar[Needs | None] = Needs(grids=1, mean_query=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_segments", "anchor_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("context_share", "anchor_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        """Exact for sound alone: how much of video finds no room depends on the data."""
        of_video, of_audio = (torch.tensor([sizes], dtype=torch.long) for sizes in (video, audio))
        ratios = sound_intact(of_video.sum(-1), of_audio.sum(-1), self.video_ratio, self.audio_ratio, FLOOR)
        return int(part(of_video, ratios[0][:, None]).sum() + part(of_audio.sum(-1), ratios[1]).sum()), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        return intact(self.condensed, video, audio, (self.video_ratio, self.audio_ratio), FLOOR)

    def condensed(self, video: Media, ratio: Tensor) -> Kept:
        """Salient tokens and anchors of video, and what the anchors become. ratio: (B,) float64."""
        there, features = video.there, video.features
        shares = self.shares(video, likeness_to_next(video), ratio)
        salient = highest(video.received, there, shares.salient)
        rest = there & ~salient
        asked = rest & (shares.anchors > 0)[..., None]
        scores = peaks(features.flatten(0, 1), asked.flatten(0, 1)).view(rest.shape)
        anchor = highest(scores, rest, shares.anchors)

        position, count = compact(anchor.flatten(1), self.most_anchors(*there.shape[1:]))
        merged = gathered(features, rest, anchor, shares.segment, position, count, self.anchor_weight)
        # Slots without an anchor all fall on one row more, which is cut off.
        empty = torch.arange(position.shape[1], device=count.device) >= count[:, None]
        target = position.masked_fill(empty, there[0].numel())[..., None].expand_as(merged)
        changed = F.pad(features.flatten(1, 2), (0, 0, 0, 1)).scatter(1, target, merged.to(features.dtype))
        return Kept(salient | anchor, changed[:, :-1].reshape(features.shape))

    def most_anchors(self, windows: int, tokens: int) -> int:
        """Anchors of so many windows at most. `sound_intact` leaves to video the larger of video_ratio and FLOOR."""
        share = max(self.video_ratio, FLOOR) * tokens + 1e-6
        return min(int(windows * max(1.0, self.context_share * share)), windows * tokens)

    def shares(self, video: Media, likeness: Tensor, ratio: Tensor) -> Shares:
        """How the budget is dealt. likeness: (B, W) float32, of each frame to the next; ratio: (B,) float64."""
        sizes, clip = video.sizes, video.clip
        another = clip.new_full((len(clip), 1), -1)
        joined = (sizes > 0) & (torch.cat((clip[:, 1:], another), dim=1) == clip) & (clip >= 0)
        rank = rank_in_group(-likeness, torch.where(joined, clip, -1))
        joined = joined & (rank >= self.min_segments - 1) & (likeness >= self.threshold)
        begins = ~F.pad(joined[:, :-1], (1, 0))
        segment = begins.cumsum(dim=1) - 1
        keeps = ~(joined & (likeness >= self.duplicate))

        frames, keeping = of_segment(torch.ones_like(segment), segment), of_segment(keeps.long(), segment)
        earlier = keeps.cumsum(dim=1) - keeps.long()
        frame = torch.arange(segment.shape[1], device=segment.device)
        begin = torch.where(begins, frame, 0).cummax(dim=1).values
        number = earlier - earlier.gather(1, begin)  # among the frames of the segment that keep
        from_end = keeping - 1 - number

        budget = frames * part(sizes, ratio[:, None])
        context = (budget.double() * self.context_share).long().clamp(min=1).minimum(budget)
        anchors = dealt(context, (keeping - 1) // self.anchor_step + 1, from_end // self.anchor_step)
        anchors = torch.where(keeps & (from_end % self.anchor_step == 0), anchors, 0)
        anchors = torch.where(frames > 1, anchors.minimum(sizes // 2), anchors)
        salient = torch.where(keeps, dealt(budget - context, keeping, number), 0).minimum(sizes - anchors)
        return Shares(segment, salient, anchors)


class Shares(NamedTuple):
    """segment: (B, W) int64, which one a frame is in, rising. salient, anchors: (B, W) int64 tokens that it keeps."""

    segment: Tensor
    salient: Tensor
    anchors: Tensor


def likeness_to_next(video: Media) -> Tensor:
    """Cosine of the mean tokens of each frame and the next: (B, W) float32, of the last frame no matter what."""
    total = video.features.masked_fill(~video.there[..., None], 0).sum(dim=2, dtype=torch.float32)
    mean = unit(total / video.sizes.clamp(min=1)[..., None], 1e-12)
    return (mean * mean.roll(-1, dims=1)).sum(dim=-1)


def of_segment(values: Tensor, segment: Tensor) -> Tensor:
    """The sum over the segment of each frame: (B, W)."""
    return torch.zeros_like(values).scatter_add(1, segment, values).gather(1, segment)


def dealt(whole: Tensor, parts: Tensor, number: Tensor) -> Tensor:
    """What the part of this number gets of a whole, of which the first parts get one more where it does not divide."""
    return whole // parts + (number < whole % parts).long()


@operator("seats::euclidean_peaks")
def peaks(features: Tensor, among: Tensor) -> Tensor:
    """How much of a cluster's centre each token is among some of its frame (DPC-kNN): (W, n) float32, 0 of others.

    features: (W, n, D), of any float type. among: (W, n) bool. In blocks of frames, as matrices of n² may be large.
    """
    scores = torch.zeros(among.shape, device=among.device)
    if among.device.type == "cpu":  # no GPU is waited for: frames without any token asked for are left out
        some = among.any(dim=1).nonzero().squeeze(-1)
        for block in blocks(len(some), features):
            scores[some[block]] = peaks_of(features[some[block]], among[some[block]])
        return scores
    for block in blocks(len(features), features):
        scores[block] = peaks_of(features[block], among[block])
    return scores


@peaks.register_fake
def _(features: Tensor, among: Tensor) -> Tensor:
    return torch.empty_like(among, dtype=torch.float32)


def peaks_of(features: Tensor, among: Tensor) -> Tensor:
    """Density times the distance to the nearest token of a higher one, or the frame's largest where there is none.

    Distances are Euclidean over √D; the density of a token is exp(-mean square of those to its nearest tokens).
    """
    tokens, channels = features.shape[1:]
    features = features.masked_fill(~among[..., None], 0).float()
    # Distances are the same from anywhere; seen from the mean, less is lost to rounding.
    features = features - (features.sum(dim=1) / among.sum(dim=1, keepdim=True).clamp(min=1))[:, None]
    lengths = features.square().sum(dim=-1)
    squares = (lengths[:, None] + lengths[..., None] - 2 * features @ features.mT).clamp(min=0) / channels
    squares = squares.masked_fill(torch.eye(tokens, dtype=torch.bool, device=among.device), 0)
    squares = squares.masked_fill(~among[:, None], float("inf"))
    nearest = squares.topk(min(NEIGHBOURS, tokens), dim=-1, largest=False).values
    absent = nearest.isinf()  # where fewer are left
    mean = nearest.masked_fill(absent, 0).sum(dim=-1) / (~absent).sum(dim=-1).clamp(min=1)
    density = (-mean).exp().masked_fill(~among, -1)

    number = torch.arange(tokens, device=among.device)
    mine, other = density[..., None], density[:, None]
    denser = (other > mine) | ((other == mine) & (number < number[:, None]))
    distances = squares.sqrt()
    to_denser = distances.masked_fill(~denser, float("inf")).amin(dim=-1)
    farthest = distances.masked_fill(~(among[:, None] & among[..., None]), 0).amax(dim=(1, 2))
    return (density * torch.where(denser.any(dim=-1), to_denser, farthest[:, None])).masked_fill(~among, 0)


@operator("seats::gathered")
def gathered(
    features: Tensor, rest: Tensor, anchor: Tensor, segment: Tensor, position: Tensor, count: Tensor, weight: float
) -> Tensor:
    """What anchors become with the mean of those that join them: (B, K, D) float32.

    features: (B, W, n, D), of any float type. rest, anchor: (B, W, n) bool, tokens that join, the anchors among them.
    segment: (B, W) int64, rising. position: (B, K) int64, where the anchors are among W · n tokens, in order; the first
    `count`, (B,) int64, are real, others are of no use. In blocks of frames, without the matrix of all cosines.
    """
    real = torch.arange(position.shape[1], device=position.device) < count[:, None]
    rows = [
        gathered_in_row(features[row], rest[row], anchor[row], segment[row], position[row], real[row], weight)
        for row in range(len(features))
    ]
    return torch.stack(rows)


@gathered.register_fake
def _(
    features: Tensor, rest: Tensor, anchor: Tensor, segment: Tensor, position: Tensor, count: Tensor, weight: float
) -> Tensor:
    return features.new_empty((*position.shape, features.shape[-1]), dtype=torch.float32)


def gathered_in_row(
    features: Tensor, rest: Tensor, anchor: Tensor, segment: Tensor, position: Tensor, real: Tensor, weight: float
) -> Tensor:
    """`gathered` of one prompt; real: (K,) bool."""
    windows, tokens, channels = features.shape
    anchors = features.flatten(0, 1)[position].masked_fill(~real[:, None], 0).float()
    directions = unit(anchors, 1e-12)  # of what joins, the length does not matter
    frame = position // tokens
    slot_segment = segment[frame].masked_fill(~real, windows)
    frame = frame.masked_fill(~real, windows)  # of no frame: not in the way of the anchors of the first
    total, members = torch.zeros_like(anchors), torch.zeros(len(anchors), device=anchors.device)
    number = torch.arange(windows, device=frame.device)
    # Of a token: its features twice, and of each anchor a cosine, an index, and what `nearest` makes of them.
    step = max(1, BLOCK_BYTES[features.device.type] // (4 * tokens * (2 * channels + 8 * len(anchors))))
    for first in range(0, windows, step):
        some = slice(first, first + step)
        slots = slots_of(segment[some], slot_segment)
        if slots.start == slots.stop:
            continue
        block = features[some].masked_fill(~rest[some][..., None], 0).float().flatten(0, 1)
        same_segment = segment[some, None] == slot_segment[slots]
        same_frame = number[some, None] == frame[slots]
        joins = rest[some][..., None] & same_segment[:, None] & ~(anchor[some][..., None] & same_frame[:, None])
        joins = nearest(block @ directions[slots].mT, frame[slots], windows + 1) & joins.flatten(0, 1)
        total[slots] += joins.mT.float() @ block
        members[slots] += joins.sum(dim=0)
    own = (1 / (members + 1)).clamp(min=weight)[:, None]
    return own * anchors + (1 - own) * total / members.clamp(min=1)[:, None]


def slots_of(segments: Tensor, slot_segment: Tensor) -> slice:
    """The anchors of these segments; all on a GPU, which would have to be waited for. Both (…,) int64, rising."""
    if segments.device.type != "cpu":
        return slice(0, len(slot_segment))
    first = torch.searchsorted(slot_segment, segments[:1])
    return slice(int(first), int(torch.searchsorted(slot_segment, segments[-1:], right=True)))


def nearest(products: Tensor, frame: Tensor, frames: int) -> Tensor:
    """The anchor of the largest product, the first of equal ones, in each frame: (N, K) bool.

    products: (N, K) float32, of tokens of any length with anchors of length 1. frame: (K,) int64 below `frames`, of
    which one an anchor is.
    """
    group = frame.expand_as(products)
    least = products.new_full((len(products), frames), float("-inf"))
    best = least.scatter_reduce(1, group, products, "amax").gather(1, group)
    slot = torch.arange(len(frame), dtype=torch.int32, device=frame.device).expand_as(products)
    candidate = torch.where(products == best, slot, len(frame))
    first = candidate.new_full((len(products), frames), len(frame)).scatter_reduce(1, group, candidate, "amin")
    return slot == first.gather(1, group)
