"""DASH: segments that begin where sound changes, for sound and video (arXiv 2603.15685)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seats.diversity import blocks
from seats.method import Kept, Media
from seats.methods.omnizip import OmniZip, filled, left, likeness
from seats.methods.ranking import highest, unit
from seats.methods.vidcom2 import clip_sum, steady
from seats.methods.vidcom2 import likeness as gaussian
from seats.operators import operator
from seats.selection import compact

PARTS = (0.4, 0.3, 0.3)
"""Of change, distinctness and attention in what a token of sound is worth."""
GUIDANCE = 0.1
"""How far the share of its sound that a segment keeps moves that of its video, from none of it to all."""


@dataclass(frozen=True, kw_only=True)
class DASH(OmniZip):
    """DASH (arXiv 2603.15685, section 3), as in the authors' code, for prompts of video and sound.

    Sound, the whole prompt at once. A token's change is (1 - its cosine to the one before) / 2, of the first 1. Its
    distinctness is 1 - its likeness to the mean of all, as a share of the largest, a likeness as in VidCom2. Dominant
    are the tokens of the largest sum, by PARTS, of change, distinctness and attention received, the first and the last
    as shares of their largest. Of the others anchors are made as in OmniZip.

    A segment begins where the cosine to the token before is below `threshold`, `shortest` tokens after the last at
    least. In proportion of their tokens these bounds are those of the video, too. Where the share S of its sound is
    kept, a segment of video loses 1 - video_ratio + GUIDANCE · (0.5 - S), within least_removed and most_removed: of its
    grids the first, third, … keep the tokens least like their `neighbours` nearest ones, the others those least like
    the token at their place in the grid before. Survivors keep their order and their places.

    video_ratio, audio_ratio, contextual, merged: `OmniZip`; the authors' settings are 0.24, 0.60, 0.05 and 3. How much
    of video stays depends on the data, within five points of video_ratio.

    What differs: a frame is a temporal grid, and a grid is of the segment that its first token falls into. In the
    authors' code (github.com/laychou666/DASH) a frame is half a grid, as it counts the frames of the clip, of which the
    encoder joins two; it cuts frames anew from each bound on, and what is left over of a segment goes. It keeps a
    segment of less than two of its frames whole: at two frames a second, where 30 tokens of sound last longer than a
    grid, that is the last of a prompt at most; where frames are sparser it may be each, and all shapes, which are made
    before the data is known, would have to hold nearly all of a clip. Here it is treated like any other. A prompt
    without sound keeps video_ratio of every grid, there 15 points more, 65 % at most. Where nothing would be left of a
    grid, or of all sound, a token is. Attention of sound is within the encoder's windows.

    Raises ValueError for a ratio outside (0, 1], where least_removed and most_removed do not rise within [0, 1], and
    for `shortest` below 1.
    """

    least_removed: float = 0.1
    most_removed: float = 0.95
    threshold: float = 0.4
    shortest: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shortest < 1:
            raise ValueError(f"shortest must be at least 1, not {self.shortest}.")

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        """Exact but for the video of a prompt with sound, whose share is not known before the data: the largest."""
        least = self.removed
        if sum(audio):
            least = min(max(self.removed - GUIDANCE / 2, self.least_removed), self.most_removed)
        of_video = grid_counts(torch.tensor(video, dtype=torch.long), least).sum()
        return int(of_video + sum(self.sound_counts(torch.tensor(sum(audio))))), 0

    def sound_counts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        dominant, anchors = super().sound_counts(tokens)
        return torch.where(dominant + anchors > 0, dominant, tokens.clamp(max=1)), anchors

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        if audio is None:
            return None if video is None else self.cut_segments(video, 0 * video.sizes, self.removed), None
        sound = self.sound_kept(audio, video)
        return None if video is None else self.guided(video, audio, sound.keep), sound

    def worth(self, audio: Media) -> Tensor:
        """Of each token of sound, (B, W · n) float32."""
        there = audio.there
        first = torch.arange(there[0].numel(), device=there.device).view(there[0].shape) == 0
        change = ((1 - to_previous(audio)) / 2).clamp(0, 1).masked_fill(first, 1)
        alike = likeness_to_mean(audio)
        parts = (
            of_largest(change, there),
            1 - alike / largest(alike, there).clamp(min=1e-6),
            of_largest(audio.received, there),
        )
        return torch.stack([weight * part for weight, part in zip(PARTS, parts, strict=True)]).sum(dim=0).flatten(1)

    def guided(self, video: Media, audio: Media, kept: Tensor) -> Kept:
        """Video, given which tokens of sound are kept, (B, W', n) bool."""
        there = audio.there.flatten(1)
        slots = there.shape[1]
        position, count = compact(there, slots)
        number = torch.arange(slots, device=count.device)
        real = number < count[:, None]
        changes = (to_previous(audio).flatten(1).gather(1, position) < self.threshold) & real
        segment = segment_begins(changes, self.shortest).cumsum(dim=1) - 1
        stays, tokens = (
            torch.zeros_like(segment).scatter_add(1, segment, some.long())
            for some in (kept.flatten(1).gather(1, position) & real, real)
        )
        share = (stays.float() / tokens.clamp(min=1).float()).double()

        scale = video.sizes.sum(dim=1, keepdim=True).double() / count[:, None].clamp(min=1)
        first = video.sizes.cumsum(dim=1) - video.sizes
        heard = torch.searchsorted((number * scale).long(), first, right=True) - 1  # the sound that a grid begins with
        of_grid = segment.gather(1, heard.minimum(count[:, None] - 1).clamp(min=0))
        lost = (self.removed + GUIDANCE * (0.5 - share.gather(1, of_grid))).clamp(self.least_removed, self.most_removed)
        return self.cut_segments(video, of_grid, torch.where(count[:, None] > 0, lost, self.removed))

    def cut_segments(self, video: Media, segment: Tensor, removed: float | Tensor) -> Kept:
        """segment: (B, W) int64, rising. removed: a number or (B, W) float64."""
        grid = torch.arange(segment.shape[1], device=segment.device)
        begins = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0), value=True)
        number = grid - torch.where(begins, grid, 0).cummax(dim=1).values
        crowd = crowding(video.features.flatten(0, 1), video.sizes.flatten(), self.neighbours)
        scores = torch.where((number % 2 == 0)[..., None], -crowd.view(video.received.shape), -likeness(video))
        return Kept(highest(scores, video.there, grid_counts(video.sizes, removed)))


def grid_counts(sizes: Tensor, removed: float | Tensor) -> Tensor:
    return left(sizes, removed).maximum(sizes.clamp(max=1))


def to_previous(audio: Media) -> Tensor:
    """(B, W, n) float32: cosine of each token and the one before, 0 of the first. Empty windows come last."""
    tokens = unit(audio.features.masked_fill(~audio.there[..., None], 0), 1e-12)
    last = (audio.sizes - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, tokens.shape[-1])
    ends = F.pad(tokens.gather(2, last)[:, :-1], (0, 0, 0, 0, 1, 0))
    return (tokens * torch.cat((ends, tokens[:, :, :-1]), dim=2)).sum(dim=-1)


def likeness_to_mean(audio: Media) -> Tensor:
    """(B, W, n) float32, of the whole prompt. Its windows count as one clip, empty ones as another."""
    prompt = torch.where(audio.sizes > 0, 0, audio.sizes.shape[1])
    tokens = steady(audio, prompt)
    count = clip_sum(audio.sizes.double(), prompt).clamp(min=1)[..., None]
    mean = clip_sum(tokens.sum(dim=2).double(), prompt) / count
    return gaussian(tokens, mean.float()[:, :, None])


def largest(values: Tensor, there: Tensor) -> Tensor:
    """Of each prompt, none below 0: (B, 1, 1)."""
    return values.masked_fill(~there, 0).amax(dim=(1, 2), keepdim=True)


def of_largest(values: Tensor, there: Tensor) -> Tensor:
    return values / (largest(values, there) + 1e-6)


def segment_begins(changes: Tensor, shortest: int) -> Tensor:
    """At the first token, and at each change that comes `shortest` tokens or more after the last begin.

    changes: (B, N) bool. (B, N) bool. One begin follows from another: round by round, twice as many are found.
    """
    slots = changes.shape[1]
    number = torch.arange(slots + 1, device=changes.device).expand(len(changes), -1)
    # The first change at or after each token; `slots` stands for none.
    change = torch.where(F.pad(changes, (0, 1)), number, slots).flip(1).cummin(dim=1).values.flip(1)
    onward = change.gather(1, (number + shortest).clamp(max=slots))
    begins = number == 0
    for _ in range((slots // shortest).bit_length()):
        begins = begins.scatter(1, torch.where(begins, onward, slots), True)
        onward = onward.gather(1, onward)
    return begins[:, :-1]


@operator("seats::crowding")
def crowding(features: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    """Mean cosine of each token to its nearest of its window, (W, n) float32, 0 of one alone.

    features: (W, n, D), of any float type. sizes: (W,) int64. In blocks of windows, as matrices of n² may be large.
    """
    tokens = features.shape[1]
    means = torch.zeros(features.shape[:2], device=features.device)
    for block in blocks(filled((sizes > 0)[None]), features):
        padding = torch.arange(tokens, device=sizes.device) >= sizes[block][:, None]
        some = unit(features[block].masked_fill(padding[..., None], 0), 1e-12)
        no_pair = padding[:, None] | torch.eye(tokens, dtype=torch.bool, device=sizes.device)
        nearest = (some @ some.mT).masked_fill_(no_pair, float("-inf"))
        nearest = nearest.topk(min(neighbours, tokens - 1), dim=-1).values
        absent = nearest.isinf()  # in a window with fewer tokens
        means[block] = nearest.masked_fill(absent, 0).sum(dim=-1) / (~absent).sum(dim=-1).clamp(min=1)
    return means


@crowding.register_fake
def _(features: Tensor, sizes: Tensor, neighbours: int) -> Tensor:
    return features.new_empty(features.shape[:2], dtype=torch.float32)
