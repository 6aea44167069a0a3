"""One request as tensors."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from omni.processing.frames import Pixels

FORMAT = "omni.Inputs"
"""In the metadata of a request's file."""


class InputError(ValueError):
    """A request that the model cannot run: what was wrong with it and what to do."""


class Patches:
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


@dataclass(repr=False)
class Inputs:
    """One request, under the names and shapes of transformers' processors: `Inputs(**batch)` takes theirs.

    input_ids: (1, S) int64, every media placeholder expanded to as many ids as the media has tokens.
    attention_mask: (1, S); positions that it masks are dropped.
    pixel_values: (patches, patch_dim) of all images; image_grid_thw: (images, 3) their size in patches. May be given as
    `Pixels`, the bytes of which patches are made, as `Omni.prepare` does; whoever reads them gets patches.
    pixel_values_videos, video_grid_thw: the same of all clips; video_second_per_grid: (clips,) seconds.
    input_features: (sounds, mel bins, frames) log-mel; feature_attention_mask: (sounds, frames), its frames
    that are real. Sounds of clips and sounds on their own stand in the order of the prompt.
    use_audio_in_video: whether sounds of clips are interleaved with the pictures. The prompt says so by
    itself; the field is there for transformers' batches.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    pixel_values: Patches = Patches()
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Patches = Patches()
    video_grid_thw: Tensor | None = None
    video_second_per_grid: Tensor | None = None
    input_features: Tensor | None = None
    feature_attention_mask: Tensor | None = None
    use_audio_in_video: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = self.held(field.name)
            if isinstance(value, (list, tuple)):
                setattr(self, field.name, torch.as_tensor(value))
        self._check("input_ids", 2)
        if self.input_ids.shape[0] != 1 or self.input_ids.shape[1] == 0:
            raise InputError(f"input_ids must be (1, S) with S > 0, not {tuple(self.input_ids.shape)}.")
        if self.attention_mask is not None:
            if self.attention_mask.shape != self.input_ids.shape:
                raise InputError("attention_mask must have the shape of input_ids.")
            self.input_ids = self.input_ids[self.attention_mask.bool()][None]
            self.attention_mask = None
        self._together("pixel_values", 2, image_grid_thw=2)
        self._together("pixel_values_videos", 2, video_grid_thw=2, video_second_per_grid=1)
        self._together("input_features", 3, feature_attention_mask=2)
        for grid in (self.image_grid_thw, self.video_grid_thw):
            if grid is not None and (grid.shape[1] != 3 or bool((grid < 1).any())):
                raise InputError("a grid_thw must be (n, 3) positive counts of patches: time, height, width.")

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
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        metadata = {FORMAT: "1", "use_audio_in_video": str(self.use_audio_in_video)}
        try:
            # A tensor may be a view of another, as `Inputs(**batch)` takes what it is given.
            save_file({name: value.contiguous().clone() for name, value in self.tensors().items()}, part, metadata)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be written: {error}.") from None
        finally:
            part.unlink(missing_ok=True)

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

    @property
    def mel_lengths(self) -> Tensor:
        """(sounds,) valid mel frames."""
        if self.feature_attention_mask is None:
            return torch.zeros(0, dtype=torch.long)
        return self.feature_attention_mask.sum(dim=1)
