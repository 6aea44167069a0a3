"""DyCoke: what changes between the frames of a group of four (arXiv 2411.15024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seats.method import Kept, Media
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import highest, intact, part, sound_intact, unit


@dataclass(frozen=True, kw_only=True)
class DyCoke(BeforeDecoder):
    """DyCoke's temporal token merging (arXiv 2411.15024, section 3.2) on the video of a prompt with sound.

    A frame is a temporal grid. Of every four the first stays whole, of the second and the fourth those tokens stay that
    are least like the one at their place in the frame before, of the third those least like the one in the first.
    Nothing is merged, as in the authors' code, whose slips in indexing are left out; survivors keep their order and
    their places. Fours run on through the clips of a prompt; a frame of another size than its neighbour stays whole.
    The second stage, of the cache while decoding, is left out: it does not shorten the prefill.

    Sound stays whole and the whole budget is taken from video, of which the first of every four frames stays at least,
    ceil(T / 4) of T; where that does not suffice any tokens of sound go (`sound_intact`). Raises ValueError where those
    frames alone are more than the budget.
    """

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        sizes = torch.tensor([video], dtype=torch.long)
        sound = torch.tensor([sum(audio)])
        total, whole = sum(video), int(sizes[whole_frames(sizes)].sum())
        budget = int(self.video_ratio * total + self.audio_ratio * sum(audio))
        if whole > budget + (not audio):  # rounding, of the modality that has to keep something
            raise ValueError(
                f"DyCoke keeps {whole / total:.0%} of video at least, more than {self.video_ratio:.0%} of video and "
                f"{self.audio_ratio:.0%} of the sound of this prompt together: ask for more."
            )
        of_video, of_audio = sound_intact(
            sizes.sum(dim=-1), sound, self.video_ratio, self.audio_ratio, least_of_video(sizes)
        )
        return int(frame_counts(sizes, of_video).sum() + part(sound, of_audio)), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        least = 0.0 if video is None else least_of_video(video.sizes)
        return intact(merged_in_time, video, audio, (self.video_ratio, self.audio_ratio), least)


def merged_in_time(video: Media, ratio: Tensor) -> Kept:
    return Kept(highest(-likeness(video), video.there, frame_counts(video.sizes, ratio)))


def whole_frames(sizes: Tensor) -> Tensor:
    """The first of every four frames, and those with none of their size to be compared with: (B, W) bool."""
    first = torch.arange(sizes.shape[1], device=sizes.device) % 4 == 0
    return first | (other_frame(sizes[..., None])[..., 0] != sizes)


def least_of_video(sizes: Tensor) -> Tensor:
    """The share of the video's tokens that are in whole frames: (B,) float64."""
    return (sizes * whole_frames(sizes)).sum(dim=-1).double() / sizes.sum(dim=-1).clamp(min=1)


def frame_counts(sizes: Tensor, ratio: Tensor) -> Tensor:
    """How many tokens of each frame stay, (B, W) int64, so that of all no more than `ratio`, (B,) float64, stay.

    Whole frames stay in any case; the others share what is left alike.
    """
    whole = whole_frames(sizes)
    tokens, stay = sizes.sum(dim=-1), (sizes * whole).sum(dim=-1)
    share = (ratio * tokens - stay).clamp(min=0) / (tokens - stay).clamp(min=1)
    return torch.where(whole, sizes, (share[:, None] * sizes).long())


def likeness(video: Media) -> Tensor:
    """(B, W, n) float32: cosine of each token and the one at its place in the frame that its frame is compared with."""
    tokens = unit(video.features.masked_fill(~video.there[..., None], 0))
    return (tokens * other_frame(tokens)).sum(dim=-1)


def other_frame(frames: Tensor) -> Tensor:
    """(B, W, …): of each four, the first for the first and the third, the one before for the second and the fourth."""
    number = torch.arange(frames.shape[1], device=frames.device)
    return frames.index_select(1, number - number % 2 - (number % 4 == 2).long() * 2)
