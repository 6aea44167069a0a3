"""PyramidDrop against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seats.methods.pyramiddrop import PyramidDrop
from seats.plan import Counts
from seats.selection import AUDIO, TEXT, VIDEO


@pytest.mark.parametrize("layers", [8, 28, 36, 48])
@pytest.mark.parametrize(("video", "audio"), [(0.30, 0.65), (0.46875, 0.46875), (0.9, 0.27)])
def test_the_average_is_what_was_asked_for(layers: int, video: float, audio: float) -> None:
    steps = PyramidDrop(video_ratio=video, audio_ratio=audio).steps(layers)
    assert [step.layer for step in steps] == [layers // 4, layers // 2, 3 * layers // 4]
    for name, ratio in (("video", video), ("audio", audio)):
        kept, levels = 1.0, []
        for layer in range(1, layers + 1):
            levels.append(kept)
            kept *= next((getattr(step, name) for step in steps if step.layer == layer), 1.0)
        assert sum(levels) / layers == pytest.approx(ratio)
    if video == 0.46875:  # (1 + 1/2 + 1/4 + 1/8) / 4
        assert all(step.video == pytest.approx(0.5) for step in steps)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    kinds=st.lists(st.sampled_from([TEXT, VIDEO, AUDIO]), min_size=3, max_size=60),
    ratios=st.tuples(st.floats(0.3, 1), st.floats(0.3, 1)),
)
def test_each_stage_keeps_the_most_relevant(seed: int, kinds: list[int], ratios: tuple[float, float]) -> None:
    """Stage after stage on what the last one left, within what was planned."""
    method = PyramidDrop(video_ratio=ratios[0], audio_ratio=ratios[1])
    left, generator = list(range(len(kinds))), torch.Generator().manual_seed(seed)
    sound = kinds.count(AUDIO)
    counts = Counts(kinds.count(TEXT), len(kinds), sound, 1, 1, 1, 1, 1)
    media = kinds.count(VIDEO) + sound
    for step in method.steps(28):
        scores = torch.rand(len(left), generator=generator)
        kind = torch.tensor([kinds[i] for i in left], dtype=torch.uint8)
        keep = method.after(scores[None], kind[None], step, 1)[0]
        expected = [n for n, i in enumerate(left) if kinds[i] == TEXT]
        for medium, ratio in ((VIDEO, step.video), (AUDIO, step.audio)):
            mine = [n for n, i in enumerate(left) if kinds[i] == medium]
            count = min(len(mine), max(1, round(ratio * len(mine))))
            expected += sorted(mine, key=lambda n: -float(scores[n]))[:count]
        assert keep.nonzero().flatten().tolist() == sorted(expected)
        left = [left[n] for n in sorted(expected)]
        media = method.left(media, step, counts)
        assert sum(kinds[i] != TEXT for i in left) <= media


def test_what_is_out_of_reach() -> None:
    with pytest.raises(ValueError, match="PyramidDrop cannot keep 20% of video on average: the first 7 of 28 layers"):
        PyramidDrop(video_ratio=0.20, audio_ratio=0.55).check(28)
    assert [step.layer for step in PyramidDrop(video_ratio=0.5, audio_ratio=0.5).steps(3)] == [1, 2]
    with pytest.raises(ValueError, match="the first 1 of 1 layers see every token"):
        PyramidDrop(video_ratio=0.5, audio_ratio=0.5).check(1)
