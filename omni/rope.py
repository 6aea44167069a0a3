"""Rotary embeddings: three-axis positions in the decoder, two-axis positions in the vision encoder.

A table holds one angle per pair of channels, in float32: cos and sin of shape (..., positions, head_dim / 2).
Pairs are (i, i + head_dim / 2), the layout of all Qwen models.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(channels: int, theta: float, device: torch.device) -> Tensor:
    """(channels / 2,) float32: theta ** (-2i / channels).

    By the operations of the public models: a last bit more or less is an angle of 0.01 after an hour of video.
    """
    return 1.0 / theta ** (torch.arange(0, channels, 2, device=device).float() / channels)


def multimodal_rotary(
    positions: Tensor, head_dim: int, theta: float, sections: tuple[int, int, int], *, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Multimodal rotary (Qwen2-VL, arXiv 2409.12191, section 2.1; interleaved: Qwen3-Omni, arXiv 2509.17765, 2.3).

    positions: (3, ..., S) temporal, height and width. Sectioned: the first `sections[0]` frequencies turn with the
    temporal position, the next `sections[1]` with the height, the rest with the width. Interleaved: frequencies
    1, 4, 7, … turn with the height and 2, 5, 8, … with the width, up to 3 · `sections` of that axis, the rest with
    the temporal position.
    Returns cos and sin, (..., S, head_dim / 2) float32.
    """
    frequencies = inverse_frequencies(head_dim, theta, positions.device)
    temporal, height, width = positions.float().unsqueeze(-1)
    index = torch.arange(head_dim // 2, device=positions.device)
    if interleaved:
        by_height = (index % 3 == 1) & (index < 3 * sections[1])
        by_width = (index % 3 == 2) & (index < 3 * sections[2])
    else:
        by_width = index >= sections[0] + sections[1]
        by_height = (index >= sections[0]) & ~by_width
    angles = torch.where(by_height, height, torch.where(by_width, width, temporal)) * frequencies
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
    # Rounded before they are joined: the other way round the compiler makes slower code of it for a GPU.
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([half.to(x.dtype) for half in turned], dim=-1)
