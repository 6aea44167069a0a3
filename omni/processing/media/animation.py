"""Moving pictures of picture formats (GIF, PNG, WebP, AVIF) → their frames and times, by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError
from omni.processing.media.files import open_file, warn
from omni.processing.media.picture import moves, open_picture, pixels
from omni.processing.media.timeline import Timeline

SHORTEST, USUAL = 0.02, 0.1
"""Frames that claim to last less than two hundredths of a second last a tenth, as browsers have it."""


class Animation:
    """The frames of a moving picture, as `open_animation` opens it."""

    def __init__(self, file: BinaryIO, picture: Any, name: str) -> None:
        if picture.width * picture.height > MAX_PIXELS:
            raise MediaError(
                f"{name} has frames of {picture.width} x {picture.height} pixels, which is too large. Scale it down."
            )
        self.file, self.picture, self.name = file, picture, name
        self.first = int(bool(getattr(picture, "default_image", False)))  # a still for those who cannot see it move

    def timeline(self) -> Timeline:
        """Reads every frame. Warns where the file ends before the last."""
        times: list[float] = []
        end = 0.0
        for number in range(self.first, self.picture.n_frames):
            try:
                self.picture.seek(number)
                self.picture.load()
                seconds = float(self.picture.info.get("duration") or 0) / 1000
            # On damaged files Pillow's decoders raise whatever their parsing runs into.
            except Exception as error:
                if not times:
                    raise MediaError(f"{self.name} is a damaged picture: {error}.") from error
                warn(f"{self.name} is cut off or damaged: {len(times)} of {self.picture.n_frames} frames can be read.")
                break
            times.append(end)
            end += seconds if SHORTEST <= seconds < 1e6 else USUAL
        return Timeline(times, end)

    def frames(self, indices: list[int]) -> Iterator[Tensor]:
        """(3, H, W) uint8 of each index, ascending, as `timeline` could read them."""
        picture: Any = open_picture(self.file, self.name)  # anew: a damaged one cannot be wound back
        for index in indices:
            try:
                picture.seek(self.first + index)
            except Exception as error:
                raise MediaError(f"{self.name} is a damaged picture: {error}.") from error
            yield pixels(picture, self.name)


@contextmanager
def open_animation(source: Any) -> Iterator[Animation | None]:
    """None for what is no picture; raises MediaError for a picture that does not move."""
    with open_file(source) as (file, name):
        picture = open_picture(file, name)
        if picture is None:
            yield None
        elif not moves(picture, name):
            raise MediaError(f"{name} is a single picture ({picture.format}). Give it as an image.")
        else:
            yield Animation(file, picture, name)
