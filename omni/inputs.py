"""One request as tensors."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.processing.frames import Pixels
from omni.reuse import digest_of

FORMAT = "omni.Inputs"
"""In the metadata of a request's file."""


MAX_SECONDS = 1e9
"""Between two temporal grids: thirty years. Positions, which count them, stay far within what integers hold."""


class InputError(ValueError):
    """A request that the model cannot run: what was wrong with it and what to do."""


def part_of(path: Path) -> Path:
    """Where a file is written before it takes a place: beside it, under a name of this thread's own."""
    return path.parent / f".{os.getpid()}-{threading.get_ident()}.part"


class TensorOrPixels:
    """A field that takes patches, or the bytes that they are made of, and is read as patches.

    Bytes are a quarter of them, so they stay bytes until somebody reads the field; from then on it holds patches.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, inputs: Inputs | None, owner: type) -> Tensor | None:
        if inputs is None:
            return None  # what the field is unless given
        held = inputs.held(self.name)
        if isinstance(held, Pixels):
            held = inputs.__dict__[self.name] = held.patches()
        return held

    def __set__(self, inputs: Inputs, value: Tensor | Pixels | None) -> None:
        inputs.__dict__[self.name] = value


@dataclass(repr=False, eq=False)
class Inputs:
    """One request, under the names and shapes of transformers' processors: `Inputs(**batch)` takes theirs.

    input_ids: (1, S) int64, every media placeholder expanded to as many ids as the media has tokens.
    attention_mask: (1, S); positions that it masks are dropped.
    pixel_values: (patches, patch_dim) of all images; image_grid_thw: (images, 3) their size in patches. May be given as
    `Pixels`, the bytes of which patches are made, as `Omni.prepare` does; whoever reads them gets patches.
    pixel_values_videos, video_grid_thw: the same of all clips; video_second_per_grid: (clips,) seconds.
    input_features: (sounds, mel bins, frames) log-mel; feature_attention_mask: (sounds, frames), its frames
    that are real; wherever they stand, they are moved to the front, in order. Sounds of clips and sounds on their own
    stand in the order of the prompt.
    use_audio_in_video: whether sounds of clips are interleaved with the pictures. The prompt says so by
    itself; the field is there for transformers' batches.

    Raises InputError for tensors that make no request, whatever the model; `omni.processing.positions.layout` for what
    does not fit one.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    pixel_values: TensorOrPixels = TensorOrPixels()
    image_grid_thw: Tensor | None = None
    pixel_values_videos: TensorOrPixels = TensorOrPixels()
    video_grid_thw: Tensor | None = None
    video_second_per_grid: Tensor | None = None
    input_features: Tensor | None = None
    feature_attention_mask: Tensor | None = None
    use_audio_in_video: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self.held(field.name)
            if isinstance(value, (list, tuple)):
                try:
                    setattr(self, field.name, torch.as_tensor(value))
                except (TypeError, ValueError, RuntimeError) as error:
                    raise InputError(f"{field.name} is no tensor: {error}.") from None
        self._check("input_ids", 2)
        if self.input_ids.shape[0] != 1 or self.input_ids.shape[1] == 0:
            raise InputError(f"input_ids must be (1, S) with S > 0, not {tuple(self.input_ids.shape)}.")
        if self.attention_mask is not None:
            self._check("attention_mask", 2)
            if self.attention_mask.shape != self.input_ids.shape:
                raise InputError("attention_mask must have the shape of input_ids.")
            self.input_ids = self.input_ids[self._mask("attention_mask")][None]
            self.attention_mask = None
            if self.input_ids.shape[1] == 0:
                raise InputError("attention_mask leaves no token.")
        self._together("pixel_values", 2, image_grid_thw=2)
        self._together("pixel_values_videos", 2, video_grid_thw=2, video_second_per_grid=1)
        self._together("input_features", 3, feature_attention_mask=2)
        for grid in (self.image_grid_thw, self.video_grid_thw):
            if grid is not None and not (_counts(grid) and grid.shape[1] == 3 and bool((grid > 0).all())):
                raise InputError("a grid_thw must be (n, 3) positive counts of patches: time, height, width.")
        if not _counts(self.input_ids):
            raise InputError(f"input_ids must be integers, not {self.input_ids.dtype}.")
        self.input_ids = self.input_ids.long()
        for name in ("pixel_values", "pixel_values_videos"):
            patches = self.held(name)
            if isinstance(patches, Tensor) and not patches.is_floating_point():
                raise InputError(f"{name} must be floating point, normalised, not {patches.dtype}.")
        self.check_seconds()
        self._bring_sounds_forward()

    def check_seconds(self) -> None:
        """Raises InputError for frames that do not follow each other: they have no order among sounds."""
        seconds, grids = self.video_second_per_grid, self.video_grid_thw
        if seconds is None or grids is None:
            return
        right = not seconds.is_complex() and len(seconds) == len(grids)
        if not right or not bool(((seconds > 0) & (seconds <= MAX_SECONDS)).all()):
            raise InputError(
                f"video_second_per_grid must be seconds above 0, one per clip, up to {MAX_SECONDS:.0e}, "
                f"not {seconds.tolist()!s:.80}."
            )

    def _bring_sounds_forward(self) -> None:
        mel, mask = self.input_features, self.feature_attention_mask
        if mel is None or mask is None:
            return
        if not mel.is_floating_point():
            raise InputError(f"input_features must be floating point, not {mel.dtype}.")
        if len(mask) != len(mel) or mask.shape[1] != mel.shape[2]:
            raise InputError(
                f"feature_attention_mask must be (sounds, frames) of input_features, {(len(mel), mel.shape[2])}, "
                f"not {tuple(mask.shape)}."
            )
        real = self._mask("feature_attention_mask")
        lengths = real.sum(dim=1)
        if not bool((lengths > 0).all()):
            empty = int((lengths == 0).nonzero()[0]) + 1
            raise InputError(f"feature_attention_mask leaves nothing of sound {empty}: leave the sound out.")
        forward = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not torch.equal(forward, real):
            order = real.logical_not().byte().argsort(dim=1, stable=True).to(mel.device)
            self.input_features = mel.gather(2, order[:, None].expand(mel.shape))
        self.feature_attention_mask = forward.long()

    def _together(self, name: str, dims: int, **partners: int) -> None:
        present = self.held(name) is not None
        for partner in partners:
            if (self.held(partner) is not None) != present:
                raise InputError(f"{name} and {partner} go together: give both or neither.")
        if present:
            for key, count in {name: dims, **partners}.items():
                self._check(key, count)

    def _check(self, name: str, dims: int) -> None:
        value = self.held(name)
        if isinstance(value, Pixels):
            return
        if not isinstance(value, Tensor) or value.dim() != dims:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} must be a tensor of {dims} dimensions, not {got}.")
        if value.layout != torch.strided or value.is_meta:
            raise InputError(f"{name} must be a dense tensor with its numbers: neither sparse nor on meta.")

    def _mask(self, name: str) -> Tensor:
        """As bool. One that is to be added to scores, 0 where something is, would be read the wrong way round."""
        value: Tensor = self.held(name)
        if not bool(((value == 0) | (value == 1)).all()):
            raise InputError(f"{name} must be of ones, where something is, and zeros.")
        return value.bool()

    def with_ids(self, input_ids: Tensor) -> Inputs:
        """The same media in another prompt; bytes stay bytes."""
        others = {field.name: self.held(field.name) for field in fields(self) if field.name != "input_ids"}
        return Inputs(input_ids, **others)

    def held(self, name: str) -> Any:
        """What a field holds: of pictures and clips bytes, `Pixels`, as long as nobody asked for patches."""
        return self.__dict__[name]

    def __repr__(self) -> str:
        media = {"image": self.image_grid_thw, "clip": self.video_grid_thw, "sound": self.input_features}
        counts = [f"{self.input_ids.shape[1]} tokens"]
        counts += [f"{len(some)} {name}{'s' * (len(some) > 1)}" for name, some in media.items() if some is not None]
        return f"Inputs({', '.join(counts)})"

    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name; of pictures and clips patches, which are not held on to."""
        found = {field.name: self.held(field.name) for field in fields(self)}
        found = {name: value.patches() if isinstance(value, Pixels) else value for name, value in found.items()}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def save(self, path: str | Path) -> None:
        """Writes the request as safetensors, which `load` reads. A file that is there is replaced when the new one is
        whole. Raises InputError where it cannot be written."""
        from safetensors.torch import save_file

        path = Path(path)
        part = part_of(path)
        metadata = {FORMAT: "1", "use_audio_in_video": str(self.use_audio_in_video)}
        try:
            # A tensor may be a view of another, as `Inputs(**batch)` takes what it is given.
            save_file({name: value.contiguous().clone() for name, value in self.tensors().items()}, part, metadata)
            part.replace(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} cannot be written: {error}.") from None
        finally:
            with suppress(OSError, ValueError):
                part.unlink()

    @classmethod
    def load(cls, path: str | Path) -> Inputs:
        """A request that `save` wrote, on the CPU. Raises InputError for a file that is missing or something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read: {error}.") from None
        heard = metadata.get("use_audio_in_video")
        if FORMAT not in metadata or found.keys() - {field.name for field in fields(cls)}:
            raise InputError(f"{path} holds no request: Inputs.save writes them.")
        return cls(**found, use_audio_in_video=heard == "True")

    def media(self, alone_from: int = 0) -> list[Medium]:
        """Its pictures, clips and sounds one by one, in this order and in memory of the request's.

        alone_from: mel frames up to which sounds are padded to the longest (`AudioConfig.alone_from`).
        """
        found = []
        for kind, name, grids in (
            ("image", "pixel_values", self.image_grid_thw),
            ("video", "pixel_values_videos", self.video_grid_thw),
        ):
            if grids is None:
                continue
            held, start = self.held(name), 0
            for number, rows in enumerate(grids.prod(dim=1).tolist()):
                data = held.only(number) if isinstance(held, Pixels) else held[start : start + rows]
                start += rows
                found.append(Medium(kind, data, grids[number : number + 1]))
        if self.input_features is not None:
            lengths = self.mel_lengths
            longest = int(lengths.max())
            for number, length in enumerate(lengths.tolist()):
                width = max(length, min(longest, alone_from))
                sound = self.input_features[number : number + 1, :, :length]
                sound = sound if width == length else F.pad(sound, (0, width - length))
                found.append(Medium("audio", sound, lengths[number : number + 1]))
        return found

    @property
    def mel_lengths(self) -> Tensor:
        """(sounds,) valid mel frames."""
        if self.feature_attention_mask is None:
            return torch.zeros(0, dtype=torch.long)
        return self.feature_attention_mask.sum(dim=1)


@dataclass(frozen=True)
class Medium:
    """One picture, clip or sound of a request. kind: "image", "video" or "audio".

    data: patches, or the bytes of which they are made; of a sound (1, mel bins, frames). size: of pictures and clips
    (1, 3) grid_thw, of sounds (1,) frames that are real, the first.
    """

    kind: str
    data: Tensor | Pixels
    size: Tensor

    def digest(self) -> bytes:
        """What tells it from media that are others for an encoder, be it by a bit."""
        content = self.data.digest(0) if isinstance(self.data, Pixels) else digest_of(self.data)
        return content + repr((self.kind, self.size.tolist())).encode()


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _counts(tensor: Tensor) -> bool:
    return tensor.dtype in INTEGERS
