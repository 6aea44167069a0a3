"""Qwen2.5-Omni's vision encoder (transformers' `Qwen2_5OmniVisionEncoder`; arXiv 2502.13923, section 2.1).

Temporal grids (pairs of frames) never see each other, so they run as dense batches of a fixed number of
grids: one static shape per frame size, whatever the duration, and memory bounded by one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import VisionConfig
from omni.layers import RMSNorm, SwiGLU
from omni.rope import axial_rotary, rotate

PATCHES_PER_BATCH = 2304
"""Patches that a batch of grids aims at: four grids of 144 tokens, enough rows for full matrix speed."""
MAX_GRIDS_PER_BATCH = 8


@dataclass(frozen=True)
class FrameLayout:
    """Where the patches of one frame size go. Patches of a window are adjacent inside the encoder.

    Frames that are no multiple of the window leave narrower windows at their right and lower edges. Windows of one
    size are adjacent too, so that each size is one dense batch: no padding and no mask.

    order: (N,) patch of the input at each place. restore: (N / merge²,) place of each merged token.
    cos, sin: (N, head_dim / 2) rotary table at each place. windows: (how many, patches of each) by size, in order.
    """

    order: Tensor
    restore: Tensor
    cos: Tensor
    sin: Tensor
    windows: tuple[tuple[int, int], ...]


@lru_cache(maxsize=64)
def frame_layout(config: VisionConfig, height: int, width: int, device: torch.device) -> FrameLayout:
    """The layout of frames of height × width patches, which come in groups of merge × merge."""
    merge = config.spatial_merge_size
    side = config.window_size // (config.patch_size * merge)  # of a window, in merged tokens
    rows, columns = height // merge, width // merge
    grid = torch.arange(rows * columns).view(rows, columns)
    places, windows = [], []
    for band in grid.split([rows - rows % side, rows % side]):
        for part in band.split([columns - columns % side, columns % side], dim=1):
            if part.numel():
                tall, wide = min(side, part.shape[0]), min(side, part.shape[1])
                places.append(rearrange(part, "(th sh) (tw sw) -> (th tw sh sw)", sh=tall, sw=wide))
                windows.append((part.numel() // (tall * wide), tall * wide * merge**2))
    tokens = torch.cat(places)
    patch = torch.arange(merge**2)
    order = (tokens[:, None] * merge**2 + patch).flatten()
    # Input patches come as (row group, column group, row in group, column in group).
    row = (tokens // columns * merge)[:, None] + patch // merge
    column = (tokens % columns * merge)[:, None] + patch % merge
    cos, sin = axial_rotary(row.flatten(), column.flatten(), config.hidden_size // config.num_heads)
    order, restore, cos, sin = (table.to(device) for table in (order, tokens.argsort(), cos, sin))
    return FrameLayout(order, restore, cos, sin, tuple(windows))


class Attention(nn.Module):
    def __init__(self, config: VisionConfig, *, full: bool) -> None:
        super().__init__()
        self.heads, self.full = config.num_heads, full
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, frame: FrameLayout) -> Tensor:
        """x: (grids, N, hidden), in window order."""
        qkv = rearrange(self.qkv(x), "g n (three h d) -> three g h n d", three=3, h=self.heads)
        q, k = rotate(qkv[:2], frame.cos, frame.sin)
        v = qkv[2]
        mixed = F.scaled_dot_product_attention(q, k, v) if self.full else self._windows(q, k, v, frame)
        return self.output(rearrange(mixed, "g h n d -> g n (h d)"))

    def _windows(self, q: Tensor, k: Tensor, v: Tensor, frame: FrameLayout) -> Tensor:
        grids, parts = q.shape[0], [count * size for count, size in frame.windows]
        mixed = []
        for (_, size), *qkv in zip(frame.windows, *(x.split(parts, dim=2) for x in (q, k, v)), strict=True):
            windows = (rearrange(x, "g h (w n) d -> (g w) h n d", n=size) for x in qkv)
            mixed.append(rearrange(F.scaled_dot_product_attention(*windows), "(g w) h n d -> g h (w n) d", g=grids))
        return torch.cat(mixed, dim=2)


class Block(nn.Module):
    def __init__(self, config: VisionConfig, *, full: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, 1e-6)
        self.attention = Attention(config, full=full)
        self.mlp_norm = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, frame: FrameLayout) -> Tensor:
        x = x + self.attention(self.attention_norm(x), frame)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """Joins each merge × merge group of patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.group = config.spatial_merge_size**2
        size = config.hidden_size * self.group
        self.norm = RMSNorm(config.hidden_size, 1e-6)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(self.norm(x), "g (n group) d -> g n (group d)", group=self.group)
        return self.output(F.gelu(self.hidden(x)))


class VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Parameter(torch.empty(config.hidden_size, *patch))
        self.blocks = nn.ModuleList(
            Block(config, full=index in config.full_attention_blocks) for index in range(config.depth)
        )
        self.merger = Merger(config)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """Encodes pictures or clips, one after another.

        patches: (ΣT·H·W, patch_dim), on any device. grid_thw: (n, 3) patches in time, height and width.
        Returns (ΣT·H·W / merge², out_hidden_size) in the encoder's dtype, on its device.
        """
        return torch.cat(list(self._encode(patches, grid_thw.tolist())))

    def _encode(self, patches: Tensor, grids_thw: list[list[int]]) -> Iterator[Tensor]:
        device = self.patch_embedding.device
        start = 0
        for grids, height, width in grids_thw:
            clip = patches[start : start + grids * height * width].view(grids, height * width, -1)
            start += grids * height * width
            batch = grids_per_batch(height * width, self.config.temporal_patch_size) if grids > 1 else 1
            frame = frame_layout(self.config, height, width, device)
            for first in range(0, grids, batch):
                group = clip[first : first + batch].to(device)
                real = len(group)
                group = F.pad(group, (0, 0, 0, 0, 0, batch - real))
                yield self.encode_batch(group, frame)[:real].flatten(0, 1)

    def encode_batch(self, patches: Tensor, frame: FrameLayout) -> Tensor:
        """(grids, N, patch_dim) of one frame size → (grids, N / merge², out_hidden_size)."""
        embedding = self.patch_embedding.flatten(1)
        x = F.linear(patches.to(embedding.dtype).index_select(1, frame.order), embedding)
        for block in self.blocks:
            x = block(x, frame)
        return self.merger(x).index_select(1, frame.restore)


def grids_per_batch(patches_per_grid: int, step: int) -> int:
    """How many temporal grids of one frame size run together: an even number, at least one pair."""
    return step * max(1, min(MAX_GRIDS_PER_BATCH, PATCHES_PER_BATCH // patches_per_grid) // step)
