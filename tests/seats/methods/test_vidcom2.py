"""VidCom2 against its definition in loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import CHANNELS, described, drawn, media, picked
from torch import Tensor

from seats.methods.vidcom2 import VidCom2


def gaussian(x: Tensor, centre: Tensor) -> float:
    square = float(((x - centre) ** 2).sum())
    return sum(math.exp(-square / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))


def keep_clip(frames: list[Tensor], ratio: float) -> list[list[int]]:
    """Tokens that stay of each frame of a clip."""
    everything = torch.cat(frames).double()
    variance = [float(everything[:, c].var(unbiased=False)) for c in range(CHANNELS)]
    channels = sorted(sorted(range(CHANNELS), key=lambda c: variance[c])[: CHANNELS // 2])
    units = [[x / x.norm() for x in frame.double()[:, channels]] for frame in frames]
    clip_mean = torch.stack([x for frame in units for x in frame]).mean(dim=0)
    to_clip = [[gaussian(x, clip_mean) for x in frame] for frame in units]
    to_frame = [[gaussian(x, torch.stack(frame).mean(dim=0)) for x in frame] for frame in units]
    stands_out = [-sum(scores) / len(scores) for scores in to_clip]
    weights = [math.exp((u - max(stands_out)) / 0.01) for u in stands_out]
    kept = []
    for t, frame in enumerate(frames):
        share = min(1.0, ratio * (1 + weights[t] / sum(weights) - 1 / len(frames)))
        count = max(1, round(share * len(frame)))
        scores = [a + b for a, b in zip(to_clip[t], to_frame[t], strict=True)]
        kept.append(sorted(sorted(range(len(frame)), key=lambda i: scores[i])[:count]))
    return kept


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    clips=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3),
    ratio=st.floats(0.05, 1),
)
def test_more_of_frames_that_stand_out(seed: int, clips: list[tuple[int, int]], ratio: float) -> None:
    """Clips of frames of several sizes in one prompt, padded."""
    sizes = [size for size, frames in clips for _ in range(frames)]
    video = media(seed, [sizes], 9, empty=2)
    number = [clip for clip, (_, frames) in enumerate(clips) for _ in range(frames)]
    video.clip[0, : len(sizes)] = torch.tensor(number)
    kept, _ = VidCom2(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    expected, at = [], 0
    for clip in range(len(clips)):
        frames = [video.features[0, w, : sizes[w]] for w in range(len(sizes)) if number[w] == clip]
        for frame, chosen in zip(frames, keep_clip(frames, ratio), strict=True):
            expected += [at + i for i in chosen]
            at += len(frame)
    assert picked(kept, video, 0) == expected


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.15, [3, 13, 16, 29, 32, 33, 41, 46, 52, 53, 66, 67, 90, 91]),
        (0.25, [3, 6, 13, 16, 25, 29, 32, 33, 34, 36, 41, 44, 46, 52, 53, 56, 66, 67, 77, 90, 91, 95]),
    ],
)
def test_keeps_what_the_authors_code_keeps(ratio: float, expected: list[int]) -> None:
    """What token_compressor/vidcom2/vidcom2.py, github.com/xuyang-liu16/VidCom2 at 944a17d1 (of the branch omni,
    19981d9e, the same file), gave: its functions in the order in which models/qwen2_5_vl.py calls them.

    base_scale is ratio, 16 tokens to a frame: five frames about one thing and, third, one about another, which keeps 4
    where the others keep 2, and 7 where they keep 3.
    """
    alike = (0.3 * drawn(1, 80, 16) + drawn(5, 1, 16)).view(5, 16, 16)
    video = described(torch.cat((alike[:2], drawn(3, 1, 16, 16), alike[2:])).flatten(0, 1), width=16)
    kept, _ = VidCom2(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    assert picked(kept, video, 0) == expected


def test_the_frame_that_stands_out_keeps_most() -> None:
    """Of six frames about one thing and one about another, at a quarter: near twice as much of that."""
    video = media(3, [[16] * 7], 16)
    video.features[:] = video.features * 0.05 + torch.linspace(-1, 1, CHANNELS)
    video.features[0, 4] = torch.randn(16, CHANNELS, generator=torch.Generator().manual_seed(0))
    kept, _ = VidCom2(video_ratio=0.25, audio_ratio=0.5).before(video, None)
    assert kept is not None
    counts = kept.keep[0].sum(dim=-1).tolist()
    assert counts[4] == max(counts) == 7 and set(counts) == {3, 7}
