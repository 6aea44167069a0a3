"""The frames of one stream of a container, as they come out of its decoder, with their times."""

from __future__ import annotations

import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from omni.processing.media.files import packets
from omni.processing.media.references import refreshing, unreferenced
from omni.processing.media.stamps import NONE, Shift
from omni.processing.media.streams import moving_pictures

WHOLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Formats that state a time for every frame, the same before and after a seek."""
UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "av1", "obu", "vvc", "dirac", "h263", "vc1")
"""Formats that state a rate and no times of appearance: what libavformat gives for AVI counts in decoding order."""

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
PICTURES = 3
"""Decoded at once for each core: one that waits for rows of the picture before leaves its core to another. With
libavcodec's own number, one more than there are cores, H.264 and HEVC kept two cores less busy."""


class DisagreementError(Exception):
    """A file's packets and what is decoded of them are not the same frames, or its index leads elsewhere."""


class Decoder:
    """ahead: decode several pictures at a time, where the codec lets one.

    damage: how many packets and frames could not be decoded so far. cut: whether draining may have lost intact frames:
    where several pictures are decoded at a time, PyAV drops those that follow a packet that cannot be decoded.
    """

    def __init__(self, stream: Any, *, ahead: bool = True) -> None:
        from av.codec.codec import Capabilities

        self.stream = stream
        self.context = stream.codec_context
        self.unit = float(stream.time_base)
        self.damage = 0
        self.cut = False
        self.awaited: int | None = None  # the time stamp of the last packet, until its frame comes
        several = stream.type == "video" and self.context.codec.capabilities & Capabilities.frame_threads
        self.ahead = ahead and bool(several) and CORES > 1
        if stream.type == "video" and ahead:
            stream.thread_type = "AUTO"
        if self.ahead:
            self.context.thread_count = min(16, PICTURES * CORES)  # libavcodec advises against more
        elif several:
            self.context.thread_count = 1

    def feed(self, packet: Any) -> list[Any]:
        """The intact frames that a packet brings out, None for all that are still to come."""
        import av

        if packet is not None:
            self.awaited = packet.pts
        try:
            frames = self.context.decode(packet)
        except av.FFmpegError:
            self.damage += packet is not None
            return []
        if any(frame.pts == self.awaited for frame in frames):
            self.awaited = None
        intact = [frame for frame in frames if not frame.is_corrupt]
        self.damage += len(frames) - len(intact)
        return intact

    def drain(self) -> list[Any]:
        frames = self.feed(None)
        self.cut |= self.ahead and self.awaited is not None
        self.context.flush_buffers()
        return frames

    def straight(self, container: Any, shifts: Sequence[Shift] = NONE) -> Iterator[tuple[float | None, Any]]:
        """(seconds on the container's clock, frame) from beginning to end; None where the file has no time for it."""
        stamps = _Stamps(self.unit, shifts[0])
        pending = list(shifts)[:0:-1]
        for number, packet in enumerate(packets(container, self.stream)):
            if pending and number == pending[-1].number:
                if self.stream.type == "video":
                    yield from ((stamps.time(frame), frame) for frame in self.drain())
                stamps = _Stamps(self.unit, pending.pop())
            yield from ((stamps.time(frame), frame) for frame in self.feed(packet))
        yield from ((stamps.time(frame), frame) for frame in self.drain())

    def sought(
        self,
        container: Any,
        places: Sequence[int],
        shown: Sequence[bool],
        keys: Sequence[int],
        spans: Sequence[tuple[int, int]],
        wanted: Collection[int] | None = None,
        position: int = -1,
    ) -> Iterator[tuple[float, Any]]:
        """(seconds, frame) of the spans (first, last), in the order of appearance.

        places: the time stamps of all packets, in decoding order, each different; shown: whether a frame is to come of
        each; keys: the numbers of those that decoding can start at. wanted: the time stamps of the frames that are
        asked for; of others only those come that some are made from. position: which packet was read last.
        Raises DisagreementError where other frames come, without damage that would explain it; and for damage where
        intact frames may be lost (`cut`), or were left out: they may be what stands in for the lost.
        """
        import av

        number = {place: n for n, place in enumerate(places)}
        coding = self.context.codec.canonical_name, self.context.extradata
        alone = unreferenced(*coding)
        anew = refreshing(*coding) if wanted is not None else None
        fed: _Fed | None = None
        for first, last in spans:
            # Seeking empties the decoder. Where more could be decoded at once, it is read on to the next keyframe.
            follows = bisect_right(keys, position) == bisect_left(keys, first)
            sought = first != position + 1 and not (fed is not None and anew is not None and follows)
            if sought:
                yield from self._rest(fed)
                fed = None
                try:
                    container.seek(places[first], stream=self.stream)
                except av.FFmpegError:
                    raise DisagreementError from None
                position = first - 1
            begun = False
            ahead = packets(container, self.stream)
            while position < last and (packet := next(ahead, None)) is not None:
                position = number.get(packet.pts, -1)
                if position < 0 or (sought and position > first):
                    raise DisagreementError
                sought = False
                if position < first:
                    continue
                if not begun:
                    begun = True
                    if fed is None or anew is None or not anew(memoryview(packet)) or self.damage > fed.damage:
                        yield from self._rest(fed)
                        fed = _Fed(places[first], self.damage)
                    fed.spans += 1
                    # What comes after the first keyframe and is shown before it may need what was not read.
                    fed.promised |= {places[n] for n in range(first, last + 1) if shown[n] and places[n] >= fed.first}
                assert fed is not None
                # Asked of each: some tell by what came before.
                if wanted is not None and alone(memoryview(packet)) and packet.pts not in wanted:
                    fed.skipped.add(packet.pts)
                    continue
                yield from self._shown(fed, self.feed(packet))
            if position < last:
                yield from self._rest(fed, short=begun)
                fed = None
        yield from self._rest(fed)

    def _shown(self, fed: _Fed, frames: Sequence[Any]) -> Iterator[tuple[float, Any]]:
        for frame in frames:
            # The two fields of a picture may be in two packets.
            if fed.skipped and frame.interlaced_frame:
                raise DisagreementError
            fed.found.add(frame.pts)
            yield frame.pts * self.unit if frame.pts is not None else math.nan, frame

    def _rest(self, fed: _Fed | None, *, short: bool = False) -> Iterator[tuple[float, Any]]:
        """What a decoder holds still, which leaves it empty. short: the file ended before."""
        if fed is None:
            return
        yield from self._shown(fed, self.drain())
        if short or self.damage > fed.damage:
            if fed.skipped or self.cut or fed.spans > 1:
                raise DisagreementError
        elif {place for place in fed.found if place is None or place >= fed.first} != fed.promised - fed.skipped:
            raise DisagreementError


class _Fed:
    """What a decoder was given since it was empty. spans: how many; first: the time stamp of their first packet;
    promised: frames that are to come, unless skipped; found: those that came. damage: the decoder's before."""

    def __init__(self, first: int, damage: int) -> None:
        self.first, self.damage, self.spans = first, damage, 0
        self.promised: set[int] = set()
        self.skipped: set[int] = set()
        self.found: set[int | None] = set()


class _Stamps:
    """The times of frames as they come out, as libavcodec guesses them (`guess_correct_pts`): by the stamps of
    appearance, unless those go back more often than the stamps of decoding."""

    def __init__(self, unit: float, shift: Shift) -> None:
        self.unit, self.shift = unit, shift
        self.faults = [0, 0]
        self.latest = [-math.inf, -math.inf]

    def time(self, frame: Any) -> float | None:
        pts, dts = frame.pts, frame.dts
        for kind, stamp in enumerate((pts, dts)):
            if stamp is not None:
                self.faults[kind] += stamp <= self.latest[kind]
                self.latest[kind] = stamp
        best = pts if pts is not None and (dts is None or self.faults[0] <= self.faults[1]) else dts
        if best is None or not self.shift.first <= best * self.unit <= self.shift.last:
            return None
        return best * self.unit + self.shift.added


def begins_anywhere(container: Any) -> bool:
    """Whether a file may begin in the middle of something: its first frame is then the first that can be decoded."""
    pictures = moving_pictures(container)
    stated = container.format.name in (*WHOLE, *UNTIMED)
    return not stated and pictures is not None and pictures.codec_context is not None


def clip_start(container: Any) -> float | None:
    """When the first frame of a file appears, in seconds on the container's clock; None where it has no pictures.

    Reads from a container that `begins_anywhere`, which has to stand at its beginning.
    """
    pictures = moving_pictures(container)
    if pictures is None:
        return None
    if begins_anywhere(container):
        for time, _ in Decoder(pictures, ahead=False).straight(container):
            if time is not None:
                return time
    return None if pictures.start_time is None else float(pictures.start_time * pictures.time_base)
