"""The small files of a checkpoint folder: foreign data, so bounded, of the folder itself, and strict where JSON.

What is wrong with a file is a ValueError here, a phrase without the file's name; callers say whose file it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 100_000_000
"""The safetensors library's own bound for a header. The largest small file, a tokenizer.json, has a tenth of it."""

MAX_DIGITS = 1000
"""Of a whole number: Python refuses more than 4300, and what it takes to read them grows with their square."""


LEAVES = "a link that leaves the folder. Give the folder that it leads to, or a copy"


def stays_inside(path: Path) -> bool:
    """Whether a file of a checkpoint folder is in it, links followed."""
    root = path.parent.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # the hub's cache: files are links into blobs/, beside snapshots/
        homes.append(root.parent.parent / "blobs")
    return any(path.resolve().is_relative_to(home) for home in homes)


def fits_utf8(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON may write half of a surrogate pair."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def read_text(path: Path) -> str:
    """The text of a regular file. Raises ValueError."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        if not stays_inside(path):
            raise ValueError(f"it is {LEAVES}")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is longer than {MAX_BYTES} bytes")
        text = path.read_bytes().decode()
    except OSError as error:
        raise ValueError(error.strerror) from error
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    if text.startswith("version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the file itself: run `git lfs pull`")
    return text


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ValueError."""
    return parse_object(read_text(path))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object in which no name occurs twice: readers differ in which of the two they take. Raises ValueError."""
    try:
        decoded = text if isinstance(text, str) else text.decode()
        value = json.loads(decoded, object_pairs_hook=_distinct, parse_int=_whole)
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values
