"""Inputs: bytes of pictures and clips under the names of transformers' patches."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

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


def test_other_words_about_the_same_media() -> None:
    """Protects: bytes stay bytes, where `dataclasses.replace` reads them as patches."""
    inputs, frames = clip_of_bytes()
    other = inputs.with_ids(torch.ones(1, 5, dtype=torch.int32))
    assert other.input_ids.tolist() == [[1] * 5]
    assert other.input_ids.dtype == torch.long
    assert other.held("pixel_values_videos").frames[0] is frames
    assert isinstance(inputs.held("pixel_values_videos"), Pixels)
    assert other.video_grid_thw is inputs.video_grid_thw
    assert inputs == inputs != other


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool, torch.complex64])
def test_patches_are_no_bytes(dtype: torch.dtype) -> None:
    """Protects: pixels that are not normalised are not taken for patches that are."""
    inputs, _ = clip_of_bytes()
    patches = inputs.pixel_values_videos.to(dtype)
    grids = {"video_grid_thw": inputs.video_grid_thw, "video_second_per_grid": torch.ones(1)}
    with pytest.raises(InputError, match="pixel_values_videos must be floating point, normalised, not torch"):
        omni.Inputs(inputs.input_ids, pixel_values_videos=patches, **grids)


def test_threads_may_save_to_one_path(tmp_path: Path) -> None:
    """Protects: each writes a part of its own; what stands there in the end is whole."""
    inputs = omni.Inputs(torch.arange(1000)[None])
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(inputs.save, tmp_path / "x.safetensors") for _ in range(60)]:
            done.result()
    assert torch.equal(omni.Inputs.load(tmp_path / "x.safetensors").input_ids, inputs.input_ids)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("name", ["n" * 300, "", "a\0b"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        omni.Inputs(torch.arange(3)[None]).save(name)
    assert not list(tmp_path.iterdir())


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
