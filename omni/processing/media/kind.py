"""What a source holds, found from its content, never from its name."""

from __future__ import annotations

from typing import Any, Literal

from omni.processing.frames import MediaError
from omni.processing.media.files import as_array, is_array, is_pil, moving_pictures, open_container, open_file
from omni.processing.media.picture import open_picture


def kind_of(source: Any) -> Literal["video", "audio", "image"]:
    """What a source holds, from its content. A sound file's cover picture does not make it a clip.

    An animated GIF or PNG is a clip. Raises MediaError for what is none of the three.
    """
    if isinstance(source, tuple) or is_array(source):
        dims = as_array(source[0] if isinstance(source, tuple) else source).dim()
        if dims not in (1, 3, 4):
            raise MediaError(f"an array of {dims} dimensions is no media: a sound has 1, a picture 3, a clip 4.")
        return "audio" if dims == 1 else "image" if dims == 3 else "video"
    if is_pil(source):
        return "image"
    with open_file(source) as (file, name):
        picture = open_picture(file, name)
        if picture is not None and not (picture.format in ("GIF", "PNG") and getattr(picture, "is_animated", False)):
            return "image"
    with open_container(source) as (container, name):
        if container.format.name.endswith("_pipe"):  # libavformat's name for a single picture
            return "image"
        if moving_pictures(container) is not None:
            return "video"
        if container.streams.audio:
            return "audio"
        raise MediaError(f"{name} holds neither pictures nor sound.")
