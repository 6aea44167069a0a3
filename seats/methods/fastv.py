"""FastV: the tokens that the question looks at after an early layer (arXiv 2403.06764)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seats.budget import keep_counts
from seats.counts import Counts
from seats.method import Kept, Media, Needs, Step, require_ratio
from seats.methods.ranking import apart, noise, sound_intact
from seats.selection import AUDIO, VIDEO, highest_of_each


@dataclass(frozen=True, kw_only=True)
class ByRelevance:
    """Methods that keep everything up to a layer, and from there on what the last token of text looks at.

    video_ratio, audio_ratio: the shares that are kept on average over all layers. both: after each step those of video
    and of sound apart; else sound stays whole, the whole budget is taken from video, and where that does not suffice
    any tokens of sound go (`sound_intact`).
    """

    video_ratio: float
    audio_ratio: float
    both: bool = True

    needs: ClassVar[Needs | None] = None
    window_grids: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_ratio("video_ratio", self.video_ratio)
        require_ratio("audio_ratio", self.audio_ratio)

    @property
    def keeps_everything(self) -> bool:
        return self.video_ratio == 1 and self.audio_ratio == 1

    def check(self, num_layers: int) -> None:
        self.steps(num_layers)

    def steps(self, num_layers: int) -> list[Step]:
        raise NotImplementedError

    def averages(self, first: int, num_layers: int) -> tuple[float, float]:
        """Both ratios. Raises ValueError where the first layers, which see every token, are more than one alone."""
        least = first / num_layers
        for name, ratio in (("video", self.video_ratio), ("audio", self.audio_ratio)):
            if ratio <= least:
                raise ValueError(
                    f"{type(self).__name__} cannot keep {ratio:.0%} of {name} on average: the first {first} of "
                    f"{num_layers} layers see every token, which is {least:.1%} alone; ask for more."
                )
        return self.video_ratio, self.audio_ratio

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        return sum(video) + sum(audio), sum(audio)

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        return apart(lambda media, _: Kept(media.there), video, audio, (1.0, 1.0))

    def left(self, media: int, step: Step, counts: Counts) -> int:
        assert step.video is not None and step.audio is not None
        audio = min(counts.audio, media) if step.audio > step.video else 0
        # Each is rounded by itself; at least one of each stays, and at least 5 % of video where sound is left whole.
        wanted = max(step.video * (media - audio) + step.audio * audio, 0.05 * media)
        return min(media, math.ceil(wanted) + 3)

    def after(self, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor | None = None) -> Tensor:
        assert step.video is not None and step.audio is not None
        video, audio = ((kind == medium).sum(dim=-1) for medium in (VIDEO, AUDIO))
        if self.both:
            wanted = keep_counts(video, step.video), keep_counts(audio, step.audio)
        else:
            of_video, of_audio = sound_intact(video, audio, step.video, step.audio)
            wanted = keep_counts(video, of_video), keep_counts(audio, of_audio)
            scores = torch.where(kind == AUDIO, noise(scores.shape[1], scores.device), scores)
        return highest_of_each(scores, kind, *wanted)


@dataclass(frozen=True, kw_only=True)
class FastV(ByRelevance):
    """FastV (arXiv 2403.06764, section 4) for video and sound together, as in the comparison of arXiv 2605.20035.

    The first `layer` layers see every token; so each ratio must be above layer / layers. After layer `layer` the tokens
    stay that the last token of text looks at most. video_ratio, audio_ratio, both: `ByRelevance`.

    The paper's text averages the attention from all tokens, its code takes the last one's, as here; as in the
    comparison it comes from layer `layer`'s projections of that layer's output, not of its input.
    """

    layer: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}.")

    def steps(self, num_layers: int) -> list[Step]:
        if self.layer >= num_layers:
            raise ValueError(f"layer {self.layer} must come before the last of the model's {num_layers} layers.")
        averages = self.averages(self.layer, num_layers)
        ratios = ((ratio * num_layers - self.layer) / (num_layers - self.layer) for ratio in averages)
        return [Step(self.layer, *ratios)]
