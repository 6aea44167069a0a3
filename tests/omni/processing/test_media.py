"""Decoding of files that the tests make: the frames and sound that went in come out, or a sentence."""

from __future__ import annotations

import io
import math
import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from threading import Barrier
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import (
    SIZE,
    decode_all,
    number_of,
    numbered_frame,
    tone,
    write_clip,
    write_covered_sound,
    write_sound,
)
from PIL import Image
from torch import Tensor

from omni.processing.frames import VisionSizes, sample_indices
from omni.processing.media import MediaError, kind_of, read_audio, read_image, read_video, video
from omni.processing.media.decoding import Decoder

MEDIA = Path(__file__).parents[4] / "shared/data/media"


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A warning where a test does not ask for one is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def numbers(source: Any, **options: Any) -> list[int]:
    return [number_of(frame) for frame in read_video(source, **options).frames]


def loudest_hertz(waveform: Tensor, rate: int = 16_000) -> float:
    return float(torch.fft.rfft(waveform).abs().argmax()) * rate / len(waveform)


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp4", "libx264", None),
        ("a.mov", "mjpeg", None),
        ("a.mkv", "libx264", None),
        ("a.webm", "libvpx-vp9", None),
        ("a.avi", "mpeg4", None),
        ("b.avi", "libx264", None),
        ("a.ts", "libx264", "mpegts"),
        ("a.h264", "libx264", "h264"),
    ],
)
@pytest.mark.parametrize("gop", [6, 250])
def test_frames_of_constant_rate_are_the_sampled_indices(
    tmp_path: Path, name: str, codec: str, container: str | None, gop: int
) -> None:
    """In every container, with many keyframes or one, exactly the frames of the family's rule come out."""
    path = write_clip(tmp_path / name, 60, 25, codec=codec, container=container, gop=gop)
    video = read_video(path, fps=3.0)
    assert [number_of(frame) for frame in video.frames] == sample_indices(60, 25.0, fps=3.0)
    assert video.frames.dtype == torch.uint8 and video.frames.shape[1:] == (3, *SIZE)
    assert (video.fps, video.size) == (3.0, SIZE)
    assert video.duration == pytest.approx(2.4, abs=1e-3)


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 30, 12])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_whole_seconds_do_not_lose_a_frame_to_rounding(tmp_path: Path, fps: Fraction | int, name: str) -> None:
    """Matroska rounds times to milliseconds; the number of frames does not suffer."""
    path = write_clip(tmp_path / name, 4 * round(fps), fps, gop=30)
    assert numbers(path) == sample_indices(4 * round(fps), float(fps))


def test_pixels_are_those_of_plain_decoding(tmp_path: Path) -> None:
    """Skipping and seeking change no pixel of what is kept."""
    path = write_clip(tmp_path / "a.mp4", 100, 25, gop=10)
    every = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    indices = sample_indices(100, 25.0)
    for frame, index in zip(read_video(path).frames, indices, strict=True):
        assert torch.equal(frame, every[index])


def test_only_what_leads_to_a_wanted_frame_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a keyframe every second, four frames of a minute cost a fraction of its 600."""
    path = write_clip(tmp_path / "a.mp4", 600, 10, gop=10, draw=lambda n: numbered_frame(n % 256))
    fed = 0
    feed = Decoder.feed

    def counting(decoder: Decoder, packet: Any) -> Any:
        nonlocal fed
        fed += packet is not None
        return feed(decoder, packet)

    monkeypatch.setattr(Decoder, "feed", counting)
    assert numbers(path, max_frames=4) == [0, 150, 300 % 256, 450 % 256]
    assert fed == 4


@pytest.mark.parametrize("landing", ["late", "refused"])
def test_bad_seeking_falls_back_to_reading_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, landing: str
) -> None:
    """Where the file's index leads past the keyframe, or nowhere, the same frames come out."""
    path = write_clip(tmp_path / "a.mp4", 100, 10, gop=5)
    container = video.open_container

    class Misled:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def seek(self, offset: int, **options: Any) -> None:
            if offset > 0 and landing == "refused":
                raise av.error.PermissionError(1, "no")
            self.inner.seek(offset + (20_000 if offset > 0 else 0), **options)

    @contextmanager
    def opened(source: Any, **options: Any) -> Iterator[tuple[Any, str]]:
        with container(source, **options) as (inner, name):
            yield Misled(inner), name

    monkeypatch.setattr(video, "open_container", opened)
    assert numbers(path, fps=0.8) == sample_indices(100, 10.0, fps=0.8)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rate_gives_what_is_on_the_screen(tmp_path: Path, name: str) -> None:
    """At even instants the frame then shown, be it new or minutes old."""
    times = [0.0, 0.1, 0.2, 0.3, 1.0, 1.7, 1.8, 3.0, 3.1, 3.9]
    video = read_video(write_clip(tmp_path / name, 10, 10, times=times))
    step = video.duration / 8
    assert video.duration == pytest.approx(4.1, abs=0.15)
    shown = [max(k for k, time in enumerate(times) if time <= i * step + 1e-3) for i in range(8)]
    assert [number_of(frame) for frame in video.frames] == shown
    assert video.fps == 2.0


@pytest.mark.parametrize(("count", "expected"), [(1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (3, [0, 0, 1, 2])])
def test_clips_of_a_few_frames(tmp_path: Path, count: int, expected: list[int]) -> None:
    """One frame makes four; the model is told the rate at which they really follow."""
    video = read_video(write_clip(tmp_path / "a.mp4", count, 10))
    assert [number_of(frame) for frame in video.frames] == expected
    assert video.fps == pytest.approx(4 / (count / 10))


def test_a_long_clip_is_capped_and_says_so(tmp_path: Path) -> None:
    """max_frames thins the whole clip out; the rate is the true one."""
    path = write_clip(tmp_path / "a.mp4", 200, 10, gop=20)
    video = read_video(path, max_frames=10)
    assert [number_of(frame) for frame in video.frames] == list(range(0, 200, 20))
    assert video.fps == 0.5


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_honoured(tmp_path: Path, degrees: int) -> None:
    """A clip filmed upright and stored lying comes out upright."""
    path = write_clip(tmp_path / "a.mp4", 4, 10, rotation=degrees)
    stored = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    video = read_video(path)
    assert video.size == tuple(video.frames.shape[2:]) == (SIZE if degrees == 180 else SIZE[::-1])
    # Counter-clockwise: what was the right edge becomes the top.
    assert torch.equal(video.frames[1], torch.rot90(stored[1], degrees // 90, dims=(1, 2)))
    band = {90: video.frames[0, 0, :, -8], 180: video.frames[0, 0, 8], -90: video.frames[0, 0, :, 8]}[degrees]
    assert float(band.float().mean()) > 200


def test_rotation_goes_by_the_matrix_in_the_file(tmp_path: Path) -> None:
    """A track header as a telephone writes it for a quarter turn clockwise: the picture's top goes right."""
    path = write_clip(tmp_path / "a.mp4", 4, 10)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, SIZE[0] << 16, 0, 1 << 30)
    path.write_bytes(data)
    frame = read_video(path).frames[0]
    assert frame.shape[1:] == SIZE[::-1]
    assert frame[0, :, :8].float().mean() > 200 > 60 > frame[0, :, -8:].float().mean()


def test_frames_are_resized_as_they_come(tmp_path: Path) -> None:
    """size_for gets the number of frames and the upright size, and decides what is kept."""
    asked = []

    def size_for(count: int, height: int, width: int) -> tuple[int, int]:
        asked.append((count, height, width))
        return VisionSizes(video_min_pixels=2 * 28**2, video_max_pixels=6 * 28**2).clip_size(count, height, width)

    told: list[tuple[int, int]] = []
    path = write_clip(tmp_path / "a.mp4", 20, 10, rotation=90)
    video = read_video(path, size_for=size_for, on_frames=lambda frames, done: told.append((done, len(frames))))
    assert asked == [(4, 96, 64)]
    assert video.frames.shape == (4, 3, 84, 56) and video.size == (96, 64)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_size_may_change_within_a_clip(tmp_path: Path) -> None:
    """Frames of another size, as streams have them, are brought to the first one's."""
    parts = [
        write_clip(tmp_path / f"{height}.h264", 10, 10, container="h264", draw=drawer(height), bframes=0)
        for height in (64, 128)
    ]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = read_video(path, fps=5.0)
    assert video.frames.shape[1:] == (3, 64, 96)
    assert number_of(video.frames[-1]) == number_of(video.frames[len(video.frames) // 2 - 1])


def drawer(height: int) -> Callable[[int], np.ndarray]:
    return lambda number: numbered_frame(number, (height, 96))


def test_colours_survive(tmp_path: Path) -> None:
    """Red stays red: channels are in RGB order and the range is full."""

    def flag(_: int) -> np.ndarray:
        return np.repeat(np.array([[[250, 5, 5], [5, 250, 5], [5, 5, 250]]], np.uint8), 32, 1).repeat(64, 0)

    frame = read_video(write_clip(tmp_path / "a.mp4", 4, 10, draw=flag)).frames[0].float()
    expected = torch.tensor(flag(0)[0, ::32]).float()
    assert float((frame[:, 32, 16::32].T - expected).abs().max()) < 12


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wav", "pcm_s16le"), ("a.flac", "flac"), ("a.wav", "pcm_f32le"), ("a.mka", "flac")]
)
@pytest.mark.parametrize("rate", [44_100, 16_000, 8_000, 48_000])
def test_a_tone_keeps_pitch_loudness_and_length(tmp_path: Path, name: str, codec: str, rate: int) -> None:
    """Stereo at any rate → mono at 16 kHz: the mean of both channels, to the sample."""
    path = write_sound(tmp_path / name, np.stack([tone(440, 1.5, rate)] * 2), rate, codec)
    waveform = read_audio(path)
    assert waveform is not None and waveform.dtype == torch.float32
    assert abs(len(waveform) - 24_000) <= 16
    assert loudest_hertz(waveform) == pytest.approx(440, abs=1)
    inner = waveform[1000:-1000]
    reference = torch.from_numpy(tone(440, 1.5, 16_000))[1000 : 1000 + len(inner)]
    assert float((inner - reference).abs().max()) < 5e-3


def test_channels_are_averaged(tmp_path: Path) -> None:
    """A tone on one side comes out half as loud; opposite sides cancel."""
    one = tone(440, 0.5, 16_000)
    left = read_audio(write_sound(tmp_path / "l.wav", np.stack([one, 0 * one]), 16_000, "pcm_f32le"))
    both = read_audio(write_sound(tmp_path / "b.wav", np.stack([one, -one]), 16_000, "pcm_f32le"))
    assert left is not None and both is not None
    np.testing.assert_allclose(left.numpy(), one / 2, atol=1e-6)
    assert float(both.abs().max()) < 1e-6


@pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.ogg", "libopus")])
def test_lossy_sound(tmp_path: Path, name: str, codec: str) -> None:
    """Compressed sound has its pitch, and its length but for the coder's last block."""
    waveform = read_audio(write_sound(tmp_path / name, tone(440, 2, 48_000)[None], 48_000, codec))
    assert waveform is not None
    assert abs(len(waveform) / 16_000 - 2) < 0.03
    assert loudest_hertz(waveform) == pytest.approx(440, abs=1)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_late_sound_stays_in_step(tmp_path: Path, name: str) -> None:
    """Sound that sets in 0.7 s after the first frame is heard 0.7 s in."""
    sound = tone(440, 2, 44_100)[None]
    waveform = read_audio(write_clip(tmp_path / name, 30, 10, sound=sound, sound_start=0.7))
    assert waveform is not None
    onset = int((waveform.abs() > 0.1).nonzero()[0]) / 16_000
    assert onset == pytest.approx(0.7, abs=0.005)
    assert len(waveform) / 16_000 == pytest.approx(2.7, abs=0.03)


def test_early_sound_is_cut(tmp_path: Path) -> None:
    """Sound from before the first frame is not part of the clip."""
    sound = np.concatenate([tone(440, 0.5, 44_100), tone(880, 1.5, 44_100)])[None]
    times = [0.5 + number / 10 for number in range(15)]
    waveform = read_audio(write_clip(tmp_path / "a.mkv", 15, 10, times=times, sound=sound))
    assert waveform is not None
    assert len(waveform) / 16_000 == pytest.approx(1.5, abs=0.03)
    assert loudest_hertz(waveform[:4000]) == pytest.approx(880, abs=5)


def test_a_hole_in_the_sound_is_silence(tmp_path: Path) -> None:
    """What follows a gap in the time stamps keeps its time."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("flac", rate=16_000, layout="mono")
        for first, hertz in ((0, 440), (32_000, 880)):
            block = (tone(hertz, 1, 16_000) * 32_767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, first, Fraction(1, 16_000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    waveform = read_audio(path)
    assert waveform is not None
    assert len(waveform) / 16_000 == pytest.approx(3, abs=0.01)
    assert float(waveform[17_000:31_000].abs().max()) == 0
    assert loudest_hertz(waveform[32_500:]) == pytest.approx(880, abs=2)


@pytest.mark.parametrize("layout", ["5.1", "7.1", "hexadecagonal"])
def test_sound_of_many_channels(tmp_path: Path, layout: str) -> None:
    """Protects: six, eight or sixteen channels are their mean, and no crash of the process."""
    path = tmp_path / "a.wav"
    channels = av.AudioLayout(layout).nb_channels
    values = np.repeat(np.linspace(0, 0.7, channels, dtype=np.float32)[:, None], 16_000, axis=1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_f32le", rate=16_000, layout=layout)
        frame = av.AudioFrame.from_ndarray(values.T.reshape(1, -1).copy(), format="flt", layout=layout)
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    waveform = read_audio(path)
    assert waveform is not None and len(waveform) == 16_000
    torch.testing.assert_close(waveform, torch.full((16_000,), 0.35))


def test_titles_in_any_encoding(tmp_path: Path) -> None:
    """Protects: a title that is no UTF-8 costs nothing of the sound."""
    path = tmp_path / "a.flac"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "naive"
        stream = file.add_stream("flac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    data = path.read_bytes()
    assert data.count(b"naive") == 1
    path.write_bytes(data.replace(b"naive", b"na\xefve"))
    waveform = read_audio(path)
    assert kind_of(path) == "audio" and waveform is not None and len(waveform) == 1600


def test_silence_is_bounded_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: time stamps that leap again and again claim no more memory than one leap may; nor does sound."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for number in range(6):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16_000, number * 32_000, Fraction(1, 16_000)
            file.mux(stream.encode(frame))
    waveform = read_audio(path)
    assert waveform is not None and len(waveform) == pytest.approx(10.1 * 16_000, abs=200)
    monkeypatch.setattr("omni.processing.media.sound.MAX_SILENCE", 5)
    with pytest.raises(MediaError, match="its sound claims 6 s of silence"):
        read_audio(path)
    sound = write_sound(tmp_path / "a.wav", tone(440, 2, 16_000)[None], 16_000, "pcm_s16le")
    monkeypatch.setattr("omni.processing.media.sound.MAX_SECONDS", 1)
    with pytest.raises(MediaError, match="its sound is longer than"):
        read_audio(sound)


def test_a_silent_clip_has_no_sound(tmp_path: Path) -> None:
    """A clip without a sound stream is no error."""
    assert read_audio(write_clip(tmp_path / "a.mp4", 4, 10)) is None


@pytest.mark.skipif(not MEDIA.exists(), reason="shared media are absent")
def test_real_files() -> None:
    """Speech has its 11 s; a clip has its frames, seeked or not."""
    speech = read_audio(MEDIA / "jfk.flac")
    assert speech is not None and len(speech) == 176_000
    assert 0.5 < float(speech.abs().max()) <= 1
    video = read_video(MEDIA / "cockatoo.mp4", size_for=lambda *_: (56, 84))
    assert video.frames.shape == (28, 3, 56, 84)
    assert (video.fps, video.duration, video.size) == (2.0, 14.0, (720, 1280))


def picture(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK"])
def test_pictures_of_any_mode(tmp_path: Path, mode: str) -> None:
    """Greys, palettes and print colours become what Pillow shows as RGB."""
    image = picture(mode)
    path = tmp_path / "a.tiff"
    image.save(path)
    pixels = read_image(path)
    assert pixels.shape == (3, 20, 30) and pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    """As in transformers' `convert_to_rgb`: what is hidden does not show."""
    image = picture("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "a.png")
    from transformers.image_transforms import convert_to_rgb

    np.testing.assert_array_equal(
        read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), convert_to_rgb(image, return_numpy=True)
    )


def test_sixteen_bit_greys(tmp_path: Path) -> None:
    """The upper eight bits, not everything above 255 white."""
    greys = np.linspace(0, 65_535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(greys).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")[0].int().numpy()
    assert np.abs(pixels - greys // 256).max() <= 1


@pytest.mark.parametrize("clear", [0x0180, 0x8000, 0x00FF])
def test_one_sixteen_bit_grey_is_transparent(tmp_path: Path, clear: int) -> None:
    """Protects: that very value is white, and neither what shares its upper 8 bits nor what shares its lower ones."""
    greys = np.array([[0, 0x0180, 0x0181, 0x8000, 0x80FF, 0x8080, 0x7FFF, 0xFFFF, 0x00FF]], np.uint16)
    Image.fromarray(greys).save(tmp_path / "a.png", transparency=clear)
    expected = np.where(greys == clear, 255, greys >> 8)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0].numpy(), expected)


def test_greys_of_unknown_range(tmp_path: Path) -> None:
    """Protects: greys of 32 bits that are those of 8 stay what they are, as in transformers, and are not black; others
    are refused, not guessed. What Pillow makes 16 bits of keeps the upper 8, turned or not."""
    greys = np.arange(256, dtype=np.int32).reshape(8, 32)
    for source in (tmp_path / "a.tiff", Image.fromarray(greys)):
        Image.fromarray(greys).save(tmp_path / "a.tiff")
        np.testing.assert_array_equal(read_image(source).numpy(), np.stack([greys] * 3))
    for wrong in (greys - 1, greys + 1, greys * 2**20):
        Image.fromarray(wrong).save(tmp_path / "a.tiff")
        said = rf"a\.tiff has greys of unknown range, here {wrong.min()} \.\. {wrong.max()}\. Convert it to 8 bits\.$"
        with pytest.raises(MediaError, match=said):
            read_image(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 32 8 65535\n" + (greys * 257).astype(">u2").tobytes())
    with Image.open(tmp_path / "a.pgm") as opened:
        assert opened.mode == "I"
    np.testing.assert_array_equal(read_image(tmp_path / "a.pgm")[0].numpy(), greys)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((greys * 257).astype(np.uint16)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0].numpy(), np.rot90(greys, -1))


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    """A photograph stored lying comes out upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture()
    image.save(tmp_path / "a.png", exif=exif)
    expected = np.rot90(np.asarray(image), -1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), expected)


def test_pictures_in_memory() -> None:
    """PIL images, file objects and arrays of both layouts are the same picture."""
    image = picture()
    array = np.asarray(image).copy()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    expected = torch.from_numpy(array).permute(2, 0, 1)
    for source in (image, buffer, array, torch.from_numpy(array), expected, expected.numpy()):
        assert torch.equal(read_image(source), expected)
        assert kind_of(source) == "image"


def test_arrays_of_any_strides() -> None:
    """Protects: views of numpy that run backwards, such as OpenCV's BGR turned to RGB, of pictures, clips and sound."""
    array = np.asarray(picture()).copy()
    expected = torch.from_numpy(array).permute(2, 0, 1)
    backwards = np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1]
    assert backwards.strides[2] < 0 and torch.equal(read_image(backwards), expected)
    clip = read_video((np.stack([array] * 4)[::-1], 2.0))
    assert torch.equal(clip.frames, torch.stack([expected] * 4))
    assert torch.equal(read_video(([backwards] * 4, 2.0)).frames, clip.frames)
    sound = np.linspace(-1, 1, 16_000, dtype=np.float32)
    found = read_audio(sound[::-1])
    assert found is not None and torch.equal(found, torch.from_numpy(sound[::-1].copy()))


def cover() -> bytes:
    buffer = io.BytesIO()
    picture().resize((32, 32)).save(buffer, "JPEG")
    return buffer.getvalue()


def test_kinds_go_by_content(tmp_path: Path) -> None:
    """Whatever the name says; and a wrong name is read all the same."""
    clip = write_clip(tmp_path / "a.mp4", 8, 10).rename(tmp_path / "clip.jpg")
    sound = write_sound(tmp_path / "a.wav", tone(440, 1, 16_000)[None], 16_000, "pcm_s16le")
    sound = sound.rename(tmp_path / "sound.mp4")
    image = tmp_path / "picture.txt"
    picture().save(image, "PNG")
    assert [kind_of(path) for path in (clip, sound, image)] == ["video", "audio", "image"]
    assert kind_of(str(clip)) == "video"
    assert numbers(clip) == [0, 2, 4, 6]
    assert len(read_audio(sound)) == 16_000  # type: ignore[arg-type]
    assert read_image(image).shape == (3, 20, 30)


def test_a_covered_song_is_sound(tmp_path: Path) -> None:
    """The picture on its sleeve is no clip."""
    path = write_covered_sound(tmp_path / "a.mp3", tone(440, 1, 44_100)[None], 44_100, cover(), "libmp3lame")
    with av.open(str(path)) as file:
        assert len(file.streams.video) == 1
    assert kind_of(path) == "audio"
    waveform = read_audio(path)
    assert waveform is not None and loudest_hertz(waveform) == pytest.approx(440, abs=2)
    with pytest.raises(MediaError, match="no moving pictures"):
        read_video(path)


def test_an_animation_is_a_clip(tmp_path: Path) -> None:
    """A GIF that moves is a clip, one that does not is a picture."""
    frames = [Image.fromarray(numbered_frame(number)) for number in range(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=250, loop=0)
    frames[0].save(tmp_path / "b.gif")
    assert (kind_of(tmp_path / "a.gif"), kind_of(tmp_path / "b.gif")) == ("video", "image")
    assert numbers(tmp_path / "a.gif") == [0, 2, 4, 6]


def test_file_objects_are_left_open(tmp_path: Path) -> None:
    """Read from the start whatever their position, as often as needed."""
    path = write_clip(tmp_path / "a.mp4", 20, 10, sound=tone(440, 2, 44_100)[None])
    with path.open("rb") as file:
        file.seek(77)
        assert kind_of(file) == "video"
        assert numbers(file) == [0, 5, 10, 15]
        assert read_audio(file) is not None
        assert not file.closed
    assert numbers(io.BytesIO(path.read_bytes())) == [0, 5, 10, 15]


def test_arrays(tmp_path: Path) -> None:
    """Clips and sounds that are decoded already go through the same rules."""
    frames = np.stack([numbered_frame(number) for number in range(30)])
    for array in (frames, torch.from_numpy(frames), torch.from_numpy(frames).permute(0, 3, 1, 2)):
        assert kind_of((array, 10)) == "video"
        assert numbers((array, 10)) == sample_indices(30, 10.0)
    sound = tone(440, 1, 44_100)
    assert kind_of(sound) == kind_of((sound, 44_100)) == "audio"
    waveform = read_audio((sound.astype(np.float64), 44_100))
    assert waveform is not None and abs(len(waveform) - 16_000) <= 2
    assert loudest_hertz(waveform) == pytest.approx(440, abs=2)
    sixteen = torch.from_numpy(tone(440, 1, 16_000))
    assert torch.equal(read_audio(sixteen), sixteen)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [kind_of, read_video, read_audio, read_image])
def test_what_is_no_media_gets_a_sentence(tmp_path: Path, read: Callable[[Any], Any]) -> None:
    """Missing, empty, folder, text, noise, pipe, address: each named, none a traceback or a wait."""
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("What happens here?\n" * 100)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(3).bytes(20_000))
    os.mkfifo(tmp_path / "pipe.mp4")
    messages = {
        "gone.mp4": "does not exist",
        "empty.mp4": "is empty",
        "text.mp4": "cannot be read|not a picture",
        "list.mp4": "cannot be read|not a picture",
        "noise.mp4": "cannot be read|not a picture",
        "pipe.mp4": "not a regular file",
        "": "is a folder",
    }
    for name, message in messages.items():
        with pytest.raises(MediaError, match=message) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)
    for source, message in (
        ("https://example.org/clip.mp4", r"urls=True .* or download it first"),
        ("s3://bucket/clip.mp4", "Download it first"),
        ("a" * 5000, "cannot be opened"),
        ("a\0b.mp4", "cannot be the name of a file"),
        ("a\ud800.mp4", "cannot be the name of a file"),
        (io.BytesIO(), "is empty"),
        (io.StringIO("text"), "binary mode"),
        (17, "no source of media"),
        (None, "no source of media"),
    ):
        with pytest.raises(MediaError, match=message) as caught:
            read(source)
        assert len(str(caught.value)) < 400


def test_an_mp4_without_its_index_is_refused(tmp_path: Path) -> None:
    """Cut off before the index at its end, a clip holds nothing that can be read."""
    path = write_clip(tmp_path / "a.mp4", 50, 10, draw=noisy)
    path.write_bytes(path.read_bytes()[:-5000])
    for read in (kind_of, read_video, read_audio):
        with pytest.raises(MediaError, match=r"a\.mp4 cannot be read.*cut off or damaged"):
            read(path)


def noisy(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).integers(0, 40, (*SIZE, 3), np.uint8)
    return np.clip(numbered_frame(number).astype(np.int16) + noise - 20, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_cut_clip_gives_its_beginning_and_a_warning(tmp_path: Path, name: str) -> None:
    """With the index in front, half a file is about half a clip: true frames, no torn ones."""
    path = write_clip(
        tmp_path / name, 100, 10, draw=noisy, faststart=name == "a.mp4", sound=tone(440, 10, 44_100)[None]
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"cut off: it promises a clip of 10\.\d s and has [3-6]\.\d s"):
        video = read_video(path)
    found = [number_of(frame) for frame in video.frames]
    assert 30 < found[-1] < 70
    assert found == sample_indices(round(video.duration * 10), 10.0)


def test_cut_sound_gives_its_beginning_and_a_warning(tmp_path: Path) -> None:
    """Half a recording is read, and said to be half."""
    path = write_sound(tmp_path / "a.flac", tone(440, 4, 16_000)[None], 16_000, "flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"promises a sound of 4\.0 s and has [12]\.\d s"):
        waveform = read_audio(path)
    assert waveform is not None and 16_000 < len(waveform) < 48_000


def test_damaged_frames_are_replaced_and_counted(tmp_path: Path) -> None:
    """Rubbish in the middle of a clip costs the frames it hits, says so, and shows no rubbish."""
    path = write_clip(tmp_path / "a.mp4", 100, 10, draw=noisy, gop=20, bframes=0)
    with av.open(str(path)) as file:
        spots = [(p.pos, p.size) for p in file.demux(video=0) if p.size and 40 <= p.pts * p.time_base * 10 < 60]
    data = bytearray(path.read_bytes())
    for position, size in spots:
        data[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"4 of 20 frames could not be decoded"):
        video = read_video(path)
    found = [number_of(frame) for frame in video.frames]
    assert found[:8] == [0, 5, 10, 15, 20, 25, 30, 35] and found[12:] == [60, 65, 70, 75, 80, 85, 90, 95]
    assert all(35 <= number < 40 for number in found[8:12])


def test_nothing_but_rubbish_is_refused(tmp_path: Path) -> None:
    """A sound index over zeros is an error, not a clip of nothing."""
    path = write_clip(tmp_path / "a.mp4", 20, 10)
    with av.open(str(path)) as file:
        spots = [(p.pos, p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for position, size in spots:
        data[position : position + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="damaged"):
        read_video(path)


@pytest.mark.parametrize("side", [9_000, 40_000, 2_000_000_000])
def test_claimed_sizes_are_not_believed(tmp_path: Path, side: int) -> None:
    """A few bytes that claim gigapixels are refused before memory is taken."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match="too large"):
        read_image(tmp_path / "a.png")
    with pytest.raises(MediaError):
        read_video(tmp_path / "a.png")


def test_a_clip_of_claimed_size_is_refused(tmp_path: Path) -> None:
    """The same for an animation."""
    frames = [Image.fromarray(numbered_frame(number)) for number in range(4)]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250)
    data = bytearray(path.read_bytes())
    data[6:10] = struct.pack("<HH", 12_000, 12_000)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="too large"):
        read_video(path)


def test_a_damaged_picture_is_refused(tmp_path: Path) -> None:
    """Half a picture is not guessed to its end, nor taken for a clip."""
    (tmp_path / "start.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert kind_of(tmp_path / "start.png") == "image"
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp"):
        picture(size=(200, 200)).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(MediaError, match=f"{name} is (a damaged|not a) picture"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), "frames per second"),
        ((np.zeros((4, 8, 8), np.uint8), 10), "must be"),
        ((np.zeros((4, 8, 8, 3), np.float32), 10), "float32"),
        ((np.zeros((0, 8, 8, 3), np.uint8), 10), "nothing to sample"),
        ((np.zeros((4, 8, 8, 3), np.uint8), 0), "nothing to sample"),
    ],
)
def test_arrays_that_are_no_clip(source: Any, message: str) -> None:
    """Wrong shapes and types are named."""
    with pytest.raises(MediaError, match=message):
        read_video(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 100), np.float32), r"\(2, 100\)"),
        (np.zeros(100, np.int16), "int16"),
        (np.zeros(0, np.float32), "must be"),
        ((np.zeros(100, np.float32), 0), "rate"),
        (np.array([0.0, math.nan]), "not a number"),
    ],
)
def test_arrays_that_are_no_sound(source: Any, message: str) -> None:
    """Stereo, integers, nothing and NaN are named."""
    with pytest.raises(MediaError, match=message):
        read_audio(source)


def test_arrays_that_are_no_picture() -> None:
    """So are pictures of another shape or type."""
    for array in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(MediaError, match="array of a picture"):
            read_image(array)
    with pytest.raises(MediaError, match="2 dimensions"):
        kind_of(np.zeros((8, 8)))


@pytest.mark.parametrize(
    "name",
    ["p%03d.png", "x%d.mp4", "sound.mp3", "list.txt", "noise.ts", "clip", "*.png", "concat:clip.mp4", "x.sdp", "-"],
)
def test_content_alone_decides(name: str, clip: Path, tmp_path: Path) -> None:
    """Whatever a file is called: libavformat takes some names for patterns of pictures' names, others for formats."""
    path = tmp_path / name
    path.write_bytes(clip.read_bytes())
    assert kind_of(path) == "video"
    assert torch.equal(read_video(path, max_frames=4).frames, read_video(clip, max_frames=4).frames)
    assert torch.equal(read_audio(path), read_audio(clip))
    with path.open("rb") as file:
        assert kind_of(file) == "video"
    memory = io.BytesIO(clip.read_bytes())
    memory.name = name
    assert kind_of(memory) == "video"
    path.write_bytes(b"x")
    for read in (kind_of, read_video, read_audio, read_image):
        with pytest.raises(MediaError):
            read(path)


@pytest.mark.parametrize(
    "rate", [math.nan, math.inf, -math.inf, "16000", b"16000", None, [16000], 0, -1, 1.5, 1j, True, 10**400, {}]
)
def test_rates_that_are_none(rate: Any) -> None:
    sound, frames = torch.zeros(1600), torch.zeros(4, 3, 28, 28, dtype=torch.uint8)
    with pytest.raises(MediaError, match="rate must be a whole number"):
        read_audio((sound, rate))
    if rate != 1.5:  # frames a second
        with pytest.raises(MediaError, match="frames per second has nothing to sample"):
            read_video((frames, rate))


@pytest.mark.parametrize(
    "rate", [16_000, 16_000.0, np.int32(16_000), np.array(16_000), torch.tensor(16_000), Fraction(32_000, 2)]
)
def test_rates_of_every_kind(rate: Any) -> None:
    assert read_audio((torch.zeros(1600), rate)).shape == (1600,)


TEXTS_AND_FLAGS = (
    np.array("16000"),
    np.str_("16000"),
    memoryview(b"16000"),
    np.bool_(True),
    torch.tensor(True),
    1j * np.ones(()),
)


def test_rates_of_several_numbers() -> None:
    for rate in (torch.tensor([1, 2]), np.array([1, 2]), torch.tensor(math.nan), *TEXTS_AND_FLAGS):
        with pytest.raises(MediaError, match="rate must be a whole number"):
            read_audio((torch.zeros(1600), rate))
        with pytest.raises(MediaError, match="frames per second has nothing to sample"):
            read_video((torch.zeros(4, 3, 28, 28, dtype=torch.uint8), rate))


SPARSE = torch.zeros(1600).to_sparse()


@pytest.mark.parametrize(
    "source",
    [
        (),
        (1,),
        (None,),
        (None, 2),
        ((), 2),
        ([], 2),
        (1, 2, 3),
        {},
        3,
        None,
        ("a", "b"),
        SPARSE,
        (SPARSE, 16_000),
    ],
)
def test_what_holds_no_media(source: Any) -> None:
    for read in (read_video, read_audio, read_image):
        with pytest.raises(MediaError):
            read(source)
    with pytest.raises(MediaError):
        {"video": read_video, "audio": read_audio, "image": read_image}[kind_of(source)](source)


def test_warnings_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two threads open pictures at a time, and one is done before the other."""
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    before, barrier, order = list(warnings.filters), Barrier(2), iter((0.0, 0.1))
    opened = Image.open

    def slow(*arguments: Any, **options: Any) -> Any:
        wait = next(order)
        barrier.wait(5)
        time.sleep(wait)
        return opened(*arguments, **options)

    monkeypatch.setattr(Image, "open", slow)

    def later() -> None:
        time.sleep(0.05)
        read_image(tmp_path / "a.png")

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(read_image, tmp_path / "a.png"), pool.submit(later)]:
            job.result()
    assert warnings.filters == before


def test_more_frames_than_memory_holds() -> None:
    """Protects: a wish for too much is told in a sentence, not by the allocator."""
    with pytest.raises(MediaError, match="4 frames of 67108864 x 67108864 pixels are more than memory holds"):
        read_video(([np.zeros((8, 8, 3), np.uint8)] * 4, 2.0), size_for=lambda *_: (2**26, 2**26))
