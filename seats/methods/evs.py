"""EVS: what differs from the frame before (arXiv 2510.14624)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seats.method import Kept, Media
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import highest, intact, part, sound_intact, unit


@dataclass(frozen=True, kw_only=True)
class EVS(BeforeDecoder):
    """Efficient Video Sampling (arXiv 2510.14624), as vLLM runs it, on the video of a prompt with sound.

    A frame is a temporal grid. The first stays whole; of the tokens of all the others together those stay that are
    least like the one at their place in the frame before, by cosine: of n tokens int(ratio · n) in all, and not less
    than the first frame. Survivors keep their order and their places.

    Several clips of a prompt share its budget: a frame that begins another clip, or has another size than the one
    before, differs wholly from it. Sound, which the paper does not have, stays whole and the whole budget is taken from
    video; where that does not suffice any tokens of sound go (`sound_intact`). Raises ValueError where the first frame
    alone is more than the budget.
    """

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        total, first, sound = sum(video), video[0] if video else 0, sum(audio)
        budget = int(self.video_ratio * total + self.audio_ratio * sound)
        if first > budget + (not sound):  # rounding, of the modality that has to keep something
            raise ValueError(
                f"EVS keeps {first / total:.0%} of video at least, its first frame, more than {self.video_ratio:.0%} "
                f"of video and {self.audio_ratio:.0%} of the sound of this prompt together: ask for more."
            )
        sizes, of_sound = torch.tensor([video], dtype=torch.long), torch.tensor([sound])
        least = first_frame(sizes)
        ratios = sound_intact(sizes.sum(dim=-1), of_sound, self.video_ratio, self.audio_ratio, least)
        return int(video_count(sizes, ratios[0]) + part(of_sound, ratios[1])), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        least = 0.0 if video is None else first_frame(video.sizes)
        return intact(changed, video, audio, (self.video_ratio, self.audio_ratio), least)


def changed(video: Media, ratio: Tensor) -> Kept:
    """ratio: (B,) float64."""
    keep = highest(change(video).flatten(1), video.there.flatten(1), video_count(video.sizes, ratio))
    return Kept(keep.view(video.received.shape))


def first_frame(sizes: Tensor) -> Tensor:
    """Its share of the video: (B,) float64."""
    first = sizes[:, 0].double() if sizes.shape[1] else sizes.new_zeros(len(sizes)).double()
    return first / sizes.sum(dim=-1).clamp(min=1)


def video_count(sizes: Tensor, ratio: Tensor) -> Tensor:
    """int(ratio · n), at least the first frame: (B,) int64."""
    count = (ratio * sizes.sum(dim=-1)).long()
    return count.maximum(sizes[:, 0]) if sizes.shape[1] else count


def change(video: Media) -> Tensor:
    """1 - cosine of each token and the one before at its place, ∞ where there is none: (B, W, n) float32."""
    tokens = unit(video.features.masked_fill(~video.there[..., None], 0), 1e-12)
    differs = 1 - (tokens[:, 1:] * tokens[:, :-1]).sum(dim=-1)
    follows = (video.clip[:, 1:] == video.clip[:, :-1]) & (video.sizes[:, 1:] == video.sizes[:, :-1])
    differs = differs.masked_fill(~follows[..., None], float("inf"))
    first = torch.full_like(video.received[:, :1], float("inf"), dtype=torch.float32)
    return torch.cat((first, differs), dim=1)
