"""The context limit, and the retention at which a prompt keeps to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from omni.config import OmniConfig
from omni.inputs import InputError, Inputs
from omni.processing.positions import Layout
from omni.request import Prompt, read_prompt
from seats.config import preset_for
from seats.method import Method

STEPS = 1000
"""Retentions are tried in thousandths, from the largest on: methods differ in what they can keep."""


def check_context(
    inputs: Inputs, place: Layout, prompt: Prompt, config: OmniConfig, method: Method | None, new: int
) -> None:
    """What enters the decoder of a prompt and `new` tokens of an answer must not exceed `max_position_embeddings`.

    Selection before the decoder makes room, selection between its layers does not: the first ones see what there is.
    method: None where every token stays. Raises InputError with the numbers and the largest retention that fits.
    """
    limit, length = config.decoder.max_position_embeddings, place.positions.shape[1]
    entering = prompt.counts(method).tokens
    if entering + new <= limit:
        return
    counts = ", ".join(f"{count} {name}" for name, count in place.counts.items() if count)
    selected = "" if entering == length else f", of which {entering} enter the decoder,"
    advice = "lower fps, max_frames, max_pixels or max_new_tokens, or cut the clip."
    retention = fitting_retention(inputs, place, config, method, limit - new)
    if retention is not None:
        advice = f"it fits at retention {retention:g} or less, with the ratios that this implies; or {advice}"
    raise InputError(
        f"the prompt has {length} tokens ({counts}){selected} and the answer may take {new}, together more than the "
        f"model's {limit}: {advice}"
    )


def fitting_retention(
    inputs: Inputs, place: Layout, config: OmniConfig, method: Method | None, room: int
) -> float | None:
    """The largest retention, in thousandths, at which at most `room` tokens enter the decoder; None where none does.

    Of the method in use, of SEATS where there is none.
    """
    if not (len(place.video) or len(place.audio)):
        return None
    try:
        some = at_retention(config, method, 1.0)
        some.check(config.decoder.num_layers)
        prompt = read_prompt(place, inputs, config, some.window_grids)
    except ValueError:  # a model too shallow for the stages, a prompt that does not end with text
        return None

    def fits(retention: float) -> bool:
        try:
            return prompt.counts(at_retention(config, method, retention)).tokens <= room
        except ValueError:  # less than the method can keep
            return False

    return next((step / STEPS for step in range(STEPS - 1, 0, -1) if fits(step / STEPS)), None)


def at_retention(config: OmniConfig, method: Method | None, retention: float) -> Method:
    """`method`, or SEATS, with the ratios that `seats.preset_for` has there."""
    preset = preset_for(config, retention)
    if method is None:
        return preset
    return cast(Method, replace(cast(Any, method), video_ratio=preset.video_ratio, audio_ratio=preset.audio_ratio))
