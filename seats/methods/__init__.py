"""Other ways of keeping tokens, to compare SEATS with: one file each, behind `seats.method.Method`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from seats.config import preset_for
from seats.method import Method
from seats.methods.divprune import DivPrune
from seats.methods.dycoke import DyCoke
from seats.methods.fastv import FastV
from seats.methods.fastvid import FastVID
from seats.methods.omnizip import OmniZip
from seats.methods.random import Random
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
}
"""Name → what makes the method, given video_ratio and audio_ratio. A new method is a file here and a line."""

NAMES = ("seats", *METHODS)


def method_for(
    name: str,
    config: Any,
    retention: float = 0.35,
    *,
    video_ratio: float | None = None,
    audio_ratio: float | None = None,
) -> Method:
    """A method at an overall retention, with the ratios of video and of sound that SEATS has there, unless given.

    name: one of NAMES. config, retention: `seats.preset_for`. Raises ValueError for another name, and where the method
    or the preset cannot run so.
    """
    if name not in NAMES:
        raise ValueError(f"No method {name!r}; choose one of {', '.join(NAMES)}.")
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
