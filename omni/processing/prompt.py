"""Media placeholders: one id of the chat template becomes as many ids as its media has tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
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
    if config.seconds_per_chunk is None:
        # In float64 and in this order of products, so that ties fall as in the public processor.
        times = torch.arange(grids, dtype=torch.float64) * seconds_per_grid * config.positions_per_second
        is_frame = take_turns(times.repeat_interleave(per_grid), torch.arange(audio_tokens, dtype=torch.float64))
        block = [config.token_ids.video if frame else config.token_ids.audio for frame in is_frame.tolist()]
        return [config.token_ids.audio_start, *block, config.token_ids.audio_end]
    size = int(config.positions_per_second * config.seconds_per_chunk)
    step = seconds_per_grid * config.positions_per_second
    frames = _chunks((grid * step for grid in range(grids) for _ in range(per_grid)), size)
    sound = _chunks(range(audio_tokens), size)
    block = [config.token_ids.audio_start]
    for chunk in range(max(len(frames), len(sound))):
        block += [config.token_ids.video] * (frames[chunk] if chunk < len(frames) else 0)
        block += [config.token_ids.audio] * (sound[chunk] if chunk < len(sound) else 0)
    return [*block, config.token_ids.audio_end]


def take_turns(frames: Tensor, sound: Tensor) -> Tensor:
    """Merges the rising times of a clip's frame tokens (n,) and audio tokens (m,), frames first where they are equal.

    Returns (n + m,) bool: whether the token at each place belongs to a frame.
    """
    is_frame = torch.zeros(len(frames) + len(sound), dtype=torch.bool)
    is_frame[torch.searchsorted(sound, frames) + torch.arange(len(frames))] = True
    return is_frame


def _chunks(times: Iterable[float], size: int) -> list[int]:
    """Tokens per chunk, from each token's time in positions.

    A token that reaches the end of the chunk opens the next one, and only the next: where frames are more
    than a chunk apart, the first tokens of a frame stand alone until the chunks have caught up with the
    clock. That is how the public processor lays out clips sampled at less than half a frame per second.
    """

    def lengths() -> Iterator[int]:
        length, chunk = 0, 1
        for time in times:
            if time >= chunk * size:
                yield length
                length, chunk = 0, chunk + 1
            length += 1
        yield length

    return list(lengths())
