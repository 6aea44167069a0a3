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

    order: (N,) patch of the input at each place. restore: (N / merge²,) place of each merged token.
    cos, sin: (N, head_dim / 2) rotary table at each place.
    slot: (windows · window_patches,) place in each slot of the padded windows, or None where all are full.
    place_slot: (N,) the slot of each place. filled: (windows, 1, 1, window_patches) which slots are real.
    """

    order: Tensor
    restore: Tensor
    cos: Tensor
    sin: Tensor
    windows: int
    slot: Tensor | None
    place_slot: Tensor | None
    filled: Tensor | None


@lru_cache(maxsize=64)
def frame_layout(config: VisionConfig, height: int, width: int, device: torch.device) -> FrameLayout:
    """The layout of frames of height × width patches, which come in groups of merge × merge."""
    merge = config.spatial_merge_size
    side = config.window_size // (config.patch_size * merge)  # of a window, in merged tokens
    rows, columns = height // merge, width // merge
    tall, wide = -(-rows // side), -(-columns // side)
    # Merged tokens by window: a grid padded to whole windows, -1 where there is no token.
    padded = torch.full((tall * side, wide * side), -1)
    padded[:rows, :columns] = torch.arange(rows * columns).view(rows, columns)
    by_window = rearrange(padded, "(th sh) (tw sw) -> (th tw) (sh sw)", sh=side, sw=side).flatten()
    real = by_window >= 0
    tokens = by_window[real]
    patch = torch.arange(merge**2)
    order = (tokens[:, None] * merge**2 + patch).flatten()
    # Input patches come as (row group, column group, row in group, column in group).
    row = (tokens // columns * merge)[:, None] + patch // merge
    column = (tokens % columns * merge)[:, None] + patch % merge
    cos, sin = axial_rotary(row.flatten(), column.flatten(), config.hidden_size // config.num_heads)
    slot = place_slot = filled = None
    if not bool(real.all()):
        slot_real = real.repeat_interleave(merge**2)
        place_slot = slot_real.nonzero().flatten()
        slot = torch.zeros(len(slot_real), dtype=torch.long)
        slot[place_slot] = torch.arange(len(place_slot))
        slot, place_slot = slot.to(device), place_slot.to(device)
        filled = slot_real.view(tall * wide, 1, 1, -1).to(device)
    restore = tokens.argsort().to(device)
    return FrameLayout(order.to(device), restore, cos.to(device), sin.to(device), tall * wide, slot, place_slot, filled)


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
        grids = q.shape[0]
        if frame.slot is not None:
            q, k, v = (x.index_select(2, frame.slot) for x in (q, k, v))
        q, k, v = (rearrange(x, "g h (w n) d -> (g w) h n d", w=frame.windows) for x in (q, k, v))
        mask = None if frame.filled is None else frame.filled.repeat(grids, 1, 1, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = rearrange(mixed, "(g w) h n d -> g h (w n) d", g=grids)
        return mixed if frame.place_slot is None else mixed.index_select(2, frame.place_slot)


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
