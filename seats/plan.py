"""StagePlan: every length of a prefill, from how many tokens there are, before the data is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import torch

from seats.config import SeatsConfig
from seats.diversity import window_counts
from seats.schedule import keep_ratios

AUDIO_WINDOW = 50
"""Audio tokens that Stage I compares with each other (arXiv 2605.20035)."""

TOKEN_STEPS, TOKEN_STEP = 16, 64
"""Rungs to the octave of the tokens that enter the decoder, and the least distance between two."""
TEXT_STEPS, TEXT_STEP = 4, 512
"""Rungs of text in the octave of those tokens, and the largest distance: most layers see the text among the rest, so
coarse rungs cost little."""
LEAST_VIDEO_TOKENS, LEAST_AUDIO_WINDOWS, LEAST_RUNS = 9216, 128, 64
"""Windows and runs are rounded to powers of two, from these on: empty ones cost next to nothing."""


@dataclass(frozen=True)
class Counts:
    """What of a prompt decides its plan.

    text: tokens of text and images. tokens: these and what Stage I leaves of video and audio. video_windows,
    audio_windows: how many windows Stage I looks into; video_window: tokens in the largest of video (of audio:
    AUDIO_WINDOW). video_runs, audio_runs: how often adjacent tokens of a modality begin.
    """

    text: int
    tokens: int
    video_windows: int
    video_window: int
    audio_windows: int
    video_runs: int
    audio_runs: int

    @property
    def pool(self) -> int:
        """Slots of the whole prompt: text, then the windows of video, then those of audio."""
        return self.text + self.video_windows * self.video_window + self.audio_windows * AUDIO_WINDOW

    def joined(self, other: Counts) -> Counts:
        """What holds both."""
        return Counts(*(max(getattr(self, field.name), getattr(other, field.name)) for field in fields(Counts)))

    def rounded(self) -> Counts:
        """The next rungs of the ladder, for plans that many prompts share.

        Windows, which cost Stage I alone, have coarse rungs; tokens, which pass through the layers, fine ones.
        A modality that is not there stays away.
        """
        tokens = _up(self.tokens, max(TOKEN_STEP, _octave(self.tokens) // TOKEN_STEPS))
        text = _up(self.text, max(TOKEN_STEP, min(TEXT_STEP, _octave(tokens) // TEXT_STEPS)))
        rounded = Counts(
            text=tokens if self.text == self.tokens else min(text, tokens),
            tokens=tokens,
            video_windows=_doubled(self.video_windows, max(1, LEAST_VIDEO_TOKENS // self.video_window)),
            video_window=self.video_window,
            audio_windows=_doubled(self.audio_windows, LEAST_AUDIO_WINDOWS),
            video_runs=_doubled(self.video_runs, LEAST_RUNS),
            audio_runs=_doubled(self.audio_runs, LEAST_RUNS),
        )
        return replace(rounded, tokens=min(tokens, rounded.pool))


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _octave(count: int) -> int:
    """The power of two at or below a count."""
    return 1 << (count.bit_length() - 1)


def _doubled(count: int, least: int) -> int:
    """The power of two at or above a count and `least`; none stays none."""
    return 1 << (max(count, least) - 1).bit_length() if count else 0


def counts_of(
    encoder_ratios: tuple[float, float],
    *,
    text: int,
    video_sizes: Sequence[int],
    audio_sizes: Sequence[int],
    runs: tuple[int, int],
) -> Counts:
    """Counts of a prompt.

    encoder_ratios: the shares of video and of audio that Stage I keeps. video_sizes, audio_sizes: tokens in each of
    its windows. runs: of video and of audio.
    """
    left = sum(
        int(window_counts(torch.tensor(sizes, dtype=torch.long), ratio).sum())
        for sizes, ratio in zip((video_sizes, audio_sizes), encoder_ratios, strict=True)
    )
    return Counts(
        text=text,
        tokens=text + left,
        video_windows=len(video_sizes),
        video_window=max(video_sizes, default=1),
        audio_windows=len(audio_sizes),
        video_runs=runs[0],
        audio_runs=runs[1],
    )


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

    counts: at most so many tokens and windows. video_ratio, audio_ratio: what Stage I keeps of a window.
    temperature: of the shares between windows.
    """

    counts: Counts
    video_ratio: float
    audio_ratio: float
    temperature: float
    segments: tuple[Segment, ...]

    @property
    def encoder_ratios(self) -> tuple[float, float]:
        return self.video_ratio, self.audio_ratio

    @property
    def windows(self) -> int:
        """Windows of Stage II at most; at least 1."""
        return max(1, self.counts.video_runs, self.counts.audio_runs)

    def check_holds(self, counts: Counts) -> None:
        """Raises ValueError where a prompt with these counts does not fit."""
        for field in fields(Counts):
            has, limit = getattr(counts, field.name), getattr(self.counts, field.name)
            if has > limit:
                raise ValueError(
                    f"The prompt has {has} of {field.name} and its plan holds {limit}: make a plan from its own counts."
                )


def make_plan(config: SeatsConfig, num_layers: int, counts: Counts) -> StagePlan:
    """The plan of prompts with at most these counts. Raises ValueError for layers past the depth."""
    config.check(num_layers)
    removal = num_layers if config.late_layer is None else config.late_layer - 1
    drops = [layer for layer in config.drop_layers if layer < removal]
    video_ratios, audio_ratios = (
        keep_ratios(ratio, encoder, config.drop_layers, config.late_layer, num_layers)
        for ratio, encoder in zip((config.video_ratio, config.audio_ratio), config.encoder_ratios, strict=True)
    )
    segments = []
    text, media = counts.text, counts.tokens - counts.text
    for step, layers in enumerate(pairwise((0, *drops))):
        video, audio = video_ratios[step], audio_ratios[step]
        segments.append(Segment(layers, text + media, video, audio))
        media = _left(media, counts, video, audio)
    segments.append(Segment((drops[-1] if drops else 0, removal), text + media))
    if config.late_layer is not None:
        segments.append(Segment((removal, num_layers), text))
    return StagePlan(
        counts=counts,
        video_ratio=config.encoder_ratios[0],
        audio_ratio=config.encoder_ratios[1],
        temperature=config.window_temperature,
        segments=tuple(segments),
    )


def plan_without_selection(num_layers: int, counts: Counts) -> StagePlan:
    """The plan of prompts of which every token stays: all of them count as text."""
    return StagePlan(counts, 1.0, 1.0, 1.0, (Segment((0, num_layers), counts.tokens),))


def _left(media: int, counts: Counts, video: float, audio: float) -> int:
    """The most that a selection leaves of so many tokens of video and audio, however they divide."""
    if not (counts.video_windows and counts.audio_windows):
        wanted = max(1, round((video if counts.video_windows else audio) * media))
        return min(media, wanted)
    # Each modality is rounded by itself, up by less than 1.
    wanted = min(media, math.floor(max(video, audio) * media) + 2)
    budget = min(media, max(wanted, counts.video_runs, counts.audio_runs))
    # A window with a budget of 1 and both modalities keeps 2, so that neither is wiped out.
    return budget + min(counts.video_runs, counts.audio_runs, media - budget)
