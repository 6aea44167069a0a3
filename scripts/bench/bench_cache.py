"""The compiler's files, kept in an archive that another run, on another machine of the kind, begins with."""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
EVERY = 60.0


def caches_in(folder: Path) -> dict[str, str]:
    """What to put into the environment, so that all that is compiled goes to a folder."""
    return dict(zip(CACHES, (str(folder), str(folder / "triton" / "0")), strict=True))


@contextmanager
def archived(path: Path | None) -> Iterator[Callable[[], None]]:
    """Inside, what is compiled is what was in the archive, where there is one, and goes into it at the end.

    Yields what does so before: it writes where a minute has passed and there is more than there was.
    """
    if path is None:
        yield lambda: None
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, written, held = Path(name), time.monotonic(), 0
        if path.is_file():
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
            held = size_of(folder)
        os.environ.update(caches_in(folder))

        def keep(every: float | None = None) -> None:
            nonlocal written, held
            wait = EVERY if every is None else every
            if time.monotonic() - written < wait or (size := size_of(folder)) == held:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(path.name + ".part")
            with tarfile.open(part, "w:gz", compresslevel=1) as archive:
                archive.add(folder, ".")
            part.replace(path)
            written, held = time.monotonic(), size

        try:
            yield keep
        finally:
            keep(0)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
