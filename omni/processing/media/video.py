"""Containers → the frames of a clip that the model sees."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError, resize, sample_indices, sampled_fps
from omni.processing.media.files import (
    as_array,
    described,
    frames_of,
    is_array,
    moving_pictures,
    open_container,
    packets,
    require_decoder,
    warn,
    warn_if_short,
)


@dataclass(frozen=True)
class Video:
    """The frames of a clip that the model sees.

    frames: (N, 3, H, W) uint8, N even. fps: the rate at which they follow each other, as the model is told it
    (`frames.sampled_fps`): `temporal_patch_size / fps` is its `video_second_per_grid`. duration: seconds of
    the whole clip. size: (height, width) before resizing, upright.
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
    size_for: Callable[[int, int, int], tuple[int, int]] | None = None,
    on_frame: Callable[[int, int], None] | None = None,
) -> Video:
    """The frames that the family's rule takes from a clip (`frames.sample_indices`), upright, as RGB.

    size_for: (number of frames, height, width) → the (height, width) that each frame is resized to as it
    comes (`VisionSizes.clip_size`): memory holds what is returned and the frame in hand, however long the
    clip. on_frame: called with (frames done, frames in all).

    The file is read once without decoding, for the times of its frames; then only what leads from a keyframe
    to a wanted frame is read and decoded. Frames at a constant rate are taken by their index. Where the rate
    varies, the same number is taken at even instants: at each, the frame that is then on the screen.

    A clip that is cut off or damaged gives what can be decoded, with a warning that says how much is missing:
    a wanted frame that is lost is replaced by the one before it. Raises MediaError where nothing is left.
    """
    if isinstance(source, tuple):
        return _sample_array(source, fps, max_frames, min_frames, size_for, on_frame)
    if is_array(source):
        raise MediaError("an array of frames does not say how fast they follow: give (array, frames per second).")
    with open_container(source) as (container, name):
        stream = _require_pictures(container, name)
        timeline = _scan(container, stream, name)
    indices, rate, duration = timeline.sample(fps, min_frames, max_frames)
    frames: Tensor | None = None
    size, done, lost = (0, 0), 0, 0
    with open_container(source) as (container, name):
        stream = _require_pictures(container, name)
        for decoded, intact in _decode(container, stream, timeline, indices):
            picture = _upright(decoded)
            if frames is None:
                size = (picture.shape[1], picture.shape[2])
                target = size_for(len(indices), *size) if size_for else size
                frames = torch.empty(len(indices), 3, *target, dtype=torch.uint8)
            # A wish for more frames than there are repeats them.
            repeats = indices.count(indices[done])
            frames[done : done + repeats] = resize(picture[None], (frames.shape[2], frames.shape[3]))
            done, lost = done + repeats, lost + repeats * (not intact)
            if on_frame is not None:
                on_frame(done, len(indices))
    if frames is None:
        raise MediaError(f"{name}: not one of its frames could be decoded. The file is damaged.")
    if lost:
        warn(f"{name}: {lost} of {len(indices)} frames could not be decoded; earlier ones stand in for them.")
    return Video(frames, rate, duration, size)


@dataclass(frozen=True)
class _Timeline:
    """The pictures of a file, without having decoded them.

    places: in decoding order, what tells each one: its time stamp, or its number where the file has no usable
    ones (then `timed` is False). keys: the numbers in decoding order at which decoding can start. shown: the
    places of those that appear on the screen, in the order of their appearance. unit: seconds of one step of
    a time stamp. rate: frames per second as the file states it. end: the time stamp at which the last goes.
    """

    places: list[int]
    keys: list[int]
    shown: list[int]
    timed: bool
    unit: float
    rate: float | None
    end: int

    def sample(self, fps: float, min_frames: int, max_frames: int) -> tuple[list[int], float, float]:
        """Indices into `shown`, ascending; their rate (`Video.fps`); the clip's duration in seconds."""
        total, start = len(self.shown), self.shown[0]
        seconds = [(place - start) * self.unit for place in self.shown]
        rate = self.rate
        # Time stamps are rounded, in Matroska to milliseconds: within half a frame of its grid is constant.
        steady = rate is not None and (
            not self.timed or all(abs(time - k / rate) < 0.5 / rate for k, time in enumerate(seconds))
        )
        if not steady or rate is None:
            rate = total / ((self.end - start) * self.unit)
        indices = sample_indices(total, rate, fps=fps, min_frames=min_frames, max_frames=max_frames)
        duration = total / rate
        if not steady:
            instants = (i * duration / len(indices) for i in range(len(indices)))
            indices = [bisect_right(seconds, instant + 1e-6) - 1 for instant in instants]
        return indices, sampled_fps(len(indices), duration, fps), duration

    def spans(self, indices: list[int]) -> list[tuple[int, int]]:
        """The runs (first, last) in decoding order, from keyframe to wanted picture, that give `indices`."""
        if not self.timed:
            return [(0, len(self.places) - 1)]
        number = {place: n for n, place in enumerate(self.places)}
        spans: list[tuple[int, int]] = []
        for index in indices:
            place = self.shown[index]
            last = number[place]
            # A picture that follows a keyframe but is shown before it needs the keyframe before.
            key = bisect_right(self.keys, last) - 1
            while key > 0 and self.places[self.keys[key]] > place:
                key -= 1
            first = self.keys[key] if key >= 0 else 0
            if spans and first <= spans[-1][1] + 1:
                spans[-1] = (spans[-1][0], max(last, spans[-1][1]))
            else:
                spans.append((first, last))
        return spans


def _scan(container: Any, stream: Any, name: str) -> _Timeline:
    """Reads the whole file without decoding; warns where it ends before the time that it promises."""
    import av

    places: list[int | None] = []
    keys: list[int] = []
    shown: list[int] = []
    end, ends = 0, 0.0
    for packet in packets(container, *container.streams.video, *container.streams.audio):
        after = None if packet.pts is None else packet.pts + (packet.duration or 0)
        if after is not None:
            ends = max(ends, float(after * packet.time_base))
        if packet.stream.index != stream.index:
            continue
        if packet.is_keyframe:
            keys.append(len(places))
        if not packet.is_discard:  # cut away by an edit list, but others may be decoded from it
            shown.append(len(places))
            end = max(end, after or 0)
        places.append(packet.pts)
    if not shown:
        raise MediaError(f"{name} has a picture stream without a single picture. The file is cut off or damaged.")
    if container.duration is not None:
        start = (container.start_time or 0) / av.time_base
        warn_if_short(name, container.duration / av.time_base, ends - start, "clip")

    numbers = [place for place in places if place is not None]
    # AVI has no times of appearance, only a rate: what libavformat gives there counts in decoding order.
    timed = len(set(numbers)) == len(places) and container.format.name != "avi"
    rate = stream.average_rate or stream.guessed_rate
    if not timed:
        numbers, shown = list(range(len(places))), list(range(len(shown)))
        if not rate:
            raise MediaError(f"{name} states neither times nor a rate of its frames. Put it into an MP4 file.")
    order = sorted(numbers[n] for n in shown)
    if end <= order[-1]:  # the last one does not say how long it stays: as long as the others
        gap = (order[-1] - order[0]) / (len(order) - 1) if len(order) > 1 else 0
        end = order[-1] + max(1, round(gap))
    return _Timeline(numbers, keys, order, timed, float(stream.time_base), float(rate) if rate else None, end)


def _decode(container: Any, stream: Any, timeline: _Timeline, indices: list[int]) -> Iterator[tuple[Any, bool]]:
    """For each different index a decoded frame and whether it is that one, not an earlier in its stead."""
    wanted = deque(timeline.shown[index] for index in dict.fromkeys(indices))
    latest: Any = None
    for place, frame in _decode_spans(container, stream, timeline, timeline.spans(indices)):
        while wanted and wanted[0] < place:
            yield latest or frame, False
            wanted.popleft()
        if wanted and wanted[0] == place:
            yield frame, True
            wanted.popleft()
        if not wanted:
            return
        latest = frame
    if latest is not None:
        for _ in wanted:
            yield latest, False


def _decode_spans(
    container: Any, stream: Any, timeline: _Timeline, spans: list[tuple[int, int]]
) -> Iterator[tuple[int, Any]]:
    """(place, frame) of all pictures in the spans, in the order of appearance."""
    import av

    stream.thread_type = "AUTO"
    context = stream.codec_context
    number = {place: n for n, place in enumerate(timeline.places)}
    position, seekable = -1, timeline.timed
    untimed = count()

    def placed(frames: list[Any]) -> Iterator[tuple[int, Any]]:
        for frame in frames:
            place = frame.pts if timeline.timed else next(untimed)
            if not frame.is_corrupt:
                yield place, frame

    for first, last in spans:
        sought = False
        if seekable and first > position + 1:
            with suppress(av.FFmpegError):
                container.seek(timeline.places[first], stream=stream)
                sought = True
        ahead = packets(container, stream)
        while position < last and (packet := next(ahead, None)) is not None:
            position = number.get(packet.pts, position) if timeline.timed else position + 1
            if sought and position > first:
                # The file's index led past the keyframe: from here on, read through from the start.
                seekable = False
                container.seek(min(0, *timeline.places), stream=stream)
                ahead, position = packets(container, stream), -1
            elif position >= first:
                yield from placed(frames_of(context, packet))
            sought = False
        yield from placed(frames_of(context, None))
        context.flush_buffers()


def _upright(frame: Any) -> Tensor:
    """(3, H, W) uint8 RGB, turned as the container's display matrix says."""
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"a frame of {frame.width} x {frame.height} pixels is too large. Scale the clip down.")
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(picture, round(frame.rotation / 90), dims=(1, 2))


def _sample_array(
    source: tuple[Any, Any],
    fps: float,
    max_frames: int,
    min_frames: int,
    size_for: Callable[[int, int, int], tuple[int, int]] | None,
    on_frame: Callable[[int, int], None] | None,
) -> Video:
    array, native = as_array(source[0]), float(source[1])
    if array.dim() != 4 or array.dtype != torch.uint8 or 3 not in (array.shape[1], array.shape[3]):
        raise MediaError(f"an array of frames must be (N, 3, H, W) or (N, H, W, 3) uint8, not {described(array)}.")
    if array.shape[1] != 3:
        array = array.permute(0, 3, 1, 2)
    indices = sample_indices(len(array), native, fps=fps, min_frames=min_frames, max_frames=max_frames)
    size = (array.shape[2], array.shape[3])
    frames = resize(array[indices], size_for(len(indices), *size) if size_for else size)
    if on_frame is not None:
        on_frame(len(indices), len(indices))
    duration = len(array) / native
    return Video(frames, sampled_fps(len(indices), duration, fps), duration, size)


def _require_pictures(container: Any, name: str) -> Any:
    stream = moving_pictures(container)
    if stream is None:
        raise MediaError(f"{name} holds no moving pictures. Give it as a sound.")
    require_decoder(stream, name)
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise MediaError(
            f"{name} has frames of {context.width} x {context.height} pixels, which is too large. Scale it down."
        )
    return stream
