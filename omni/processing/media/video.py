"""Containers, animations and lists of frames → the frames of a clip that the model sees."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from omni.processing.frames import MediaError, resize, resize_into
from omni.processing.media.animation import open_animation
from omni.processing.media.decoding import CORES, UNTIMED, WHOLE, Decoder, DisagreementError
from omni.processing.media.files import (
    as_array,
    as_number,
    described,
    is_array,
    is_pair,
    open_container,
    packets,
    warn,
    warn_if_short,
)
from omni.processing.media.picture import read_image
from omni.processing.media.references import lost_at_beginning
from omni.processing.media.stamps import NONE, Mark, Recordings, Shift, credible, mark, may_leap
from omni.processing.media.streams import require_pictures, sound_track
from omni.processing.media.timeline import Sample, Timeline, Wish
from omni.processing.media.upright import upright

SizeFor = Callable[[int, int, int], tuple[int, int]]
OnFrames = Callable[[Tensor, int], None]
SAME = 1e-6
"""Seconds between two computations of one time."""


@dataclass(frozen=True)
class Video:
    """The frames of a clip that the model sees.

    frames: (N, 3, H, W) uint8, N even. fps: the rate at which they follow each other, as the model is told it
    (`frames.sampled_fps`): `temporal_patch_size / fps` is its `video_second_per_grid`. duration: seconds of
    the whole clip, or of the stretch that was asked for. size: (height, width) before resizing, upright.
    """

    frames: Tensor
    fps: float
    duration: float
    size: tuple[int, int]


def read_video(
    source: Any,
    *,
    fps: float = 2.0,
    max_frames: int = 768,
    min_frames: int = 4,
    nframes: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    told_fps: float | None = None,
    size_for: SizeFor | None = None,
    through_for: SizeFor | None = None,
    on_frames: OnFrames | None = None,
) -> Video:
    """The frames that the family's rule takes from a clip (`frames.sample_indices`), upright, as RGB.

    nframes: how many, made even, instead of `fps`. start, end: the stretch of the clip in seconds from its first frame;
    `end` may lie beyond the clip. A list of frames that is no faster than `fps` is taken whole. told_fps:
    `omni.protocol.Reading`.
    size_for: (number of frames, height, width) → the (height, width) that each frame is resized to as it
    comes (`VisionSizes.clip_size`): memory holds what is returned and the few frames in hand (`IN_HAND`), however long
    the clip. through_for: likewise, a size that each is resized to before that. on_frames: called each time with all
    frames of the clip and how many of them are there, the first ones; with others where the file turns out to need
    reading anew.

    The file is read once without decoding, for the times of its frames. Where these can be trusted, only what leads
    from a keyframe to a wanted frame is read, and of that only the wanted and what others are made from is decoded
    (`references`); elsewhere the file is decoded from beginning to end, and a second time where its frames turn out to
    be others than its packets promised. Frames at a constant rate are taken by their index. Where the rate varies, the
    same number is taken at even instants: at each, the frame that is then on the screen.

    A clip that is cut off or damaged gives what can be decoded, with a warning that says how much is missing:
    a wanted frame that is lost is replaced by the one before it. Raises MediaError where nothing is left.
    """
    wish = Wish(fps, min_frames, max_frames, nframes, start, end, told_fps=told_fps)
    scaling = _Scaling(size_for, through_for, on_frames)
    if isinstance(source, (tuple, list)) or is_array(source):
        return _given(source, wish, scaling)
    with open_animation(source) as animation:
        if animation is not None:
            sample = animation.timeline().sample(wish, animation.name)
            with _Frames(sample, scaling) as frames:
                for picture in animation.frames(list(dict.fromkeys(sample.indices))):
                    frames.add(picture)
            return frames.video()
    return _contained(source, wish, scaling)


THREADS = min(8, CORES)
IN_HAND = 2**28
"""Bytes that pictures at full size may take while they are scaled, if it is more than one: all threads are busy up to
1080p, three at 4K."""
BYTES_PER_PIXEL = 12
"""Of a picture in hand: decoded, as RGB and as Pillow has it, or scaled in one direction."""


class _Scaling(NamedTuple):
    """`read_video`'s options of that name."""

    size_for: SizeFor | None = None
    through_for: SizeFor | None = None
    on_frames: OnFrames | None = None


class _Frames:
    """The wanted frames as they come, each scaled, beside those that are still decoded, and put where it belongs."""

    def __init__(self, sample: Sample, scaling: _Scaling) -> None:
        self.sample = sample
        self.size_for, self.through_for, self.on_frames = scaling
        # A wish for more frames than there are repeats them.
        self.repeats = deque(Counter(sample.indices).values())
        self.frames: Tensor | None = None
        self.size = (0, 0)
        self.through: tuple[int, int] | None = None
        self.placed = self.done = self.lost = 0
        self.pool = ThreadPoolExecutor(THREADS)
        self.scaling: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> _Frames:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.drop()
        try:
            while self.scaling:
                self._finish()
        finally:
            self.pool.shutdown(cancel_futures=True)

    def add(self, picture: Any, intact: bool = True) -> None:
        """picture: the next of `sample.indices` that differs, a frame of PyAV or (3, H, W) uint8; not intact where it
        stands in for it."""
        count, repeats = len(self.sample.indices), self.repeats.popleft()
        if self.frames is None:
            if not isinstance(picture, Tensor):
                picture = upright(picture)
            shape = picture.shape[1:] if isinstance(picture, Tensor) else (picture.height, picture.width)
            self.size = (shape[0], shape[1])
            target = self.size_for(count, *self.size) if self.size_for else self.size
            self.through = self.through_for(count, *self.size) if self.through_for else None
            try:
                self.frames = torch.empty(count, 3, *target, dtype=torch.uint8)
            except RuntimeError as error:
                raise MediaError(
                    f"{count} frames of {target[1]} x {target[0]} pixels are more than memory holds. "
                    "Ask for fewer or smaller ones."
                ) from error
        at_once = max(1, min(THREADS + 1, IN_HAND // (BYTES_PER_PIXEL * self.size[0] * self.size[1])))
        while len(self.scaling) >= at_once:
            self._finish()
        into = self.frames[self.placed : self.placed + repeats]
        self.scaling.append((repeats, self.pool.submit(_scale, picture, into, self.through)))
        self.placed += repeats
        self.lost += repeats * (not intact)

    def drop(self) -> None:
        """Forgets what is being scaled."""
        for _, job in self.scaling:
            job.cancel()
        self.scaling.clear()

    def _finish(self) -> None:
        """Waits for the first that is being scaled."""
        repeats, job = self.scaling.popleft()
        job.result()
        self.done += repeats
        if self.on_frames is not None and self.frames is not None:
            self.on_frames(self.frames, self.done)

    def are(self, times: Sequence[float], wanted: Sequence[float]) -> bool:
        """Whether they were taken at `times`, `wanted` being the different ones of theirs."""
        taken = [
            time
            for time, repeats in zip(wanted, Counter(self.sample.indices).values(), strict=True)
            for _ in range(repeats)
        ]
        return len(taken) == len(times) and all(abs(a - b) < SAME for a, b in zip(taken, times, strict=True))

    def video(self) -> Video:
        assert self.frames is not None
        return Video(self.frames, self.sample.fps, self.sample.duration, self.size)


def _scale(picture: Any, into: Tensor, through: tuple[int, int] | None = None) -> None:
    """A frame of PyAV, a picture of Pillow or (3, H, W) uint8 → into (n, 3, h, w), n times, by way of a size."""
    if through is not None and through != tuple(into.shape[2:]):
        first = torch.empty(1, 3, *through, dtype=torch.uint8)
        _scale(picture, first)
        picture = first[0]
    if isinstance(picture, Tensor):
        into[0] = resize(picture[None], (into.shape[2], into.shape[3]))[0]
    else:
        resize_into(into[0], upright(picture) if hasattr(picture, "planes") else picture)
    into[1:] = into[0]


@dataclass(frozen=True)
class _Scan:
    """The pictures of a file by its packets, without having decoded them.

    marks: all packets; shown: whether a frame is to come of each. places: the time stamp of each, in decoding order,
    where every one is known and differs; empty where they cannot be sought by. shifts: what to add to the stamps of
    joined recordings. times: in seconds on the container's clock, in order, of those shown. end: when the last goes.
    rates: as the file states them. timed: whether it states times at all.
    """

    marks: list[Mark]
    shown: list[bool]
    places: list[int]
    shifts: list[Shift]
    times: list[float]
    end: float
    rates: tuple[float, ...]
    timed: bool
    unit: float

    def timeline(self, times: Sequence[float], end: float) -> Timeline:
        return Timeline([time - times[0] for time in times], end - times[0], self.rates, self.unit if self.timed else 0)

    def numbers(self, wanted: Sequence[float]) -> list[int]:
        """The packets of the pictures of these times."""
        number = {place * self.unit: n for n, place in enumerate(self.places)}
        return [number[time] for time in wanted]

    @property
    def keys(self) -> list[int]:
        """The packets that decoding can start at."""
        return [number for number, each in enumerate(self.marks) if each.key]

    def spans(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The runs (first, last) of packets, from keyframe to wanted picture, that give the pictures of these."""
        keys = self.keys
        spans: list[tuple[int, int]] = []
        for last in numbers:
            # A picture that follows a keyframe but is shown before it needs the keyframe before.
            key = bisect_right(keys, last) - 1
            while key > 0 and self.places[keys[key]] > self.places[last]:
                key -= 1
            first = keys[key] if key >= 0 else 0
            if spans and first <= spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
            else:
                spans.append((first, last))
        return spans


def _scan(container: Any, stream: Any, name: str) -> _Scan:
    """Reads the whole file without decoding; warns where it ends before the time that it promises."""
    import av

    usual = sound_track(container, name, None)
    codec = stream.codec_context.codec
    lost: Callable[[memoryview], bool] | None = None
    keys, stated = 0, container.format.name in WHOLE
    length, others = _length(container)
    marks: list[Mark] = []
    sound: list[Mark] = []
    shown: list[bool] = []
    stamps: list[int | None] = []
    begins, ends = math.inf, -math.inf
    for place, packet in enumerate(packets(container, *container.streams.video, *container.streams.audio, *others)):
        found = mark(place, packet)
        if found.shown is not None:
            ends = max(ends, found.shown + found.duration)
            counted = found.decoded if container.format.name == "flv" else found.shown
            if not packet.is_discard and counted is not None:
                begins = min(begins, counted)
        if packet.stream.index == stream.index:
            marks.append(found)
            stamps.append(packet.pts)
            keys += packet.is_keyframe
            if lost is None:
                lost = lost_at_beginning(codec.canonical_name, stream.codec_context.extradata, memoryview(packet))
            # Cut away by an edit list, but others may be decoded from it; or coded to be never shown.
            visible = not packet.is_discard and _is_shown(stream.codec_context.name, packet)
            if visible and stated and keys == 1 and None not in (packet.pts, stamps[0]) and packet.pts < stamps[0]:
                visible = not lost(memoryview(packet))
            shown.append(visible)
        elif usual is not None and packet.stream.index == usual.index:
            sound.append(found)
    if not any(shown):
        raise MediaError(f"{name} has a picture stream without a single picture. The file is cut off or damaged.")
    if length is not None and not may_leap(container):
        start = (container.start_time or 0) / av.time_base
        # Writers count it from the first stamp, those of FLV from that of decoding, those of Matroska mostly from 0.
        since = min(start, begins, 0.0 if container.format.name == WHOLE[1] else math.inf)
        warn_if_short(name, length, max(ends, start) - since, "clip")

    rates = tuple(float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate)
    known = [stamp for stamp in stamps if stamp is not None]
    unit = float(stream.time_base)
    if container.format.name not in UNTIMED and 2 * len(known) >= len(stamps) and 2 * len(set(known)) > len(known):
        shifts = NONE
        if may_leap(container):
            marks = credible(marks)
            shifts = Recordings(marks, credible(sound)).shifts(marks)
        times, end = _laid_out(marks, shown, shifts)
        trusted = stated and len(set(known)) == len(stamps) and marks[0].key
        # Where a file does not say which are keyframes, all are taken for some. These decoders give a frame then, too.
        trusted &= keys < len(marks) or len(marks) == 1 or codec.intra_only or codec.canonical_name in TELLING
        if times:
            return _Scan(marks, shown, known if trusted else [], shifts, times, end, rates, True, unit)
    if not rates:
        raise MediaError(f"{name} states neither times nor a rate of its frames. Put it into an MP4 file.")
    # In order of decoding there may be times all the same, as in AVI, where frames may have been left out: what is
    # shown comes in that order at these times.
    slots = [each.decoded for each, visible in zip(marks, shown, strict=True) if visible]
    if all(b is not None and a is not None and a < b for a, b in pairwise(slots)) and slots[0] is not None:
        times = [slot - slots[0] for slot in slots if slot is not None]
    else:
        times = [number / rates[0] for number in range(len(slots))]
    return _Scan(marks, shown, [], NONE, times, times[-1] + 1 / rates[0], rates, False, unit)


TELLING = ("h264", "hevc", "vvc", "vp8", "vp9", "av1", "mpeg1video", "mpeg2video", "ffv1", "cfhd", "png")
"""Codecs whose decoders give no frame for one that is no keyframe and lacks what it is made from, or say so; and some
that have none but keyframes."""


def _length(container: Any) -> tuple[float | None, Sequence[Any]]:
    """Seconds of pictures and sound that a file promises; and streams that may be what lasts so long, where it states
    one length for all of them, as Matroska may."""
    import av

    if container.duration is None:
        return None, ()
    whole, start = container.duration / av.time_base, (container.start_time or 0) / av.time_base
    ends = [_end_of(stream) for stream in (*container.streams.video, *container.streams.audio)]
    if None in ends:
        return whole, container.streams.subtitles
    return min(whole, max(end for end in ends if end is not None) - min(start, 0.0)), ()


def _end_of(stream: Any) -> float | None:
    """When a stream ends by its header, in seconds on the container's clock; of Matroska by the tag of its writer."""
    if stream.duration is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    stated = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return 3600 * int(stated[1]) + 60 * int(stated[2]) + float(stated[3]) if stated else None


def _is_shown(codec: str, packet: Any) -> bool:
    """False for a packet of frames that others are made from, and that are not shown themselves.

    VP8: RFC 6386, section 9.1. VP9: its bitstream specification, sections 6.2 and annex B; of a superframe the last
    frame is looked at.
    """
    if codec == "vp8":
        return bool(bytes(memoryview(packet)[:1])[0] >> 4 & 1)
    if codec == "vp9":
        data = memoryview(packet)
        marker = data[len(data) - 1]
        if marker >> 5 == 0b110:
            width, count = (marker >> 3 & 3) + 1, (marker & 7) + 1
            index = len(data) - 2 - width * count
            if index >= 0 and data[index] == marker:
                sizes = bytes(data[index + 1 : -1])
                before = sum(int.from_bytes(sizes[n * width : n * width + width], "little") for n in range(count - 1))
                data = data[before:] if before < index else data
        head = int.from_bytes(bytes(data[:2]), "big")  # marker (2 bits), profile (2, or 3 where both are set)
        head <<= 4 if head >> 12 & 3 != 3 else 5
        return bool(head >> 15 & 1 or head >> 13 & 1)  # show_existing_frame, frame_type, show_frame
    return True


def _laid_out(marks: Sequence[Mark], shown: Sequence[bool], shifts: list[Shift]) -> tuple[list[float], float]:
    """The times of what is shown, in order, and when the last goes."""
    times: list[float] = []
    end = -math.inf
    pending, shift = shifts[:0:-1], shifts[0]
    for number, (each, visible) in enumerate(zip(marks, shown, strict=True)):
        if pending and number == pending[-1].number:
            shift = pending.pop()
        if visible and each.shown is not None and shift.first <= each.shown <= shift.last:
            times.append(each.shown + shift.added)
            end = max(end, each.shown + shift.added + each.duration)
    times.sort()
    return times, _end(times, end)


def _end(times: Sequence[float], end: float) -> float:
    """When the last frame goes. One that does not say how long it stays, stays as long as the others."""
    if end > times[-1]:
        return end
    return times[-1] + max((times[-1] - times[0]) / max(len(times) - 1, 1), 1e-3)


def _contained(source: Any, wish: Wish, scaling: _Scaling) -> Video:
    """The frames of a container: sought where its stamps can be trusted, else read through."""
    with open_container(source, by_header=True) as (container, name):
        stream = require_pictures(container, name)
        scan = _scan(container, stream, name)
        if scan.places:
            # Not opened anew, which may decode the first pictures once more: half a second at 4K.
            end = len(scan.places) - 1
            video = _sought(Decoder(stream), container, name, scan, wish, scaling, sparse=True, position=end)
            if video is not None:
                return video
    for ahead in (True, False) if scan.places else ():
        with open_container(source) as (container, name):
            decoder = Decoder(require_pictures(container, name), ahead=ahead)
            video = _sought(decoder, container, name, scan, wish, scaling, sparse=False)
        if video is not None:
            return video
        if not decoder.cut:
            break
    return _read_through(source, scan, wish, scaling)


def _sought(
    decoder: Decoder,
    container: Any,
    name: str,
    scan: _Scan,
    wish: Wish,
    scaling: _Scaling,
    *,
    sparse: bool,
    position: int = -1,
) -> Video | None:
    """By what leads from keyframes to wanted frames; sparse: only what those are made from. None where the packets
    promised other frames. position: `Decoder.sought`."""
    sample = scan.timeline(scan.times, scan.end).sample(wish, name)
    wanted = _instants(scan.times, sample)
    numbers = scan.numbers(wanted)
    asked = {scan.places[number] for number in numbers} if sparse else None
    with _Frames(sample, scaling) as frames:
        spans = scan.spans(numbers)
        shown = decoder.sought(container, scan.places, scan.shown, scan.keys, spans, asked, position)
        try:
            _take(shown, wanted, frames)
        except DisagreementError:
            frames.drop()
            return None
    return _judged(frames, name, decoder.damage)


def _read_through(source: Any, scan: _Scan, wish: Wish, scaling: _Scaling) -> Video:
    """From the beginning to the end; once more, one picture at a time, where that lost frames at a damaged packet
    (`Decoder.cut`), and once more where the frames turn out to be others than the packets promised."""
    times, end = scan.times, scan.end
    ahead = again = True
    while True:
        with open_container(source) as (container, name):
            sample = scan.timeline(times, end).sample(wish, name)
            wanted = _instants(times, sample)
            decoder = Decoder(require_pictures(container, name), ahead=ahead)
            through = _Through(decoder.straight(container, scan.shifts), scan, wish.end)
            with _Frames(sample, scaling) as frames:
                _take(through, wanted, frames)
        if decoder.cut:
            ahead = False
            continue
        if not (again and through.times):
            break
        # The wish, of the frames that there really are: mostly they are those that the packets promised.
        times, end = through.found(times, end, damaged=decoder.damage > 0)
        real = scan.timeline(times, end).sample(wish, name)
        if frames.are([times[index] for index in real.indices], wanted):
            frames.sample = real
            break
        again = False
    return _judged(frames, name, decoder.damage)


def _instants(times: Sequence[float], sample: Sample) -> list[float]:
    """When the different frames of a sample are shown."""
    return [times[index] for index in dict.fromkeys(sample.indices)]


def _judged(frames: _Frames, name: str, damage: int) -> Video:
    if frames.frames is None:
        raise MediaError(f"{name}: not one of its frames could be decoded. The file is damaged.")
    if frames.lost and damage:
        count = len(frames.sample.indices)
        warn(f"{name}: {frames.lost} of {count} frames could not be decoded; earlier ones stand in for them.")
    return frames.video()


def _take(shown: Iterable[tuple[float, Any]], wanted: Sequence[float], frames: _Frames) -> None:
    """Of all frames as they come, with their times, those that are on the screen at the wanted ones. Reads to the end.

    The first stands in for what was to come before it.
    """
    waiting = deque(wanted)
    latest: tuple[float, Any] | None = None

    def take(time: float, frame: Any) -> None:
        frames.add(frame, intact=abs(time - waiting.popleft()) < SAME)

    for time, frame in shown:
        while latest is not None and waiting and waiting[0] < time - SAME:
            take(*latest)
        latest = time, frame
    while latest is not None and waiting:
        take(*latest)


class _Through:
    """All frames of a file from its beginning, in order, each with its time. times: of those that have come."""

    def __init__(self, frames: Iterator[tuple[float | None, Any]], scan: _Scan, end: float | None) -> None:
        self.frames, self.scan = frames, scan
        self.most = math.inf if end is None else end
        self.times: list[float] = []
        self.end = -math.inf
        self.stopped = False

    def __iter__(self) -> Iterator[tuple[float, Any]]:
        step = 1 / self.scan.rates[0] if self.scan.rates else 0.0
        latest = self.scan.times[0]
        for number, (time, frame) in enumerate(self.frames):
            stays = (frame.duration or 0) * self.scan.unit if self.scan.timed else step
            if not self.scan.timed:
                time = self.scan.times[number] if number < len(self.scan.times) else latest + step
            elif time is None:
                time = latest + step if self.times else latest
            # Stamps that go back, or stand still, are followed by what was to be shown later.
            latest = max(time, latest) if self.times else time
            self.times.append(latest)
            self.end = max(self.end, latest + (stays or step))
            if latest - self.times[0] >= self.most:
                self.stopped = True
                return
            yield latest, frame

    def found(self, times: list[float], end: float, *, damaged: bool) -> tuple[list[float], float]:
        """The times of the frames, and when the last goes. times, end: what the packets promised.

        What is missing in a damaged file was to be shown all the same, unless it came before everything else.
        """
        first, last = self.times[0], self.times[-1]
        rest = [time for time in times if time > last] if self.stopped else []
        kept = [time for time in times if first <= time and (not self.stopped or time <= last)]
        if damaged and set(self.times) <= set(kept):
            return [*kept, *rest], end
        found = [*self.times, *rest]
        return found, end if rest else _end(found, self.end)


def _given(source: Any, wish: Wish, scaling: _Scaling) -> Video:
    """The frames of an array or a list."""
    if not is_pair(source):
        kind = "a list" if isinstance(source, list) else "a tuple" if isinstance(source, tuple) else "an array"
        raise MediaError(
            f"{kind} of frames does not say how fast they follow: give fps, or a pair (frames, frames per second)."
        )
    given, rate = source
    number = as_number(rate)
    if not 0 < number < math.inf:
        raise MediaError(f"a clip at {rate!r:.80} frames per second has nothing to sample: fps must be above 0.")
    rate = number
    pictures: Sequence[Any] | Tensor = given
    if not isinstance(given, list):
        pictures = as_array(given)
        if pictures.dim() != 4 or pictures.dtype != torch.uint8 or 3 not in (pictures.shape[1], pictures.shape[3]):
            raise MediaError(
                f"an array of frames must be (N, 3, H, W) or (N, H, W, 3) uint8, not {described(pictures)}."
            )
        if pictures.shape[1] != 3:
            pictures = pictures.permute(0, 3, 1, 2)
    total = len(pictures)
    if total == 0:
        raise MediaError("a clip without a single frame has nothing to sample.")
    timeline = Timeline([number / rate for number in range(total)], total / rate, (rate,))
    sample = timeline.sample(replace(wish, every=isinstance(given, list)), "the clip")
    with _Frames(sample, scaling) as frames:
        for index in dict.fromkeys(sample.indices):
            frames.add(read_image(pictures[index]))
    return frames.video()
