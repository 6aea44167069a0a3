"""Sampling, sizes, resizing and patches against transformers' processors, live."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.machinery
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from omni.config import QWEN2_5, QWEN3, ConfigError
from omni.processing.frames import (
    QWEN3_OMNI_SIZES,
    MediaError,
    VisionSizes,
    clip_max_pixels,
    patchify,
    resize,
    sample_indices,
    sampled_fps,
    target_size,
    vision_sizes,
)

FAMILIES = {QWEN2_5: VisionSizes(), QWEN3: QWEN3_OMNI_SIZES}


@pytest.fixture(params=FAMILIES)
def sizes(request: pytest.FixtureRequest) -> VisionSizes:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def public_video() -> Any:
    """transformers' video processor class; its module wants torchvision at import, for the resizing alone."""
    before = set(sys.modules)
    parent: types.ModuleType | None = None
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            parent = _stub(name, parent, patch)
        _stub("torchvision.transforms.v2.functional", parent, patch)
        module = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    for name in set(sys.modules) - before:
        if "video_processing" in name:  # they hold the stand-in
            del sys.modules[name]
    return module.Qwen2VLVideoProcessor


def _stub(name: str, parent: types.ModuleType | None, patch: pytest.MonkeyPatch) -> types.ModuleType:
    stub = types.ModuleType(name)
    stub.__spec__ = importlib.machinery.ModuleSpec(name, None)
    stub.__path__ = []
    stub.__getattr__ = lambda _: types.SimpleNamespace  # type: ignore[method-assign]
    patch.setitem(sys.modules, name, stub)
    if parent is not None:
        setattr(parent, name.rpartition(".")[2], stub)
    return stub


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """Smooth shapes with sharp edges and some noise, (..., 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    height, width = shape[-2:]
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    base = 128 + 90 * torch.sin(x * y / 3) + 60 * ((x.floor() + y.floor()) % 2)
    noise = torch.randn(*shape, generator=generator) * 12
    return (base + noise).clamp(0, 255).to(torch.uint8)


@given(
    total=st.integers(4, 40_000),
    native=st.sampled_from([1.0, 5.0, 12.5, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 59.94]),
    fps=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    max_frames=st.integers(4, 800),
)
@settings(max_examples=300, deadline=None)
def test_indices_equal_the_public_ones(
    public_video: Any, total: int, native: float, fps: float, max_frames: int
) -> None:
    """Count and places are `sample_frames`' for every clip that it takes."""
    ours = sample_indices(total, native, fps=fps, max_frames=max_frames)
    theirs = public_video.sample_frames(
        types.SimpleNamespace(num_frames=None),
        types.SimpleNamespace(total_num_frames=total, fps=native),
        temporal_patch_size=2,
        min_frames=4,
        max_frames=max_frames,
        fps=fps,
    ).tolist()
    # Rounding sometimes gives the public code one index more, past the last frame.
    assert ours == theirs[: len(ours)]
    assert all(index >= total for index in theirs[len(ours) :])
    assert len(ours) % 2 == 0 and 4 <= len(ours) <= max_frames and ours[-1] < total


@pytest.mark.parametrize(
    ("total", "indices"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2]), (5, [0, 1, 2, 3])]
)
def test_very_short_clips_repeat_frames(total: int, indices: list[int]) -> None:
    """Fewer frames than the least the model takes: each stands for as long as it was shown."""
    assert sample_indices(total, 30.0) == indices


@pytest.mark.parametrize(
    ("count", "duration", "rate"), [(20, 10.0, 2.0), (20, 10.9, 2.0), (4, 1.0, 4.0), (768, 1536.0, 0.5)]
)
def test_the_rate_told_to_the_model(count: int, duration: float, rate: float) -> None:
    """The wish, unless a bound changed the count: then the true rate."""
    assert sampled_fps(count, duration, 2.0) == rate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0.0}, "fps is 0.0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"max_frames": 3}, "max_frames is 3"),
        ({"total_frames": 0}, "nothing to sample"),
    ],
)
def test_impossible_wishes_are_named(arguments: dict[str, Any], message: str) -> None:
    """Numbers that leave no frame are refused with a sentence."""
    with pytest.raises(MediaError, match=message):
        sample_indices(**{"total_frames": 100, "native_fps": 30.0, **arguments})


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([28, 32]),
    low=st.integers(1, 200),
    span=st.integers(1, 2000),
)
@settings(max_examples=500, deadline=None)
def test_sizes_equal_the_public_ones(height: int, width: int, factor: int, low: int, span: int) -> None:
    """The size rule is `smart_resize`, and what it refuses, ours refuses."""
    bounds = {"min_pixels": low * factor**2, "max_pixels": (low + span) * factor**2}
    try:
        theirs = smart_resize(height, width, factor=factor, **bounds)
    except ValueError:
        with pytest.raises(MediaError, match="at most 200 times"):
            target_size(height, width, factor=factor, **bounds)
    else:
        assert target_size(height, width, factor=factor, **bounds) == theirs


@pytest.mark.parametrize("num_frames", [4, 100, 300, 302, 768, 20_000])
def test_clip_sizes_equal_the_public_ones(
    public_video: Any, num_frames: int, sizes: VisionSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip's frames share the public budget of pixels: the sizes that `cap_pixels_per_frame` gives."""

    def asked(self: Any, image: Tensor, size: Any, resample: Any) -> tuple[int, int]:
        return size.height, size.width

    monkeypatch.setattr(public_video.__mro__[1], "resize", asked, raising=False)
    theirs = public_video.resize(
        object.__new__(public_video),
        torch.empty(1, num_frames, 3, 1080, 1920, device="meta"),
        types.SimpleNamespace(shortest_edge=sizes.video_min_pixels, longest_edge=sizes.video_max_pixels),
        resample=None,
        factor=sizes.factor,
        cap_pixels_per_frame=True,
    )
    assert sizes.clip_size(num_frames, 1080, 1920) == theirs


@pytest.mark.parametrize(("family", "token"), [(QWEN2_5, 28**2), (QWEN3, 32**2)])
def test_clip_bound_by_hand(family: str, token: int) -> None:
    """The budget of a whole clip, at its three regimes."""
    assert clip_max_pixels(4, FAMILIES[family]) == 768 * token
    assert clip_max_pixels(768, FAMILIES[family]) == int(128_000 * token * 0.9) * 2 // 768
    assert clip_max_pixels(20_000, FAMILIES[family]) == int(128 * token * 1.05)


def test_bounds_are_those_of_the_public_processors() -> None:
    """A frame's floor and ceiling are those that transformers' processors give their video processor."""
    for family, name in ((QWEN2_5, "Qwen2_5OmniProcessor"), (QWEN3, "Qwen3OmniMoeProcessor")):
        public = getattr(importlib.import_module("transformers"), name).videos_kwargs["size"]
        ours = FAMILIES[family]
        assert {"shortest_edge": ours.video_min_pixels, "longest_edge": ours.video_max_pixels} == public


@pytest.mark.parametrize(
    ("height", "width"), [(240, 320), (33, 57), (301, 77), (1080, 1919), (61, 500), (28, 28), (700, 701)]
)
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_pictures_become_the_public_patches(height: int, width: int, kind: str, sizes: VisionSizes) -> None:
    """Resizing, normalisation and layout of a picture are those of transformers' processor."""
    picture = pictures(3, height, width)
    if kind == "noise":
        picture = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1)).byte()
    sizes = dataclasses.replace(sizes, image_max_pixels=1280 * 784)
    patches, grid = patchify(resize(picture[None], sizes.image_size(height, width)), sizes)
    public = Qwen2VLImageProcessorPil(
        patch_size=sizes.patch_size,
        image_mean=sizes.image_mean,
        image_std=sizes.image_std,
        size={"shortest_edge": sizes.image_min_pixels, "longest_edge": sizes.image_max_pixels},
    )
    batch = public([picture.permute(1, 2, 0).numpy()], return_tensors="pt")
    assert grid.tolist() == batch["image_grid_thw"][0].tolist()
    # One 8-bit step is 0.0078 or more: no pixel differs by one.
    torch.testing.assert_close(patches, batch["pixel_values"], atol=1e-5, rtol=0)


def test_resize_needs_no_work_for_the_right_size() -> None:
    """A frame that has its size is not touched."""
    frames = pictures(2, 3, 56, 84)
    assert resize(frames, (56, 84)) is frames


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_clips_become_the_public_patches(public_video: Any, count: int, sizes: VisionSizes) -> None:
    """The layout of a clip is the public one, an odd count repeats its last frame, groups leave no seam."""
    patch = sizes.patch_size
    frames = pictures(count, 3, 4 * patch, 6 * patch)
    patches, grid = patchify(frames, sizes)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (sizes.image_mean, sizes.image_std))
    # The clip processor's method divides complete groups; a single picture counts as twice itself there too.
    theirs, *their_grid = public_video.patchify(None, ((frames / 255 - mean) / std)[None], patch, 2, 2)
    assert grid.tolist() == their_grid
    torch.testing.assert_close(patches, theirs[0], atol=1e-6, rtol=0)


def _config(family: str) -> Any:
    patch = FAMILIES[family].patch_size
    vision = types.SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    return types.SimpleNamespace(family=family, vision=vision)


# What the preprocessor_config.json of the released checkpoints says of pictures.
RELEASED = {
    QWEN2_5: {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    QWEN3: {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_the_released_numbers(family: str, tmp_path: Path) -> None:
    """A checkpoint without preprocessor_config.json is treated as the released one that has it."""
    assert vision_sizes(tmp_path, _config(family)) == FAMILIES[family]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**RELEASED[family], "n_fft": 400}))
    assert vision_sizes(tmp_path, _config(family)) == FAMILIES[family]


def test_the_file_of_a_checkpoint_has_its_say(tmp_path: Path) -> None:
    """Both spellings of the bounds, and what is not said stays the family's; patches are the config's."""
    file = tmp_path / "preprocessor_config.json"
    file.write_text('{"image_std": [1, 2, 0.5], "size": {"shortest_edge": 4096, "longest_edge": 8192}}')
    config = _config(QWEN3)
    config.vision.patch_size = 8
    expected = dataclasses.replace(
        QWEN3_OMNI_SIZES,
        patch_size=8,
        image_std=(1.0, 2.0, 0.5),
        image_min_pixels=4096,
        image_max_pixels=8192,
    )
    assert vision_sizes(tmp_path, config) == expected
    file.write_text('{"image_std": null, "min_pixels": 5000, "size": {"shortest_edge": 4096}}')
    assert vision_sizes(tmp_path, _config(QWEN3)) == dataclasses.replace(QWEN3_OMNI_SIZES, image_min_pixels=5000)
    file.write_text('{"video_min_pixels": 3136, "video_max_pixels": 50176}')
    sizes = vision_sizes(tmp_path, _config(QWEN2_5))
    assert sizes == dataclasses.replace(VisionSizes(), video_min_pixels=3136, video_max_pixels=50176)
    assert sizes.clip_size(64, 112, 112) == (112, 112)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not readable JSON"),
        ("[]", "it is not a JSON object"),
        ('{"image_mean": 0.5}', "image_mean must be three numbers"),
        ('{"image_mean": [0.5, 0.5, NaN]}', "image_mean must be three numbers"),
        ('{"image_std": [0.5, 0.5, 0]}', "image_std must be three numbers"),
        ('{"image_std": [0.5, 0.5, 1e-300]}', "image_std must be three numbers"),
        ('{"image_mean": [0.5, 0.5, 1e300]}', "image_mean must be three numbers"),
        ('{"min_pixels": 100000000, "max_pixels": 100000000}', "min_pixels must be a positive integer up to 67108864"),
        ('{"video_min_pixels": 1' + "0" * 18 + "}", "video_min_pixels must be a positive integer up to 67108864"),
        ('{"min_pixels": 9000, "min_pixels": 8000}', "a name occurs twice"),
        ('{"min_pixels": "3136"}', "min_pixels must be a positive integer up to 67108864, not '3136'"),
        ('{"size": {"longest_edge": 0}}', "max_pixels must be a positive integer up to 67108864, not 0"),
        ('{"min_pixels": 9000, "max_pixels": 8000}', "min_pixels must not exceed max_pixels"),
        ('{"video_max_pixels": 100.5}', "video_max_pixels must be a positive integer up to 67108864, not 100.5"),
        ('{"video_min_pixels": 9000, "video_max_pixels": 8000}', "video_min_pixels must not exceed video_max_pixels"),
    ],
)
def test_damaged_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    """One sentence with the file and the key."""
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"preprocessor_config.json.*{message}"):
        vision_sizes(tmp_path, _config(QWEN3))


def test_patches_by_a_plain_loop() -> None:
    """The documented order of patches and of numbers within one, spelled out."""
    sizes = VisionSizes(patch_size=2, image_mean=(0.0, 0.0, 0.0), image_std=(1 / 255, 1 / 255, 1 / 255))
    frames = pictures(4, 3, 8, 12)
    patches, grid = patchify(frames, sizes)
    assert grid.tolist() == [2, 4, 6]
    expected = []
    for t, block_y, block_x, y, x in itertools.product(range(2), range(2), range(3), range(2), range(2)):
        top, left = (block_y * 2 + y) * 2, (block_x * 2 + x) * 2
        expected.append(frames[2 * t : 2 * t + 2, :, top : top + 2, left : left + 2].transpose(0, 1).flatten())
    np.testing.assert_allclose(patches.numpy(), torch.stack(expected).numpy(), atol=1e-3)
