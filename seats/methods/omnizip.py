"""OmniZip: sound that its encoder attends to, and video cut the harder the less of such sound it has (2511.14582)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from seats.diversity import blocks
from seats.method import Kept, Media, Needs
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import highest, unit
from seats.operators import operator
from seats.selection import compact, rank_in_group

BLOCK = 4096
"""Tokens of either side whose cosines are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class OmniZip(BeforeDecoder):
    """OmniZip (arXiv 2511.14582, section 3), as in the authors' code, for prompts of video and sound.

    Sound, the whole prompt at once: the dominant tokens, which receive the most attention in the encoder's last block,
    stay as they are. Of the others, every so many-th is an anchor; the rest join the anchor most like them, and of
    these the `merged` most like any token of video make up half of the anchor, weighted by the softmax of that
    likeness. No token of sound but these is left.

    Video: adjacent tokens of a modality are a run, and the i-th run of video is a group with the i-th of sound. The
    share of its sound that is kept, S, sets what a group loses of its video: most_removed, less the span to
    least_removed times S. With more than two groups the shares are brought near the whole budget, all but the smallest
    and the largest (`to_budget`). Of a group's grids the first, third, … keep the tokens that are density peaks, the
    others those least like the token at their place in the grid before. Survivors keep their order and their places.

    video_ratio, audio_ratio: the shares kept. The paper counts what is removed: of video 1 - video_ratio, of sound
    1 + contextual - audio_ratio within [0, 1], so that dominant tokens and anchors together are audio_ratio.
    Video saturates as published: groups lose at least least_removed and at most most_removed, so that ratios outside
    [0.25, 0.65] are not reached, and with one or two groups the ratio has no say. Sound keeps `contextual` at least.
    contextual: anchors, as a share of the sound. merged: the paper's G, 0 for no anchors at all. neighbours: k of the
    density.

    Of the two versions that the authors' code has had (github.com/KD-TAO/OmniZip) this is the later, `omnizip_core`,
    whose groups are the runs of the prompt, whose budget counts tokens and whose density peaks are weighed by density.
    The earlier, `omnizip_units`, has groups of four frames and 50 tokens of sound, counts groups, keeps incomplete ones
    whole and takes the tokens least like their neighbours. arXiv 2605.20035 publishes it, for comparison, at 35 %, with
    the ratios of SEATS, and at 25 %, with 0.25 for both (`omni.protocol`); at less than that it saturates.

    What differs: attention of sound is within the encoder's windows, where the authors' code for Qwen2.5-Omni takes
    the softmax over the whole clip. A grid belongs to the run of its first token; below half a frame per second
    Qwen2.5-Omni cuts grids between runs, and the authors' code keeps such pieces whole. The budget is of all the
    prompt's clips, not of the first. A prompt without sound, where that code fails, keeps video_ratio of every grid,
    as do runs of video past the last of sound.

    Raises ValueError for a ratio outside (0, 1] and where least_removed and most_removed do not rise within [0, 1].
    """

    least_removed: float = 0.35
    most_removed: float = 0.75
    contextual: float = 0.05
    merged: int = 3
    neighbours: int = 5

    needs: ClassVar[Needs | None] = Needs(grids=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.least_removed <= self.most_removed <= 1:
            raise ValueError(
                "least_removed and most_removed must rise within [0, 1], "
                f"not {self.least_removed} and {self.most_removed}."
            )

    @property
    def removed(self) -> float:
        """The share of video that is to go."""
        return 1 - self.video_ratio

    @property
    def anchors(self) -> float:
        """The share of sound that is made anchors."""
        return self.contextual if self.merged else 0.0

    @property
    def dominant(self) -> float:
        """The share of sound that is kept as it is."""
        return min(max(self.audio_ratio - self.anchors, 0.0), 1.0)

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        """Exact but for the video of a prompt with sound, whose share is not known before the data: the largest."""
        sound = torch.tensor(sum(audio))
        least = min(self.least_removed, self.removed) if sum(audio) else self.removed
        of_video = left(torch.tensor(video, dtype=torch.long), least).sum()
        return int(of_video + sum(self.sound_counts(sound))), 0

    def sound_counts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Dominant tokens and anchors of so many: int64, of the same shape."""
        dominant = (self.dominant * tokens.double()).round().long()
        return dominant, (self.anchors * tokens.double()).round().long().minimum(tokens - dominant)

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        if audio is None:
            return None if video is None else cut(video, self.removed, self.neighbours), None
        sound = self.sound_kept(audio, video)
        if video is None:
            return None, sound
        return cut(video, self.removed_shares(video, audio, sound.keep), self.neighbours), sound

    def worth(self, audio: Media) -> Tensor:
        """By which tokens of sound are dominant: (B, W · n) float32."""
        return audio.received.flatten(1)

    def sound_kept(self, audio: Media, video: Media | None) -> Kept:
        """Dominant tokens and anchors of sound; what the anchors become."""
        there, features = audio.there.flatten(1), audio.features.flatten(1, 2)
        counts = self.sound_counts(audio.sizes.sum(dim=-1))
        dominant = highest(self.worth(audio), there, counts[0])
        if not self.anchors:
            return Kept(dominant.view(audio.received.shape))

        slots = there.shape[1]
        most_rest = min(slots, int((1 - self.dominant) * slots) + 1)
        position, count = compact(there & ~dominant, most_rest)  # of the others, in order
        rest, anchors = rows(features, position), counts[1][:, None]
        step = (count[:, None] // anchors.clamp(min=1)).clamp(min=1)
        anchor = torch.arange(min(most_rest, int(self.anchors * slots) + 1), device=there.device).expand(len(there), -1)
        is_anchor = anchor < anchors
        number = (anchor * step).clamp(max=most_rest - 1)
        others = torch.arange(most_rest, device=there.device).expand(len(there), -1)
        joins = (others < count[:, None]) & ~((others % step == 0) & (others // step < anchors))

        changed = merge(rest, joins, rows(rest, number), is_anchor, video, self.merged)
        # Slots without an anchor all fall on one row more, which is cut off.
        place = torch.where(is_anchor, position.gather(1, number), slots)
        keep = F.pad(dominant, (0, 1)).scatter(1, place, True)[:, :-1]
        target = place[..., None].expand_as(changed)
        features = F.pad(features, (0, 0, 0, 1)).scatter(1, target, changed.to(features.dtype))[:, :-1]
        return Kept(keep.reshape(audio.received.shape), features.reshape(audio.features.shape))

    def removed_shares(self, video: Media, audio: Media, sound: Tensor) -> Tensor:
        """What each grid of video loses, given which tokens of sound are kept, (B, W', n) bool: (B, W) float64."""
        run, number = grid_runs(video)
        sound_run = run_numbers(audio)
        kept, tokens = (
            torch.zeros_like(sound_run).scatter_add(1, sound_run.clamp(min=0), some.flatten(1).long())
            for some in (sound, audio.there)
        )
        share = (kept.float() / tokens.clamp(min=1).float()).double().gather(1, run.clamp(0, kept.shape[1] - 1))
        bounds = self.least_removed, self.most_removed
        initial = (self.most_removed + (self.least_removed - self.most_removed) * share).clamp(*bounds)
        guided = (video.sizes > 0) & (run <= sound_run[:, -1:])
        groups = (guided & (number == 0)).sum(dim=1, keepdim=True)
        shares = torch.where(groups > 2, to_budget(initial, video.sizes, run, guided, self.removed, bounds), initial)
        return torch.where(guided, shares, self.removed)


def cut(video: Media, removed: float | Tensor, neighbours: int) -> Kept:
    """The tokens of each grid that are left where so much is removed, a number or (B, W) float64."""
    _, number = grid_runs(video)
    sizes = video.sizes.flatten()
    peaks = density_peaks(video.features.flatten(0, 1), sizes, neighbours).view(video.received.shape)
    scores = torch.where((number % 2 == 0)[..., None], peaks, -likeness(video))
    return Kept(highest(scores, video.there, left(video.sizes, removed)))


def grid_runs(video: Media) -> tuple[Tensor, Tensor]:
    """The run of each grid's first token, and the number of the grid among those of its run: (B, W) int64 each."""
    run = run_numbers(video).view(video.place.shape)[..., 0]
    begins = run != F.pad(run[:, :-1], (1, 0), value=-1)
    grid = torch.arange(run.shape[1], device=run.device)
    return run, grid - torch.where(begins, grid, 0).cummax(dim=1).values


def run_numbers(media: Media) -> Tensor:
    """The run of adjacent tokens in the prompt that each token is in, from 0: (B, W · n) int64, rising."""
    there = media.there.flatten(1)
    place = media.place.flatten(1).masked_fill(~there, -2)
    before = F.pad(place.cummax(dim=1).values[:, :-1], (1, 0), value=-2)
    return (there & (place != before + 1)).cumsum(dim=1) - 1


def left(sizes: Tensor, removed: float | Tensor) -> Tensor:
    """int(size · (1 - removed)), with a little more, so that no token is lost to the rounding of sums: int64."""
    return (sizes.double() * (1 - removed) + 1e-6).long().minimum(sizes)


def to_budget(
    initial: Tensor, sizes: Tensor, run: Tensor, guided: Tensor, removed: float, bounds: tuple[float, float]
) -> Tensor:
    """Shares that are lost, such that of all guided grids `removed` is lost where `bounds` let it: (B, W) float64.

    initial: (B, W) float64. sizes, run: (B, W) int64. guided: (B, W) bool. The first run of the smallest share and the
    first of the largest stay as they are. The others are scaled; what is then missing is given to each of them alike,
    once, so that where `bounds` hold some of them back the rest is missed.
    """
    tokens = sizes.double()
    lost = initial * tokens
    target = removed * total(tokens, guided)
    smallest = run.gather(1, initial.masked_fill(~guided, float("inf")).argmin(dim=1, keepdim=True))
    largest = run.gather(1, initial.masked_fill(~guided, float("-inf")).argmax(dim=1, keepdim=True))
    fixed = guided & ((run == smallest) | (run == largest))
    others = guided & ~fixed
    of_others = total(lost, others)
    scale = (target - total(lost, fixed)) / of_others
    scaled = torch.where(others, (initial * scale).clamp(*bounds), initial)
    missing = target - total(scaled * tokens, guided)
    repaired = (scaled + missing / total(tokens, others)).clamp(*bounds)
    shares = torch.where(others & (missing.abs() > 1e-3), repaired, scaled)
    off = (total(lost, guided) - target).abs() > 1e-3
    return torch.where(off & (of_others > 0), shares, initial)


def total(values: Tensor, some: Tensor) -> Tensor:
    """The sum of some of each row: (B, 1)."""
    return values.masked_fill(~some, 0).sum(dim=1, keepdim=True)


def rows(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, N, D), (B, M) → (B, M, D)."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def merge(rest: Tensor, joins: Tensor, anchors: Tensor, is_anchor: Tensor, video: Media | None, merged: int) -> Tensor:
    """Anchors of which half is what they have taken in: (B, A, D) float32.

    rest: (B, M, D), joins: (B, M) bool, which of them join an anchor. anchors: (B, A, D), is_anchor: (B, A) bool.
    """
    likeness, nearest = best_cosines(rest, joins, anchors, is_anchor)
    score = likeness
    if video is not None:
        seen = video.there.flatten(1)
        crossmodal, _ = best_cosines(rest, joins, video.features.flatten(1, 2), seen)
        score = torch.where(seen.any(dim=1, keepdim=True), crossmodal, likeness)

    slots = anchors.shape[1]
    rank = rank_in_group(score, torch.where(joins, nearest, slots))
    slot = torch.where(joins & (rank < merged), nearest * merged + rank, slots * merged)  # the last is cut off
    member, weight = (
        torch.zeros(len(rest), slots * merged + 1, dtype=values.dtype, device=rest.device)
        .scatter(1, slot, values)[:, :-1]
        .unflatten(1, (slots, merged))
        for values in (torch.arange(rest.shape[1], device=rest.device).expand_as(slot), score.exp())
    )  # exp of a cosine is above 0, so that 0 is no member
    weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    taken = anchors.float()
    for each in range(merged):
        share = weight[..., each, None]
        taken = torch.where(share > 0, taken + share * rows(rest, member[..., each]).float(), taken)
    return taken / (1 + weight.sum(dim=-1, keepdim=True))


@operator("seats::best_cosines")
def best_cosines(queries: Tensor, asked: Tensor, keys: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of each query to any key that is there, (B, Q) float32, and the first such key, (B, Q) int64.

    queries: (B, Q, D), keys: (B, K, D), of any float type. asked: (B, Q) bool, queries to answer; others may get -∞
    and 0. Where no key is there, -∞ and 0. In blocks, without the matrix of all cosines, which would unroll into a
    graph.
    """
    best = torch.full(asked.shape, float("-inf"), device=asked.device)
    index = torch.zeros_like(asked, dtype=torch.long)
    for first_key in range(0, filled(there), BLOCK):
        some = slice(first_key, first_key + BLOCK)
        padding = ~there[:, some]
        block = unit(keys[:, some].masked_fill(padding[..., None], 0))
        for first in range(0, filled(asked), BLOCK):
            these = slice(first, first + BLOCK)
            cosines = (unit(queries[:, these]) @ block.mT).masked_fill_(padding[:, None], float("-inf"))
            value, found = cosines.max(dim=-1)
            better = value > best[:, these]
            best[:, these] = torch.where(better, value, best[:, these])
            index[:, these] = torch.where(better, found + first_key, index[:, these])
    return best, index


@best_cosines.register_fake
def _(queries: Tensor, asked: Tensor, keys: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(asked, dtype=torch.float32), torch.empty_like(asked, dtype=torch.long)


@operator("seats::density_peaks")
def density_peaks(features: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    """How much of a cluster's centre each token is among those of its window (DPC-kNN): (W, n) float32.

    features: (W, n, D), of any float type. sizes: (W,) int64. In blocks of windows, as matrices of n² may be large.
    """
    scores = torch.zeros(features.shape[:2], device=features.device)
    for block in blocks(filled((sizes > 0)[None]), features):
        scores[block] = peaks_of(features[block], sizes[block], neighbours)
    return scores


@density_peaks.register_fake
def _(features: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=torch.float32)


def filled(some: Tensor) -> int:
    """Columns up to the last that any row has, (B, N) bool; all on a GPU, which would have to be waited for."""
    if some.device.type != "cpu":
        return some.shape[1]
    return int((some.any(dim=0) * torch.arange(1, some.shape[1] + 1)).max())


def peaks_of(features: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    """Density times the distance to the nearest token of a higher density, or to the farthest where there is none.

    Distances are 1 - cosine; the density of a token is exp(-mean distance to its nearest `neighbours`).
    """
    tokens = features.shape[1]
    padding = torch.arange(tokens, device=sizes.device) >= sizes[:, None]
    features = unit(features.masked_fill(padding[..., None], 0), 1e-12)
    no_pair = padding[:, None] | torch.eye(tokens, dtype=torch.bool, device=sizes.device)
    distances = (1 - features @ features.mT).masked_fill_(no_pair, float("inf"))
    nearest = distances.topk(min(neighbours, tokens - 1), dim=-1, largest=False).values
    absent = nearest.isinf()  # in a window with fewer tokens
    mean = nearest.masked_fill(absent, 0).sum(dim=-1) / (~absent).sum(dim=-1).clamp(min=1)
    density = (-mean).exp().masked_fill(padding, -1)
    denser = density[:, None] > density[..., None]
    to_denser = distances.masked_fill(~denser, float("inf")).amin(dim=-1)
    farthest = distances.masked_fill(no_pair, 0).amax(dim=-1)
    return density * torch.where(denser.any(dim=-1), to_denser, farthest)


def likeness(video: Media) -> Tensor:
    """Cosine of each token and the one at its place in the grid before: (B, W, n) float32."""
    tokens = unit(video.features.masked_fill(~video.there[..., None], 0), 1e-12)
    return (tokens * torch.cat((tokens[:, :1], tokens[:, :-1]), dim=1)).sum(dim=-1)
