"""Media parts of messages: their kind, their source under any of its public names, and their own settings.

A part is {"type": "image" | "audio" | "video", that type, "url" or "path": the source} as in qwen-omni-utils and
transformers ("base64" there, too), or, as in chat completions, {"type": "image_url" | "video_url" | "audio_url",
that type: {"url": ...}} or {"type": "input_audio", "input_audio": {"data": base64, "format": ...}}. Beside these stand
the part's settings, `KEYS`, under the names of qwen-omni-utils; they go before the options of the call. A value of None
is as if the key were not there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

from omni.inputs import InputError
from omni.processing.chat_template import MEDIA
from omni.processing.frames import MAX_PIXELS
from omni.processing.media.addresses import decoded, scheme_of

KINDS = {"image_url": "image", "video_url": "video", "audio_url": "audio", "input_audio": "audio"}
"""The names of chat completions, as vLLM takes them."""
SOURCES = {
    "image": ("image", "image_url", "url", "path", "base64"),
    "audio": ("audio", "audio_url", "input_audio", "url", "path", "base64"),
    "video": ("video", "video_url", "url", "path", "base64"),
}


class Check(NamedTuple):
    """What a value must be, in words, and as what it is handed on."""

    is_right: Callable[[Any], bool]
    what: str
    make: Callable[[Any], Any]


def _real(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _whole(least: int, most: int = 2**31) -> Check:
    return Check(
        lambda value: _real(value) and value == int(value) and least <= value <= most,
        f"a whole number of at least {least}" + (f" and at most {most}" if most < 2**31 else ""),
        int,
    )


_RATE = Check(lambda value: _real(value) and value > 0, "a number of frames per second above 0", float)
_SECONDS = Check(lambda value: _real(value) and value >= 0, "a number of seconds from the beginning, 0 or more", float)
_FRAMES = _whole(2, 100_000)  # of a clip that has fewer, they are repeated
_PIXELS = Check(lambda value: _real(value) and value >= 1, "a number of pixels of at least 1", int)
_LEAST_PIXELS = Check(
    lambda value: _real(value) and 1 <= value <= MAX_PIXELS,
    f"a number of pixels of at least 1 and at most {MAX_PIXELS}",
    int,
)
_FLAG = Check(lambda value: type(value).__name__ in ("bool", "bool_"), "true or false", bool)
_SIZES = {
    "min_pixels": _LEAST_PIXELS,
    "max_pixels": _PIXELS,
    "total_pixels": _PIXELS,
    "resized_height": _LEAST_PIXELS,
    "resized_width": _LEAST_PIXELS,
}
KEYS: dict[str, dict[str, Check]] = {
    "image": _SIZES,
    "audio": {"audio_start": _SECONDS, "audio_end": _SECONDS, "audio_track": _whole(0)},
    "video": {
        "fps": _RATE,
        "sample_fps": _RATE,
        "nframes": _FRAMES,
        "min_frames": _FRAMES,
        "max_frames": _whole(2),
        "video_start": _SECONDS,
        "video_end": _SECONDS,
        **_SIZES,
        "use_audio_in_video": _FLAG,
        "audio_track": _whole(0),
    },
}
"""What may stand beside a part's type and source, and what its value must be. sample_fps: the rate of a list of frames,
another name for its fps."""


@dataclass(frozen=True)
class Part:
    """settings: those of `KEYS` that the part states, as numbers of Python. where: "message 1, part 2"."""

    kind: str
    source: Any
    settings: dict[str, Any]
    where: str


def read_parts(messages: Any) -> tuple[Any, list[Part]]:
    """Messages with every media part under its plain name, as `apply_chat_template` takes them, and these parts in
    order.

    Whatever is no part is left to `apply_chat_template` to refuse. Raises InputError for keys and values that mean
    nothing.
    """
    if not isinstance(messages, (list, tuple)):
        return messages, []
    plain: list[Any] = []
    media: list[Part] = []
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, (list, tuple)):
            plain.append(message)
            continue
        parts = []
        for index, each in enumerate(content, 1):
            where = f"message {number}, part {index}"
            kind = each.get("type") if isinstance(each, Mapping) else None
            kind = KINDS.get(kind, kind) if isinstance(kind, str) else None
            if kind in MEDIA:
                media.append(_read(each, str(kind), where))
                each = {"type": kind, kind: kind}
            elif kind == "text":
                _refuse_unknown(each, ("type", "text"), "a text", where)
            parts.append(each)
        plain.append({**message, "content": parts})
    return plain, media


def _read(part: Mapping[str, Any], kind: str, where: str) -> Part:
    stated = {key: value for key, value in part.items() if value is not None}
    names = [key for key in SOURCES[kind] if key in stated]
    if not names:
        raise InputError(f'{where} is of type {part["type"]!r} and needs the key "{part["type"]}".')
    for name in names[1:]:
        one, other = stated[names[0]], stated[name]
        if not (one is other or (isinstance(one, str) and isinstance(other, str) and one == other)):
            raise InputError(f'{where} has two sources, under "{names[0]}" and "{name}".')
    known = KEYS[kind]
    _refuse_unknown(stated, ("type", *names, *known), f"{'an' if kind != 'video' else 'a'} {kind}", where)
    settings = checked(kind, {key: stated[key] for key in known if key in stated}, f"{where}: ")
    _require_sense(settings, where)
    return Part(kind, _source(stated[names[0]], names[0], where), settings, where)


def checked(kind: str, settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Values under names of `KEYS`, of a part or of a call, as numbers of Python. Raises InputError."""
    for key, value in settings.items():
        if not KEYS[kind][key].is_right(value):
            raise InputError(f"{where}{key} must be {KEYS[kind][key].what}, not {value!r:.80}.")
    return {key: KEYS[kind][key].make(value) for key, value in settings.items()}


def _refuse_unknown(part: Mapping[str, Any], known: Sequence[str], what: str, where: str) -> None:
    for key, value in part.items():
        if key not in known and value is not None:
            raise InputError(f"{where}: {what} has no key {key!r:.80}; it may have {', '.join(known)}.")


def _require_sense(settings: Mapping[str, Any], where: str) -> None:
    for one, other in (("fps", "nframes"), ("fps", "sample_fps"), ("nframes", "sample_fps")):
        if one in settings and other in settings:
            raise InputError(f"{where}: give {one} or {other}, not both.")
    for bound in ("min_frames", "max_frames"):
        if "nframes" in settings and bound in settings:
            raise InputError(f"{where}: nframes says how many frames: leave {bound} out.")
    for one, other in (("resized_height", "resized_width"), ("resized_width", "resized_height")):
        if one in settings and other not in settings:
            raise InputError(f"{where}: {one} needs {other} beside it.")
    for least, most in (("min_frames", "max_frames"), ("min_pixels", "max_pixels")):
        if settings.get(least, 0) > settings.get(most, math.inf):
            raise InputError(f"{where}: {least} must not exceed {most}.")
    if settings.get("min_frames") == settings.get("max_frames", 0) and settings["max_frames"] % 2:
        count = settings["max_frames"]
        raise InputError(f"{where}: min_frames and max_frames, both {count}, allow no even number of frames.")
    for kind in ("video", "audio"):
        start, end = settings.get(f"{kind}_start", 0.0), settings.get(f"{kind}_end", math.inf)
        if start >= end:
            raise InputError(f"{where}: {kind}_end, {end:g} s, must come after {kind}_start, {start:g} s.")


def _source(value: Any, key: str, where: str) -> Any:
    """What stands under a source's key, as `omni.processing.media` takes it."""
    if key == "base64":
        return _bytes(value, f"{where}, {key}")
    if key == "input_audio":
        inner = _inner(value, ("data", "format"), key, where)
        return inner["data"] if scheme_of(inner["data"]) else _bytes(inner["data"], f"{where}, {key}")
    if key.endswith("_url") and isinstance(value, Mapping):
        inner = _inner(value, ("url", "detail"), key, where)
        if inner.get("detail", "auto") != "auto":
            raise InputError(f"{where}: detail must be auto: how large a picture is seen, max_pixels says.")
        return inner["url"]
    return value


def _inner(value: Any, keys: tuple[str, str], key: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f'{where}: {key} must be an object such as {{"{keys[0]}": …}}, not a {type(value).__name__}.')
    inner = {name: each for name, each in value.items() if each is not None}
    for name in inner:
        if name not in keys:
            raise InputError(f"{where}: {key} has no key {name!r:.80}; it may have {', '.join(keys)}.")
    if keys[0] not in inner:
        raise InputError(f'{where}: {key} needs the key "{keys[0]}".')
    return inner


def _bytes(value: Any, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"{name}: its content must be base64, not a {type(value).__name__}.")
    return decoded(value, name)
