"""Time stamps of recordings that were joined: where they leap, and what to add so that each follows the one before.

Transport and program streams may be joined by appending one to the other. The stamps then leap, forwards or back, by
any amount, in pictures and sound at once. A gap in one of the two alone is none: a picture that stands still, a pause.
"""

from __future__ import annotations

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


class Mark(NamedTuple):
    """A packet: its place in the file; when it is shown, when decoded, how long it lasts, in seconds; whether decoding
    can start at it."""

    place: int
    shown: float | None
    decoded: float | None
    duration: float
    key: bool


Shifts = list[tuple[int, float]]
"""(number of a packet in its stream, seconds to add to the stamps from there on)."""
NONE: Shifts = [(0, 0.0)]


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
    return found


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
            beside: list[list[Mark]] = [[] for _ in self.runs]
            for owner, each in zip(_owners(self.runs, other), other, strict=True):
                beside[owner].append(each)
            _, end = _extent(self.runs[0], beside[0])
            for run, heard in zip(self.runs[1:], beside[1:], strict=True):
                first, last = _extent(run, heard)
                self.added.append(end - first)
                end += last - first

    def shifts(self, marks: Sequence[Mark]) -> Shifts:
        """What to add to the stamps of a stream, so that the recordings follow each other, all streams in step."""
        if len(self.runs) == 1:
            return NONE
        if marks is self.lead:
            return list(zip(self.starts, self.added, strict=True))
        owners = _owners(self.runs, marks)
        changes = [number for number, owner in enumerate(owners) if number == 0 or owners[number - 1] != owner]
        return [(number, self.added[owners[number]]) for number in changes]


def _leaps(lead: Sequence[Mark], other: Sequence[Mark]) -> list[int]:
    """The numbers in `lead` of packets before which the stamps leap."""
    known = [(number, each.decoded, each) for number, each in enumerate(lead) if each.decoded is not None]
    steps = [after - before for (_, before, _), (_, after, _) in pairwise(known)]
    usual = median([step for step in steps if step > 0] or [0.0])
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


def _owners(runs: list[Sequence[Mark]], other: Sequence[Mark]) -> list[int]:
    """The run that each packet of `other` belongs to: of those near it in the file the one whose stamps are near."""
    begins = [run[0].place for run in runs]
    places = [[each.place for each in run] for run in runs]
    owners: list[int] = []
    for each in other:
        here = max(0, bisect_right(begins, each.place) - 1)
        beside = {here: runs[here][max(0, bisect_right(places[here], each.place) - 1)]}
        if here > 0 and each.place - begins[here] < NEAR:
            beside[here - 1] = runs[here - 1][-1]
        if here + 1 < len(runs) and begins[here + 1] - each.place < NEAR:
            beside[here + 1] = runs[here + 1][0]
        time = _time(each)
        owners.append(min(beside, key=lambda run: abs(_time(beside[run]) - time)) if time == time else here)
    return owners


def _extent(run: Sequence[Mark], heard: Sequence[Mark]) -> tuple[float, float]:
    """When a recording begins and ends, by its leading stream, or by the other where that has more than a tail."""
    first, last = _bounds(run)
    if heard:
        sooner, later = _bounds(heard)
        if first - 10 < sooner < first - 0.1:
            first = sooner
        if last + 0.1 < later < last + 10:
            last = later
    return first, last


def _bounds(run: Sequence[Mark]) -> tuple[float, float]:
    known = [each for each in run if _time(each) == _time(each)]
    if not known:
        return 0.0, 0.0
    return min(map(_time, known)), max(_time(each) + each.duration for each in known)


def _time(each: Mark) -> float:
    """Of a mark without a time, not a number, which is neither before nor after any."""
    time = each.decoded if each.shown is None else each.shown
    return float("nan") if time is None else time
