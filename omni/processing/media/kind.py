"""What a source holds, found from its content, never from its name."""

from __future__ import annotations

from typing import Any, Literal

from omni.processing.frames import MediaError
from omni.processing.media.files import as_array, is_array, is_pil, open_container, open_file
from omni.processing.media.picture import is_heif, moves, open_picture
from omni.processing.media.streams import moving_pictures


def kind_of(source: Any) -> Literal["video", "audio", "image"]:
    """What a source holds, from its content. A sound file's cover picture does not make it a clip.

    A GIF, PNG, WebP or AVIF that moves is a clip, and so is a list of frames. Raises MediaError for what is none of the
    three.
    """
    if isinstance(source, list) or (isinstance(source, tuple) and source and isinstance(source[0], list)):
        return "video"
    if isinstance(source, tuple) or is_array(source):
        dims = as_array(source[0] if isinstance(source, tuple) and source else source).dim()
        if dims not in (1, 3, 4):
            raise MediaError(f"an array of {dims} dimensions is no media: a sound has 1, a picture 3, a clip 4.")
        return "audio" if dims == 1 else "image" if dims == 3 else "video"
    if is_pil(source):
        return "image"
    with open_file(source) as (file, name):
        if is_heif(file):
            return "image"
        picture = open_picture(file, name)
        if picture is not None:
            return "video" if moves(picture, name) else "image"
    with open_container(source, by_header=True) as (container, name):
        if container.format.name.endswith("_pipe") or container.format.name == "ico":  # single pictures
            return "image"
        if moving_pictures(container) is not None:
            return "video"
        if container.streams.audio:
            return "audio"
        raise MediaError(f"{name} holds neither pictures nor sound.")
