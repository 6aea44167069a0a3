"""When the frames of a clip are on the screen, and which of them the model sees."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import NamedTuple

import torch

from omni.processing.frames import MediaError, sample_indices, sampled_fps


@dataclass(frozen=True)
class Wish:
    """What is wanted of a clip: frames per second or, where it is given, their number; the stretch in seconds from the
    first frame, to the end where `end` is None. every: of frames that were picked before, all where the rest allows it.
    told_fps: `omni.protocol.Reading`.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    nframes: int | None = None
    start: float = 0.0
    end: float | None = None
    every: bool = False
    told_fps: float | None = None

    def __post_init__(self) -> None:
        if self.nframes is not None and self.nframes < 2:
            raise MediaError(f"nframes is {self.nframes}; a clip needs at least 2 frames.")
        require_stretch(self.start, self.end, "video")


def require_stretch(start: float, end: float | None, kind: str) -> None:
    if not 0 <= start < math.inf:
        raise MediaError(f"{kind}_start is {start}; give seconds from the beginning.")
    if end is not None and not start < end:
        raise MediaError(f"{kind}_end is {end}; it must come after {kind}_start, {start:g} s.")


def past_end(name: str, start: float, duration: float, kind: str) -> str:
    return f"{kind}_start is {start:g} s, but {name} ends at {duration:.2f} s."


class Sample(NamedTuple):
    """indices: of frames in the timeline, ascending, some of them twice. fps: the rate that the model is told
    (`frames.sampled_fps`, or what was wished). duration: seconds of the stretch that they are taken from."""

    indices: list[int]
    fps: float
    duration: float


@dataclass(frozen=True)
class Timeline:
    """times: seconds from the first frame at which each appears, in order; of equal ones the last is what is on the
    screen. end: when the last goes. rates: frames per second that the file states. grain: seconds to which times are
    rounded."""

    times: list[float]
    end: float
    rates: tuple[float, ...] = ()
    grain: float = 0.0

    def sample(self, wish: Wish, name: str) -> Sample:
        """By the family's rule (`frames.sample_indices`). Frames at a constant rate are taken by their index. Where the
        rate varies, the same number is taken at even instants: at each, the frame that is then on the screen."""
        total, rate = len(self.times), self._constant_rate()
        whole = total / rate if rate else self.end
        if wish.start >= whole:
            raise MediaError(past_end(name, wish.start, whole, "video"))
        stop = whole if wish.end is None else min(wish.end, whole)
        if wish.told_fps:
            return self._from_end_to_end(wish, wish.told_fps, stop, rate or total / self.end)
        if rate:
            # A thousandth of a frame is rounding.
            first = min(math.floor(wish.start * rate + 1e-3), total - 1)
            last = min(max(math.ceil(stop * rate - 1e-3), first + 1), total)
            duration = (last - first) / rate
            picked = [first + index for index in _picked(last - first, rate, wish)]
        else:
            slack = self.grain / 2 + 1e-6
            duration = stop - wish.start
            first = bisect_right(self.times, wish.start + slack) - 1
            seen = max(bisect_left(self.times, stop - slack) - first, 1)
            wanted = len(_picked(seen, seen / duration, wish))
            instants = (wish.start + number * duration / wanted for number in range(wanted))
            picked = [bisect_right(self.times, instant + slack) - 1 for instant in instants]
        if wish.nframes:
            return Sample(picked, len(picked) / duration, duration)
        if wish.every and rate and len(set(picked)) == last - first:
            return Sample(picked, rate, duration)
        return Sample(picked, sampled_fps(len(picked), duration, wish.fps), duration)

    def _from_end_to_end(self, wish: Wish, told_fps: float, stop: float, rate: float) -> Sample:
        """As qwen-omni-utils takes them: by index, whether or not the rate varies; both ends of the stretch are in."""
        first = min(math.ceil(wish.start * rate - 1e-3), len(self.times) - 1)
        last = max(min(math.floor(stop * rate + 1e-3), len(self.times) - 1), first)
        count = len(_picked(last - first + 1, rate, wish))
        # In float32 and rounded to even, as there.
        picked = torch.linspace(first, last, count).round().long().tolist()
        return Sample(picked, told_fps, stop - wish.start)

    def _constant_rate(self) -> float | None:
        """The rate on whose grid every time is, to half a frame; None where there is none."""
        total, last = len(self.times), self.times[-1]
        rates = [rate for rate in self.rates if rate > 0]
        if total >= 8 and last > 0 and abs(total * last / (total - 1) - self.end) < 0.5 * last / (total - 1):
            rates.append((total - 1) / last)
        for rate in rates:
            if all(abs(time - number / rate) < 0.5 / rate for number, time in enumerate(self.times)):
                return rate
        return None


def _picked(total: int, rate: float, wish: Wish) -> list[int]:
    if wish.nframes is not None:
        count = 2 * round(wish.nframes / 2)
        return sample_indices(total, rate, fps=wish.fps, min_frames=count, max_frames=count)
    every = [*range(total), *[total - 1] * (total % 2)]
    if wish.every and rate <= wish.fps and wish.min_frames <= len(every) <= wish.max_frames:
        return every
    return sample_indices(total, rate, fps=wish.fps, min_frames=wish.min_frames, max_frames=wish.max_frames)
