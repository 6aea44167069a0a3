"""A decoded frame → its pixels as they are shown: turned, mirrored, and over white where they are transparent."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError


def upright(frame: Any) -> Tensor:
    """(3, H, W) uint8 RGB of a frame of PyAV, as the container's display matrix says (`turned`)."""
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"a frame of {frame.width} x {frame.height} pixels is too large. Scale the clip down.")
    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        picture = over_white(torch.from_numpy(frame.to_ndarray(format="rgba")))
    else:
        picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    return turned(picture.permute(2, 0, 1), _display_matrix(frame))


def over_white(picture: Tensor) -> Tensor:
    """(H, W, 4) uint8 RGBA → (H, W, 3), laid over white."""
    if bool((picture[..., 3] == 255).all()):
        return picture[..., :3]
    colour, alpha = picture[..., :3].int(), picture[..., 3:].int()
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def turned(picture: Tensor, matrix: tuple[int, ...] | None) -> Tensor:
    """A picture (3, H, W) by a display matrix (a, b, u, c, d, v, x, y, w): a pixel at (column, row) is shown at
    (a · column + c · row, b · column + d · row). The nearest of the eight turns and mirrorings, as ffmpeg's autorotate.
    """
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = matrix
    if abs(b) > abs(a):
        picture, across, down = picture.transpose(1, 2), c, b
    else:
        across, down = a, d
    mirrored = [axis for axis, sign in ((1, down), (2, across)) if sign < 0]
    return picture.flip(mirrored) if mirrored else picture


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if data is None or data.buffer_size < 36 else struct.unpack("=9i", bytes(data)[:36])
