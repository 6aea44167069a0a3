"""Qwen2.5-Omni's vision encoder (transformers' `Qwen2_5OmniVisionEncoder`; arXiv 2502.13923, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import VisionConfig
from omni.encoders.received import Signals
from omni.encoders.vision import Attention, VisionEncoder, patch_coordinates, signals
from omni.layers import RMSNorm, SwiGLU, part
from omni.rope import axial_rotary
from seats.method import Needs


@dataclass(frozen=True)
class FrameLayout:
    """Where the patches of one frame size go. Patches of a window are adjacent inside the encoder.

    Frames that are no multiple of the window leave narrower windows at their right and lower edges. Windows of one
    size are adjacent too, so that each size is one dense batch: no padding and no mask.

    order: (N,) patch of the input at each place. restore: (N / merge²,) place of each merged token.
    rotary: cos and sin, (N, head_dim / 2), at each place. windows: (how many, patches of each) by size, in order.
    """

    order: Tensor
    restore: Tensor
    rotary: tuple[Tensor, Tensor]
    windows: tuple[tuple[int, int], ...]


@torch.inference_mode(False)  # made while answering, it serves a training as well
def frame_layout(config: VisionConfig, height: int, width: int, device: torch.device) -> FrameLayout:
    """The layout of frames of height × width patches, which come in groups of merge × merge."""
    merge = config.spatial_merge_size
    side = config.window_size // (config.patch_size * merge)  # of a window, in merged tokens
    rows, columns = height // merge, width // merge
    grid = torch.arange(rows * columns).view(rows, columns)
    places, windows = [], []
    for band in grid.split([rows - rows % side, rows % side]):
        for some in band.split([columns - columns % side, columns % side], dim=1):
            if some.numel():
                tall, wide = min(side, some.shape[0]), min(side, some.shape[1])
                places.append(rearrange(some, "(th sh) (tw sw) -> (th tw sh sw)", sh=tall, sw=wide))
                windows.append((some.numel() // (tall * wide), tall * wide * merge**2))
    tokens = torch.cat(places)
    order = (tokens[:, None] * merge**2 + torch.arange(merge**2)).flatten()
    coordinates = patch_coordinates(tokens, columns, merge)
    cos, sin = axial_rotary(*coordinates, config.hidden_size // config.num_heads)
    order, restore, cos, sin = (table.to(device) for table in (order, tokens.argsort(), cos, sin))
    return FrameLayout(order, restore, (cos, sin), tuple(windows))


class Block(nn.Module):
    def __init__(self, config: VisionConfig, *, full: bool) -> None:
        super().__init__()
        self.full = full
        self.attention_norm = RMSNorm(config.hidden_size, 1e-6)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = SwiGLU(config.hidden_size, config.padded_size, bias=True)

    @part
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], windows: tuple[tuple[int, int], ...]) -> Tensor:
        """x: (grids, N, hidden), in window order. windows: of `FrameLayout`, none where attention is full: machine code
        is made for each kind of windows."""
        x = x + self.attention(self.attention_norm(x), rotary, windows)
        return x + self.mlp(self.mlp_norm(x))

    def over(self, x: Tensor, frame: FrameLayout) -> Tensor:
        return self(x, frame.rotary, () if self.full else frame.windows)


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


class Qwen25VisionEncoder(VisionEncoder):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Parameter(torch.empty(config.hidden_size, *patch))
        self.blocks = nn.ModuleList(
            Block(config, full=index in config.full_attention_blocks) for index in range(config.depth)
        )
        self.merger = Merger(config)

    def make_layout(self, height: int, width: int, device: torch.device) -> FrameLayout:
        return frame_layout(self.config, height, width, device)

    def encode_batch(
        self, patches: Tensor, layout: FrameLayout, real: Tensor | None, needs: Needs | None
    ) -> tuple[Tensor, Signals | None]:
        embedding = self.patch_embedding.flatten(1)
        x = F.linear(patches.to(embedding.dtype).index_select(1, layout.order), embedding)
        last = cast(Block, self.blocks[-1])
        for block in self.blocks[:-1]:
            x = cast(Block, block).over(x, layout)
        found = None
        if needs is not None:
            q, k, _ = last.attention.project(last.attention_norm(x), layout.rotary)
            received, keys = signals(q, k, real, self.merger.group, needs)
            keys = None if keys is None else keys.index_select(1, layout.restore)
            found = Signals(received.index_select(1, layout.restore), keys)
        return self.merger(last.over(x, layout)).index_select(1, layout.restore).unsqueeze(0), found
