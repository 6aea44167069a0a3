"""Where every token stands: 3-D positions and the places of media, from the prompt's ids alone.

Time-aligned multimodal positions (arXiv 2503.20215, section 2.3; transformers' `get_rope_index`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import OmniConfig
from omni.inputs import InputError, Inputs

IMAGE, VIDEO, AUDIO = 1, 2, 3


@dataclass(frozen=True)
class Layout:
    """The places of a prompt's tokens; all tensors are on the CPU.

    positions: (3, S) int64, temporal, height, width. next_position: what the first new token gets.
    image, video, audio: (n,) int64 indices of the placeholders, in order.
    """

    positions: Tensor
    next_position: int
    image: Tensor
    video: Tensor
    audio: Tensor

    @property
    def counts(self) -> dict[str, int]:
        media = {name: len(getattr(self, name)) for name in ("image", "video", "audio")}
        return {"text": self.positions.shape[1] - sum(media.values()), **media}


def layout(inputs: Inputs, config: OmniConfig) -> Layout:
    """Reads the prompt from left to right. Raises InputError where its placeholders do not match the media.

    Text counts on by one from the largest position of the run before it. A clip's frames advance by real
    time at `positions_per_second`; its sound, where it has one, starts at the same position and the two are
    interleaved in one block of placeholders.
    """
    ids = inputs.input_ids[0].cpu()
    vocab_size = config.decoder.vocab_size
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise InputError(f"input_ids must be token ids from 0 to {vocab_size - 1}: is this the model's tokenizer?")
    tokens = config.tokens
    kinds = torch.zeros_like(ids)
    for kind, token in ((IMAGE, tokens.image), (VIDEO, tokens.video), (AUDIO, tokens.audio)):
        kinds[ids == token] = kind
    media = {
        IMAGE: _vision_positions(inputs.image_grid_thw, None, config),
        VIDEO: _vision_positions(inputs.video_grid_thw, inputs.video_second_per_grid, config),
        AUDIO: [torch.arange(config.audio.token_count(n)).expand(3, -1) for n in inputs.mel_lengths.tolist()],
    }
    for kind, name in ((IMAGE, "image"), (VIDEO, "video"), (AUDIO, "audio")):
        found, given = int((kinds == kind).sum()), sum(block.shape[1] for block in media[kind])
        if found != given:
            raise InputError(f"the prompt has {found} {name} placeholders but its media make {given} tokens.")
    _check_patches("pixel_values", inputs.pixel_values, inputs.image_grid_thw, config)
    _check_patches("pixel_values_videos", inputs.pixel_values_videos, inputs.video_grid_thw, config)

    # A clip with sound is marked as a picture that opens with a sound.
    opening = F.pad((ids[:-1] == tokens.vision_start) & (ids[1:] == tokens.audio_start), (0, 1))
    stops = [*((kinds > 0) | opening).nonzero().flatten().tolist(), len(ids)]
    queues = {kind: deque(blocks) for kind, blocks in media.items()}
    positions = torch.empty(3, len(ids), dtype=torch.long)
    place, start = 0, 0  # the next token and its position
    while place < len(ids):
        kind = int(kinds[place])
        if opening[place]:
            place, start = _place_sounding_clip(positions, kinds, place, start, queues)
        elif kind:
            block = _take(queues, kind)
            _require(kinds[place : place + block.shape[1]], kind, block.shape[1])
            positions[:, place : place + block.shape[1]] = block + start
            place, start = place + block.shape[1], start + int(block.max()) + 1
        else:
            end = stops[bisect_left(stops, place)]
            positions[:, place:end] = torch.arange(start, start + end - place)
            place, start = end, start + end - place
    return Layout(
        positions=positions,
        next_position=int(positions.max()) + 1,
        image=(kinds == IMAGE).nonzero().flatten(),
        video=(kinds == VIDEO).nonzero().flatten(),
        audio=(kinds == AUDIO).nonzero().flatten(),
    )


def _place_sounding_clip(
    positions: Tensor, kinds: Tensor, place: int, start: int, queues: dict[int, deque[Tensor]]
) -> tuple[int, int]:
    """Fills marks and block of a clip with sound; returns the next token and its position."""
    frames, sound = _take(queues, VIDEO), _take(queues, AUDIO)
    first = place + 2
    end = first + frames.shape[1] + sound.shape[1]
    block = kinds[first:end]
    _require(block[block != AUDIO], VIDEO, frames.shape[1])
    positions[:, place:first] = start  # the two opening marks share a position
    positions[:, first:end][:, block == VIDEO] = frames + start + 1
    positions[:, first:end][:, block == AUDIO] = sound + start + 1
    # What follows counts on from the last run of the block, be it frames or sound, not from the furthest.
    run = int((block != block[-1]).nonzero().flatten().max()) + 1 if bool((block != block[-1]).any()) else 0
    after = int(positions[:, first + run : end].max()) + 1
    positions[:, end : end + 2] = after  # and so do the two closing marks
    return min(end + 2, positions.shape[1]), after + 1


def _take(queues: dict[int, deque[Tensor]], kind: int) -> Tensor:
    if not queues[kind]:
        raise InputError("the prompt has more media blocks than media: check its placeholders.")
    return queues[kind].popleft()


def _require(found: Tensor, kind: int, count: int) -> None:
    if len(found) != count or bool((found != kind).any()):
        raise InputError("a media block of the prompt is not as long as its media: check its placeholders.")


def _vision_positions(grid_thw: Tensor | None, seconds: Tensor | None, config: OmniConfig) -> list[Tensor]:
    """Per picture or clip, (3, tokens) int64 from zero; `seconds` (n,) between temporal grids, None for pictures."""
    if grid_thw is None:
        return []
    blocks = []
    merge = config.vision.spatial_merge_size
    for index, (grids, height, width) in enumerate(grid_thw.tolist()):
        if height % merge or width % merge:
            raise InputError(f"a grid of {height} x {width} patches is no multiple of {merge} x {merge}.")
        # Rounded down in float32, as the public code does.
        step = torch.tensor(1.0) if seconds is None else seconds[index].cpu().float()
        time = (torch.arange(grids) * step * config.positions_per_second).long()
        axes = (time, torch.arange(height // merge), torch.arange(width // merge))
        blocks.append(torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]))
    return blocks


def _check_patches(name: str, patches: Tensor | None, grid_thw: Tensor | None, config: OmniConfig) -> None:
    if patches is None or grid_thw is None:
        return
    expected = (int(grid_thw.prod(dim=1).sum()), config.vision.patch_dim)
    if tuple(patches.shape) != expected:
        raise InputError(f"{name} is {tuple(patches.shape)} but its grid_thw asks for {expected}.")
