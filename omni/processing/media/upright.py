"""A decoded frame → its pixels as they are shown: turned, mirrored, and over white where they are transparent."""

from __future__ import annotations

import errno
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError


def upright(frame: Any) -> Any:
    """A frame of PyAV as a picture of Pillow, RGB, as the container's display matrix says (`turned`)."""
    if frame.width * frame.height > MAX_PIXELS:
        raise MediaError(f"a frame of {frame.width} x {frame.height} pixels is too large. Scale the clip down.")
    if frame.colorspace == RESERVED:
        frame.colorspace = UNSPECIFIED
    try:
        picture = _picture(frame)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        raise MediaError(
            f"a frame's colours are coded by matrix {frame.colorspace} of ITU-T H.273, which cannot be read. Convert "
            "the clip to BT.709."
        ) from None
    return turned(picture, _display_matrix(frame))


RESERVED, UNSPECIFIED = 3, 2
"""Of colour matrices (ITU-T H.273, 8.3): what states the first states nothing, which libswscale refuses."""


def _picture(frame: Any) -> Any:
    """A frame of PyAV as a picture of Pillow, RGB, as it is coded."""
    from PIL import Image

    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        return Image.fromarray(over_white(torch.from_numpy(frame.to_ndarray(format="rgba"))).numpy())
    plane = _rgb(frame).planes[0]
    line = (plane.line_size, 1)
    return Image.frombuffer("RGB", (frame.width, frame.height), plane, "raw", "RGB", *line)


_of_thread = threading.local()


def _rgb(frame: Any) -> Any:
    """`frame.reformat(format="rgb24")` by a converter that each thread keeps, without threads of its own."""
    from av.video.reformatter import VideoReformatter

    if not hasattr(_of_thread, "converter"):
        _of_thread.converter = VideoReformatter()
    return _of_thread.converter.reformat(frame, format="rgb24", threads=1)


STRIP = 2**16
"""Pixels that are laid over white at a time, at up to 44 bytes each."""


def over_white(picture: Tensor) -> Tensor:
    """(H, W, 4) uint8 RGBA → (H, W, 3), laid over white, in strips: of all that is computed, memory holds one strip."""
    if bool((picture[..., 3] == 255).all()):
        return picture[..., :3]
    found = torch.empty(*picture.shape[:2], 3, dtype=torch.uint8)
    rows = max(1, STRIP // picture.shape[1])
    for strip, into in zip(picture.split(rows), found.split(rows), strict=True):
        colour, alpha = strip[..., :3].int(), strip[..., 3:].int()
        into.copy_((colour * alpha + 255 * (255 - alpha) + 127) // 255)
    return found


def turned(picture: Any, matrix: tuple[int, ...] | None) -> Any:
    """A picture of Pillow by a display matrix (a, b, u, c, d, v, x, y, w): a pixel at (column, row) is shown at
    (a · column + c · row, b · column + d · row). The nearest of the eight turns and mirrorings, as ffmpeg's autorotate.
    """
    from PIL.Image import Transpose

    if matrix is None:
        return picture
    a, b, _, c, d, *_ = matrix
    turns = {
        (False, True, False): Transpose.FLIP_LEFT_RIGHT,
        (False, False, True): Transpose.FLIP_TOP_BOTTOM,
        (False, True, True): Transpose.ROTATE_180,
        (True, False, False): Transpose.TRANSPOSE,
        (True, True, False): Transpose.ROTATE_270,
        (True, False, True): Transpose.ROTATE_90,
        (True, True, True): Transpose.TRANSVERSE,
    }
    lies = abs(b) > abs(a)
    across, down = (c, b) if lies else (a, d)
    turn = turns.get((lies, across < 0, down < 0))
    return picture if turn is None else picture.transpose(turn)


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    return None if data is None or data.buffer_size < 36 else struct.unpack("=9i", bytes(data)[:36])
