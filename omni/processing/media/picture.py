"""Picture files → pixels."""

from __future__ import annotations

from typing import Any, BinaryIO

import torch
from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError
from omni.processing.media.files import as_array, described, is_array, is_pil, open_file, warn
from omni.processing.media.upright import over_white

# Formats that Pillow recognises by a signature and decodes by itself: no EPS, which runs another program.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "CUR")
MOVING = ("GIF", "PNG", "WEBP", "AVIF")
SCALED = ("PNG", "PPM")
"""Formats of whose greys of more than 8 bits Pillow makes 0 .. 65535, also where it takes 32 bits for each."""
HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
"""Of files with pictures coded as HEVC (ISO/IEC 23008-12, annex B); "mif1" and "msf1" leave the coding open."""


def read_image(source: Any) -> Tensor:
    """(3, H, W) uint8 RGB, upright. Transparency is laid over white; 16-bit greys keep their upper 8 bits, those of 32
    bits or with a sign are taken as they are where all are within 0 .. 255, and refused elsewhere.

    Of a picture that moves, or has several pages, the first is taken, with a warning. HEIC needs `pillow-heif` (the
    extra `heif`). Raises MediaError for what is no picture, is damaged, or claims more than `MAX_PIXELS`.
    """
    if is_array(source):
        array = as_array(source)
        if array.dim() != 3 or array.dtype != torch.uint8 or 3 not in (array.shape[0], array.shape[2]):
            raise MediaError(f"an array of a picture must be (H, W, 3) or (3, H, W) uint8, not {described(array)}.")
        return array if array.shape[0] == 3 else array.permute(2, 0, 1)
    if is_pil(source):
        return pixels(source, "the picture")
    with open_file(source) as (file, name):
        picture = open_picture(file, name)
        if picture is None:
            raise MediaError(f"{name} is not a picture of a known format ({', '.join((*PICTURES, 'HEIC'))}).")
        if moves(picture, name):
            warn(f"{name} moves: as an image it is its first frame. Give it as a video to have all.")
        elif picture.format == "TIFF" and getattr(picture, "n_frames", 1) > 1:
            warn(f"{name} has {picture.n_frames} pages: the first is taken.")
        return pixels(picture, name)


def is_heif(file: BinaryIO) -> bool:
    """Whether a file's pictures take pillow-heif to read, by the brands in its first box (ISO/IEC 14496-12)."""
    head = file.read(1024)
    file.seek(0)
    if head[4:8] != b"ftyp":
        return False
    size = int.from_bytes(head[:4], "big")
    brands = {head[start : start + 4] for start in (8, *range(16, min(size, len(head)) - 3, 4))}
    if not brands & {b"avif", b"avis"}:
        return head[8:12] in HEIF_BRANDS | {b"mif1", b"msf1"}
    from PIL import features

    return not features.check("avif")


def moves(picture: Any, name: str) -> bool:
    """Whether an opened picture is a clip. Raises MediaError for a damaged one."""
    try:
        return picture.format in MOVING and bool(getattr(picture, "is_animated", False))
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error


def open_picture(file: BinaryIO, name: str) -> Any | None:
    """A picture, not yet decoded; None where Pillow knows no such format."""
    from PIL import Image, UnidentifiedImageError

    if is_heif(file):
        return _open_heif(file, name)
    Image.init()
    # Pillow's warning of large pictures is left as it is, beside our own word: what is ignored is the same for all
    # threads, and would stay so where two open pictures at a time.
    try:
        picture: Any = Image.open(file, formats=[name for name in PICTURES if name in Image.OPEN])
        # libwebp's canvas is transparent where no frame covers it, also in files that claim to be opaque.
        if picture.format == "WEBP" and picture.is_animated and picture.rawmode == "RGBX":
            picture.rawmode = picture._mode = "RGBA"
        return picture
    except UnidentifiedImageError:
        return None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name} is too large for a picture. Scale it down.") from error
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error
    finally:
        file.seek(0)


def _open_heif(file: BinaryIO, name: str) -> Any:
    try:
        import pillow_heif
    except ImportError:
        raise MediaError(
            f"{name} is a HEIC picture: pip install 'seats-omni[heif]' (pillow-heif) reads it, or convert it to JPEG."
        ) from None
    try:
        pictures = pillow_heif.open_heif(file)
        found = pictures[pictures.primary_index]
        width, height = found.size
        if width * height > MAX_PIXELS:
            raise MediaError(f"{name} has {width} x {height} pixels, which is too large. Scale it down.")
        return found.to_pillow()
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error
    finally:
        file.seek(0)


def pixels(picture: Any, name: str) -> Tensor:
    """(3, H, W) uint8 of an opened picture, of one that moves the frame it stands at."""
    from PIL import ImageOps

    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name} has {width} x {height} pixels, which is too large. Scale it down.")
    if picture.mode == "F":
        raise MediaError(f"{name} has floating point pixels of unknown range. Convert it to 8 bits.")
    sixteen = picture.mode.startswith("I;16") or picture.format in SCALED  # a copy has no format
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            return _grey(picture, name, sixteen=sixteen).repeat(3, 1, 1)
        clear = "A" in picture.getbands() or picture.info.get("transparency") is not None
        mode = "RGBA" if clear else "RGB"
        picture = picture.convert(mode)
        found = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        found = found.view(picture.height, picture.width, len(mode))
    except MediaError:
        raise
    # On damaged files Pillow's decoders raise whatever their parsing runs into.
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error
    return (over_white(found) if clear else found).permute(2, 0, 1)


def _grey(picture: Any, name: str, *, sixteen: bool) -> Tensor:
    """(H, W) uint8 of whole numbers: the upper 8 of 16 bits, or all of them. The one that is transparent is white."""
    values = torch.frombuffer(bytearray(picture.convert("I").tobytes()), dtype=torch.int32)
    values = values.view(picture.height, picture.width)
    lowest, highest = int(values.min()), int(values.max())
    if not sixteen and (lowest < 0 or highest > 255):
        raise MediaError(f"{name} has greys of unknown range, here {lowest} .. {highest}. Convert it to 8 bits.")
    found = (values >> 8 if sixteen else values).to(torch.uint8)
    clear = picture.info.get("transparency")
    return found if clear is None else found.masked_fill(values == clear, 255)
