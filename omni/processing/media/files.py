"""Sources of media: files and containers opened, arrays recognised, damage reported.

A source is a path, a seekable binary file object, or what is already decoded: a picture as a PIL image or an
array (H, W, 3) or (3, H, W) uint8; sound as an array (n,) in [-1, 1] at 16 kHz, or a pair (array, rate in Hz);
a clip as a pair (array, frames per second), its array (N, 3, H, W) or (N, H, W, 3) uint8. Arrays are torch's or
numpy's.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omni.processing.frames import MediaError


@contextmanager
def open_file(source: Any) -> Iterator[tuple[BinaryIO, str]]:
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
    except MediaError:
        raise
    except FileNotFoundError as error:
        hint = " Download it first." if "://" in name else ""
        raise MediaError(f"{name} does not exist.{hint}") from error
    except OSError as error:
        raise MediaError(f"{name:.300} cannot be opened: {error.strerror}.") from error
    except ValueError as error:  # a name that the system has no way to write
        raise MediaError(f"{name!r:.80} cannot be the name of a file.") from error
    with file:
        yield file, name


@contextmanager
def open_container(source: Any) -> Iterator[tuple[Any, str]]:
    """An opened container and its name; errors of the libraries beneath become MediaError."""
    import av

    with open_file(source) as (file, name):
        try:
            # Playlists and the like may name other files: only this one is read. Titles may be in any encoding.
            with av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="replace") as container:
                yield container, name
        except MediaError:
            raise
        except (av.FFmpegError, OSError) as error:
            raise MediaError(
                f"{name} cannot be read as a clip, a sound or a picture ({error.strerror}). "
                "It is of another kind, cut off or damaged."
            ) from error


def packets(container: Any, *streams: Any) -> Iterator[Any]:
    """Whole packets, in the order of the file, up to its end or to where it cannot be read on."""
    import av

    with suppress(av.FFmpegError):
        for packet in container.demux(*streams):
            if packet.size > 0 and not packet.is_corrupt:
                yield packet


def frames_of(context: Any, packet: Any) -> list[Any]:
    """What a packet decodes to, None for what is still to come; nothing where it is damaged."""
    import av

    try:
        return context.decode(packet)
    except av.FFmpegError:
        return []


def moving_pictures(container: Any) -> Any | None:
    """The stream of moving pictures: not the cover of a sound."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    return next((stream for stream in container.streams.video if not stream.disposition & still), None)


def require_decoder(stream: Any, name: str) -> None:
    if stream.codec_context is None:
        raise MediaError(f"{name}: there is no decoder for its {stream.type} stream. Convert it to H.264 and AAC.")


def is_array(source: Any) -> bool:
    return hasattr(source, "shape") and hasattr(source, "dtype")


def is_pil(source: Any) -> bool:
    return hasattr(source, "getbands")


def as_array(source: Any) -> Tensor:
    try:
        return torch.as_tensor(source).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MediaError(f"{type(source).__name__} is no array of numbers: {error}") from error


def described(array: Tensor) -> str:
    return f"{tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}"


def seconds_of(time: int | None, unit: Any) -> float | None:
    return None if time is None else float(time * unit)


def warn_if_short(name: str, promised: float, found: float, what: str) -> None:
    if found < promised * 0.99 - 0.1:
        warn(f"{name} is cut off: it promises a {what} of {promised:.1f} s and has {found:.1f} s.")


def warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)
