"""Which of a container's streams are seen and heard."""

from __future__ import annotations

from typing import Any

from omni.processing.frames import MAX_PIXELS, MediaError


def moving_pictures(container: Any) -> Any | None:
    """The stream of moving pictures: not the cover of a sound. Of several that there is a decoder for, the container's
    default."""
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails
    moving = [stream for stream in container.streams.video if not stream.disposition & still]
    seen = [stream for stream in moving if stream.codec_context is not None] or moving
    return _default(seen) or (seen[0] if seen else None)


def require_pictures(container: Any, name: str) -> Any:
    stream = moving_pictures(container)
    if stream is None:
        raise MediaError(f"{name} holds no moving pictures. Give it as a sound.")
    require_decoder(stream, name)
    context = stream.codec_context
    if context.width * context.height > MAX_PIXELS:
        raise MediaError(
            f"{name} has frames of {context.width} x {context.height} pixels, which is too large. Scale it down."
        )
    return stream


def sound_track(container: Any, name: str, number: int | None) -> Any | None:
    """Of several tracks the container's default, else what ffmpeg takes for the best; None where there is none.

    number: of the wanted track instead, counted from 0. A track that no decoder is there for is passed over.
    """
    tracks = container.streams.audio
    if number is not None:
        if not 0 <= number < len(tracks):
            there = "no sound track" if not tracks else f"{len(tracks)} sound track{'s'[: len(tracks) > 1]}"
            raise MediaError(f"audio_track is {number}, but {name} has {there} (they count from 0).")
        return tracks[number]
    if not tracks:
        return None
    heard = [track for track in tracks if track.codec_context is not None]
    best = container.streams.best("audio", moving_pictures(container))
    return _default(heard) or (best if best in heard else (heard or tracks)[0])


def require_decoder(stream: Any, name: str) -> None:
    if stream.codec_context is None:
        raise MediaError(f"{name}: there is no decoder for its {stream.type} stream. Convert it to H.264 and AAC.")


def _default(streams: list[Any]) -> Any | None:
    """The one stream that is called the default. Where several are, as all in many files, that says nothing."""
    from av.stream import Disposition

    named = [stream for stream in streams if stream.disposition & Disposition.default]
    return named[0] if len(named) == 1 else None
