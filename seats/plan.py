"""StagePlan: every length of a prefill, from how many tokens there are, before the data is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from seats.config import SeatsConfig
from seats.schedule import keep_ratios

AUDIO_WINDOW = 50
"""Audio tokens that Stage I compares with each other (arXiv 2605.20035)."""


@dataclass(frozen=True)
class Segment:
    """Decoder layers that see a sequence of one length, and what shortens it after them.

    layers: first and one past the last, from 0. length: slots of the sequence, some of them padding at its end.
    video_keep, audio_keep: keep ratios of the selection that follows, None after the last segment and where all
    video and audio goes.
    """

    layers: tuple[int, int]
    length: int
    video_keep: float | None = None
    audio_keep: float | None = None


@dataclass(frozen=True)
class StagePlan:
    """Static shapes of a request. Requests of one plan take the same path through the same graph.

    text: slots for text and image tokens. video_windows, audio_windows: how many windows Stage I looks into,
    of `video_window` and `audio_window` tokens each. video_ratio, audio_ratio: what Stage I keeps of a window.
    windows: how many runs of video, or of audio, the sequence has at most. drops_media: whether the last segment
    sees text alone.
    """

    text: int
    video_windows: int
    video_window: int
    audio_windows: int
    audio_window: int
    windows: int
    video_ratio: float
    audio_ratio: float
    temperature: float
    segments: tuple[Segment, ...]
    drops_media: bool

    @property
    def pool(self) -> int:
        """Slots of the whole prompt: text, then the windows of video, then those of audio."""
        return self.text + self.video_windows * self.video_window + self.audio_windows * self.audio_window


def make_plan(
    config: SeatsConfig,
    num_layers: int,
    *,
    text: int,
    video_windows: int,
    video_window: int,
    audio_windows: int,
    windows: int,
) -> StagePlan:
    """The plan of prompts with at most so many tokens and windows. Raises ValueError for layers past the depth."""
    config.check(num_layers)
    first = config.encoder_ratios
    kept = [
        count * max(1, min(size, round(size * ratio)))
        for count, size, ratio in zip((video_windows, audio_windows), (video_window, AUDIO_WINDOW), first, strict=True)
    ]
    removal = num_layers if config.late_layer is None else config.late_layer - 1
    drops = [layer for layer in config.drop_layers if layer < removal]
    ratios = [
        keep_ratios(ratio, encoder, config.drop_layers, config.late_layer, num_layers)
        for ratio, encoder in zip((config.video_ratio, config.audio_ratio), first, strict=True)
    ]
    segments, start, media = [], 0, sum(kept)
    both = video_windows > 0 and audio_windows > 0
    for step, layer in enumerate(drops):
        video, audio = ratios[0][step], ratios[1][step]
        segments.append(Segment((start, layer), text + media, video, audio))
        if step == 0:
            wanted = sum(max(1, round(ratio * n)) for ratio, n in zip((video, audio), kept, strict=True) if n)
        else:  # how the survivors divide into video and audio is data
            wanted = math.floor(max(video, audio) * media + 1.5)
        # Selection may add a token per window, so that none is wiped out.
        media = min(media, max(wanted, windows) + windows if both and windows > 1 else wanted)
        start = layer
    segments.append(Segment((start, removal), text + media))
    if config.late_layer is not None:
        segments.append(Segment((removal, num_layers), text))
    return StagePlan(
        text=text,
        video_windows=video_windows,
        video_window=video_window,
        audio_windows=audio_windows,
        audio_window=AUDIO_WINDOW,
        windows=windows,
        video_ratio=first[0],
        audio_ratio=first[1],
        temperature=config.window_temperature,
        segments=tuple(segments),
        drops_media=config.late_layer is not None,
    )
