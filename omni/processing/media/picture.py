"""Picture files → pixels."""

from __future__ import annotations

import warnings
from typing import Any, BinaryIO

import torch
from torch import Tensor

from omni.processing.frames import MAX_PIXELS, MediaError
from omni.processing.media.files import as_array, described, is_array, is_pil, open_file

# Formats that Pillow recognises by a signature and decodes by itself: no EPS, which runs another program.
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


def read_image(source: Any) -> Tensor:
    """(3, H, W) uint8 RGB, upright. Transparency is laid over white; 16-bit greys keep their upper 8 bits.

    Raises MediaError for what is no picture, is damaged, or claims more than `MAX_PIXELS`.
    """
    if is_array(source):
        array = as_array(source)
        if array.dim() != 3 or array.dtype != torch.uint8 or 3 not in (array.shape[0], array.shape[2]):
            raise MediaError(f"an array of a picture must be (H, W, 3) or (3, H, W) uint8, not {described(array)}.")
        return array if array.shape[0] == 3 else array.permute(2, 0, 1)
    if is_pil(source):
        return _pixels(source, "the picture")
    with open_file(source) as (file, name):
        picture = open_picture(file, name)
        if picture is None:
            raise MediaError(f"{name} is not a picture of a known format ({', '.join(PICTURES)}).")
        return _pixels(picture, name)


def open_picture(file: BinaryIO, name: str) -> Any | None:
    """A picture, not yet decoded; None where Pillow knows no such format."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours comes when it is decoded
        try:
            return Image.open(file, formats=[name for name in PICTURES if name in Image.OPEN])
        except UnidentifiedImageError:
            return None
        except Image.DecompressionBombError as error:
            raise MediaError(f"{name} is too large for a picture. Scale it down.") from error
        except Exception as error:
            raise MediaError(f"{name} is a damaged picture: {error}.") from error
        finally:
            file.seek(0)


def _pixels(picture: Any, name: str) -> Tensor:
    from PIL import Image, ImageOps

    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise MediaError(f"{name} has {width} x {height} pixels, which is too large. Scale it down.")
    if picture.mode == "F":
        raise MediaError(f"{name} has floating point pixels of unknown range. Convert it to 8 bits.")
    try:
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):
            picture = picture.convert("I").point(lambda grey: grey * (1 / 256)).convert("L")
        if "A" in picture.getbands() or picture.info.get("transparency") is not None:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("RGB")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    # On damaged files Pillow's decoders raise whatever their parsing runs into.
    except Exception as error:
        raise MediaError(f"{name} is a damaged picture: {error}.") from error
    return pixels.view(picture.height, picture.width, 3).permute(2, 0, 1)
