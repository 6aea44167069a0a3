"""Where every token stands: 3-D positions and the places of media, from the prompt's ids alone.

Time-aligned multimodal positions (arXiv 2503.20215, section 2.3; transformers' `get_rope_index`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import QWEN3, OmniConfig
from omni.inputs import InputError, Inputs
from omni.processing.frames import Pixels
from omni.processing.prompt import take_turns

IMAGE, VIDEO, AUDIO = 1, 2, 3


@dataclass(frozen=True)
class Layout:
    """The places of a prompt's tokens; all tensors are on the CPU.

    positions: (3, S), temporal, height, width; int64 in Qwen2.5-Omni, float32 in Qwen3-Omni, where frames stand
    at fractions and so does text after a clip. next_position: what the first new token gets, a float there, too.
    image, video, audio: (n,) int64 indices of the placeholders, in order. clip: (S,) int64, of which clip or sound a
    token is, counted in the order of the prompt, a clip and its sound as one; -1 for text and images.
    """

    positions: Tensor
    next_position: float
    image: Tensor
    video: Tensor
    audio: Tensor
    clip: Tensor

    @property
    def counts(self) -> dict[str, int]:
        media = {name: len(getattr(self, name)) for name in ("image", "video", "audio")}
        return {"text": self.positions.shape[1] - sum(media.values()), **media}


def layout(inputs: Inputs, config: OmniConfig) -> Layout:
    """Reads the prompt from left to right. Raises InputError where its placeholders do not match the media.

    Text counts on by one from the largest position of the run before it. A clip's frames advance by real
    time at `positions_per_second`, in Qwen2.5-Omni rounded down; its sound, where it has one, starts at the same
    position and the two are interleaved in one block of placeholders.
    """
    inputs.check_seconds()  # fields may have been set since they were checked
    ids = inputs.input_ids[0].cpu()
    vocab_size = config.decoder.vocab_size
    if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise InputError(f"input_ids must be token ids from 0 to {vocab_size - 1}: is this the model's tokenizer?")
    tokens = config.token_ids
    kinds = torch.zeros_like(ids)
    for kind, token in ((IMAGE, tokens.image), (VIDEO, tokens.video), (AUDIO, tokens.audio)):
        kinds[ids == token] = kind
    if inputs.input_features is not None and inputs.input_features.shape[1] != config.audio.num_mel_bins:
        raise InputError(
            f"input_features has {inputs.input_features.shape[1]} mel bins but the model takes "
            f"{config.audio.num_mel_bins}."
        )
    lengths = inputs.mel_lengths.tolist()
    sounds = [config.audio.token_count(frames) for frames in lengths]
    if 0 in sounds:
        number = sounds.index(0)
        raise InputError(
            f"sound {number + 1} is too short for a single audio token: {lengths[number]} frames. Leave it out."
        )
    counts = {
        IMAGE: _token_counts(inputs.image_grid_thw, config),
        VIDEO: _token_counts(inputs.video_grid_thw, config),
        AUDIO: sounds,
    }
    for kind, name in ((IMAGE, "image"), (VIDEO, "video"), (AUDIO, "audio")):
        found, given = int((kinds == kind).sum()), sum(counts[kind])
        if found != given:
            raise InputError(f"the prompt has {found} {name} placeholders but its media make {given} tokens.")
    media = {
        IMAGE: _vision_positions(inputs.image_grid_thw, None, config),
        VIDEO: _vision_positions(inputs.video_grid_thw, inputs.video_second_per_grid, config),
        AUDIO: [torch.arange(count).expand(3, -1) for count in sounds],
    }
    _check_patches("pixel_values", inputs, inputs.image_grid_thw, config)
    _check_patches("pixel_values_videos", inputs, inputs.video_grid_thw, config)

    positions, clip = _walk(ids, kinds, {kind: deque(blocks) for kind, blocks in media.items()}, config)
    length = len(ids)
    return Layout(
        positions=positions,
        # By way of the distance from the length, as the public code keeps it while decoding.
        next_position=length + (positions.max() + 1 - length).item(),
        image=(kinds == IMAGE).nonzero().flatten(),
        video=(kinds == VIDEO).nonzero().flatten(),
        audio=(kinds == AUDIO).nonzero().flatten(),
        clip=clip,
    )


def _walk(ids: Tensor, kinds: Tensor, queues: dict[int, deque[Tensor]], config: OmniConfig) -> tuple[Tensor, Tensor]:
    """(3, S) positions and (S,) clips. queues: (3, tokens) from zero of every medium, by kind.

    A medium stands between marks, a clip with sound between two and two: there the picture's mark comes first.
    Sums are in the public code's order, on which they depend in float32.
    """
    is_mark = (ids == config.token_ids.vision_start) | (ids == config.token_ids.audio_start)
    opens = F.pad(is_mark[:-1] & (kinds[1:] > 0), (0, 1))
    opens_both = F.pad((ids[:-1] == config.token_ids.vision_start) & (ids[1:] == config.token_ids.audio_start), (0, 1))
    stops = ((kinds > 0) | opens | opens_both).nonzero().flatten()

    def stop_after(place: int) -> int:
        at = int(torch.searchsorted(stops, place))
        return int(stops[at]) if at < len(stops) else len(ids)

    positions = torch.empty(3, len(ids), dtype=_dtype(config))
    clip, clips = torch.full((len(ids),), -1), 0
    place, start = 0, positions.new_zeros(())  # the next token and its position
    while place < len(ids):
        marks = 2 if opens_both[place] else int(opens[place])
        if not marks and not kinds[place]:
            end = stop_after(place)
            positions[:, place:end] = torch.arange(end - place) + start
            place, start = end, start + (end - place)
            continue
        # Both marks of a clip with sound share a position in Qwen2.5-Omni.
        span = marks if config.family == QWEN3 else min(marks, 1)
        steps = torch.arange(marks).clamp(max=span - 1)
        first = place + marks
        positions[:, place:first] = steps + start
        if marks == 2:
            frames, sound = (_take(queues, kind) for kind in (VIDEO, AUDIO))
            block, run = _interleave(frames, sound, kinds[first:], config, start + span)
        else:
            kind = int(kinds[first])
            block, run = _take(queues, kind) + (start + span), 0
            _require(kinds[first : first + block.shape[1]], kind, block.shape[1])
        end = first + block.shape[1]
        positions[:, first:end] = block
        if marks == 2 or kind != IMAGE:
            clip[first:end] = clips
            clips += 1
        start = block[:, run:].max() + 1
        place = min(end + marks, stop_after(end))  # as many marks close
        if place > end:
            positions[:, end:place] = steps[: place - end] + start
            start = positions[0, place - 1] + 1
    return positions, clip


def _interleave(frames: Tensor, sound: Tensor, kinds: Tensor, config: OmniConfig, start: Tensor) -> tuple[Tensor, int]:
    """(3, n + m) of a clip's n frame and m audio tokens, and where the last run of one of the two begins.

    What follows counts on from that run, be it frames or sound, and not from the furthest position.
    frames, sound: (3, n), (3, m) from zero. kinds: of the prompt's tokens from the block's first on.
    """
    kinds = kinds[: frames.shape[1] + sound.shape[1]]
    is_frame, is_sound = kinds == VIDEO, kinds == AUDIO
    if int(is_frame.sum()) != frames.shape[1] or int(is_sound.sum()) != sound.shape[1]:
        raise _wrong_block()
    # As the public models: by the positions, whatever their places hold. Rounding may have sorted the ids otherwise.
    # Qwen3-Omni sorts them where they are in the prompt, in float32 there.
    begin = start if config.family == QWEN3 else 0
    is_frame = take_turns(frames[0] + begin, sound[0] + begin, config)
    frames, sound = frames + start, sound + start
    block = frames.new_empty(3, len(kinds))
    block.index_copy_(1, is_frame.nonzero().flatten(), frames)
    block.index_copy_(1, is_frame.logical_not().nonzero().flatten(), sound)
    changes = (is_frame != is_frame[-1]).nonzero().flatten()
    return block, int(changes[-1]) + 1 if len(changes) else 0


def _dtype(config: OmniConfig) -> torch.dtype:
    return torch.float32 if config.family == QWEN3 else torch.long


def _take(queues: dict[int, deque[Tensor]], kind: int) -> Tensor:
    if not queues[kind]:
        raise InputError("the prompt has more media blocks than media: check its placeholders.")
    return queues[kind].popleft()


def _require(found: Tensor, kind: int, count: int) -> None:
    if len(found) != count or bool((found != kind).any()):
        raise _wrong_block()


def _wrong_block() -> InputError:
    return InputError("a media block of the prompt is not as long as its media: check its placeholders.")


def _token_counts(grid_thw: Tensor | None, config: OmniConfig) -> list[int]:
    """Per picture or clip, whatever its grid says: before anything is made that is as large."""
    merge = config.vision.spatial_merge_size
    counts = []
    for grids, height, width in [] if grid_thw is None else grid_thw.tolist():
        if height % merge or width % merge:
            raise InputError(f"a grid of {height} x {width} patches is no multiple of {merge} x {merge}.")
        counts.append(grids * height * width // merge**2)
    return counts


def _vision_positions(grid_thw: Tensor | None, seconds: Tensor | None, config: OmniConfig) -> list[Tensor]:
    """Per picture or clip, (3, tokens) from zero; `seconds` (n,) between temporal grids, None for pictures."""
    if grid_thw is None:
        return []
    blocks = []
    merge = config.vision.spatial_merge_size
    for index, (grids, height, width) in enumerate(grid_thw.tolist()):
        # In float32, as in the public code; long() rounds down.
        step = torch.tensor(1.0) if seconds is None else seconds[index].cpu().float()
        time = (torch.arange(grids) * step * config.positions_per_second).to(_dtype(config))
        axes = (time, torch.arange(height // merge).to(time), torch.arange(width // merge).to(time))
        blocks.append(torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]))
    return blocks


def _check_patches(name: str, inputs: Inputs, grid_thw: Tensor | None, config: OmniConfig) -> None:
    patches = inputs.held(name)
    if patches is None or grid_thw is None:
        return
    if isinstance(patches, Pixels) and not torch.equal(patches.grid_thw, grid_thw.cpu()):
        raise InputError(f"{name} has frames of {patches.grid_thw.tolist()} patches, but its grid_thw says other.")
    expected = (int(grid_thw.prod(dim=1).sum()), config.vision.patch_dim)
    if tuple(patches.shape) != expected:
        raise InputError(f"{name} is {tuple(patches.shape)} but its grid_thw asks for {expected}.")
