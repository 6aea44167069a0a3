"""Rows of the encoders: of video and of sound."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_sides import Bench, milliseconds, target

import omni
from omni.processing.frames import Pixels, vision_sizes


def vision_row(bench: Bench, grids: int, side: int) -> dict[str, Any]:
    """So many temporal grids of side × side patches: ours from bytes in the host's memory, as a request holds them,
    transformers from patches on the device."""
    pixels, grid = noise(bench, 2 * grids, side * bench.config.vision.patch_size), torch.tensor([[grids, side, side]])
    patches, device_grid = pixels.patches().to(bench.device, bench.dtype), grid.to(bench.device)
    return encoder_row(
        bench,
        "vision" if side == 24 else "",
        lambda model, call: model.thinker.vision(pixels, grid, **call),
        lambda: bench.encoder("visual")(patches, grid_thw=device_grid),
    )


def noise(bench: Bench, frames: int, height: int, width: int | None = None) -> Pixels:
    """Of so many frames."""
    sizes = vision_sizes(Path(os.devnull), bench.config)
    shown = torch.randint(256, (frames, 3, height, width or height), dtype=torch.uint8)
    return Pixels((shown,), sizes, of_clip=True)


def audio_row(bench: Bench, seconds: int) -> dict[str, Any]:
    """So many seconds of sound."""
    mel, length = torch.randn(1, 128, 100 * seconds), torch.tensor([100 * seconds])
    theirs, device_length = mel[0].to(bench.device, bench.dtype), length.to(bench.device)
    return encoder_row(
        bench,
        "audio",
        lambda model, call: model.thinker.audio(mel, length, **call),
        lambda: bench.encoder("audio_tower")(theirs, feature_lens=device_length),
    )


def encoder_row(
    bench: Bench, what: str, ours: Callable[[omni.Omni, dict[str, Any]], object], theirs: Callable[[], object]
) -> dict[str, Any]:
    call = {"call": bench.compiled.engine.compiled.call}  # type: ignore[union-attr]
    with torch.inference_mode():
        sides = {
            "compiled": bench.timed(lambda: ours(bench.compiled, call)),
            "eager": bench.timed(lambda: ours(bench.eager, {})),
            "transformers": bench.timed(theirs),
        }
        row = bench.measure(sides, repeats=2 * bench.repeats).row({name: name for name in sides})
        row["profile"] = bench.profile(lambda: ours(bench.compiled, call))
    row["targets"] = milliseconds(bench, what, row)
    if not bench.on_gpu:
        against = row["times_as_fast"]["transformers"]["median"]
        row["targets"] += [target("times as fast as transformers", against, 1.5)]
    return row
