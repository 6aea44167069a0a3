"""Other ways of keeping tokens, to compare SEATS with: one file each, behind `seats.method.Method`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from seats.config import preset_for
from seats.method import Method
from seats.methods.dash import DASH
from seats.methods.divprune import DivPrune
from seats.methods.dycoke import DyCoke
from seats.methods.evs import EVS
from seats.methods.fastv import FastV
from seats.methods.fastvid import FastVID
from seats.methods.omnizip import OmniZip
from seats.methods.pyramiddrop import PyramidDrop
from seats.methods.random import Random
from seats.methods.vidcom2 import VidCom2
from seats.methods.visionzip import VisionZip

METHODS: dict[str, Callable[..., Method]] = {
    "random": Random,
    "fastv": partial(FastV, both=False),
    "fastv-om": FastV,
    "visionzip": partial(VisionZip, both=False),
    "visionzip-om": VisionZip,
    "divprune": partial(DivPrune, both=False),
    "divprune-om": DivPrune,
    "dycoke": DyCoke,
    "fastvid": FastVID,
    "omnizip": OmniZip,
    "dash": DASH,
    "evs": EVS,
    "vidcom2": VidCom2,
    "pyramiddrop": partial(PyramidDrop, both=False),
    "pyramiddrop-om": PyramidDrop,
}
"""Name → what makes the method, given video_ratio and audio_ratio. A new method is a file here and a line."""

NAMES = ("seats", *METHODS)
"""Of the methods that are here. `names` has those, too, that were registered since."""


def names() -> tuple[str, ...]:
    """Whatever `method_for` takes now."""
    return ("seats", *METHODS)


def require_name(name: str) -> None:
    """Raises ValueError where there is no such method."""
    if name not in names():
        raise ValueError(f"No method {name!r}; choose one of {', '.join(names())}.")


def register(name: str, make: Callable[..., Method]) -> None:
    """Makes a method known by a name, from anywhere, until the program ends: docs/methods.md.

    make: called with video_ratio and audio_ratio, returns the method. Raises ValueError for a name that is taken or is
    no word of small letters, digits and hyphens, TypeError where `make` does not return a `seats.method.Method`, or one
    that is no frozen dataclass, compared by its values and hashable: a method is a part of the key of graphs and of
    what is kept between questions.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]*", str(name)):
        raise ValueError(f"the name of a method is of small letters, digits and hyphens, not {name!r}.")
    if name in names():
        raise ValueError(f"there is a method {name!r} already: choose another name.")
    if not callable(make):
        raise TypeError(f"what makes a method is called with video_ratio and audio_ratio; {make!r:.80} cannot be.")
    method = make(video_ratio=0.5, audio_ratio=0.5)
    parameters = getattr(method, "__dataclass_params__", None)
    if parameters is None or not (parameters.frozen and parameters.eq):
        raise TypeError(f"{type(method).__name__} must be a dataclass that is frozen and compared by its values.")
    lacking = [part for part in vars(Method) if not part.startswith("_") and not hasattr(method, part)]
    if lacking:
        raise TypeError(f"{type(method).__name__} is no method: it lacks {', '.join(lacking)} of seats.method.Method.")
    try:
        hash(method)
    except TypeError as error:
        raise TypeError(f"{type(method).__name__} must be hashable, and so its fields: {error}.") from None
    METHODS[name] = make


def method_for(
    name: str,
    config: Any,
    retention: float = 0.35,
    *,
    video_ratio: float | None = None,
    audio_ratio: float | None = None,
) -> Method:
    """A method at an overall retention, with the ratios of video and of sound that SEATS has there, unless given.

    name: one of `names`. config, retention: `seats.preset_for`. Raises ValueError for another name, and where the
    method or the preset cannot run so.
    """
    require_name(name)
    preset = preset_for(config, retention)
    preset = replace(
        preset,
        video_ratio=preset.video_ratio if video_ratio is None else video_ratio,
        audio_ratio=preset.audio_ratio if audio_ratio is None else audio_ratio,
    )
    if name == "seats":
        return preset
    method = METHODS[name](video_ratio=preset.video_ratio, audio_ratio=preset.audio_ratio)
    method.check(config.decoder.num_layers)
    return method
