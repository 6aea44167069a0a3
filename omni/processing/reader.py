"""Media parts of messages → what the model sees and hears of them, each read once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.inputs import InputError
from omni.processing.background import BackgroundTask
from omni.processing.frames import Pixels, VisionSizes, resize, target_size
from omni.processing.media import Video, read_image, read_video
from omni.processing.media.files import is_array, is_file_object, is_pair, noting, warn
from omni.processing.media.identity import Identity, identity
from omni.processing.media.sound import PastEndError, listen
from omni.processing.media.video import SizeFor
from omni.processing.mel import LogMel
from omni.processing.parts import Part
from omni.reuse import LRUCache

T = TypeVar("T")
OnFrame = Callable[[int, int], None]
OnPixels = Callable[[Pixels, int], None]


class _Read(NamedTuple):
    """value: what a source gave; notes: what there was to warn of. tensor: of the value, at which version."""

    value: Any
    notes: list[str]
    tensor: Tensor | None
    version: int


class _NobodyWaitsError(Exception):
    """The block was left beside which sound is read."""


class Reader:
    """Reads the media of prompts, and keeps what it read last: `limit` bytes of it at most.

    Frames scaled, as bytes, and spectrograms are found again by the source's identity (`media.identity`) and by all
    that shaped them. What was warned of is warned of again. Errors are not kept, nor what changed while it was read,
    nor what somebody wrote to since.
    """

    def __init__(self, config: OmniConfig, limit: int) -> None:
        self.config = config
        self.kept: LRUCache[_Read] = LRUCache(limit)

    def read(
        self,
        parts: Sequence[Part],
        bounds: VisionSizes,
        options: dict[str, Any],
        on_frame: OnFrame | None = None,
        on_pixels: OnPixels | None = None,
    ) -> tuple[list[Any], list[Tensor | None]]:
        """For each part: (1, 3, h, w) uint8 of a picture, the Video of a clip, None of a sound; and the log-mel of its
        sound, None where it has none or is not to be heard. Sound is read beside the pictures."""
        known = [identity(part.source) if self.kept.limit else None for part in parts]
        with BackgroundTask(lambda stopped: self._hear_all(parts, known, options, stopped)) as hearing:
            if any(is_file_object(part.source) for part in parts):  # it stands at one place at a time
                hearing.wait()
            seen = [
                self._see(part, each, bounds, options, on_frame, on_pixels)
                for part, each in zip(parts, known, strict=True)
            ]
            return seen, hearing.wait()

    def _once(self, part: Part, known: Identity | None, asked: Hashable, read: Callable[[], T]) -> T:
        """What `read` gives, or gave when it was asked the same of the same content."""
        if known is None:
            return read()
        found = self.kept.get((known, asked))
        if found is None or (found.tensor is not None and found.tensor._version != found.version):
            # As a plain tensor, which counts how often it was written to, whoever prepares.
            with noting() as notes, torch.inference_mode(False):
                value = read()
            tensor = value.frames if isinstance(value, Video) else value if isinstance(value, Tensor) else None
            found = _Read(value, notes, tensor, 0 if tensor is None else tensor._version)
            if known.is_of(part.source):
                nbytes = 0 if tensor is None else tensor.untyped_storage().nbytes()
                self.kept.put((known, asked), found, nbytes + 1024)
        for note in found.notes:
            warn(note)
        return found.value

    def _hear_all(
        self,
        parts: Sequence[Part],
        known: Sequence[Identity | None],
        options: dict[str, Any],
        stopped: Callable[[], bool],
    ) -> list[Tensor | None]:
        """Spectrograms of a prompt's sounds, padded as the family's processor pads them."""
        spectra: dict[int, LogMel | None] = {}

        def spectrum(number: int) -> LogMel | None:
            if number not in spectra:
                sound, mel = asked[number], LogMel(self.config.audio.num_mel_bins)
                assert sound is not None
                spectra[number] = mel if _hear(parts[number].source, sound, mel.push, stopped) else None
                if stopped():  # half a sound
                    raise _NobodyWaitsError
            return spectra[number]

        def samples(number: int) -> int | None:
            found = spectrum(number)
            return None if found is None else found.samples

        def mel(number: int) -> Tensor | None:
            found = spectrum(number)
            del spectra[number]  # that is its last call
            return None if found is None else found.finish(padded_to)

        asked = [_asked_sound(part, options) for part in parts]
        lengths = [
            self._once(part, known[number], asked[number], partial(samples, number)) if asked[number] else None
            for number, part in enumerate(parts)
        ]
        padded_to = options["reading"].sound_samples
        if self.config.family == QWEN3:
            padded_to = max(filter(None, lengths), default=0)
        with noting():  # what is read again was warned of above
            return [
                self._once(part, known[number], (asked[number], padded_to), partial(mel, number))
                if lengths[number] is not None
                else None
                for number, part in enumerate(parts)
            ]

    def _see(
        self,
        part: Part,
        known: Identity | None,
        bounds: VisionSizes,
        options: dict[str, Any],
        on_frame: OnFrame | None,
        on_pixels: OnPixels | None,
    ) -> Any:
        if part.kind == "audio":
            return None
        sizes = _part_sizes(bounds, part)
        size = _stated_size(part, sizes)
        if part.kind == "image":
            return self._once(part, known, ("image", sizes, size), lambda: _look(part.source, sizes, size))
        source, asked = _asked_frames(part, sizes, options)
        shown: Tensor | None = None

        def on_frames(frames: Tensor, done: int) -> None:
            nonlocal shown
            shown = frames
            if on_frame is not None:
                on_frame(done, len(frames))
            if on_pixels is not None:
                on_pixels(Pixels((frames,), bounds, of_clip=True), done)

        first = sizes.clip_size if size is None else lambda *_: size
        again = _again(first, sizes, options["reading"].again_tokens)
        scaled = {"size_for": first} if again is None else {"through_for": first, "size_for": again}
        video = self._once(
            part,
            known,
            ("video", sizes, size, options["reading"].again_tokens, *asked.items()),
            lambda: read_video(source, **asked, **scaled, on_frames=on_frames),
        )
        if shown is None:
            on_frames(video.frames, len(video.frames))
        return video


class _Sound(NamedTuple):
    """What is asked of a medium's sound."""

    kind: str
    start: float
    end: float | None
    track: int | None


def _asked_sound(part: Part, options: dict[str, Any]) -> _Sound | None:
    """None where it has none or is not to be heard."""
    given = part.settings
    if part.kind == "image" or (
        part.kind == "video" and not given.get("use_audio_in_video", options["use_audio_in_video"])
    ):
        return None
    track = given.get("audio_track")
    if part.kind == "video" and _is_frames(part.source):  # they have no sound beside them
        if track is not None:
            raise InputError(f"{part.where}: audio_track is for files; frames have no sound.")
        return None
    start, end = options["reading"].heard(given.get(f"{part.kind}_start", 0.0), given.get(f"{part.kind}_end"))
    return _Sound(part.kind, start, end, track)


def _hear(source: Any, asked: _Sound, put: Callable[[Tensor], None], stopped: Callable[[], bool]) -> bool:
    """Calls `put` with the pieces of a medium's waveform; whether it has any."""
    try:
        return listen(source, put, start=asked.start, end=asked.end, track=asked.track, stopped=stopped) is not None
    except PastEndError:
        if asked.kind == "audio":
            raise
        return False  # of the sound; whether it is the clip's, its frames show


def _look(source: Any, sizes: VisionSizes, size: tuple[int, int] | None) -> Tensor:
    """(1, 3, h, w) uint8."""
    picture = read_image(source)
    size = size or sizes.image_size(picture.shape[1], picture.shape[2])
    return resize(picture[None], size).clone()  # whoever gave an array may write to it


def _asked_frames(part: Part, sizes: VisionSizes, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A clip as `read_video` takes it, and which frames of it: by its own settings, then those of the call."""
    given, source, fps = part.settings, part.source, part.settings.get("fps", options["fps"])
    if isinstance(source, tuple) and not is_pair(source):  # as qwen-omni-utils takes it
        source = list(source)
    listed = isinstance(source, list) or is_array(source)
    if "sample_fps" in given and not listed:
        raise InputError(f"{part.where}: sample_fps is the rate of a list of frames; of a clip give fps.")
    if listed:  # its fps is the rate at which the frames follow: all of them are seen
        fps = given.get("sample_fps", given.get("fps"))
        if fps is None:
            what = "a list of frames" if isinstance(source, list) else "an array of frames"
            raise InputError(f"{part.where}: {what} needs fps, how many of them make a second.")
        source = (list(source) if len(getattr(source, "shape", "1234")) == 4 else source, fps)
    least = 2 * -(-given["min_frames"] // 2) if "min_frames" in given else 2 if listed else sizes.min_frames
    most = 2 * (given["max_frames"] // 2) if "max_frames" in given else options["max_frames"]
    if "min_frames" in given and "max_frames" not in given:
        most = max(least, most)
    if "max_frames" in given and "min_frames" not in given:
        least = min(least, most)
    return source, {
        "fps": fps,
        "max_frames": most,
        "min_frames": least,
        "nframes": given.get("nframes"),
        "start": given.get("video_start", 0.0),
        "end": given.get("video_end"),
        "told_fps": options["reading"].told_fps,
    }


def _is_frames(source: Any) -> bool:
    return isinstance(source, (list, tuple)) or is_array(source)


def _part_sizes(sizes: VisionSizes, part: Part) -> VisionSizes:
    least, most, total = (part.settings.get(key) for key in ("min_pixels", "max_pixels", "total_pixels"))
    if part.kind == "image" and total is not None:  # of all that is seen of it: it is one
        most, total = min(total, most or sizes.image_max_pixels), None
    try:
        return bounded(sizes, least, most, total)
    except InputError as error:
        raise InputError(f"{part.where}: {error}") from None


def _again(first: SizeFor, sizes: VisionSizes, tokens: tuple[int, int] | None) -> SizeFor | None:
    """The size of a frame that has had its first: with no fewer and no more tokens' worth of pixels than these."""
    if tokens is None:
        return None
    least, most = (count * sizes.factor**2 for count in tokens)
    return lambda *clip: target_size(*first(*clip), factor=sizes.factor, min_pixels=least, max_pixels=most)


def _stated_size(part: Part, sizes: VisionSizes) -> tuple[int, int] | None:
    """The size that resized_height and resized_width ask for, in whole tokens and within the part's bounds, or, as
    qwen-omni-utils has it, those of pictures."""
    given = part.settings
    if "resized_height" not in given:
        return None
    return target_size(
        given["resized_height"],
        given["resized_width"],
        factor=sizes.factor,
        min_pixels=given.get("min_pixels", min(4 * sizes.factor**2, sizes.image_max_pixels)),
        max_pixels=given.get("max_pixels", max(sizes.image_max_pixels, sizes.image_min_pixels)),
    )


def bounded(
    sizes: VisionSizes, min_pixels: int | None, max_pixels: int | None, total_pixels: int | None
) -> VisionSizes:
    """`sizes` with new bounds, where given, for pictures and clips alike. One that is given moves the other along."""
    least = sizes.factor**2
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels), ("total_pixels", total_pixels)):
        if value is not None and value < (1 if name == "total_pixels" else least):
            limit = "1" if name == "total_pixels" else f"{least}, the pixels of one token"
            raise InputError(f"{name} must be at least {limit}, not {value}.")
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise InputError("min_pixels must not exceed max_pixels.")

    def bounds(low: int, high: int) -> tuple[int, int]:
        if max_pixels is not None:
            low, high = min(low, max_pixels), max_pixels
        if min_pixels is not None:
            low, high = min_pixels, max(high, min_pixels)
        return low, high

    image = bounds(sizes.image_min_pixels, sizes.image_max_pixels)
    video = bounds(sizes.video_min_pixels, sizes.video_max_pixels)
    return replace(
        sizes,
        image_min_pixels=image[0],
        image_max_pixels=image[1],
        video_min_pixels=video[0],
        video_max_pixels=video[1],
        video_total_pixels=total_pixels or sizes.video_total_pixels,
    )
