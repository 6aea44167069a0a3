"""Which frames of a clip the model sees, at what size, and how pixels become patches.

The rules of both families, as in transformers' `models/qwen2_vl/{video,image}_processing_qwen2_vl.py`.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from omni.config import QWEN3, ConfigError, OmniConfig
from omni.processing.settings import Settings, read_settings
from omni.reuse import digest_of

MAX_ASPECT_RATIO = 200
MAX_PIXELS = 2**26
"""Of a frame or picture: a few bytes can claim any size. 8192 x 8192 is twice an 8K frame."""


class MediaError(ValueError):
    """A clip, sound or picture that cannot be used: which one, what is wrong with it, what to do."""


@dataclass(frozen=True)
class VisionSizes:
    """The numbers of a family's vision processor. The defaults are Qwen2.5-Omni's.

    Picture bounds, mean and standard deviation (here CLIP's): the released preprocessor_config.json. Clip bounds:
    `videos_kwargs` of transformers' Qwen2_5OmniProcessor, which are those of qwen-omni-utils. video_mean, video_std: of
    clips, None where they are those of pictures.
    """

    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_frames: int = 4
    image_min_pixels: int = 4 * 28**2
    image_max_pixels: int = 16384 * 28**2
    video_min_pixels: int = 128 * 28**2
    video_max_pixels: int = 768 * 28**2
    max_video_tokens: int = 128_000
    video_total_pixels: int | None = None
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    video_mean: tuple[float, float, float] | None = None
    video_std: tuple[float, float, float] | None = None

    @property
    def factor(self) -> int:
        """Pixels along one side of what becomes one token."""
        return self.patch_size * self.merge_size

    def colours(self, of_clip: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Mean and standard deviation of red, green and blue."""
        if of_clip:
            return self.video_mean or self.image_mean, self.video_std or self.image_std
        return self.image_mean, self.image_std

    def image_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the model sees a picture."""
        return target_size(
            height,
            width,
            factor=self.factor,
            min_pixels=self.image_min_pixels,
            max_pixels=self.image_max_pixels,
        )

    def clip_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which the model sees each of a clip's `num_frames` frames."""
        return target_size(
            height,
            width,
            factor=self.factor,
            min_pixels=self.video_min_pixels,
            max_pixels=clip_max_pixels(num_frames, self),
        )


QWEN3_OMNI_SIZES = VisionSizes(
    patch_size=16,
    video_min_pixels=128 * 32**2,
    video_max_pixels=768 * 32**2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
)
"""Qwen3-Omni's: clip bounds of transformers' Qwen3OmniMoeProcessor, the rest as its checkpoints' files say.

They keep Qwen2.5-Omni's picture bounds to the pixel, although a token is of 32 x 32 pixels here.
"""


def vision_sizes(folder: Path, config: OmniConfig) -> VisionSizes:
    """The family's numbers, patches of the config's size, and what the checkpoint's own settings say.

    Those (`omni.processing.settings.read_settings`) have a say in the bounds of pictures and in mean and standard
    deviation of pictures and of clips, each their own, in `min_frames` and `max_video_tokens`. The bounds of clips are
    in the code of transformers' processors, whatever `size` says there, and so they are here; for a model of small
    clips a file may state video_min_pixels and video_max_pixels, which transformers does not read. What would change
    the pixels otherwise is refused. Raises ConfigError for that and for a file that is damaged.
    """
    sizes = replace(
        QWEN3_OMNI_SIZES if config.family == QWEN3 else VisionSizes(),
        patch_size=config.vision.patch_size,
        merge_size=config.vision.spatial_merge_size,
        temporal_patch_size=config.vision.temporal_patch_size,
    )
    pictures, clips = (read_settings(folder, kind) for kind in ("image_processor", "video_processor"))
    for settings in (pictures, clips):
        settings.expect(
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            resample=3,  # bicubic
            rescale_factor=1 / 255,
            patch_size=sizes.patch_size,
            merge_size=sizes.merge_size,
            temporal_patch_size=sizes.temporal_patch_size,
        )
    clips.expect(cap_pixels_per_frame=True)
    _warn_of_other_sampling(clips)
    stated = _stated_colours(pictures, "image") | _stated_colours(clips, "video")
    for settings, key, field, edge in (
        (pictures, "min_pixels", "image_min_pixels", "shortest_edge"),
        (pictures, "max_pixels", "image_max_pixels", "longest_edge"),
        (clips, "video_min_pixels", "video_min_pixels", None),
        (clips, "video_max_pixels", "video_max_pixels", None),
        (clips, "max_video_tokens", "max_video_tokens", None),
        (clips, "min_frames", "min_frames", None),
    ):
        stated |= _stated_count(settings, key, field, edge)
    sizes = replace(sizes, **stated)
    if sizes.colours(of_clip=True) == sizes.colours(of_clip=False):
        sizes = replace(sizes, video_mean=None, video_std=None)
    for least, most, where, name in (
        (sizes.image_min_pixels, sizes.image_max_pixels, pictures.where, "min_pixels"),
        (sizes.video_min_pixels, sizes.video_max_pixels, clips.where, "video_min_pixels"),
    ):
        if least > most:
            raise ConfigError(f"{where}: {name} must not exceed {name.replace('min', 'max')}.")
    return sizes


def _warn_of_other_sampling(clips: Settings) -> None:
    """transformers takes frames by these keys where the file says so; here whoever asks says how many."""
    if not clips.values.get("do_sample_frames"):
        return
    for key, usual in (("fps", 2), ("max_frames", 768), ("num_frames", None)):
        if (stated := clips.values.get(key)) not in (None, usual):
            how = "give fps, max_frames or nframes when asking"
            warnings.warn(f"{clips.where}: {key} = {stated!r:.80} is not followed: {how}.", stacklevel=3)


def _stated_colours(settings: Settings, kind: str) -> dict[str, Any]:
    """Mean and standard deviation, where stated, as fields of VisionSizes."""
    stated = {}
    for name in ("mean", "std"):
        if (value := settings.values.get(f"image_{name}")) is None:
            continue
        least = 1e-6 if name == "std" else -1e6
        if not isinstance(value, list) or len(value) != 3 or not all(_is_number(item, least) for item in value):
            raise ConfigError(
                f"{settings.where}: image_{name} must be three numbers, standard deviations above 0, not {value!r:.80}."
            )
        stated[f"{kind}_{name}"] = tuple(map(float, value))
    return stated


def _stated_count(settings: Settings, key: str, field: str, edge: str | None) -> dict[str, Any]:
    """A number of pixels, frames or tokens, where stated, as a field of VisionSizes.

    Released files say min_pixels, later ones size.shortest_edge (`edge`); the former goes first.
    """
    value = settings.values.get(key)
    if value is None and edge is not None:
        size = settings.values.get("size")
        if isinstance(size, Mapping):
            size = {key: value for key, value in size.items() if value is not None}
        if size is not None and not (isinstance(size, Mapping) and _EDGES.issuperset(size)):
            raise ConfigError(
                f"{settings.where}: size may have {' and '.join(sorted(_EDGES))} alone, not {size!r:.80}."
            )
        value = (size or {}).get(edge)
    if value is None:
        return {}
    if type(value) is not int or not 1 <= value <= MAX_PIXELS:
        raise ConfigError(f"{settings.where}: {key} must be a positive integer up to {MAX_PIXELS}, not {value!r:.80}.")
    return {field: value}


_EDGES = {"shortest_edge", "longest_edge"}


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value <= 1e6


def sample_indices(
    total_frames: int, native_fps: float, *, fps: float = 2.0, min_frames: int = 4, max_frames: int = 768
) -> list[int]:
    """The frames to take from a clip of `total_frames` at `native_fps`: every `total / count`-th.

    The count is even: `fps` for each second of the clip, at least `min_frames`, at most `max_frames` and no
    more than the clip has; equal to `Qwen2VLVideoProcessor.sample_frames`. A clip of fewer than `min_frames`
    frames, which the public code refuses or shortens, gives `min_frames` on the same grid, so that frames
    repeat and each stands for as long as it was shown.
    """
    if total_frames < 1 or not native_fps > 0:
        raise MediaError(f"a clip of {total_frames} frames at {native_fps} per second has nothing to sample.")
    if not fps > 0:
        raise MediaError(f"fps is {fps}; give a positive number of frames per second.")
    if max_frames < min_frames:
        raise MediaError(f"max_frames is {max_frames}; the model needs at least {min_frames} frames of a clip.")
    count = min_frames
    if total_frames >= min_frames:
        wanted = max(total_frames / native_fps * fps, min_frames)
        count = 2 * math.floor(min(wanted, max_frames, total_frames) / 2)
    # The public code's own expression, so that it rounds alike; rounding can add one past the end.
    return torch.arange(0, total_frames, total_frames / count)[:count].int().tolist()


def sampled_fps(count: int, duration: float, fps: float) -> float:
    """The rate at which `count` frames taken from `duration` seconds for a wish of `fps` follow each other.

    `fps` itself where the count is what the wish gives, made even: the public processor tells the model
    `temporal_patch_size / fps` seconds per temporal grid. Where a bound on the count changed it (a very short
    clip, a very long one, one with fewer frames than wished), the true `count / duration`, as
    qwen-omni-utils computes it.
    """
    return fps if 0 <= duration * fps - count < 2 else count / duration


def target_size(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: float) -> tuple[int, int]:
    """The multiples of `factor` nearest to (height, width), scaled to a product within the bounds.

    Equal to `smart_resize` of the public code. Raises MediaError for shapes more than 200 times as long as
    wide.
    """
    if min(height, width) < 1 or max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise MediaError(
            f"{width} x {height} pixels: a picture's long side may be at most {MAX_ASPECT_RATIO} times "
            "its short one. Crop it."
        )
    # Python rounds halves to even, and so does the public code.
    size = round(height / factor) * factor, round(width / factor) * factor
    if size[0] * size[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        size = (
            max(factor, math.floor(height / shrink / factor) * factor),
            max(factor, math.floor(width / shrink / factor) * factor),
        )
    elif size[0] * size[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        size = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return size


def clip_max_pixels(num_frames: int, sizes: VisionSizes) -> float:
    """The most pixels a frame may have in a clip of `num_frames`, so that the whole clip stays in bounds.

    The clip's budget, shared evenly, is `video_total_pixels` or else 90 % of `max_video_tokens` tokens' worth; a frame
    keeps at least 1.05 times the minimum. `cap_pixels_per_frame` of transformers, which makes the share whole,
    `total_pixels` of qwen-omni-utils, which does not.
    """
    share: float
    if sizes.video_total_pixels is None:
        share = int(sizes.max_video_tokens * sizes.factor**2 * 0.9) * sizes.temporal_patch_size // num_frames
    else:
        share = sizes.video_total_pixels / num_frames * sizes.temporal_patch_size
    return max(min(sizes.video_max_pixels, share), int(sizes.video_min_pixels * 1.05))


def resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 3, H, W) uint8 → (N, 3, *size) uint8, antialiased bicubic.

    By Pillow, so equal to transformers' image processor on Pillow to the bit. torch's own filter is the same,
    but rounds and clips between its two passes in an order of its own: at sharp edges 20 steps of 255 apart.
    """
    from PIL import Image

    if tuple(frames.shape[-2:]) == size:
        return frames
    resized = torch.empty(len(frames), 3, *size, dtype=torch.uint8)
    for into, frame in zip(resized, frames, strict=True):
        resize_into(into, Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()))
    return resized


def resize_into(into: Tensor, picture: Any) -> None:
    """Writes an RGB picture of Pillow to `into`, contiguous (3, h, w) uint8, at that size, as `resize`.

    The interpreter lock is released for nearly all of it.
    """
    from PIL import Image

    _, height, width = into.shape
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    for plane, band in zip(into.numpy(), "RGB", strict=True):
        memoryview(plane).cast("B")[:] = picture.tobytes("raw", band)


def patchify(frames: Tensor, sizes: VisionSizes, *, of_clip: bool = False) -> tuple[Tensor, Tensor]:
    """(N, 3, h, w) uint8 → normalised patches (t * gh * gw, 3 * temporal * patch²) float32, grid (3,) int64.

    of_clip: by the mean and standard deviation of clips instead of those of pictures. The grid is (t, gh, gw) in
    patches; h and w are multiples of `sizes.factor`. Order of patches: `cut_patches`.
    """
    pixels = Pixels((frames,), sizes, of_clip)
    return pixels.patches(), pixels.grid_thw[0]


@dataclass(frozen=True)
class Pixels:
    """Pictures or clips as bytes: of them come patches, four times as large in float32, where they are needed.

    frames: of each picture or clip, (N, 3, h, w) uint8; h and w are multiples of `sizes.factor`. A last temporal grid
    short of `temporal_patch_size` frames (a single picture, an odd count) repeats its last one. of_clip: clips may have
    a mean and standard deviation of their own.
    """

    frames: tuple[Tensor, ...]
    sizes: VisionSizes
    of_clip: bool = False

    @property
    def grid_thw(self) -> Tensor:
        """(n, 3) int64: patches in time, height and width."""
        patch, step = self.sizes.patch_size, self.sizes.temporal_patch_size
        counts = ((len(clip), *clip.shape[2:]) for clip in self.frames)
        return torch.tensor([[-(-count // step), height // patch, width // patch] for count, height, width in counts])

    @property
    def shape(self) -> tuple[int, int]:
        """Of `patches`."""
        sizes = self.sizes
        return int(self.grid_thw.prod(dim=1).sum()), 3 * sizes.temporal_patch_size * sizes.patch_size**2

    def only(self, index: int) -> Pixels:
        """One of them."""
        return replace(self, frames=(self.frames[index],))

    def grids(self, clip: int, first: int, count: int) -> Tensor:
        """(count * temporal_patch_size, 3, h, w) uint8, of the clip's temporal grids from `first` on.

        Where there are no more, the last frame is repeated.
        """
        step = self.sizes.temporal_patch_size
        some = self.frames[clip][first * step : (first + count) * step]
        lacking = count * step - len(some)
        return torch.cat((some, some[-1:].expand(lacking, -1, -1, -1))) if lacking else some

    def digest(self, index: int) -> bytes:
        """Tells a clip or picture, and what patches it makes, from all others: 32 bytes (`omni.reuse.digest_of`)."""
        sizes = self.sizes
        made = sizes.patch_size, sizes.merge_size, sizes.temporal_patch_size, sizes.colours(self.of_clip)
        return hashlib.sha256(repr(made).encode() + digest_of(self.frames[index])).digest()

    def normalisation(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, (3,) float32 each."""
        mean, std = torch.tensor(self.sizes.colours(self.of_clip)).to(device)
        return mean, std

    def patches(self) -> Tensor:
        """What transformers' processors call pixel_values: (ΣT·H·W, patch_dim) float32, of all one after another."""
        sizes, place = self.sizes, 0
        patches = torch.empty(self.shape)
        for clip, (grids, height, width) in enumerate(self.grid_thw.tolist()):
            # A few frames at a time: a long clip is in memory as float32 once, as the result.
            for first in range(0, grids, 4):
                count = min(4, grids - first)
                rows = count * height * width
                some = cut_patches(
                    self.grids(clip, first, count),
                    *self.normalisation(),
                    patch=sizes.patch_size,
                    merge=sizes.merge_size,
                    step=sizes.temporal_patch_size,
                )
                patches[place : place + rows] = some.flatten(0, 1)
                place += rows
        return patches


def cut_patches(frames: Tensor, mean: Tensor, std: Tensor, *, patch: int, merge: int, step: int) -> Tensor:
    """(t * step, 3, h, w) uint8 → normalised patches (t, gh * gw, 3 * step * patch²) float32. mean, std: (3,).

    Patches of a temporal grid are ordered by `merge` x `merge` block, then within the block; a patch's numbers by
    channel, time, row, column.
    """
    by_patch = rearrange(
        frames,
        "(t step) c (gh mh ph) (gw mw pw) -> t (gh gw mh mw) c (step ph pw)",
        step=step,
        mh=merge,
        mw=merge,
        ph=patch,
        pw=patch,
    )  # shuffled as bytes
    return by_patch.float().div_(255).sub_(mean[:, None]).div_(std[:, None]).flatten(2)
