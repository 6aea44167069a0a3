"""Sources of media: files and containers opened, arrays recognised, damage reported.

A source is a path, an address (file://, data:; http:// and https:// by `addresses.fetched`), bytes, a seekable binary
file object, or what is already decoded: a picture as a PIL image or an array (H, W, 3) or (3, H, W) uint8; sound as an
array (n,) in [-1, 1] at 16 kHz, or a pair (array, rate in Hz); a clip as a pair (frames, frames per second), its frames
an array (N, 3, H, W) or (N, H, W, 3) uint8 or a list of pictures. Arrays are torch's or numpy's, of any strides.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omni.processing.frames import MediaError
from omni.processing.media.addresses import data_of, path_of, refusal, scheme_of, shown
from omni.processing.media.streams import moving_pictures

MAY_LEAP = 0x200
"""AVFMT_TS_DISCONT of libavformat's avformat.h: time stamps may leap within a file of such a format."""


@contextmanager
def open_file(source: Any) -> Iterator[tuple[BinaryIO, str]]:
    """A source opened at its start, and its name for messages. File objects stay open afterwards."""
    scheme, name = scheme_of(source), named(source)
    if scheme in ("http", "https"):
        raise MediaError(refusal(source))
    if scheme == "data":
        source = data_of(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) == 0:
            raise MediaError(f"{name} is empty.")
        yield io.BytesIO(source), name
        return
    if not isinstance(source, (str, os.PathLike)):
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
    if scheme == "file":
        source = path_of(str(source))
    try:
        status = Path(source).stat()
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(f"{name} is a folder. Name a file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(f"{name} is not a regular file. Copy its content into one.")
        if status.st_size == 0:
            raise MediaError(f"{name} is empty.")
        file = Path(source).open("rb")  # noqa: SIM115 (closed below)
    except MediaError:
        raise
    except FileNotFoundError as error:
        hint = " Download it first." if "://" in name and scheme is None else ""
        raise MediaError(f"{name} does not exist.{hint}") from error
    except OSError as error:
        raise MediaError(f"{name} cannot be opened: {error.strerror}.") from error
    except ValueError as error:  # a name that the system has no way to write
        raise MediaError(f"{name!r:.80} cannot be the name of a file.") from error
    with file:
        yield file, name


def named(source: Any) -> str:
    """A source in a message: its path or the beginning of its address, or what kind of object it is."""
    if isinstance(source, str):
        return shown(source)
    if isinstance(source, os.PathLike):
        return shown(str(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "the data"
    return shown(str(getattr(source, "name", None) or "the file object"))


@contextmanager
def open_container(source: Any, *, by_header: bool = False) -> Iterator[tuple[Any, str]]:
    """An opened container and its name; errors of the libraries beneath become MediaError.

    by_header: what the header of an MP4 or MOV file says of its pictures is enough. Else libavformat decodes the first
    of them, in one thread, to learn how they are coded: seven of 4K take half a second. A header that is followed by
    fragments does not know of all frames, nor in which order they are shown; and of several sound tracks libavformat
    takes for the best the one of which it has read most, here further than else. Such files are opened once more.
    """
    import av

    with open_file(source) as (file, name):
        try:
            if by_header and file.read(8)[4:] == b"ftyp":
                with _opened(file, skip_frame="all") as container:
                    pictures = moving_pictures(container)
                    if (pictures is None or pictures.frames) and len(container.streams.audio) < 2:
                        yield container, name
                        return
            with _opened(file) as container:
                yield container, name
        except MediaError:
            raise
        except (av.FFmpegError, OSError) as error:
            raise MediaError(
                f"{name} cannot be read as a clip, a sound or a picture ({error.strerror}). "
                "It is of another kind, cut off or damaged."
            ) from error


def _opened(file: BinaryIO, **options: str) -> Any:
    """Playlists and the like may name other files: only this one is read. Titles may be in any encoding."""
    import av

    file.seek(0)
    return av.open(_Nameless(file), options={"protocol_whitelist": "none", **options}, metadata_errors="replace")


class _Nameless:
    """A file for libavformat, which would go by its name: take p%03d.png for the pattern of a clip's pictures."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Packets in the order of the file, up to its end or to where it cannot be read on.

    libavformat marks packets as corrupt that may be: ones shorter than it asked for, which the last of a stream of
    unknown length is as well, and in transport streams all beside which a counter leaps, as where recordings are
    joined. Pictures of the first kind are torn and are left out; sound and the others are for the decoder to judge.
    """
    import av

    judged = container.format.flags & MAY_LEAP
    ahead = container.demux(*streams)
    with suppress(av.FFmpegError, StopIteration):
        while True:
            try:
                packet = next(ahead)
            except IndexError:  # PyAV 18 at its end, of a stream found meanwhile: none of those asked for
                ahead = container.demux(*streams)
                continue
            if packet.size > 0 and (not packet.is_corrupt or judged or packet.stream.type == "audio"):
                yield packet


def is_array(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "dtype")


def is_file_object(source: Any) -> bool:
    return hasattr(source, "read")


def is_pil(source: Any) -> bool:
    return hasattr(source, "getbands")


def is_pair(source: Any) -> bool:
    """Whether a clip is (frames, frames per second) and not a tuple of frames: what is second is no picture."""
    if not isinstance(source, tuple) or len(source) != 2:
        return False
    return not is_pil(source[1]) and getattr(source[1], "ndim", 0) < 2


def as_array(source: Any) -> Tensor:
    try:
        if any(step < 0 for step in getattr(source, "strides", ())):  # numpy's, such as of BGR turned to RGB
            source = source.copy()
        array = torch.as_tensor(source).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"{type(source).__name__} is no array of numbers: {error}") from error
    if array.layout != torch.strided:
        raise MediaError("an array must be dense, not sparse.")
    return array


def as_number(value: Any) -> float:
    """NaN for what is none, such as a text."""
    try:
        value = value.item() if is_array(value) else value  # numpy makes numbers of texts in arrays
        return math.nan if isinstance(value, (str, bytes, bytearray, memoryview, bool)) else float(value)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        return math.nan


def described(array: Tensor) -> str:
    return f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"


def warn_if_short(name: str, promised: float, found: float, what: str) -> None:
    if found < promised * 0.99 - 0.1:
        warn(f"{name} is cut off: it promises a {what} of {promised:.1f} s and has {found:.1f} s.")


_noted: ContextVar[list[str] | None] = ContextVar("noted", default=None)


@contextmanager
def noting() -> Iterator[list[str]]:
    """What this thread, and every `BackgroundTask` of it, warns of inside, instead of the warnings; which are given
    after all where the block fails."""
    notes: list[str] = []
    token = _noted.set(notes)
    failed = True
    try:
        yield notes
        failed = False
    finally:
        _noted.reset(token)
        for note in notes if failed else ():
            warn(note)


def warn(message: str) -> None:
    if (notes := _noted.get()) is None:
        warnings.warn(message, stacklevel=3)
    else:
        notes.append(message)
