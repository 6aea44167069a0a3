"""Rotary embeddings: three-axis positions in the decoder, two-axis positions in the vision encoder.

A table holds one angle per pair of channels, in float32: cos and sin of shape (..., positions, head_dim / 2).
Pairs are (i, i + head_dim / 2), the layout of all Qwen models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(channels: int, theta: float, device: torch.device) -> Tensor:
    """(channels / 2,) float32: theta ** (-2i / channels)."""
    return theta ** (-torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels)


def multimodal_rotary(
    positions: Tensor, head_dim: int, theta: float, sections: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Sectioned multimodal rotary (Qwen2-VL, arXiv 2409.12191, section 2.1).

    positions: (3, ..., S) temporal, height and width. The first `sections[0]` frequencies turn with the
    temporal position, the next `sections[1]` with the height, the rest with the width.
    Returns cos and sin, (..., S, head_dim / 2) float32.
    """
    per_axis = positions.float().unsqueeze(-1).split(1)
    frequencies = inverse_frequencies(head_dim, theta, positions.device).split(sections)
    angles = torch.cat([p[0] * f for p, f in zip(per_axis, frequencies, strict=True)], dim=-1)
    return angles.cos(), angles.sin()


def axial_rotary(rows: Tensor, columns: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Two-axis rotary of the vision encoder: half of the angles turn with the row, half with the column.

    rows, columns: (N,) integers. Returns cos and sin, (N, head_dim / 2) float32.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta, rows.device)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channel pairs of x (..., head_dim) by the table's angles, in float32, back in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
