"""Containers → frames and sound; picture files → pixels.

A source is a path, a seekable binary file object, or what is already decoded (arrays are torch's or numpy's):
a picture as a PIL image or an array (H, W, 3) or (3, H, W) uint8; sound as an array (n,) in [-1, 1] at
16 kHz, or a pair (array, rate in Hz); a clip as a pair (array, frames per second) with an array (N, 3, H, W)
or (N, H, W, 3) uint8. What a file holds is found from its content, never from its name.
"""

from __future__ import annotations

import os
import stat
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from omni.processing.frames import MediaError as MediaError
from omni.processing.frames import resize, sample_indices, sampled_fps

# Formats that Pillow recognises by a signature and decodes by itself: no EPS, which runs another program.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# A few bytes can claim any size. 8192 x 8192 is twice an 8K frame.
MAX_PIXELS = 2**26
# Silence that the time stamps of a damaged file ask for is believed up to this many seconds.
MAX_SILENCE = 6 * 3600


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


def kind_of(source: Any) -> Literal["video", "audio", "image"]:
    """What a source holds, from its content. A sound file's cover picture does not make it a clip.

    An animated GIF or PNG is a clip. Raises MediaError for what is none of the three.
    """
    if isinstance(source, tuple) or _is_array(source):
        dims = _array(source[0] if isinstance(source, tuple) else source).dim()
        if dims not in (1, 3, 4):
            raise MediaError(f"an array of {dims} dimensions is no media: a sound has 1, a picture 3, a clip 4.")
        return "audio" if dims == 1 else "image" if dims == 3 else "video"
    if _is_pil(source):
        return "image"
    with _file(source) as (file, name):
        picture = _open_picture(file, name)
        if picture is not None and not (picture.format in ("GIF", "PNG") and getattr(picture, "is_animated", False)):
            return "image"
    with _container(source) as (container, name):
        if container.format.name.endswith("_pipe"):  # libavformat's name for a single picture
            return "image"
        if _pictures(container) is not None:
            return "video"
        if container.streams.audio:
            return "audio"
        raise MediaError(f"{name} holds neither pictures nor sound.")


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
    if _is_array(source):
        raise MediaError("an array of frames does not say how fast they follow: give (array, frames per second).")
    with _container(source) as (container, name):
        stream = _require_pictures(container, name)
        timeline = _scan(container, stream, name)
    indices, rate, duration = timeline.sample(fps, min_frames, max_frames)
    frames: Tensor | None = None
    size, done, lost = (0, 0), 0, 0
    with _container(source) as (container, name):
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
        _warn(f"{name}: {lost} of {len(indices)} frames could not be decoded; earlier ones stand in for them.")
    return Video(frames, rate, duration, size)


def read_audio(source: Any, *, sample_rate: int = 16_000) -> Tensor | None:
    """(n,) float32 mono, the plain mean of the channels; None for a file without sound.

    Sample 0 is the instant of the first frame where the file has pictures: sound that starts later is
    preceded by zeros, what comes before is cut. Gaps in the time stamps are filled with zeros. Sound that is
    cut off gives what can be decoded, with a warning. Raises MediaError where nothing is left.
    """
    import av

    if isinstance(source, tuple) or _is_array(source):
        array, rate = source if isinstance(source, tuple) else (source, 16_000)
        return _resample_array(_array(array), rate, sample_rate)
    with _container(source) as (container, name):
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        _require_decoder(stream, name)
        pictures = _pictures(container)
        promised = stream.duration and float(stream.duration * stream.time_base)
        if promised is None and pictures is None and container.duration is not None:
            promised = container.duration / av.time_base
        mixer = _Mixer(sample_rate, name)
        # Everything from here on is measured from the first frame, or from the first sound.
        clock = _seconds(pictures.start_time, pictures.time_base) if pictures is not None else None
        for packet in _packets(container, stream):
            for frame in _frames_of(stream.codec_context, packet):
                time = _seconds(frame.pts, stream.time_base)
                if clock is None:
                    clock = time
                mixer.add(frame, at=None if time is None or clock is None else time - clock)
        for frame in _frames_of(stream.codec_context, None):
            mixer.add(frame, at=None)
        waveform = mixer.finish()
    if len(waveform) == 0:
        raise MediaError(f"{name}: none of its sound could be decoded. The file is damaged.")
    # Raw streams promise nothing: their duration is estimated from the first frames.
    if promised and container.format.name not in ("mp3", "aac", "ac3", "eac3"):
        _warn_if_short(name, promised, len(waveform) / sample_rate, "sound")
    return _finite(waveform, name)


def read_image(source: Any) -> Tensor:
    """(3, H, W) uint8 RGB, upright. Transparency is laid over white; 16-bit greys keep their upper 8 bits.

    Raises MediaError for what is no picture, is damaged, or claims more than `MAX_PIXELS`.
    """
    if _is_array(source):
        array = _array(source)
        if array.dim() != 3 or array.dtype != torch.uint8 or 3 not in (array.shape[0], array.shape[2]):
            raise MediaError(f"an array of a picture must be (H, W, 3) or (3, H, W) uint8, not {_described(array)}.")
        return array if array.shape[0] == 3 else array.permute(2, 0, 1)
    if _is_pil(source):
        return _pixels(source, "the picture")
    with _file(source) as (file, name):
        picture = _open_picture(file, name)
        if picture is None:
            raise MediaError(f"{name} is not a picture of a known format ({', '.join(PICTURES)}).")
        return _pixels(picture, name)


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
    for packet in _packets(container, *container.streams.video, *container.streams.audio):
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
        _warn_if_short(name, container.duration / av.time_base, ends - start, "clip")

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
        packets = _packets(container, stream)
        while position < last and (packet := next(packets, None)) is not None:
            position = number.get(packet.pts, position) if timeline.timed else position + 1
            if sought and position > first:
                # The file's index led past the keyframe: from here on, read through from the start.
                seekable = False
                container.seek(min(0, *timeline.places), stream=stream)
                packets, position = _packets(container, stream), -1
            elif position >= first:
                yield from placed(_frames_of(context, packet))
            sought = False
        yield from placed(_frames_of(context, None))
        context.flush_buffers()


def _upright(frame: Any) -> Tensor:
    """(3, H, W) uint8 RGB, turned as the container's display matrix says."""
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"a frame of {frame.width} x {frame.height} pixels is too large. Scale the clip down.")
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
    return torch.rot90(picture, round(frame.rotation / 90), dims=(1, 2))


class _Mixer:
    """Decoded sound of any layout, format and rate → mono float32 at one rate, laid out by time."""

    def __init__(self, sample_rate: int, name: str) -> None:
        self.sample_rate = sample_rate
        self.name = name
        self.pieces: list[Tensor] = []
        self.clock: float | None = None
        self.early = 0  # samples from before the start, still to be cut
        self.form: tuple[str, str, int] | None = None
        self.resampler: Any = None

    def add(self, frame: Any, at: float | None) -> None:
        """at: seconds from the start at which the frame is heard; None for right after the one before."""
        import av

        if self.clock is None:
            self.clock = min(at or 0.0, 0.0)
            self.early = round(-self.clock * self.sample_rate)
        gap = 0.0 if at is None else at - self.clock
        # Time stamps are rounded, so a small gap is none; the sound of a clip may start with any.
        if gap > (0.1 if self.resampler else 0.0):
            if gap > MAX_SILENCE:
                raise MediaError(f"{self.name}: its sound claims {gap:.0f} s of silence. The file is damaged.")
            self._flush()
            self._put(torch.zeros(round(gap * self.sample_rate)))
            self.clock += gap
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self._flush()
            self.resampler = av.AudioResampler(format="fltp", layout=form[1], rate=self.sample_rate)
            self.form = form
        self.clock += frame.samples / frame.sample_rate
        self._resample(frame)

    def finish(self) -> Tensor:
        self._flush()
        return torch.cat(self.pieces) if self.pieces else torch.empty(0)

    def _flush(self) -> None:
        if self.resampler is not None:
            self._resample(None)
        self.resampler = self.form = None

    def _resample(self, frame: Any) -> None:
        for part in self.resampler.resample(frame):
            # The plain mean, as librosa's: libswresample's own mix to one channel is louder than its sources.
            self._put(torch.from_numpy(part.to_ndarray()).mean(dim=0))

    def _put(self, piece: Tensor) -> None:
        cut = min(self.early, len(piece))
        self.early -= cut
        self.pieces.append(piece[cut:])


def _sample_array(
    source: tuple[Any, Any],
    fps: float,
    max_frames: int,
    min_frames: int,
    size_for: Callable[[int, int, int], tuple[int, int]] | None,
    on_frame: Callable[[int, int], None] | None,
) -> Video:
    array, native = _array(source[0]), float(source[1])
    if array.dim() != 4 or array.dtype != torch.uint8 or 3 not in (array.shape[1], array.shape[3]):
        raise MediaError(f"an array of frames must be (N, 3, H, W) or (N, H, W, 3) uint8, not {_described(array)}.")
    if array.shape[1] != 3:
        array = array.permute(0, 3, 1, 2)
    indices = sample_indices(len(array), native, fps=fps, min_frames=min_frames, max_frames=max_frames)
    size = (array.shape[2], array.shape[3])
    frames = resize(array[indices], size_for(len(indices), *size) if size_for else size)
    if on_frame is not None:
        on_frame(len(indices), len(indices))
    duration = len(array) / native
    return Video(frames, sampled_fps(len(indices), duration, fps), duration, size)


def _resample_array(array: Tensor, rate: float, sample_rate: int) -> Tensor:
    import av

    if array.dim() != 1 or len(array) == 0 or not array.is_floating_point():
        raise MediaError(
            f"an array of sound must be (n,) floating point in [-1, 1], one channel, not {_described(array)}."
        )
    if rate < 1 or rate != int(rate):
        raise MediaError(f"a sound's rate must be a whole number of samples per second, not {rate}.")
    waveform = _finite(array.detach().float(), "the sound")
    if rate == sample_rate:
        return waveform
    frame = av.AudioFrame.from_ndarray(waveform.numpy()[None], format="fltp", layout="mono")
    frame.sample_rate = int(rate)
    mixer = _Mixer(sample_rate, "the sound")
    mixer.add(frame, at=None)
    return mixer.finish()


@contextmanager
def _file(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """A source opened at its start, and its name for messages. File objects stay open afterwards."""
    if not isinstance(source, (str, os.PathLike)):
        name = str(getattr(source, "name", None) or "the file object")
        try:
            empty = source.seek(0, os.SEEK_END) == 0
            source.seek(0)
            if not isinstance(source.read(0), bytes):
                raise MediaError(f"{name} is open as text. Open it in binary mode.")
        except (AttributeError, OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(
                f"{type(source).__name__} is no source of media. Give a path, a seekable binary file or an array."
            ) from error
        if empty:
            raise MediaError(f"{name} is empty.")
        yield source, name
        return
    name = os.fspath(source)
    try:
        status = Path(source).stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{name} is a folder. Name a file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a regular file. Copy its content into one.")
        if status.st_size == 0:
            raise MediaError(f"{name} is empty.")
        file = Path(source).open("rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError as error:
        hint = " Download it first." if "://" in name else ""
        raise MediaError(f"{name} does not exist.{hint}") from error
    except OSError as error:
        raise MediaError(f"{name} cannot be opened: {error.strerror}.") from error
    with file:
        yield file, name


@contextmanager
def _container(source: Any) -> Iterator[tuple[Any, str]]:
    """An opened container and its name; errors of the libraries beneath become MediaError."""
    import av

    with _file(source) as (file, name):
        try:
            # Playlists and the like may name other files: only this one is read.
            with av.open(file, options={"protocol_whitelist": "none"}) as container:
                yield container, name
        except MediaError:
            raise
        except (av.FFmpegError, OSError) as error:
            raise MediaError(
                f"{name} cannot be read as a clip, a sound or a picture ({error.strerror}). "
                "It is of another kind, cut off or damaged."
            ) from error


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Whole packets, in the order of the file, up to its end or to where it cannot be read on."""
    import av

    with suppress(av.FFmpegError):
        for packet in container.demux(*streams):
            if packet.size > 0 and not packet.is_corrupt:
                yield packet


def _frames_of(context: Any, packet: Any) -> list[Any]:
    """What a packet decodes to, None for what is still to come; nothing where it is damaged."""
    import av

    try:
        return context.decode(packet)
    except av.FFmpegError:
        return []


def _pictures(container: Any) -> Any | None:
    """The stream of moving pictures: not the cover of a sound."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    return next((stream for stream in container.streams.video if not stream.disposition & still), None)


def _require_pictures(container: Any, name: str) -> Any:
    stream = _pictures(container)
    if stream is None:
        raise MediaError(f"{name} holds no moving pictures. Give it as a sound.")
    _require_decoder(stream, name)
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise MediaError(
            f"{name} has frames of {context.width} x {context.height} pixels, which is too large. Scale it down."
        )
    return stream


def _require_decoder(stream: Any, name: str) -> None:
    if stream.codec_context is None:
        raise MediaError(f"{name}: there is no decoder for its {stream.type} stream. Convert it to H.264 and AAC.")


def _open_picture(file: BinaryIO, name: str) -> Any | None:
    """A picture, not yet decoded; None where Pillow knows no such format."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes when it is decoded
        try:
            return Image.open(file, formats=[name for name in PICTURES if name in Image.OPEN])
        except UnidentifiedImageError:
            return None
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name} is too large for a picture. Scale it down.") from error
        except Exception as error:
            raise MediaError(f"{name} is a damaged picture: {error}.") from error
        finally:
            file.seek(0)


def _pixels(picture: Any, name: str) -> Tensor:
    from PIL import Image, ImageOps

    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name} has {width} x {height} pixels, which is too large. Scale it down.")
    if picture.mode == "F":
        raise MediaError(f"{name} has floating point pixels of unknown range. Convert it to 8 bits.")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            picture = picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
        if "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    # On damaged files Pillow's decoders raise whatever their parsing runs into.
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)


def _is_array(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "dtype")


def _is_pil(source: Any) -> bool:
    return hasattr(source, "getbands")


def _array(source: Any) -> Tensor:
    try:
        return torch.as_tensor(source).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"{type(source).__name__} is no array of numbers: {error}") from error


def _described(array: Tensor) -> str:
    return f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"


def _finite(waveform: Tensor, name: str) -> Tensor:
    if not bool(waveform.isfinite().all()):
        raise MediaError(f"{name} has samples that are infinite or not a number.")
    return waveform


def _seconds(time: int | None, unit: Any) -> float | None:
    return None if time is None else float(time * unit)


def _warn_if_short(name: str, promised: float, found: float, what: str) -> None:
    if found < promised * 0.99 - 0.1:
        _warn(f"{name} is cut off: it promises a {what} of {promised:.1f} s and has {found:.1f} s.")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
