"""EVS against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import described, drawn, flat, media, picked

from seats.methods.evs import EVS


def keep_by_loop(frames: list[list[list[float]]], clips: list[int], ratio: float) -> list[int]:
    """Numbers of the tokens that stay of a prompt's frames."""
    scored = []
    for t, frame in enumerate(frames):
        for i, token in enumerate(frame):
            differs = float("inf")
            if t and clips[t] == clips[t - 1] and len(frames[t - 1]) == len(frame):
                x, y = torch.tensor(token), torch.tensor(frames[t - 1][i])
                differs = 1 - float(x @ y / (x.norm() * y.norm()))
            scored.append(differs)
    count = max(len(frames[0]), int(ratio * len(scored)))
    return sorted(sorted(range(len(scored)), key=lambda n: -scored[n])[:count])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.sampled_from([5, 8]), min_size=1, max_size=7),
    ratio=st.floats(0.05, 1),
)
def test_what_differs_from_the_frame_before(seed: int, sizes: list[int], ratio: float) -> None:
    video = media(seed, [sizes], 8, empty=2)
    clips = [number // 3 for number in range(len(sizes))]
    video.clip[0, : len(sizes)] = torch.tensor(clips)
    kept, _ = EVS(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    frames = [video.features[0, t, :size].tolist() for t, size in enumerate(sizes)]
    assert picked(kept, video, 0) == keep_by_loop(frames, clips, ratio)


FIRST = list(range(12))


@pytest.mark.parametrize(
    ("ratio", "others"),
    [
        (0.1, []),
        (0.3, [23, 25, 32, 33, 49, 51, 61, 62, 66]),
        (0.45, [16, 17, 20, 21, 23, 25, 32, 33, 35, 36, 40, 43, 45, 47, 49, 50, 51, 61, 62, 66]),
    ],
)
def test_keeps_what_vllm_keeps(ratio: float, others: list[int]) -> None:
    """What `compute_retention_mask` of vllm/multimodal/evs.py, github.com/vllm-project/vllm at 094f1178, gave.

    video_size_thw (6, 6, 8), spatial_merge_size 2, q 1 - ratio: six frames of 12 tokens, of which the first stays.
    """
    video = described(drawn(1, 72, 16), width=12)
    kept, _ = EVS(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    assert picked(kept, video, 0) == FIRST + others


def test_a_still_clip_keeps_its_first_frame_and_what_moves() -> None:
    video = media(1, [[6] * 4], 6)
    video.features[:, 1:] = video.features[:, :1]
    video.features[0, 2, 4] *= -1  # it turns round, and back again
    kept, _ = EVS(video_ratio=8 / 24, audio_ratio=1.0).before(video, None)
    assert picked(kept, video, 0) == [0, 1, 2, 3, 4, 5, 16, 22]


def test_sound_gives_what_the_first_frame_needs() -> None:
    method = EVS(video_ratio=0.1, audio_ratio=0.5)
    video, audio = media(2, [[16] * 2], 16), media(3, [[50]], 50)
    kept, sound = method.before(video, audio)
    assert kept is not None and sound is not None
    assert picked(kept, video, 0) == list(range(16))
    assert int(sound.keep.sum()) == int(0.1 * 32 + 0.5 * 50) - 16 == method.entering([16] * 2, [50])[0] - 16
    with pytest.raises(ValueError, match="EVS keeps 50% of video at least, its first frame, more than 10% of video"):
        method.entering([16] * 2, [])
    assert len(flat(video, 0, "features")) == 32
