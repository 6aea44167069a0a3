"""Requests of a given size that show nothing: to compile graphs with, and to measure."""

from __future__ import annotations

import torch

from omni.config import OmniConfig
from omni.inputs import Inputs
from omni.processing.frames import Pixels, VisionSizes
from omni.processing.prompt import clip_block


def blank_clip(
    config: OmniConfig,
    seconds: float,
    *,
    height: int = 336,
    width: int = 336,
    fps: float = 2.0,
    max_frames: int = 768,
    text_tokens: int = 100,
) -> Inputs:
    """A clip of noise and as much sound, with `text_tokens` tokens around it. height, width: pixels of its frames."""
    vision = config.vision
    unit = vision.patch_size * vision.spatial_merge_size
    merge = vision.spatial_merge_size
    grids = max(1, min(int(seconds * fps), max_frames) // vision.temporal_patch_size)
    grid = [grids, max(1, height // unit) * merge, max(1, width // unit) * merge]
    sizes = VisionSizes(vision.patch_size, merge, vision.temporal_patch_size)
    shape = (grids * vision.temporal_patch_size, 3, grid[1] * vision.patch_size, grid[2] * vision.patch_size)
    mel_frames = max(2, int(100 * seconds))
    step = max(vision.temporal_patch_size / fps, seconds / grids)
    block = clip_block(grid, step, config.audio.token_count(mel_frames), config)
    tokens = config.token_ids
    before = text_tokens // 4
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Inputs(
        input_ids=torch.tensor([[0] * before + [tokens.vision_start, *block] + [0] * (text_tokens - before - 1)]),
        pixel_values_videos=Pixels((frames,), sizes),
        video_grid_thw=torch.tensor([grid]),
        video_second_per_grid=torch.tensor([step]),
        input_features=torch.randn(1, config.audio.num_mel_bins, mel_frames, generator=generator),
        feature_attention_mask=torch.ones(1, mel_frames, dtype=torch.long),
    )
