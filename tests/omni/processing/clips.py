"""Small files for the tests of media: clips whose frames carry their number, sound of known pitch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from torch import Tensor

SIZE = (64, 96)
BITS = 8


def numbered_frame(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(H, W, 3) uint8: the number in eight black or white columns, lowest bit first, over a red band."""
    height, width = size
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        if number >> bit & 1:
            frame[:, bit * width // BITS : (bit + 1) * width // BITS] = 255
    frame[height * 3 // 4 :] = (255, 0, 0)
    return frame


def number_of(frame: Tensor) -> int:
    """The number of a (3, H, W) frame, after lossy coding and resizing."""
    _, height, width = frame.shape
    row = frame[1, height // 4].float()
    return sum(1 << bit for bit in range(BITS) if row[int((bit + 0.5) * width / BITS)] > 128)


def tone(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray:
    """(n,) float32 sine."""
    return (amplitude * np.sin(2 * math.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_clip(
    path: Path,
    count: int = 20,
    fps: Fraction | int = 10,
    *,
    codec: str = "libx264",
    times: Sequence[float] | None = None,
    gop: int = 250,
    bframes: int = 2,
    sound: np.ndarray | None = None,
    rate: int = 44_100,
    sound_start: float = 0.0,
    sound_codec: str = "aac",
    rotation: int = 0,
    faststart: bool = False,
    container: str | None = None,
    draw: Callable[[int], np.ndarray] = numbered_frame,
) -> Path:
    """Writes `count` numbered frames, at `times` in seconds or at a rate, and sound (channels, n) float32."""
    options = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.height, stream.width = draw(0).shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.gop_size = gop
        if codec == "libx264":
            stream.codec_context.options = {"bf": str(bframes), "crf": "18", "preset": "ultrafast"}
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        audio = None
        if sound is not None:
            audio = file.add_stream(sound_codec, rate=rate, layout="stereo" if len(sound) == 2 else "mono")
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(draw(number), format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = Fraction(1, 1000) if times is not None else 1 / Fraction(fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if audio is not None and sound is not None:
            _mux_sound(file, audio, sound, rate, sound_start)
    return path


def write_sound(path: Path, sound: np.ndarray, rate: int, codec: str, container: str | None = None) -> Path:
    """Writes sound (channels, n) float32."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout="stereo" if len(sound) == 2 else "mono")
        _mux_sound(file, stream, sound, rate, 0.0)
    return path


def write_covered_sound(path: Path, sound: np.ndarray, rate: int, cover: bytes, codec: str) -> Path:
    """Writes sound with a JPEG as its cover."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate, layout="mono")
        picture = file.add_stream("mjpeg")
        picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
        picture.disposition = av.stream.Disposition.attached_pic
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.is_keyframe = picture, 0, 0, True
        file.start_encoding()
        file.mux(packet)
        _mux_sound(file, stream, sound, rate, 0.0)
    return path


def decode_all(path: Path) -> Iterable[np.ndarray]:
    """Every frame of a clip, in the order of appearance, by nothing but PyAV."""
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def _mux_sound(
    file: av.container.OutputContainer, stream: av.AudioStream, sound: np.ndarray, rate: int, start: float
) -> None:
    layout = "stereo" if len(sound) == 2 else "mono"
    resampler = av.AudioResampler(format=stream.format.name, layout=layout, rate=rate)
    for first in range(0, sound.shape[1], 1024):
        block = np.ascontiguousarray(sound[:, first : first + 1024])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, first + round(start * rate)
        frame.time_base = Fraction(1, rate)
        for part in resampler.resample(frame):
            file.mux(stream.encode(part))
    file.mux(stream.encode())
