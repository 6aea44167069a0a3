"""Clips, sounds and pictures, decoded: `omni.processing.media.files` says what a source may be."""

from omni.processing.frames import MediaError
from omni.processing.media.addresses import fetched
from omni.processing.media.kind import kind_of
from omni.processing.media.picture import read_image
from omni.processing.media.sound import read_audio
from omni.processing.media.video import Video, read_video

__all__ = ["MediaError", "Video", "fetched", "kind_of", "read_audio", "read_image", "read_video"]
