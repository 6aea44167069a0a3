"""The highest scores, chance, and budgets that leave sound whole, against plain loops."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from seats.methods.ranking import highest, noise, part, sound_intact


@given(
    scores=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    there=st.integers(0, 2**12 - 1),
    count=st.integers(0, 14),
)
def test_highest(scores: list[int], there: int, count: int) -> None:
    """The highest of those that are there, the first of equals; NaN elsewhere changes nothing."""
    real = [bool(there >> i & 1) for i in range(len(scores))]
    values = torch.tensor([float(s) if r else float("nan") for s, r in zip(scores, real, strict=True)])
    best = sorted((i for i, r in enumerate(real) if r), key=lambda i: (-scores[i], i))[:count]
    assert highest(values, torch.tensor(real), torch.tensor(count)).nonzero().flatten().tolist() == sorted(best)


def test_noise_is_even() -> None:
    """No stretch of tokens is favoured: of a tenth kept, every tenth of the tokens has its part; no two are equal."""
    chance = noise(100_000, torch.device("cpu"))
    assert torch.equal(chance, noise(200_000, torch.device("cpu"))[:100_000])
    kept = highest(chance, torch.ones(100_000, dtype=torch.bool), torch.tensor(10_000))
    parts = kept.view(100, 1000).sum(-1)
    assert parts.min() > 60 and parts.max() < 145  # 100 expected, ± 4.5 standard deviations
    lags = [(kept[:-lag] & kept[lag:]).double().mean().item() for lag in (1, 2, 3, 25, 50, 144)]
    assert all(abs(lag - 0.01) < 0.002 for lag in lags)


def test_part_truncates() -> None:
    assert part(torch.tensor([0, 1, 10, 19]), 0.1).tolist() == [0, 1, 1, 1]
    assert part(torch.tensor([10]), torch.tensor([1.0])).tolist() == [10]


@given(
    video=st.integers(0, 500),
    audio=st.integers(0, 200),
    of_video=st.floats(0.01, 1),
    of_audio=st.floats(0.01, 1),
    floor=st.sampled_from([0.05, 0.25]),
)
def test_sound_is_left_whole_where_the_budget_allows(
    video: int, audio: int, of_video: float, of_audio: float, floor: float
) -> None:
    """By the comparison's own steps; the tokens kept are the budget's to within rounding, unless the floor is more."""
    total = int(video * of_video + audio * of_audio)
    expected = [of_video, of_audio]
    if video and audio:
        left = (total - audio) / video
        expected = [left, 1.0] if left >= floor else [floor, (total - floor * video) / audio]
        if expected[0] > 1:
            expected = [1.0, (total - video) / audio]
        expected[1] = min(1.0, expected[1])
    found = sound_intact(torch.tensor([video]), torch.tensor([audio]), of_video, of_audio, floor)
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected, dtype=torch.float64))
    if video and audio and found[1] >= 0:
        kept = float(found[0] * video + found[1] * audio)
        assert abs(kept - total) < 1e-6
