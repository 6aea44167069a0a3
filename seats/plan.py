"""StagePlan: every length of a prefill, from how many tokens there are, before the data is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from seats.method import Method, Step

AUDIO_WINDOW = 50
"""Audio tokens in a window before the decoder (arXiv 2605.20035, Stage I)."""

TOKEN_STEPS, TOKEN_STEP = 16, 64
"""Rungs to the octave of the tokens that enter the decoder, and the least distance between two."""
TEXT_STEPS, TEXT_STEP = 4, 512
"""Rungs of text in the octave of those tokens, and the largest distance: most layers see the text among the rest, so
coarse rungs cost little."""
AUDIO_STEPS = 4
"""Rungs to the octave of audio, which is the lesser part of the tokens."""
LEAST_VIDEO_TOKENS, LEAST_AUDIO_WINDOWS, LEAST_WINDOWS = 9216, 128, 64
"""Windows are rounded to powers of two, from these on: empty ones cost next to nothing."""


@dataclass(frozen=True)
class Counts:
    """What of a prompt decides its plan.

    text: tokens of text and images. tokens: these and what of video and audio enters the decoder; audio: audio tokens
    among them, 0 where its method does not ask. video_windows, audio_windows: how many windows are looked into before
    the decoder; video_window: tokens in the largest of video (of audio: AUDIO_WINDOW). windows: between the layers, as
    `seats.selection.select` makes them; pairs: those of them with video and audio.
    """

    text: int
    tokens: int
    audio: int
    video_windows: int
    video_window: int
    audio_windows: int
    windows: int
    pairs: int

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
            audio=_up(self.audio, max(TOKEN_STEP, _octave(self.audio) // AUDIO_STEPS)) if self.audio else 0,
            video_windows=_doubled(self.video_windows, max(1, LEAST_VIDEO_TOKENS // self.video_window)),
            video_window=self.video_window,
            audio_windows=_doubled(self.audio_windows, LEAST_AUDIO_WINDOWS),
            windows=_doubled(self.windows, LEAST_WINDOWS),
            pairs=_doubled(self.pairs, LEAST_WINDOWS),
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
    method: Method,
    *,
    text: int,
    video_sizes: Sequence[int],
    audio_sizes: Sequence[int],
    windows: tuple[int, int],
) -> Counts:
    """Counts of a prompt.

    video_sizes, audio_sizes: tokens in each window of the method before the decoder. windows: between its layers, and
    those of them with both modalities (`seats.selection.count_windows`).
    """
    entering, audio = method.entering(video_sizes, audio_sizes)
    return Counts(
        text=text,
        tokens=text + entering,
        audio=audio,
        video_windows=len(video_sizes),
        video_window=max(video_sizes, default=1),
        audio_windows=len(audio_sizes),
        windows=windows[0],
        pairs=windows[1],
    )


@dataclass(frozen=True)
class Segment:
    """Decoder layers that see a sequence of one length, and the selection that shortens it after them.

    layers: first and one past the last, from 0. length: slots of the sequence, some of them padding at its end.
    """

    layers: tuple[int, int]
    length: int
    step: Step | None = None


@dataclass(frozen=True)
class StagePlan:
    """Static shapes of a request. Requests of one plan take the same path through the same graph.

    counts: at most so many tokens and windows. method: what selects, None where every token stays.
    """

    counts: Counts
    method: Method | None
    segments: tuple[Segment, ...]

    @property
    def windows(self) -> int:
        """Windows of Stage II at most; at least 1."""
        return max(1, self.counts.windows)

    def check_holds(self, counts: Counts) -> None:
        """Raises ValueError where a prompt with these counts does not fit."""
        for field in fields(Counts):
            has, limit = getattr(counts, field.name), getattr(self.counts, field.name)
            if has > limit:
                raise ValueError(
                    f"The prompt has {has} of {field.name} and its plan holds {limit}: make a plan from its own counts."
                )


def make_plan(method: Method, num_layers: int, counts: Counts) -> StagePlan:
    """The plan of prompts with at most these counts. Raises ValueError for layers past the depth."""
    method.check(num_layers)
    segments = []
    layer, media = 0, counts.tokens - counts.text
    for step in method.steps(num_layers):
        segments.append(Segment((layer, step.layer), counts.text + media, step))
        layer, media = step.layer, 0 if step.video is None else method.left(media, step, counts)
    segments.append(Segment((layer, num_layers), counts.text + media))
    return StagePlan(counts, method, tuple(segments))


def plan_without_selection(num_layers: int, counts: Counts) -> StagePlan:
    """The plan of prompts of which every token stays: all of them count as text."""
    return StagePlan(counts, None, (Segment((0, num_layers), counts.tokens),))
