"""Media placeholders: one id of the chat template becomes as many ids as its media has tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import OmniConfig
from omni.inputs import InputError


def expand(ids: Sequence[int], blocks: Iterable[tuple[int, list[int]]]) -> list[int]:
    """Replaces each placeholder in `ids` by its block, in order.

    blocks: (placeholder id, ids that take its place) of every media part of the messages.
    Raises InputError where the template dropped or added a placeholder.
    """
    waiting = list(blocks)
    placeholders = {placeholder for placeholder, _ in waiting}
    expanded: list[int] = []
    queue = iter(waiting)
    for token in ids:
        if token not in placeholders:
            expanded.append(token)
            continue
        placeholder, block = next(queue, (None, []))
        if placeholder != token:
            raise InputError("the chat template does not keep the media in the order of the messages.")
        expanded.extend(block)
    if next(queue, None) is not None:
        raise InputError("the chat template drops a media part: use a template with its placeholders.")
    return expanded


def clip_block(
    grid_thw: Sequence[int], seconds_per_grid: float, audio_tokens: int | None, config: OmniConfig
) -> list[int]:
    """Ids of a clip: its frames, and with sound (`audio_tokens` not None) both in turns between audio marks.

    In Qwen2.5-Omni frames and sound take turns by chunks of `seconds_per_chunk` (arXiv 2503.20215, section 2.3), in
    Qwen3-Omni token by token (`take_turns`; arXiv 2509.17765, section 2.3). Equal to `replace_video_with_audio_token`
    of the public processors.
    """
    grids, height, width = grid_thw
    per_grid = height * width // config.vision.spatial_merge_size**2
    if audio_tokens is None:
        return [config.token_ids.video] * (grids * per_grid)
    # In float64 and in this order of products, so that ties fall as in the public processor.
    times = torch.arange(grids, dtype=torch.float64) * seconds_per_grid * config.positions_per_second
    sound = torch.arange(audio_tokens, dtype=torch.float64)
    is_frame = take_turns(times.repeat_interleave(per_grid), sound, config)
    block = [config.token_ids.video if frame else config.token_ids.audio for frame in is_frame.tolist()]
    return [config.token_ids.audio_start, *block, config.token_ids.audio_end]


def take_turns(frames: Tensor, sound: Tensor, config: OmniConfig) -> Tensor:
    """How a clip's frame tokens (n,) and audio tokens (m,) follow each other, by their rising times in positions.

    Qwen2.5-Omni: by chunks of `seconds_per_chunk`, the frames of each before its sound. Qwen3-Omni: by time, frames
    first where it is equal. Returns (n + m,) bool: whether the token at each place belongs to a frame.
    """
    if config.seconds_per_chunk is None:
        is_frame = torch.zeros(len(frames) + len(sound), dtype=torch.bool)
        is_frame[torch.searchsorted(sound, frames) + torch.arange(len(frames))] = True
        return is_frame
    size = int(config.positions_per_second * config.seconds_per_chunk)
    counts = [_chunks(times, size) for times in (frames, sound)]
    longest = max(map(len, counts))
    runs = torch.stack([F.pad(each, (0, longest - len(each))) for each in counts], dim=1).flatten()
    return (torch.arange(len(runs)) % 2 == 0).repeat_interleave(runs)


def _chunks(times: Tensor, size: int) -> Tensor:
    """Tokens per chunk, (chunks,) int64, from each token's time in positions, (n,), rising.

    A token that reaches the end of the chunk opens the next one, and only the next: where frames are more
    than a chunk apart, the first tokens of a frame stand alone until the chunks have caught up with the
    clock. That is how the public processor lays out clips sampled at less than half a frame per second.
    """
    ends = size * torch.arange(1, int(times.max()) // size + 2, dtype=times.dtype)
    number = torch.arange(len(times))
    # By the clock alone, and at most one more than the token before.
    behind = (torch.searchsorted(ends, times, right=True) - number).cummin(dim=0).values
    return (number + behind.clamp(max=1)).bincount()
