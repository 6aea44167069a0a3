"""Pictures that move, HEIC and icons: what they are taken for, and what they show."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import number_of, numbered_frame
from PIL import Image, features
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omni.processing.media import MediaError, kind_of, read_audio, read_image, read_video
from omni.processing.media.upright import over_white

CORNERS = {(0, 0): (250, 0, 0), (0, 1): (0, 250, 0), (1, 0): (0, 0, 250), (1, 1): (250, 250, 250)}
FORMATS = [
    "gif",
    "png",
    "webp",
    pytest.param("avif", marks=pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")),
]


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A warning where a test does not ask for one is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def write_moving(path: Path, durations: list[int], size: tuple[int, int] = (64, 96)) -> Path:
    """Numbered pictures, each shown for so many milliseconds."""
    pictures = [Image.fromarray(numbered_frame(number, size)) for number in range(len(durations))]
    options = {"lossless": True} if path.suffix == ".webp" else {"quality": 90} if path.suffix == ".avif" else {}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_moving_pictures_are_clips(tmp_path: Path, kind: str) -> None:
    """Protects: whatever the format, frames at the rule's indices, of the clip's length; without sound."""
    path = write_moving(tmp_path / f"a.{kind}", [100] * 24)
    assert kind_of(path) == "video"
    found = read_video(path)
    assert [number_of(frame) for frame in found.frames] == [0, 6, 12, 18]
    assert (found.duration, found.fps, found.size) == (pytest.approx(2.4), 2.0, (64, 96))
    assert [number_of(frame) for frame in read_video(path, start=0.5, end=1.5, nframes=4).frames] == [5, 7, 10, 12]


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_every_frame_has_its_own_time(tmp_path: Path, kind: str) -> None:
    """Protects: a slow picture stays on the screen for as long as it says."""
    durations = [100, 100, 2000, 100, 700, 3000]
    path = write_moving(tmp_path / f"a.{kind}", durations)
    starts = np.cumsum([0, *durations[:-1]]) / 1000
    found = read_video(path, nframes=6)
    assert found.duration == pytest.approx(6.0)
    shown = [int((starts <= instant + 1e-6).sum()) - 1 for instant in np.arange(6) * 1.0]
    assert [number_of(frame) for frame in found.frames] == shown


def test_frames_of_no_duration(tmp_path: Path) -> None:
    """Protects: frames that claim to last no time at all last a tenth of a second, as in browsers."""
    found = read_video(write_moving(tmp_path / "a.gif", [0] * 20))
    assert found.duration == pytest.approx(2.0) and [number_of(frame) for frame in found.frames] == [0, 5, 10, 15]


@pytest.mark.parametrize("kind", FORMATS)
def test_as_an_image_the_first_frame_with_a_warning(tmp_path: Path, kind: str) -> None:
    path = write_moving(tmp_path / f"a.{kind}", [100] * 5)
    with pytest.warns(UserWarning, match=r"moves: as an image it is its first frame\. Give it as a video"):
        picture = read_image(path)
    assert number_of(picture) == 0 and picture.shape == (3, 64, 96)


@pytest.mark.parametrize("kind", FORMATS)
def test_still_pictures_stay_pictures(tmp_path: Path, kind: str) -> None:
    """Protects: one frame is no clip, and is told so."""
    path = tmp_path / f"a.{kind}"
    Image.fromarray(numbered_frame(0)).save(path)
    assert kind_of(path) == "image" and read_image(path).shape == (3, 64, 96)
    with pytest.raises(MediaError, match=r"is a single picture .*Give it as an image"):
        read_video(path)


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_transparency_is_white(tmp_path: Path, kind: str) -> None:
    """Protects: what is transparent in a moving picture shows white, as in a still one."""
    pictures = []
    for number in range(4):
        picture = np.zeros((64, 96, 4), np.uint8)
        picture[:32] = (200, 40 * number, 0, 255)
        pictures.append(Image.fromarray(picture))
    path = tmp_path / f"a.{kind}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=250, disposal=2, lossless=True)
    for frame in read_video(path, fps=4).frames:
        assert frame[0, 8, 8] > 180 and int(frame[:, 40:].min()) == 255


def test_half_transparent_as_pillow_lays_it_over_white() -> None:
    """Protects: every colour at every transparency to one step, where Pillow rounds another way."""
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    picture = Image.fromarray(np.stack([colour, colour, colour, alpha], -1).astype(np.uint8))
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))
    found = read_image(picture).permute(1, 2, 0).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_transparency_is_laid_over_white_in_strips() -> None:
    """Protects: nothing on the way takes more memory than the picture itself, and no border of two strips shows: the
    last of whose rows are fewer, or one row for each where the picture is wide."""
    sizes: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            several = found if isinstance(found, (list, tuple)) else [found]
            sizes.extend(each.nbytes for each in several if isinstance(each, Tensor))
            return found

    for height, width in ((701, 500), (3, 2**17)):
        picture = torch.randint(0, 256, (height, width, 4), generator=torch.Generator().manual_seed(0)).byte()
        with Noting():
            found = over_white(picture)
        assert max(sizes) <= picture.nbytes
        colour, alpha = picture[..., :3].int(), picture[..., 3:].int()
        assert torch.equal(found.int(), (colour * alpha + 255 * (255 - alpha) + 127) // 255)


def test_a_still_for_those_who_see_nothing_move_is_no_frame(tmp_path: Path) -> None:
    """Protects: the default image of a PNG that is not part of its animation."""
    pictures = [Image.fromarray(numbered_frame(number)) for number in (255, 1, 2, 3, 4)]
    path = tmp_path / "a.png"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=500, default_image=True)
    assert [number_of(frame) for frame in read_video(path).frames] == [1, 2, 3, 4]


def test_a_moving_picture_that_is_cut_off(tmp_path: Path) -> None:
    """Protects: what can be read is shown, and what is missing is said."""
    path = write_moving(tmp_path / "a.png", [100] * 20, (200, 300))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    with pytest.warns(UserWarning, match=r"\d+ of 20 frames can be read"):
        found = read_video(path)
    assert 0.5 < found.duration < 2.0


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_icon_is_a_picture(tmp_path: Path, kind: str) -> None:
    """Protects: no clip of its sizes; the largest, over white. A cursor is one, too."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:32] = (0, 0, 200, 255)
    path = tmp_path / "a.ico"
    Image.fromarray(picture).save(path, sizes=[(16, 16), (64, 64)], bitmap_format=kind)
    assert kind_of(path) == "image"
    found = read_image(path)
    assert found.shape == (3, 64, 64)
    assert found[:, 8, 8].tolist() == [0, 0, 200] and found[:, 60, 8].tolist() == [255, 255, 255]
    with pytest.raises(MediaError, match="Give it as an image"):
        read_video(path)
    if kind == "bmp":
        data = bytearray(path.read_bytes())
        data[2] = 2
        assert kind_of(bytes(data)) == "image" and read_image(bytes(data)).shape == (3, 64, 64)


def test_pages_are_told(tmp_path: Path) -> None:
    """Protects: of a scan of several pages the first is not taken in silence."""
    pages = [Image.fromarray(numbered_frame(number)) for number in range(3)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    assert kind_of(tmp_path / "a.tiff") == "image"
    with pytest.warns(UserWarning, match="has 3 pages: the first is taken"):
        read_image(tmp_path / "a.tiff")


def heic(side: int = 256, orientation: int | None = None) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    picture = np.zeros((side, side, 3), np.uint8)
    for (row, column), colour in CORNERS.items():
        half = side // 2
        picture[row * half : (row + 1) * half, column * half : (column + 1) * half] = colour
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif.tobytes()
    pillow_heif.from_pillow(image).save(buffer, quality=90, **options)
    return buffer.getvalue()


def quarters(picture: Tensor) -> list[tuple[int, ...]]:
    height, width = picture.shape[1:]
    spots = [(height // 4, width // 4), (height // 4, 3 * width // 4), (3 * height // 4, width // 4)]
    return [tuple(int(value > 128) for value in picture[:, y, x]) for y, x in spots]


def test_heic_is_a_picture(tmp_path: Path) -> None:
    """Protects: the whole of it, in its colours, whatever reads it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(heic())
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert kind_of(source) == "image"
        picture = read_image(source)
        assert picture.shape == (3, 256, 256) and picture.dtype == torch.uint8
        assert quarters(picture) == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    with pytest.raises(MediaError, match="Give it as an image"):
        read_video(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(MediaError, match=r"a\.jpg is a damaged picture"):
        read_image(path)


def test_heic_without_its_library_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: never a clip of tiles; the message says what to install."""
    path = tmp_path / "a.heic"
    brands = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    path.write_bytes(brands + bytes(1000))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert kind_of(path) == "image"
    for read in (read_image, read_video):
        with pytest.raises(MediaError, match=r"pip install 'seats-omni\[heif\]' \(pillow-heif\)"):
            read(path)
    for kind in (b"mif1", b"msf1", b"heix", b"hevc", b"heis"):
        path.write_bytes(brands.replace(b"ftypheic", b"ftyp" + kind).replace(b"mif1heic", b"mif1miaf") + bytes(1000))
        assert kind_of(path) == "image"
    with pytest.raises(MediaError):
        read_audio(path)
