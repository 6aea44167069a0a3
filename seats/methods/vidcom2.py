"""VidCom2: tokens unlike their frame and their clip, more of frames that stand out (arXiv 2505.14454)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seats.method import Kept, Media
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import highest, intact, part, sound_intact, unit

WIDTHS = tuple(2.0**power for power in range(-3, 2))
"""Of the Gaussian kernels, as variances."""
SHARPNESS = 0.01
"""Temperature of the softmax over frames."""


@dataclass(frozen=True, kw_only=True)
class VidCom2(BeforeDecoder):
    """VidCom2 (arXiv 2505.14454, section 3), as in the authors' code, on the video of a prompt with sound.

    A frame is a temporal grid. Tokens of a clip are compared by the half of their channels that vary least over it, as
    vectors of length 1. A token's likeness to a centre is the sum of exp(-d² / 2a) for the a in WIDTHS, d its distance
    to it; the centres are the mean of the clip's tokens and that of the frame's. A frame's share of its tokens is
    ratio · (1 + p - the mean of p), at most 1, where p is the softmax over the clip's frames of their tokens' mean
    likeness to the clip, negative and over SHARPNESS; of each frame round(share · n) tokens stay, at least one, those
    of the least likeness to clip and frame together. Survivors keep their order and their places.

    How many that are depends on the data, within half a token of each frame. Each clip of a prompt is taken for itself.
    Sound, which the paper does not have, stays whole, as in the authors' code for Qwen-Omni, and the whole budget is
    taken from video; where that does not suffice any tokens of sound go (`sound_intact`).
    """

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        """A bound for video, whose shares are not known before the data: a token more for each frame."""
        total, of_sound = torch.tensor([sum(video)]), torch.tensor([sum(audio)])
        ratios = sound_intact(total, of_sound, self.video_ratio, self.audio_ratio)
        most = min(sum(video), int(ratios[0] * total) + len(video))
        return most + int(part(of_sound, ratios[1])), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        return intact(outstanding, video, audio, (self.video_ratio, self.audio_ratio))


def outstanding(video: Media, ratio: Tensor) -> Kept:
    """ratio: (B,) float64."""
    there = video.there
    real = video.sizes > 0
    windows = real.shape[1]
    # Clips by number; empty windows belong to one more, of no token.
    clip = torch.where(real, video.clip.clamp(0, windows - 1), windows)
    frames = clip_sum(real.double(), clip)
    tokens = steady(video, clip)
    mask = there[..., None]
    total = tokens.sum(dim=2)
    sizes = clip_sum(video.sizes.double(), clip)
    clip_mean = clip_sum(total, clip) / sizes.clamp(min=1)[..., None]
    frame_mean = total / video.sizes.clamp(min=1)[..., None]
    to_clip = likeness(tokens, clip_mean.float()[:, :, None])
    to_frame = likeness(tokens, frame_mean[:, :, None])
    of_frame = to_clip.masked_fill(~mask[..., 0], 0).sum(dim=-1) / video.sizes.clamp(min=1)
    # Softmax over a clip's frames.
    logit = -of_frame.double() / SHARPNESS
    highest_logit = clip_max(logit.masked_fill(~real, float("-inf")), clip)
    weight = (logit - highest_logit).exp().masked_fill(~real, 0)
    p = weight / clip_sum(weight, clip).clamp(min=1e-300)
    share = (ratio[:, None] * (1 + p - 1 / frames.clamp(min=1))).clamp(max=1)
    counts = (share * video.sizes).round().long().clamp(min=1).minimum(video.sizes)
    return Kept(highest(-(to_clip + to_frame), there, counts))


def steady(video: Media, clip: Tensor) -> Tensor:
    """Tokens of length 1 in the half of the channels that vary least over their clip, 0 in the others and in padding.

    (B, W, n, D) float32. clip: (B, W) int64 up to W.
    """
    there = video.there[..., None]
    features = video.features.masked_fill(~there, 0).float()
    count = clip_sum(video.sizes.double(), clip).clamp(min=1)[..., None]
    mean = clip_sum(features.sum(dim=2), clip).double() / count
    apart = (features - mean.float()[:, :, None]).masked_fill(~there, 0)
    variance = clip_sum(apart.square().sum(dim=2), clip) / count.float()
    channels = features.shape[-1]
    rank = variance.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return unit(features.masked_fill((rank >= channels // 2)[:, :, None], 0), 1e-12)


def clip_sum(values: Tensor, clip: Tensor) -> Tensor:
    """The sum over the windows of each window's clip: (B, W, …)."""
    index = clip.view(*clip.shape, *[1] * (values.dim() - 2)).expand(values.shape)
    sums = values.new_zeros(len(values), clip.shape[1] + 1, *values.shape[2:]).scatter_add(1, index, values)
    return sums.gather(1, index)


def clip_max(values: Tensor, clip: Tensor) -> Tensor:
    """The largest of each window's clip: (B, W); 0 of no window's."""
    least = values.new_full((len(values), clip.shape[1] + 1), float("-inf"))
    return least.scatter_reduce(1, clip, values, "amax").gather(1, clip).clamp(min=-1e300)


def likeness(tokens: Tensor, centre: Tensor) -> Tensor:
    """(B, W, n) float32. centre: (B, W, 1, D)."""
    square = (tokens - centre).square().sum(dim=-1)
    return torch.stack([(-square / (2 * width)).exp() for width in WIDTHS]).sum(dim=0)
