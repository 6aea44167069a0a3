"""Files as people have them: frames and sound against straight decoding by PyAV."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from clips import SIZE, decode_all, number_of, numbered_frame, tone, write_clip, write_sound
from PIL import Image
from torch import Tensor

from omni.processing.frames import sample_indices
from omni.processing.media import MediaError, Video, read_audio, read_video, video
from omni.processing.media.upright import turned, upright

RATE = 48_000


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A warning where a test does not ask for one is a failure: nothing is warned of that is not so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def numbers(source: Any, **options: Any) -> list[int]:
    return [number_of(frame) for frame in read_video(source, **options).frames]


def straight(path: Path) -> list[tuple[float, int]]:
    """(seconds, number) of every frame, in the order of appearance, by nothing but PyAV."""
    with av.open(str(path)) as file:
        frames = [
            (frame.time, number_of(torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)))
            for frame in file.decode(video=0)
        ]
    return [(time - frames[0][0], number) for time, number in frames]


def instants(found: Video) -> list[float]:
    """When each frame of a clip is shown, in seconds from its beginning."""
    return [number * found.duration / len(found.frames) for number in range(len(found.frames))]


def beeping(seconds: float, rate: int = RATE, first: float = 0.25) -> np.ndarray:
    """(1, n) float32: a beep of a tenth of a second every second, the first after a quarter."""
    times = np.arange(round(seconds * rate)) / rate
    sounding = (times % 1 >= first) & (times % 1 < first + 0.1)
    return (0.5 * np.sin(2 * np.pi * 880 * times) * sounding).astype(np.float32)[None]


def beeps(waveform: Tensor | None) -> list[float]:
    """When they set in, in seconds."""
    assert waveform is not None
    loud = (waveform.abs() > 0.1).nonzero().flatten() / 16_000
    return [float(time) for n, time in enumerate(loud) if n == 0 or time - loud[n - 1] > 0.2]


def recording(
    start: float,
    first: int,
    count: int = 40,
    fps: int = 10,
    *,
    container: str = "mpegts",
    codecs: tuple[str, str] = ("libx264", "aac"),
    pictures: bool = True,
    sound: bool = True,
    late: float = 0.0,
) -> bytes:
    """A recording whose time stamps begin at `start` seconds: frames from number `first` on, and beeps, `late`."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        found = []
        if pictures:
            stream = file.add_stream(codecs[0], rate=fps)
            stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", 12
            stream.bit_rate = 2_000_000
            stream.codec_context.options = {"bf": "2", "preset": "ultrafast"}
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(numbered_frame(first + number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                found += stream.encode(frame)
            found += stream.encode()
        if sound:
            track = file.add_stream(codecs[1], rate=RATE, layout="mono")
            resampler = av.AudioResampler(format=track.format.name, layout="mono", rate=RATE)
            wave = beeping(count / fps)
            for begin in range(0, wave.shape[1], 1024):
                part = np.ascontiguousarray(wave[:, begin : begin + 1024])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = RATE, begin + round(late * RATE), Fraction(1, RATE)
                found += [packet for part in resampler.resample(frame) for packet in track.encode(part)]
            found += track.encode()
        file.start_encoding()
        for packet in found:
            ticks = round(start / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        file.mux(sorted(found, key=lambda packet: packet.dts * packet.time_base))
    return buffer.getvalue()


def write_hidden(path: Path, count: int = 120, fps: int = 30, gop: int = 15) -> Path:
    """VP8 with a frame that is never shown behind every keyframe: its copy, with show_frame (RFC 6386, 9.1) off."""
    with av.open(str(path), "w") as file:
        options = {"auto-alt-ref": "0", "lag-in-frames": "0", "deadline": "realtime", "cpu-used": "8"}
        stream = file.add_stream("libvpx", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", gop
        stream.bit_rate = 400_000
        for number in [*range(count), None]:
            frame = None
            if number is not None:
                frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
            for packet in stream.encode(frame):
                data, time, unit = bytearray(bytes(packet)), packet.pts, packet.time_base
                hidden = packet.is_keyframe
                file.mux(packet)
                if hidden:
                    data[0] &= ~0x10
                    copy = av.Packet(bytes(data))
                    copy.stream, copy.pts, copy.dts, copy.time_base = stream, time + 1, time + 1, unit
                    file.mux(copy)
    return path


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["a.webm", "a.mkv"])
def test_frames_that_are_never_shown_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, known: bool
) -> None:
    """Protects: the clip keeps its length, and frames their times, whether packets tell (known) or decoding does."""
    path = write_hidden(tmp_path / name)
    with av.open(str(path)) as file:
        assert sum(packet.size > 0 for packet in file.demux(video=0)) == 128
    if not known:
        monkeypatch.setattr(video, "_is_shown", lambda *_: True)
    assert [number for _, number in straight(path)] == list(range(120))
    found = read_video(path)
    assert [number_of(frame) for frame in found.frames] == sample_indices(120, 30.0)
    assert (found.duration, found.fps) == (4.0, 2.0)
    assert numbers(path, start=1.0, end=3.0) == [30, 45, 60, 75]


def test_hidden_frames_within_packets_of_vp9(tmp_path: Path) -> None:
    """Protects: a superframe is one frame on the screen, whatever else is in it."""
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as file:
        options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "8"}
        stream = file.add_stream("libvpx-vp9", rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 200_000
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert numbers(path) == sample_indices(60, 30.0)
    with av.open(str(path)) as file:
        shown = [video._is_shown("vp9", packet) for packet in file.demux(video=0) if packet.size]
    assert shown == [True] * 60


def test_frames_left_out_of_an_avi_keep_their_time(tmp_path: Path) -> None:
    """Protects: a frame that an AVI has no bytes for leaves the one before it on the screen."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 2_000_000
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            if not 20 <= number < 40:
                file.mux(stream.encode(frame))
        file.mux(stream.encode())
    found = read_video(path)
    assert found.duration == pytest.approx(6.0, abs=0.3)
    for instant, frame in zip(instants(found), found.frames, strict=True):
        number = int(10 * instant + 1e-3)
        assert number_of(frame) == (19 if 20 <= number < 40 else number)


@pytest.mark.parametrize("doubled", [[19], [5, 6, 30]])
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_equal_stamps_cost_no_other_its_time(tmp_path: Path, name: str, doubled: list[int]) -> None:
    """Protects: in a clip of varying rate every other stamp still holds; of equal ones the last is on the screen."""
    times = [number / 30 for number in range(60)] + [2.0 + number for number in range(12)]
    for number in doubled:
        times[number + 1] = times[number]
    path = tmp_path / name
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.options = {"bf": "0", "preset": "ultrafast"}
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        packets = []
        for number in range(len(times)):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode()
        seen: list[float] = []
        for packet, time in zip(packets, times, strict=True):
            packet.pts = packet.dts = round(time * 1000)
            packet.time_base, packet.duration = Fraction(1, 1000), 33
            if name == "a.mp4":  # there two may be shown, but not decoded, at once
                packet.dts += len(seen) - len(times)
                seen.append(time)
            file.mux(packet)
    found = read_video(path, fps=1.0)
    assert found.duration == pytest.approx(13, abs=1.0)
    for instant, frame in zip(instants(found), found.frames, strict=True):
        shown = [number for number, time in enumerate(times) if time <= instant + 0.002]
        assert abs(number_of(frame) - shown[-1]) <= 1
    begin = times[doubled[0]] + 0.001
    last = [number for number, time in enumerate(times) if time < begin][-1]
    assert last > doubled[0] and numbers(path, start=begin, end=begin + 0.02, nframes=2)[0] == last


MATRICES = [(a, b, c, d) for a, b, c, d in [(1, 0, 0, 1), (0, 1, 1, 0)]]
EIGHT = [
    (across * a, down * b, across * c, down * d) for a, b, c, d in MATRICES for across in (1, -1) for down in (1, -1)
]


@pytest.mark.parametrize("matrix", EIGHT)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_every_display_matrix_is_obeyed(tmp_path: Path, matrix: tuple[int, ...], name: str) -> None:
    """Protects: turns and mirrorings, as a telephone's selfie camera writes them, come out as ffmpeg's autorotate has
    them: by the definition of ISO/IEC 14496-12, a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, c, d = matrix
    path = write_clip(tmp_path / name, 4, 10, draw=lambda _: corners())
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    data[place : place + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    stored = torch.from_numpy(next(iter(decode_all(path)))).permute(2, 0, 1)
    found = read_video(path).frames[0]
    height, width = stored.shape[1:]
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    right, down = a * xs + c * ys, b * xs + d * ys
    expected = torch.empty(3, *((height, width) if a else (width, height)), dtype=torch.uint8)
    expected[:, down - down.min(), right - right.min()] = stored
    assert torch.equal(found, expected)


def corners() -> np.ndarray:
    """A picture whose quarters are red, green, blue and white."""
    quarters = np.array([[[250, 5, 5], [5, 250, 5]], [[5, 5, 250], [250, 250, 250]]], np.uint8)
    return quarters.repeat(SIZE[0] // 2, 0).repeat(SIZE[1] // 2, 1)


def test_a_matrix_of_another_angle_is_the_nearest_turn() -> None:
    """Protects: a level that was held a little askew, and a matrix of zeros, turn nothing; neither does none."""
    picture = Image.fromarray(corners())
    for matrix in ((60_000, 20_000, 0, -20_000, 60_000, 0, 0, 0, 1), (0,) * 9, None):
        assert turned(picture, matrix).tobytes() == picture.tobytes()


@pytest.mark.parametrize("leap", [0, 1, 3, 10, 1000, 50_000, -1.5, -4, -4.5, -9, -1000])
def test_joined_transport_streams_follow_each_other(tmp_path: Path, leap: float) -> None:
    """Protects: two recordings, whatever their stamps, are seen and heard one after the other, in step. -4: both begin
    alike, as where two files are appended."""
    path = tmp_path / "a.ts"
    path.write_bytes(recording(2000, 0) + recording(2004 + leap, 40))
    found, sound = read_video(path), read_audio(path)
    assert [number_of(frame) for frame in found.frames] == list(range(0, 80, 5))
    assert found.duration == pytest.approx(8, abs=0.05) and sound is not None
    assert len(sound) / 16_000 == pytest.approx(8, abs=0.1)
    assert beeps(sound) == pytest.approx([0.25 + number for number in range(8)], abs=0.05)


def test_a_stretch_across_the_join(tmp_path: Path) -> None:
    """Protects: frames and sound of a stretch are those around the leap."""
    path = tmp_path / "a.ts"
    path.write_bytes(recording(10, 0) + recording(900, 40))
    assert numbers(path, start=3.0, end=6.0) == list(range(30, 60, 5))
    assert beeps(read_audio(path, start=3.0, end=6.0)) == pytest.approx([0.25, 1.25, 2.25], abs=0.05)


def test_three_recordings_one_without_sound_one_late(tmp_path: Path) -> None:
    """Protects: what a recording lacks shifts nothing in the others; drift does not add up."""
    path = tmp_path / "a.ts"
    path.write_bytes(recording(10, 0) + recording(10, 40, sound=False) + recording(10, 80))
    assert numbers(path) == list(range(0, 120, 5))
    assert beeps(read_audio(path)) == pytest.approx([0.25 + n for n in (0, 1, 2, 3, 8, 9, 10, 11)], abs=0.06)
    path.write_bytes(b"".join(recording(10, 0, count=10) for _ in range(12)))
    found = read_video(path)
    assert found.duration == pytest.approx(12, abs=0.3)
    assert beeps(read_audio(path)) == pytest.approx([0.25 + number for number in range(12)], abs=0.15)
    path.write_bytes(recording(10, 0, late=0.4) + recording(500, 40, late=0.4))
    starts = beeps(read_audio(path))
    assert starts[:4] == pytest.approx([0.65, 1.65, 2.65, 3.65], abs=0.05)
    assert np.diff(starts[4:]) == pytest.approx([1, 1, 1], abs=0.01)


@pytest.mark.parametrize("leap", [2, 300, -4, -300])
def test_joined_recordings_of_one_kind(tmp_path: Path, leap: float) -> None:
    """Protects: without sound, or without pictures, the leap is closed as well."""
    path = tmp_path / "a.ts"
    path.write_bytes(recording(500, 0, sound=False) + recording(504 + leap, 40, sound=False))
    assert numbers(path) == list(range(0, 80, 5))
    path.write_bytes(recording(500, 0, pictures=False) + recording(504 + leap, 40, pictures=False))
    assert beeps(read_audio(path)) == pytest.approx([0.25 + number for number in range(8)], abs=0.08)


def test_a_pause_of_the_pictures_is_no_leap(tmp_path: Path) -> None:
    """Protects: while the sound goes on, a picture that stands still for four seconds stays as long on the screen."""
    times = [number / 10 for number in range(20)] + [6 + number / 10 for number in range(20)]
    sound = beeping(8.0)
    path = write_clip(tmp_path / "a.ts", 40, 10, times=times, sound=sound, rate=RATE, container="mpegts")
    found = read_video(path)
    assert found.duration == pytest.approx(8, abs=0.2)
    for instant, frame in zip(instants(found), found.frames, strict=True):
        assert abs(number_of(frame) - [n for n, time in enumerate(times) if time <= instant + 1e-3][-1]) <= 1
    assert beeps(read_audio(path)) == pytest.approx([0.25 + number for number in range(8)], abs=0.05)


@pytest.mark.parametrize(("container", "sound"), [("mpeg", "mp2"), ("vob", "ac3"), ("mpeg", None)])
@pytest.mark.parametrize("fps", [25, 30])
def test_program_streams_are_read_straight(tmp_path: Path, container: str, sound: str | None, fps: int) -> None:
    """Protects: several pictures to a packet, whose stamps would change after a seek: frames as of a straight read."""
    path = tmp_path / f"a.{container}"
    data = recording(0, 0, 100, fps, container=container, codecs=("mpeg2video", sound or "mp2"), sound=bool(sound))
    path.write_bytes(data)
    every = straight(path)
    found = read_video(path)
    assert len(every) >= 98
    for instant, frame in zip(instants(found), found.frames, strict=True):
        assert abs(number_of(frame) - [number for time, number in every if time <= instant + 1e-3][-1]) <= 1
    if sound:
        assert beeps(read_audio(path)) == pytest.approx([0.25 + n for n in range(4)], abs=0.05)


def test_joined_program_streams(tmp_path: Path) -> None:
    """Protects: the same where stamps begin anew, as between the cells of a DVD."""
    kind = {"container": "vob", "codecs": ("mpeg2video", "ac3")}
    path = tmp_path / "a.vob"
    for leap in (-4, 300, 3):
        path.write_bytes(recording(10, 0, 100, 25, **kind) + recording(14 + leap, 100, 100, 25, **kind))
        found = read_video(path)
        assert found.duration == pytest.approx(8, abs=0.2)
        for instant, frame in zip(instants(found), found.frames, strict=True):
            assert abs(number_of(frame) - 25 * instant) <= 4
        assert beeps(read_audio(path)) == pytest.approx([0.25 + number for number in range(8)], abs=0.15)


def test_a_stream_that_begins_in_the_middle(tmp_path: Path) -> None:
    """Protects: what cannot be decoded at the beginning is no part of the clip, and the sound keeps step with what is
    seen first."""
    data = recording(100, 0, 60)
    path = tmp_path / "a.ts"
    path.write_bytes(data[188 * (len(data) // 188 // 4) :])
    every = straight(path)
    first = every[0][1]
    assert 0 < first < 40
    found = read_video(path)
    assert [number_of(frame) for frame in found.frames] == [every[n][1] for n in sample_indices(len(every), 10.0)]
    expected = [0.25 + second - first / 10 for second in range(6) if 0.25 + second > first / 10]
    assert beeps(read_audio(path)) == pytest.approx(expected, abs=0.06)


def write_tracks(path: Path, dispositions: list[Disposition], layouts: list[str] | None = None) -> Path:
    """A clip with a sound track for each disposition; the beeps of track n set in at 0.2 (n + 1) s."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        tracks = []
        for disposition, layout in zip(dispositions, layouts or ["mono"] * len(dispositions), strict=True):
            track = file.add_stream("aac", rate=RATE, layout=layout)
            track.disposition = disposition
            tracks.append(track)
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        for number, track in enumerate(tracks):
            wave = beeping(3.0, first=0.2 * (number + 1))
            for begin in range(0, wave.shape[1], 1024):
                part = np.ascontiguousarray(wave[:, begin : begin + 1024]).repeat(track.layout.nb_channels, 0)
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=track.layout.name)
                frame.sample_rate, frame.pts, frame.time_base = RATE, begin, Fraction(1, RATE)
                file.mux(track.encode(frame))
            file.mux(track.encode())
    return path


@pytest.mark.parametrize(
    ("name", "dispositions", "heard"),
    [
        ("a.mkv", [Disposition(0), Disposition.default], 1),
        ("a.mp4", [Disposition(0), Disposition.default, Disposition(0)], 1),
        ("a.mkv", [Disposition.visual_impaired, Disposition(0)], 1),
        ("a.mkv", [Disposition.visual_impaired | Disposition.default, Disposition.default], 1),
        ("a.mkv", [Disposition.default, Disposition(0)], 0),
    ],
)
def test_the_default_track_is_heard(tmp_path: Path, name: str, dispositions: list[Disposition], heard: int) -> None:
    """Protects: not the first, which may be an audio description; audio_track chooses another."""
    path = write_tracks(tmp_path / name, dispositions)
    assert beeps(read_audio(path))[0] == pytest.approx(0.2 * (heard + 1), abs=0.04)
    for number in range(len(dispositions)):
        assert beeps(read_audio(path, track=number))[0] == pytest.approx(0.2 * (number + 1), abs=0.04)
    with pytest.raises(MediaError, match=rf"audio_track is {len(dispositions)}, but .* has {len(dispositions)} sound"):
        read_audio(path, track=len(dispositions))


@pytest.mark.parametrize(
    ("data_size", "riff_size"), [(2**32 - 1, 2**32 - 1), (0, 0), (2**31 - 1, 2**31 + 35), (2**31 - 2**12, 0)]
)
@pytest.mark.parametrize("samples", [1, 4095, 36_800, 110_400])
def test_sound_from_a_pipe_is_whole(tmp_path: Path, data_size: int, riff_size: int, samples: int) -> None:
    """Protects: a WAV whose writer did not know its length, as ffmpeg, SoX and GStreamer leave it, to the sample."""
    wave = (beeping(samples / RATE)[0, :samples] * 32_767).astype("<i2")
    head = (
        b"RIFF" + struct.pack("<I", riff_size) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    )
    path = tmp_path / "a.wav"
    path.write_bytes(head + b"data" + struct.pack("<I", data_size) + wave.tobytes())
    sound = read_audio(path, sample_rate=RATE)
    assert sound is not None
    np.testing.assert_array_equal(sound.numpy(), wave.astype(np.float32) / 32_768)


def test_a_wav_that_is_cut_off_is_read_to_its_end(tmp_path: Path) -> None:
    """Protects: what is there, to the last whole sample."""
    path = write_sound(tmp_path / "a.wav", beeping(2.0), RATE, "pcm_s16le")
    path.write_bytes(path.read_bytes()[:100_001])
    sound = read_audio(path, sample_rate=RATE)
    assert sound is not None and len(sound) == (100_001 - path.read_bytes().index(b"data") - 8) // 2


@pytest.mark.parametrize(("name", "codec"), [("a.ts", "mp2"), ("a.au", "pcm_s16be"), ("a.w64", "pcm_s16le")])
def test_the_last_packet_counts(tmp_path: Path, name: str, codec: str) -> None:
    """Protects: a last packet that the demuxer calls corrupt is heard where it can be decoded."""
    path = write_sound(tmp_path / name, tone(440, 1.234, RATE)[None], RATE, codec)
    with av.open(str(path)) as file:
        expected = sum(frame.samples for frame in file.decode(audio=0))
    sound = read_audio(path, sample_rate=RATE)
    assert sound is not None and len(sound) == expected


def test_frames_over_white_where_they_are_transparent(tmp_path: Path) -> None:
    """Protects: a clip with an alpha channel is laid over white, as pictures are."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("qtrle", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "argb"
        picture = np.zeros((*SIZE, 4), np.uint8)
        picture[:32] = (0, 200, 0, 255)
        for number in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    frame = read_video(path).frames[0]
    assert frame[:, 8, 8].tolist() == [0, 200, 0] and frame[:, 60, 8].tolist() == [255, 255, 255]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi"])
def test_a_stretch_is_as_if_it_were_the_clip(tmp_path: Path, name: str) -> None:
    """Protects: frames and sound between start and end, times from 0, sought or read through."""
    sound = beeping(10.0)
    path = write_clip(tmp_path / name, 100, 10, gop=20, sound=sound, rate=RATE, bframes=0 if name == "a.avi" else 2)
    found = read_video(path, start=2.5, end=6.5)
    rounding = 1 if name == "a.avi" else 0  # its times are whole frames, sound or not
    assert [number_of(frame) for frame in found.frames] == pytest.approx(list(range(25, 65, 5)), abs=rounding)
    assert (found.duration, found.fps) == (pytest.approx(4.0), 2.0)
    heard = read_audio(path, start=2.5, end=6.5)
    assert heard is not None and len(heard) == 64_000
    assert beeps(heard) == pytest.approx([0.75, 1.75, 2.75, 3.75], abs=0.05)
    for options, expected in (
        ({"start": 8.0}, [80, 85, 90, 95]),
        ({"start": 9.0, "end": 60.0}, [90, 92, 95, 97]),
        ({"nframes": 10}, list(range(0, 100, 10))),
        ({"nframes": 5, "start": 5.0}, [50, 62, 75, 87]),
    ):
        assert numbers(path, **options) == pytest.approx(expected, abs=rounding)
    for read, word in ((read_video, "video"), (read_audio, "audio")):
        with pytest.raises(MediaError, match=rf"{word}_start is 60 s, but .* ends at (9\.9|10\.\d)\d s"):
            read(path, start=60.0)
        with pytest.raises(MediaError, match=rf"{word}_end is 2\.0; it must come after {word}_start, 3 s"):
            read(path, start=3.0, end=2.0)


OPEN = "open-gop=1:keyint=20:min-keyint=20:b-adapt=0:scenecut=0"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=3:b-adapt=0:scenecut=0"}),
        (
            "libx265",
            {"x265-params": "open-gop=1:keyint=20:min-keyint=20:bframes=4:b-adapt=0:scenecut=0:log-level=none"},
        ),
    ],
)
def test_a_file_that_begins_in_an_open_group_of_pictures(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    """Protects: pictures that are made from some that were cut away are no part of the clip, nor is its sound late."""
    with av.open(str(tmp_path / f"whole-{name}"), "w") as file:
        stream = file.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.bit_rate = 2_000_000
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    path, keys, stamps = tmp_path / name, 0, []
    with av.open(str(tmp_path / f"whole-{name}")) as whole, av.open(str(path), "w") as file:
        stream = file.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            keys += packet.size > 0 and packet.is_keyframe
            if packet.size and keys >= 2:
                stamps.append(packet.pts * packet.time_base)
                packet.stream = stream
                file.mux(packet)
    assert min(stamps) < stamps[0], "no picture of it is shown before the keyframe"
    every = straight(path)
    assert len(every) < len(stamps)
    found = read_video(path)
    assert [number_of(frame) for frame in found.frames] == [every[n][1] for n in sample_indices(len(every), 10.0)]
    assert found.duration == pytest.approx(len(every) / 10, abs=0.002)


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video", "h263", "libx264", "libx265"])
def test_a_file_that_does_not_say_which_are_keyframes(tmp_path: Path, codec: str) -> None:
    """Protects: libavformat takes all for keyframes then, and some decoders give a frame, of grey and what moved, for a
    picture that lacks what it is made from."""

    def draw(number: int) -> np.ndarray:
        return np.ascontiguousarray(np.roll(numbered_frame(5, (96, 128)), number, axis=1))

    path = tmp_path / ("a.3gp" if codec == "h263" else "a.mp4")
    path = write_clip(path, 40, codec=codec, gop=12 if codec == "mpeg2video" else 250, bframes=0, draw=draw)
    every = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    data = path.read_bytes()
    assert data.count(b"stss") == 1
    path.write_bytes(data.replace(b"stss", b"free"))
    found = read_video(path)
    assert torch.equal(found.frames, torch.stack([every[n] for n in sample_indices(len(every), 10.0)]))


@pytest.mark.parametrize("late", [0.5, -0.5])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
def test_sound_that_begins_before_the_pictures_is_not_cut_off(tmp_path: Path, name: str, late: float) -> None:
    """Protects: what comes before the first frame is not heard, but there."""
    times = [max(late, 0) + number / 10 for number in range(40)]
    path = write_clip(
        tmp_path / name, 40, times=times, sound=beeping(4.0), rate=RATE, sound_start=max(-late, 0), bframes=0
    )
    expected = [0.25 - late + second for second in range(4)]
    assert beeps(read_audio(path)) == pytest.approx([time for time in expected if time > 0], abs=0.06)
    read_video(path)


def test_subtitles_may_last_longer(tmp_path: Path) -> None:
    """Protects: Matroska states one length for all it holds. A file that is cut off is still told."""
    (tmp_path / "a.srt").write_text(
        "1\n00:00:01,000 --> 00:00:02,000\nHello\n\n2\n00:00:03,500 --> 00:00:10,000\nBye\n"
    )
    whole, path = write_clip(tmp_path / "whole.mkv", 40, gop=10), tmp_path / "a.mkv"
    with (
        av.open(str(whole)) as clip,
        av.open(str(tmp_path / "a.srt")) as text,
        av.open(str(path), "w") as file,
    ):
        streams = [file.add_stream_from_template(each.streams[0]) for each in (clip, text)]
        for source, stream in zip((clip, text), streams, strict=True):
            for packet in source.demux():
                if packet.size:
                    packet.stream = stream
                    file.mux(packet)
    assert read_video(path).duration == pytest.approx(4.0, abs=0.002)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"it promises a clip of 4.0 s and has [12]"):
        read_video(path)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.flv", "a.mkv"])
@pytest.mark.parametrize("start", [0, 60])
def test_a_file_that_is_cut_off_is_told_wherever_it_begins(tmp_path: Path, name: str, start: float) -> None:
    times = [start + number / 10 for number in range(40)]
    path = write_clip(tmp_path / name, 40, times=times, gop=10, faststart=name in ("a.mp4", "a.mov"))
    assert len(read_video(path).frames) == 8
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.warns(UserWarning, match="it promises a clip of "):
        read_video(path)


def test_the_end_of_a_broadcast_in_ogg_is_whole(tmp_path: Path) -> None:
    """Protects: its stamps begin anywhere, and its length is measured by the last."""
    path = write_sound(tmp_path / "a.opus", beeping(30.0), RATE, "libopus")
    pages = [b"OggS" + page for page in path.read_bytes().split(b"OggS")[1:]]
    path.write_bytes(b"".join(pages[:2] + pages[-6:]))
    sound = read_audio(path)
    assert sound is not None and 3 < len(sound) / 16_000 < 29


def test_lengths_that_are_guessed_are_no_promises(tmp_path: Path) -> None:
    """AMR that begins with silence: libavformat multiplies the file's size by the rate of what is silent."""
    path = tmp_path / "a.amr"
    path.write_bytes(b"#!AMR\n" + (b"\x44" + bytes(5)) * 100 + (b"\x3c" + bytes(31)) * 400)
    sound = read_audio(path)
    assert sound is not None and len(sound) / 16_000 == pytest.approx(10, abs=2.1)


def test_pictures_without_a_decoder_are_passed_over(tmp_path: Path) -> None:
    """As sound is: of two tracks the one that can be seen."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        tracks = [file.add_stream("libx264", rate=10) for _ in range(2)]
        for track in tracks:
            track.height, track.width, track.pix_fmt = *SIZE, "yuv420p"
        for first, track in zip((0, 100), tracks, strict=True):
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(numbered_frame(first + number), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 10)
                file.mux(track.encode(frame))
            file.mux(track.encode())
    assert min(numbers(path)) < 20
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/XYZ", 1))
    assert min(numbers(path)) >= 100


@pytest.mark.parametrize("matrix", [8, 10, 14])
def test_colours_that_cannot_be_converted_are_refused_by_name(tmp_path: Path, matrix: int) -> None:
    """YCgCo, BT.2020 of constant luminance, ICtCp: libswscale has none of them, and says nothing of colours."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        stream.codec_context.colorspace = matrix
        for number in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        file.mux(stream.encode())
    with pytest.raises(MediaError, match=rf"colours are coded by matrix {matrix} of ITU-T H.273.* Convert the clip"):
        read_video(path)


def test_a_reserved_matrix_says_nothing() -> None:
    """VP9 has a number for a matrix that is none."""
    frame = av.VideoFrame.from_ndarray(numbered_frame(77), format="rgb24").reformat(format="yuv420p")
    pictures = []
    for matrix in (2, 3):
        frame.colorspace = matrix
        pictures.append(upright(frame).tobytes())
    assert pictures[0] == pictures[1]
