"""StagePlan: every length of a prefill, from how many tokens there are, before the data is seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from seats.counts import Counts
from seats.method import Method, Step


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
