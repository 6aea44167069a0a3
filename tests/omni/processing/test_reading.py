"""What reading leaves out, and what it does at the same time, shows in nothing but its speed."""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import SIZE, decode_all, number_of, tone, write_clip
from PIL import Image
from torch import Tensor

from omni.processing.frames import MediaError, sample_indices
from omni.processing.media import decoding, read_audio, read_video, video
from omni.processing.media.decoding import Decoder, DisagreementError
from omni.processing.media.files import open_container, packets
from omni.processing.media.references import unreferenced

FRAMES, RATE, HEIGHT, WIDTH = 61, 30, 96, 160
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "mp4", {"bf": "3", "x264-params": "b-adapt=0"}),
    "h264 in matroska": ("libx264", "mkv", {"bf": "3", "g": "20", "x264-params": "b-adapt=0:open-gop=1"}),
    "h264 without pyramid": ("libx264", "mov", {"bf": "2", "x264-params": "b-adapt=0:b-pyramid=none:ref=4"}),
    "h264 without b": ("libx264", "mp4", {"bf": "0", "g": "15"}),
    "h264 interlaced": ("libx264", "mp4", {"bf": "3", "x264-params": "b-adapt=0:interlaced=1"}),
    "hevc": ("libx265", "mp4", {"x265-params": "bframes=4:b-adapt=0:b-pyramid=1:log-level=none"}),
    "hevc in layers": ("libx265", "mkv", {"x265-params": "bframes=4:b-adapt=0:temporal-layers=1:log-level=none"}),
    "hevc, open": ("libx265", "mp4", {"x265-params": "bframes=4:b-adapt=0:keyint=20:open-gop=1:log-level=none"}),
    "av1": ("libsvtav1", "mp4", {"preset": "10", "svtav1-params": "lp=1"}),
    "av1 in matroska": ("libsvtav1", "mkv", {"preset": "12", "g": "20", "svtav1-params": "lp=1:hierarchical-levels=3"}),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "mpeg4": ("mpeg4", "mp4", {"bf": "2"}),
}
LEAVE_OUT = ("h264", "h264 in matroska", "h264 without pyramid", "hevc", "hevc, open", "av1", "av1 in matroska")


@pytest.fixture(scope="module")
def moving() -> list[np.ndarray]:
    """Frames of a texture that moves and turns brighter: each differs from what it would be made from."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 200, (2 * HEIGHT // 8, 3 * WIDTH // 8, 3), np.uint8)
    large = np.asarray(Image.fromarray(texture).resize((3 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC))
    return [
        np.ascontiguousarray(large[n : n + HEIGHT, 3 * n : 3 * n + WIDTH]) + np.uint8(n % 7 * 5) for n in range(FRAMES)
    ]


def encode(path: Path, frames: list[np.ndarray], codec: str, options: dict[str, str]) -> Path:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"PyAV is built without {codec}")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        if "bf" in options:
            stream.max_b_frames = int(options["bf"])
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = number
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    return path


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The packets that decoders get."""
    packets: list[Any] = []
    feed = Decoder.feed

    def counted(self: Decoder, packet: Any) -> list[Any]:
        packets.extend([] if packet is None else [packet.pts])
        return feed(self, packet)

    monkeypatch.setattr(Decoder, "feed", counted)
    return packets


@pytest.mark.parametrize("name", CODECS)
def test_frames_that_nothing_is_made_from_are_left_out(
    name: str, tmp_path: Path, moving: list[np.ndarray], fed: list[Any]
) -> None:
    """Protects: what is not decoded changes no pixel of what is, in every coding; and that something is not."""
    codec, container, options = CODECS[name]
    path = encode(tmp_path / f"a.{container}", moving, codec, options)
    every = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    assert len(every) == FRAMES
    for fps in (3, 10):
        fed.clear()
        found = read_video(path, fps=fps)
        wanted = sample_indices(FRAMES, RATE, fps=fps)
        assert len(found.frames) == len(wanted)
        for frame, index in zip(found.frames, wanted, strict=True):
            assert torch.equal(frame, every[index])
        assert len(fed) == len(set(fed)) or name == "h264 interlaced"
        if name in LEAVE_OUT:
            assert len(wanted) < len(fed) <= {3: 0.85, 10: 0.95}[fps] * FRAMES


def test_what_stands_in_for_lost_frames_is_what_came_before(
    tmp_path: Path, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: in a damaged clip nothing is left out: the frame before a lost one may be any."""
    path = encode(tmp_path / "a.mp4", moving, "libx264", {"bf": "3", "g": "12"})
    blank(path, range(20, 40, 5))
    with pytest.warns(UserWarning, match="could not be decoded"):
        found = read_video(path, fps=10)
    monkeypatch.setattr("omni.processing.media.decoding.unreferenced", lambda *_: lambda _: False)
    with pytest.warns(UserWarning, match="could not be decoded"):
        assert torch.equal(found.frames, read_video(path, fps=10).frames)


@pytest.mark.parametrize("container", ["mp4", "mkv", "flv"])
@pytest.mark.parametrize("cores", [1, 2, 8])
def test_damage_near_the_end_costs_what_it_hits(
    container: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: what comes after a damaged packet, of the pictures that are decoded at a time: PyAV drops them at the
    end of a file, and with them went the warning."""
    monkeypatch.setattr(decoding, "CORES", cores)
    clip = write_clip(tmp_path / "a.mp4", 40, 10, gop=1, bframes=0)
    path = tmp_path / f"b.{container}"
    with av.open(str(clip)) as file, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for number, packet in enumerate(packet for packet in file.demux(video=0) if packet.size):
            torn = av.Packet(bytes(packet)[: 5 if number == 36 else None])
            torn.pts, torn.dts, torn.time_base = packet.pts, packet.dts, packet.time_base
            torn.duration, torn.is_keyframe, torn.stream = packet.duration, True, stream
            out.mux(torn)
    with pytest.warns(UserWarning, match="1 of 40 frames could not be decoded"):
        found = read_video(path, fps=10)
    assert [number_of(frame) for frame in found.frames] == [*range(36), 35, 37, 38, 39]


def test_a_stream_that_appears_late_costs_no_other(tmp_path: Path) -> None:
    """Protects: PyAV 18 may raise an IndexError for a stream that was not there when the file was opened, as in FLV."""
    path = write_clip(tmp_path / "a.flv", 20, 10, sound=tone(440, 2, 44_100)[None])
    with av.open(str(path)) as container:
        every = [packet.dts for packet in packets(container, container.streams.video[0])]
    failing = iter([3, 7])

    class Late:
        def __init__(self, container: Any) -> None:
            self.container, self.format = container, container.format

        def demux(self, *streams: Any) -> Iterator[Any]:
            last = next(failing, 100)
            for number, packet in enumerate(self.container.demux(*streams)):
                yield packet
                if number == last:
                    raise IndexError

    with av.open(str(path)) as container:
        assert [packet.dts for packet in packets(Late(container), container.streams.video[0])] == every


@pytest.mark.parametrize("codec", ["h264", "hevc", "av1"])
def test_packets_that_are_damaged_are_decoded(codec: str) -> None:
    """Protects: no bytes, whatever they are, make the look at them fail or leave out what cannot be read."""
    generator = np.random.default_rng(0)
    head = {"h264": b"\1dN\1\1\xff\xe1", "hevc": b"\1" + bytes(20) + b"\x0f\0", "av1": b"\x81\0\0\0\x0a\x0b"}[codec]
    look = unreferenced(codec, head + generator.bytes(20))
    for length in (0, 1, 2, 5, 40):
        for _ in range(200):
            assert look(memoryview(generator.bytes(length))) in (True, False)
    assert look(memoryview(b"")) is False
    assert unreferenced(codec, None)(memoryview(b"\0\0\0\2\1\1")) is False


def test_parameters_are_not_left_out() -> None:
    """Protects: what stands beside a picture that nobody refers to, and later ones need, is decoded."""

    def units(*heads: bytes) -> memoryview:
        return memoryview(b"".join((len(head) + 6).to_bytes(4, "big") + head + bytes(6) for head in heads))

    avc = unreferenced("h264", b"\1dN\1\xff\xe1" + bytes(20))
    assert avc(units(b"\x06", b"\x01")) and avc(units(b"\x09", b"\x01", b"\x01"))
    assert not any(
        map(avc, (units(b"\x01", b"\x21"), units(b"\x68", b"\x01"), units(b"\x67", b"\x01"), units(b"\x06")))
    )
    hevc = unreferenced("hevc", b"\1" + bytes(20) + b"\x0f\0")
    assert hevc(units(b"\x4e\1", b"\0\1")) and hevc(units(b"\x10\1"))
    assert not any(map(hevc, (units(b"\2\1"), units(b"\x44\1", b"\0\1"), units(b"\0\2"), units(b"\x26\1"))))


def test_scaled_by_pillow_to_the_bit(tmp_path: Path, moving: list[np.ndarray]) -> None:
    """Protects: beside decoding, and by a converter that is kept, pixels are those of the plain way."""
    path = encode(tmp_path / "a.mp4", moving, "libx264", {"bf": "3"})
    found = read_video(path, fps=10, size_for=lambda *_: (56, 84))
    every = list(decode_all(path))
    for frame, index in zip(found.frames, sample_indices(FRAMES, RATE, fps=10), strict=True):
        plain = Image.fromarray(every[index]).resize((84, 56), Image.Resampling.BICUBIC)
        assert torch.equal(frame, torch.from_numpy(np.array(plain)).permute(2, 0, 1))


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Scaling takes a while. Yields how many pictures were in hand, each time one more was."""
    monkeypatch.setattr(video, "THREADS", 2)
    lock, in_hand, seen = threading.Lock(), 0, list[int]()
    scale, submit = video._scale, video.ThreadPoolExecutor.submit

    def slow(*arguments: Any) -> None:
        nonlocal in_hand
        time.sleep(0.01)
        scale(*arguments)
        with lock:
            in_hand -= 1

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal in_hand
        with lock:
            in_hand += 1
            seen.append(in_hand)
        return submit(self, *arguments)

    monkeypatch.setattr(video, "_scale", slow)
    monkeypatch.setattr(video.ThreadPoolExecutor, "submit", counted)
    yield seen


@pytest.mark.parametrize(("room", "most"), [(2**28, 3), (1, 1)])
def test_few_pictures_are_in_hand(
    room: int, most: int, tmp_path: Path, slowly: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: where scaling is slower than decoding, decoding waits: memory does not grow with the clip."""
    monkeypatch.setattr(video, "IN_HAND", room)
    path = write_clip(tmp_path / "a.mp4", 40)
    done: list[tuple[int, int]] = []
    thread = threading.get_ident()

    def on_frames(frames: Tensor, count: int) -> None:
        assert threading.get_ident() == thread
        done.append((count, len(frames)))

    read_video(path, fps=10, size_for=lambda *_: (28, 28), on_frames=on_frames)
    assert max(slowly) == most
    assert done == [(number, 40) for number in range(1, 41)]


def test_what_fails_beside_decoding_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: an error in another thread reaches the caller, and leaves no thread behind."""
    path = write_clip(tmp_path / "a.mp4", 40)

    def fail(*_: Any) -> None:
        raise MediaError("too large")

    monkeypatch.setattr(video, "_scale", fail)
    before = threading.active_count()
    with pytest.raises(MediaError, match="too large"):
        read_video(path, fps=10)
    assert threading.active_count() == before


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv"])
def test_a_clip_is_opened_once_for_its_pictures_and_once_for_its_sound(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: the seconds that libavformat takes for the first picture of a 4K clip, each time it opens one; and that
    what was read to its end for the packets' sake is sought in afterwards."""
    path = write_clip(tmp_path / f"a.{container}", 40, 10, gop=10, sound=tone(440, 4, 44_100)[None], sound_start=0.5)
    opened: list[Any] = []
    opening = av.open

    def counted(*args: Any, **options: Any) -> Any:
        opened.append(args)
        return opening(*args, **options)

    monkeypatch.setattr(av, "open", counted)
    seen = read_video(path, fps=2.5)
    assert [number_of(frame) for frame in seen.frames] == sample_indices(40, 10, fps=2.5)
    assert len(opened) == 1
    heard = read_audio(path)
    assert heard is not None
    assert abs(int(heard.abs().gt(0.1).nonzero()[0]) / 16_000 - 0.5) < 0.1
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("codec", "container", "options", "anew"),
    [
        ("libx264", "mp4", {"bf": "0", "g": "10"}, True),
        ("libx264", "mkv", {"bf": "3", "g": "10", "x264-params": "b-adapt=0"}, True),
        ("libx264", "mp4", {"bf": "3", "g": "10", "x264-params": "b-adapt=0:open-gop=1"}, False),
        ("libx265", "mp4", {"x265-params": "bframes=4:b-adapt=0:keyint=10:open-gop=0:log-level=none"}, True),
        ("libx265", "mkv", {"x265-params": "bframes=4:b-adapt=0:keyint=10:open-gop=1:log-level=none"}, False),
        ("libx265", "mp4", {"x265-params": "bframes=4:b-adapt=0:keyint=10:open-gop=0:radl=2:log-level=none"}, True),
        ("mpeg4", "mp4", {"g": "10"}, False),
    ],
)
def test_a_decoder_is_not_emptied_where_nothing_refers_to_what_was_before(
    codec: str,
    container: str,
    options: dict[str, str],
    anew: bool,
    tmp_path: Path,
    moving: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Protects: that pictures from several keyframes, a second apart in clips of telephones, are decoded at the same
    time; and that those of one are none of another's."""
    path = encode(tmp_path / f"a.{container}", moving, codec, options)
    every = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    drains: list[Decoder] = []
    drain = Decoder.drain

    def counted(self: Decoder) -> list[Any]:
        drains.append(self)
        return drain(self)

    monkeypatch.setattr(Decoder, "drain", counted)
    for fps, follows in ((6, True), (2, False)):  # frames of each keyframe; with others between
        drains.clear()
        found = read_video(path, fps=fps)
        wanted = sample_indices(FRAMES, RATE, fps=fps)
        for frame, index in zip(found.frames, wanted, strict=True):
            assert torch.equal(frame, every[index])
        assert (len(drains) == 1) == (anew and follows)


def test_pictures_that_a_keyframe_forgets_are_shown_before(
    tmp_path: Path, moving: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a decoder that forgets pictures at a keyframe, as its stream says, is emptied before it."""
    options = {"x265-params": "bframes=3:b-adapt=0:keyint=10:min-keyint=10:open-gop=0:log-level=none"}
    path = encode(tmp_path / "a.mp4", moving, "libx265", options)
    every = [torch.from_numpy(frame).permute(2, 0, 1) for frame in decode_all(path)]
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        keys = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size and packet.is_keyframe]
    assert len(keys) > 5
    for place, size in keys:
        end = place + size
        while place < end:
            if data[place + 4] >> 1 in (19, 20):
                data[place + 6] |= 64  # no_output_of_prior_pics_flag
            place += 4 + int.from_bytes(data[place : place + 4], "big")
    path.write_bytes(data)
    assert len(list(decode_all(path))) < FRAMES
    opened: list[Any] = []
    opening = av.open
    monkeypatch.setattr(av, "open", lambda *given, **options: opened.append(given) or opening(*given, **options))
    found = read_video(path, fps=6)
    for frame, index in zip(found.frames, sample_indices(FRAMES, RATE, fps=6), strict=True):
        assert torch.equal(frame, every[index])
    assert len(opened) == 1


def test_the_sound_track_that_libavformat_takes_for_the_best(tmp_path: Path) -> None:
    """Protects: which one that is depends on how much of each is read when a file is opened."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        pictures = file.add_stream("libx264", rate=30, options={"bf": "0"})
        pictures.height, pictures.width = SIZE
        tracks = [file.add_stream("aac", rate=16_000, layout="mono") for _ in range(2)]
        tracks[1].bit_rate, tracks[0].bit_rate = 128_000, 32_000
        for _ in range(240):
            file.mux(pictures.encode(av.VideoFrame(SIZE[1], SIZE[0], "yuv420p")))
        file.mux(pictures.encode())
        for track, seconds, start in zip(tracks, (8, 4), (0, 1), strict=True):
            block = av.AudioFrame.from_ndarray(tone(440, seconds, 16_000)[None], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16_000, start * 16_000, Fraction(1, 16_000)
            file.mux([*track.encode(block), *track.encode()])
    data = bytearray(path.read_bytes())
    for found in re.finditer(b"tkhd", bytes(data)):
        data[found.end() + 3] = 3  # enabled, in the movie: none is the default before others
    path.write_bytes(data)
    with av.open(str(path)) as file:
        best = file.streams.best("audio")
        assert best is not None
        number = [stream.index for stream in file.streams.audio].index(best.index)
    heard, expected = read_audio(path), read_audio(path, track=number)
    assert heard is not None
    assert expected is not None
    assert torch.equal(heard, expected)


def test_damage_is_not_carried_to_the_next_keyframe(tmp_path: Path, moving: list[np.ndarray]) -> None:
    """Protects: a clip whose decoder was not emptied between keyframes is judged, and read, as one where it was."""
    path = encode(tmp_path / "a.mp4", moving, "libx264", {"bf": "0", "g": "10"})
    intact = read_video(path, fps=6).frames
    wanted = sample_indices(FRAMES, RATE, fps=6)
    lost = wanted[5]
    blank(path, [lost])
    with pytest.warns(UserWarning, match="1 of 12 frames could not be decoded"):
        found = read_video(path, fps=6).frames
    for index, frame, expected in zip(wanted, found, intact, strict=True):
        assert torch.equal(frame, expected) or lost <= index < (lost // 10 + 1) * 10


def test_frames_beside_damage_are_judged(tmp_path: Path, moving: list[np.ndarray]) -> None:
    """Protects: damage explains what is lost from its keyframe to the next, and no more."""
    path = encode(tmp_path / "a.mp4", moving, "libx264", {"bf": "0", "g": "10"})
    with av.open(str(path)) as file:
        places = [packet.pts for packet in packets(file, file.streams.video[0])]
    blank(path, [33])
    keys = list(range(0, FRAMES, 10))
    spans = [(first, first + 5) for first in keys[:-1]]
    shown = [number != 14 for number in range(FRAMES)]  # not true
    with open_container(path) as (container, _):
        frames = Decoder(container.streams.video[0]).sought(container, places, shown, keys, spans, set(places))
        with pytest.raises(DisagreementError):
            list(frames)


@pytest.mark.parametrize("file", ["a.mp4", "a.mov", "a.mkv", "fragments.mp4"])
def test_pictures_are_decoded_to_open_a_clip_where_its_header_does_not_say_all(
    file: str, tmp_path: Path, moving: list[np.ndarray]
) -> None:
    """Protects: the half second that libavformat takes for the first pictures of 4K, where their coding is known. It
    knows the format of pixels once it has decoded one."""
    path = encode(tmp_path / "b.mp4", moving, "libx264", {"bf": "3"})
    remux(path, tmp_path / file)
    with open_container(tmp_path / file, by_header=True) as (container, _):
        decoded = container.streams.video[0].codec_context.pix_fmt is not None
    assert decoded == (file not in ("a.mp4", "a.mov"))
    with open_container(tmp_path / file) as (container, _):
        assert container.streams.video[0].codec_context.pix_fmt is not None


@pytest.mark.parametrize("file", ["a.mp4", "fragments.mp4", "a.mkv"])
def test_a_stream_that_does_not_say_how_far_it_reorders_its_pictures(
    file: str, tmp_path: Path, moving: list[np.ndarray]
) -> None:
    """Protects: a decoder that does not know it gives pictures too early, and drops those that should have come before.
    Some telephones write such streams."""
    path = encode(tmp_path / "b.mp4", moving, "libx264", {"bf": "3", "x264-params": "b-adapt=0:b-pyramid=normal"})
    every = list(decode_all(path))
    path.write_bytes(without_reordering(path.read_bytes()))
    remux(path, tmp_path / file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_video(tmp_path / file, fps=RATE)
    wanted = sample_indices(FRAMES, RATE, fps=RATE)
    assert len(found.frames) == len(wanted) >= FRAMES - 1
    for frame, index in zip(found.frames, wanted, strict=True):
        assert torch.equal(frame, torch.from_numpy(every[index]).permute(2, 0, 1))


def test_frames_larger_than_the_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: the limit of pixels holds for what is decoded, where nothing was decoded to open the clip."""
    path = write_clip(tmp_path / "a.mp4", 8)
    for limited in ("streams", "upright"):
        monkeypatch.setattr(f"omni.processing.media.{limited}.MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    with pytest.raises(MediaError, match="frames of 96 x 64 pixels"):
        read_video(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"avc1", data.index(b"stsd")) + 28  # VisualSampleEntry's width and height, ISO/IEC 14496-12
    assert data[place : place + 4] == bytes((0, 96, 0, 64))
    data[place : place + 4] = bytes((0, 8, 0, 8))
    path.write_bytes(data)
    with pytest.raises(MediaError, match="a frame of 96 x 64 pixels is too large"):
        read_video(path)


def blank(path: Path, numbers: Iterable[int]) -> None:
    """Zeros for all but the beginning of these packets of a clip's pictures, counted in decoding order."""
    with av.open(str(path)) as file:
        found = [(packet.pos, packet.size) for packet in packets(file, file.streams.video[0])]
    data = bytearray(path.read_bytes())
    for place, size in (found[number] for number in numbers):
        data[place + 5 : place + size] = bytes(size - 5)
    path.write_bytes(data)


def remux(source: Path, target: Path) -> None:
    """Its pictures in another file, as they are; in an MP4 of fragments where it is called so."""
    options = {"movflags": "empty_moov+frag_every_frame"} if target.stem == "fragments" else {}
    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)


def without_reordering(data: bytes) -> bytes:
    """An MP4 file of libx264 whose sequence parameter set has no bitstream_restriction (ITU-T H.264, E.1.1)."""
    place = data.index(b"avcC") + 12
    length = int.from_bytes(data[place - 2 : place], "big")
    bits = "".join(f"{byte:08b}" for byte in data[place : place + length]).rstrip("0")
    # The flag, three times 1 and four numbers as Exp-Golomb codes: log2_max_mv_length twice, num_reorder_frames, 1 to
    # 4, and max_dec_frame_buffering; then the bit that ends it.
    shorter, count = re.subn(r"1111(0001\d{3}){2}(010|011|00100|00101)(0*)1[01]*?1$", "01", bits)
    assert count == 1
    return data[:place] + int(shorter.ljust(8 * length, "0"), 2).to_bytes(length, "big") + data[place + length :]
