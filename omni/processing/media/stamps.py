"""Time stamps of recordings that were joined: where they leap, and what to add so that each follows the one before.

Transport and program streams may be joined by appending one to the other. The stamps then leap, forwards or back, by
any amount, in pictures and sound at once. A gap in one of the two alone is none: a picture that stands still, a pause.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from omni.processing.media.files import MAY_LEAP, packets

BACK, AHEAD = 0.2, 0.5
"""Seconds that a stream's stamps may go back, or on beyond the usual step, without being looked at."""
NEAR = 1000
"""Packets by which pictures and sound of the same instant may lie apart in a file."""
SLACK = 10.0
"""Seconds by which the streams of a recording may begin and end apart."""


class Mark(NamedTuple):
    """A packet: its place in the file; when it is shown, when decoded, how long it lasts, in seconds; whether decoding
    can start at it."""

    place: int
    shown: float | None
    decoded: float | None
    duration: float
    key: bool


class Shift(NamedTuple):
    """From a packet of a stream on, by its number: the seconds to add to time stamps, and between which they lie as
    they are. Around a leap libavformat mixes stamps of both sides: what lies outside is none."""

    number: int
    added: float
    first: float = -math.inf
    last: float = math.inf


NONE = [Shift(0, 0.0)]


def mark(place: int, packet: Any) -> Mark:
    unit = float(packet.time_base)
    return Mark(
        place,
        None if packet.pts is None else packet.pts * unit,
        None if packet.dts is None else packet.dts * unit,
        (packet.duration or 0) * unit,
        packet.is_keyframe,
    )


def marks(container: Any, *streams: Any) -> dict[int, list[Mark]]:
    """The packets of streams, by the stream's index, without decoding them."""
    found: dict[int, list[Mark]] = {stream.index: [] for stream in streams}
    for place, packet in enumerate(packets(container, *streams)):
        found[packet.stream.index].append(mark(place, packet))
    return {index: credible(each) for index, each in found.items()}


def credible(marks: list[Mark]) -> list[Mark]:
    """Without stamps of appearance that are far from those of decoding: libavformat mixes them around a leap."""
    limit = max(1.0, 20 * _usual([each.decoded for each in marks if each.decoded is not None]))
    return [
        each._replace(shown=None)
        if each.shown is not None and each.decoded is not None and abs(each.shown - each.decoded) > limit
        else each
        for each in marks
    ]


def _usual(times: Sequence[float]) -> float:
    """The step from one to the next, mostly."""
    return median([after - before for before, after in pairwise(times) if after > before] or [0.0])


def may_leap(container: Any) -> bool:
    return bool(container.format.flags & MAY_LEAP)


class Recordings:
    """The recordings that a file is joined from, by the packets of its pictures and of its sound."""

    def __init__(self, pictures: Sequence[Mark], sound: Sequence[Mark]) -> None:
        # A few stills beside a sound do not lead.
        self.lead, other = (sound, pictures) if len(pictures) * 50 < len(sound) else (pictures, sound)
        self.starts = [0, *_leaps(self.lead, other)]
        ends = [*self.starts[1:], len(self.lead)]
        self.runs = [self.lead[first:last] for first, last in zip(self.starts, ends, strict=True)]
        self.added = [0.0]
        if len(self.runs) > 1:
            cuts = _cuts(self.starts, self.lead, other)
            beside = [other[first:last] for first, last in zip(cuts, [*cuts[1:], len(other)], strict=True)]
            _, end = _extent(self.runs[0], beside[0])
            for run, heard in zip(self.runs[1:], beside[1:], strict=True):
                first, last = _extent(run, heard)
                self.added.append(end - first)
                end += last - first

    def shifts(self, marks: Sequence[Mark]) -> list[Shift]:
        """What to add to the stamps of a stream, so that the recordings follow each other, all streams in step."""
        if len(self.runs) == 1:
            return NONE
        cuts = self.starts if marks is self.lead else _cuts(self.starts, self.lead, marks)
        found = []
        for cut, end, added in zip(cuts, [*cuts[1:], len(marks)], self.added, strict=True):
            if cut < end:
                first, last = _bounds(marks[cut:end])
                found.append(Shift(cut, added, first - AHEAD, last + AHEAD))
        return found or NONE


def _leaps(lead: Sequence[Mark], other: Sequence[Mark]) -> list[int]:
    """The numbers in `lead` of packets before which the stamps leap."""
    known = [(number, each.decoded, each) for number, each in enumerate(lead) if each.decoded is not None]
    steps = [after - before for (_, before, _), (_, after, _) in pairwise(known)]
    usual = _usual([time for _, time, _ in known])
    even = sum(abs(step - usual) <= usual / 2 for step in steps) >= 0.9 * len(steps)
    places = [each.place for each in other]
    found = []
    for step, ((_, begin, before), (number, end, after)) in zip(steps, pairwise(known), strict=True):
        if step < -BACK:
            found.append(number)
        elif step > AHEAD + 2 * usual:
            first, last = bisect_left(places, before.place), bisect_right(places, after.place)
            if first > 0 and last < len(other):
                inside = other[max(0, first - NEAR) : last + NEAR]
                heard = sum(each.duration for each in inside if begin < _time(each) < end)
                leap = heard < step / 2
            else:  # nothing beside it to tell by: an even stream does not pause; ffmpeg's limit is 10 s
                leap = even or (step > 10 and after.key)
            if leap:
                found.append(number)
    return found


def _cuts(starts: Sequence[int], lead: Sequence[Mark], other: Sequence[Mark]) -> list[int]:
    """Where the recordings begin in `other`, that begin at `starts` in `lead`: where its stamps leap near by, else at
    the same place in the file."""
    places = [each.place for each in other]
    begins = [lead[start].place for start in starts]
    cuts = [bisect_left(places, place) for place in begins]
    nearest: dict[int, int] = {}
    for leap in _leaps(other, ()):
        number = min(range(1, len(begins)), key=lambda n: abs(begins[n] - places[leap]))
        distance = abs(begins[number] - places[leap])
        if distance < min(NEAR, nearest.get(number, NEAR)):
            nearest[number], cuts[number] = distance, leap
    cuts[0] = 0
    for number in range(1, len(cuts)):
        cuts[number] = max(cuts[number], cuts[number - 1])
    return cuts


def _extent(run: Sequence[Mark], heard: Sequence[Mark]) -> tuple[float, float]:
    """When a recording begins and ends, by its leading stream, or by the other where that has more than a tail."""
    first, last = _bounds(run)
    if heard:
        sooner, later = _bounds(heard)
        if first - SLACK < sooner < first - 0.1:
            first = sooner
        if last + 0.1 < later < last + SLACK:
            last = later
    return first, last


def _bounds(run: Sequence[Mark]) -> tuple[float, float]:
    known = [each for each in run if not math.isnan(_time(each))]
    if not known:
        return -math.inf, math.inf
    return min(map(_time, known)), max(_time(each) + each.duration for each in known)


def _time(each: Mark) -> float:
    """Of a mark without a time, not a number, which is neither before nor after any."""
    time = each.decoded if each.shown is None else each.shown
    return math.nan if time is None else time
