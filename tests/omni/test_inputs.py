"""Inputs: bytes of pictures and clips under the names of transformers' patches."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

import pytest
import torch

import omni
from omni.inputs import InputError
from omni.processing.frames import Pixels, VisionSizes, patchify


def clip_of_bytes() -> tuple[omni.Inputs, torch.Tensor]:
    torch.manual_seed(0)
    frames = torch.randint(256, (5, 3, 28, 56), dtype=torch.uint8)
    pixels = Pixels((frames,), VisionSizes())
    inputs = omni.Inputs(
        torch.zeros(1, 3, dtype=torch.long),
        pixel_values_videos=pixels,
        video_grid_thw=pixels.grid_thw,
        video_second_per_grid=torch.ones(1),
    )
    return inputs, frames


def test_bytes_stay_bytes_until_somebody_asks_for_patches() -> None:
    """Protects: names, shapes and values of transformers' processors for who reads them; and a quarter of the memory
    for who does not."""
    inputs, frames = clip_of_bytes()
    held = inputs.held("pixel_values_videos")
    assert isinstance(held, Pixels)
    assert held.frames[0] is frames
    assert isinstance(replace(inputs).held("pixel_values_videos"), torch.Tensor)
    assert isinstance(pickle.loads(pickle.dumps(clip_of_bytes()[0])).held("pixel_values_videos"), Pixels)
    patches = inputs.pixel_values_videos
    expected, grid = patchify(frames, VisionSizes())
    assert patches is not None
    assert patches.dtype == torch.float32
    assert torch.equal(patches, expected)
    assert torch.equal(grid, inputs.video_grid_thw[0])
    assert inputs.pixel_values is None


def test_what_is_written_to_patches_stays_written() -> None:
    """Protects: whoever edits patches in place is heard by the model."""
    inputs, _ = clip_of_bytes()
    inputs.pixel_values_videos.zero_()
    assert not inputs.pixel_values_videos.any()
    assert not inputs.held("pixel_values_videos").any()
    inputs.pixel_values_videos = torch.ones(2)
    assert inputs.pixel_values_videos.tolist() == [1, 1]


def test_fields_are_those_of_transformers() -> None:
    """Protects: `Inputs(**batch)`, and its refusals, for bytes as well."""
    assert {"pixel_values", "pixel_values_videos"} < {field.name for field in fields(omni.Inputs)}
    inputs, frames = clip_of_bytes()
    with pytest.raises(InputError, match="go together"):
        omni.Inputs(inputs.input_ids, pixel_values=Pixels((frames,), VisionSizes()))
    with pytest.raises(InputError, match="pixel_values must be a tensor of 2 dimensions"):
        omni.Inputs(inputs.input_ids, pixel_values=frames, image_grid_thw=torch.ones(1, 3, dtype=torch.long))
