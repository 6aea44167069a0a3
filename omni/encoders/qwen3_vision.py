"""Qwen3-Omni's vision encoder (transformers' `Qwen3OmniMoeVisionEncoder`; arXiv 2509.17765, section 2.2).

That of Qwen3-VL, grown from SigLIP2: learned positions, stretched to the frame, beside 2-D rotary ones, full attention
inside each frame, and the features of some blocks beside the last (deepstack, arXiv 2406.04334).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from omni.config import VisionConfig
from omni.encoders.layers import LayerNorm, gelu_by_tanh
from omni.encoders.received import Signals
from omni.encoders.vision import Attention, VisionEncoder, patch_coordinates, signals
from omni.layers import part
from omni.rope import axial_rotary
from seats.method import Needs


@dataclass(frozen=True)
class FrameLayout:
    """Positions of one frame size. rotary: cos and sin, (N, head_dim / 2), of each patch.

    corners, shares: (N, 4), the learned positions around each patch and how much of each it gets.
    """

    rotary: tuple[Tensor, Tensor]
    corners: Tensor
    shares: Tensor


@torch.inference_mode(False)  # made while answering, it serves a training as well
def frame_layout(config: VisionConfig, height: int, width: int, device: torch.device) -> FrameLayout:
    """The layout of frames of height × width patches, which come in groups of merge × merge."""
    merge, side = config.spatial_merge_size, math.isqrt(config.num_position_embeddings)
    groups = torch.arange(height * width // merge**2)
    row, column = patch_coordinates(groups, width // merge, merge)
    cos, sin = axial_rotary(row, column, config.hidden_size // config.num_heads)
    # The learned grid is stretched so that its corner positions fall on the frame's corner patches.
    upper, lower, low = _between(side, height, row)
    left, right, far = _between(side, width, column)
    corners = torch.stack([vertical * side + across for vertical in (upper, lower) for across in (left, right)], dim=1)
    shares = torch.stack([(1 - low) * (1 - far), (1 - low) * far, low * (1 - far), low * far], dim=1)
    cos, sin, corners, shares = (table.to(device) for table in (cos, sin, corners, shares))
    return FrameLayout((cos, sin), corners, shares)


def _between(side: int, patches: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For patches `index` of `patches` in a line: the learned positions before and after, and the way between them."""
    place = torch.linspace(0, side - 1, patches)[index]
    before = place.long()
    return before, (before + 1).clamp(max=side - 1), place - before


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.padded_size)
        self.down = nn.Linear(config.padded_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_by_tanh(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=1e-6)
        self.mlp = MLP(config)

    @part
    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Merger(nn.Module):
    """Joins each merge × merge group of patches into one token; the norm is over a patch, or (deep) over the group."""

    def __init__(self, config: VisionConfig, *, deep: bool) -> None:
        super().__init__()
        self.group, self.deep = config.spatial_merge_size**2, deep
        size = config.hidden_size * self.group
        self.norm = LayerNorm(size if deep else config.hidden_size, eps=1e-6)
        self.hidden = nn.Linear(size, size)
        self.output = nn.Linear(size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        grouped = rearrange(x if self.deep else self.norm(x), "g (n group) d -> g n (group d)", group=self.group)
        return self.output(F.gelu(self.hidden(self.norm(grouped) if self.deep else grouped)))


class Qwen3VisionEncoder(VisionEncoder):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        patch = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Parameter(torch.empty(config.hidden_size, *patch))
        self.patch_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.positions = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config, deep=False)
        self.deep_mergers = nn.ModuleList(Merger(config, deep=True) for _ in config.deepstack_blocks)

    def make_layout(self, height: int, width: int, device: torch.device) -> FrameLayout:
        return frame_layout(self.config, height, width, device)

    def encode_batch(
        self, patches: Tensor, layout: FrameLayout, real: Tensor | None, needs: Needs | None
    ) -> tuple[Tensor, Signals | None]:
        embedding = self.patch_embedding.flatten(1)
        x = F.linear(patches.to(embedding.dtype), embedding, self.patch_bias)
        positions = (self.positions(layout.corners) * layout.shares.unsqueeze(-1)).sum(1)
        x = x + positions.to(x.dtype)
        levels: list[Tensor] = []
        found = None
        for index, block in enumerate(self.blocks):
            if needs is not None and index == len(self.blocks) - 1:
                last = cast(Block, block)
                q, k, _ = last.attention.project(last.attention_norm(x), layout.rotary)
                found = signals(q, k, real, self.merger.group, needs)
            x = block(x, layout.rotary)
            if index in self.config.deepstack_blocks:
                levels.append(self.deep_mergers[len(levels)](x))
        return torch.stack([self.merger(x), *levels]), found
