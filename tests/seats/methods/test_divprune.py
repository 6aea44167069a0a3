"""DivPrune against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import flat, media, picked
from torch import Tensor

from seats.methods import divprune
from seats.methods.divprune import DivPrune


def pick_by_loop(features: Tensor, count: int) -> list[int]:
    """All of a modality, with the whole matrix of distances."""
    x = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    distances = 1 - x @ x.T
    n = len(x)
    if n == 1:
        return [0]
    nearest = [sorted(float(distances[i, j]) for i in range(n))[1] for j in range(n)]
    chosen = [max(range(n), key=lambda j: nearest[j])]
    while len(chosen) < count:
        rest = [j for j in range(n) if j not in chosen]
        chosen.append(max(rest, key=lambda j: min(float(distances[i, j]) for i in chosen)))
    return sorted(chosen)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    windows=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    ratio=st.floats(0.01, 1),
)
def test_the_whole_clip_is_one_set(seed: int, windows: list[int], ratio: float) -> None:
    video = media(seed, [windows], 9, empty=1)
    kept, _ = DivPrune(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    count = max(1, min(sum(windows), round(ratio * sum(windows))))
    assert picked(kept, video, 0) == pick_by_loop(flat(video, 0, "features"), count)


def test_blocks_change_nothing() -> None:
    """However many tokens look for their neighbours at a time."""
    video = media(1, [[9] * 6, [9] * 4], 9)
    method = DivPrune(video_ratio=0.3, audio_ratio=0.5)
    whole, _ = method.before(video, None)
    before, divprune.BLOCK = divprune.BLOCK, 7
    try:
        parts, _ = method.before(video, None)
    finally:
        divprune.BLOCK = before
    assert whole is not None and parts is not None
    assert torch.equal(whole.keep, parts.keep)


def test_copies_are_not_picked_twice() -> None:
    """Of equal tokens, as many as are asked for stay, each once."""
    video = media(2, [[8, 8]], 8)
    video.features[:] = video.features[:, :1, :1]
    kept, _ = DivPrune(video_ratio=0.5, audio_ratio=0.5).before(video, None)
    assert kept is not None
    assert int(kept.keep.sum()) == 8


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    windows=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    sound=st.lists(st.integers(1, 9), max_size=3),
    ratio=st.floats(0.01, 1),
    both=st.booleans(),
)
def test_no_more_picks_than_may_be_needed(
    seed: int, windows: list[int], sound: list[int], ratio: float, both: bool
) -> None:
    """Protects: a GPU does as many picks as are planned, of which all but those needed are for nothing."""
    steps: list[tuple[int, int, int]] = []
    pick = divprune.farthest

    def watched(features: Tensor, there: Tensor, counts: Tensor, most: int) -> Tensor:
        steps.append((int(counts.max()), most, there.shape[1]))
        return pick(features, there, counts, most)

    video, audio = media(seed, [windows], 9, empty=1), media(seed, [sound], 9) if sound else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divprune, "farthest", watched)
        DivPrune(video_ratio=ratio, audio_ratio=ratio, both=both).before(video, audio)
    for needed, planned, slots in steps:
        assert needed <= planned <= max(1, round(max(ratio, 0.05) * slots))
