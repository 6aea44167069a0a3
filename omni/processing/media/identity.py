"""What a source of media is known by, without decoding it: the stamps of a file, or the digest of its content."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from pathlib import Path
from typing import Any, NamedTuple

from omni.processing.frames import MediaError
from omni.processing.media.addresses import Fetched, path_of, scheme_of
from omni.processing.media.files import is_array, is_file_object, is_pil, named

SETTLED = 2.0
"""Seconds after which a change of a file shows in its stamps, as coarse as its file system may keep them: what was
written later is known by its content alone."""


class Identity(NamedTuple):
    """name: by which messages call the source. stamps: of a file, device, number, size, time of change of its content
    and of itself; or else digest: SHA-256 of the content."""

    name: str
    stamps: tuple[int, ...] | None
    digest: bytes | None

    def is_of(self, source: Any) -> bool:
        """Whether it is still that of a source which may have changed since."""
        try:
            return _stamps(source) == self.stamps if self.stamps else _digest(source) == self.digest
        except _UNREADABLE:
            return False


def identity(source: Any) -> Identity | None:
    """None for what is decoded already, whose content its owner may change, and for what cannot be read.

    A path or file:// address is known by its stamps, if these have settled; what was fetched, bytes and file objects,
    which stay where they stand, by their content.
    """
    if (
        isinstance(source, (list, tuple))
        or is_array(source)
        or is_pil(source)
        or scheme_of(source) not in (None, "file")
    ):
        return None
    try:
        stamps = None if isinstance(source, Fetched) else _stamps(source)
        if stamps and max(stamps[-2:]) < time.time_ns() - SETTLED * 1e9:
            return Identity(named(source), stamps, None)
        digest = _digest(source)
        return None if digest is None else Identity(named(source), None, digest)
    except _UNREADABLE:  # reading says so, in words
        return None


_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, MediaError)


def is_same_file(source: Any, path: Path) -> bool:
    """Whether a source is this very file, under whatever name."""
    try:
        mine = _path(source)
        return mine is not None and mine.samefile(path)
    except _UNREADABLE:
        return False


def _path(source: Any) -> Path | None:
    if not isinstance(source, (str, os.PathLike)):
        return None
    return Path(path_of(str(source)) if scheme_of(source) == "file" else source)


def _stamps(source: Any) -> tuple[int, ...] | None:
    if (path := _path(source)) is None:
        return None
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest(source: Any) -> bytes | None:
    if (path := _path(source)) is not None:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait
            return None
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    if isinstance(source, (bytes, bytearray, memoryview)):
        return hashlib.sha256(source).digest()
    if not is_file_object(source) or isinstance(source, io.TextIOBase):
        return None
    place = source.tell()
    try:
        source.seek(0)
        whole = hashlib.sha256()
        while block := source.read(2**20):
            whole.update(block)
        return whole.digest()
    finally:
        source.seek(place)
