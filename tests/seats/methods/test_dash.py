"""DASH: what it keeps and merges is what loops over the method's text do, whatever surrounds a prompt."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import described, drawn, picked
from test_omnizip import LAYOUTS, Clip, assert_merged, clip, cosine, first_best, keep_sound, kept_rows, media, norm

from seats.diversity import BLOCK_BYTES
from seats.methods.dash import DASH, crowding, segment_begins

RATIOS = st.floats(0.02, 1)


# ---- the method's text, in loops


def bounds_of(sound: list[list[float]], method: DASH) -> list[int]:
    """Where segments of sound begin, and where the last ends."""
    begins = [0]
    for t in range(1, len(sound)):
        if cosine(sound[t - 1], sound[t]) < method.threshold and t - begins[-1] >= method.shortest:
            begins.append(t)
    return [*begins, len(sound)]


def distinctness(sound: list[list[float]]) -> list[float]:
    channels = range(len(sound[0]))
    mean = [sum(x[c] for x in sound) / len(sound) for c in channels]
    variance = [sum((x[c] - mean[c]) ** 2 for x in sound) / len(sound) for c in channels]
    steady = sorted(channels, key=lambda c: variance[c])[: len(channels) // 2]
    units = [[x[c] / norm([x[d] for d in steady]) for c in steady] for x in sound]
    centre = [sum(x[c] for x in units) / len(units) for c in range(len(steady))]
    square = [sum((a - b) ** 2 for a, b in zip(x, centre, strict=True)) for x in units]
    alike = [sum(math.exp(-d / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2)) for d in square]
    return [1 - each / max(alike) for each in alike]


def worth(one: Clip) -> list[float]:
    sound, received = one.sound.tolist(), one.received.tolist()
    change = [1.0] + [min(max((1 - cosine(x, y)) / 2, 0), 1) for x, y in pairwise(sound)]
    parts = zip(change, distinctness(sound), received, strict=True)
    return [0.4 * c / (max(change) + 1e-6) + 0.3 * d + 0.3 * r / (max(received) + 1e-6) for c, d, r in parts]


def crowd(tokens: list[list[float]]) -> list[float]:
    """Mean cosine to the five nearest."""
    near = [
        sorted((cosine(x, y) for j, y in enumerate(tokens) if j != i), reverse=True)[:5] for i, x in enumerate(tokens)
    ]
    return [sum(each) / max(1, len(each)) for each in near]


def keep_video(one: Clip, method: DASH, sound: list[int]) -> list[int]:
    starts = [sum(one.grids[:g]) for g in range(len(one.grids) + 1)]
    tokens, heard = one.video.tolist(), one.sound.tolist()
    bounds = bounds_of(heard, method) if heard else [0]
    of_video = [int(bound * (len(tokens) / max(1, len(heard)))) for bound in bounds[:-1]] or [0]
    segments = [max(k for k, bound in enumerate(of_video) if bound <= start) for start in starts[:-1]]
    kept = []
    for g, segment in enumerate(segments):
        removed = 1 - method.video_ratio
        if heard:
            share = float(torch.tensor([t in sound for t in range(*bounds[segment : segment + 2])]).float().mean())
            removed = min(max(removed + 0.1 * (0.5 - share), 0.1), 0.95)
        grid = tokens[starts[g] : starts[g + 1]]
        if (g - segments.index(segment)) % 2 == 0:
            scores = [-each for each in crowd(grid)]
        else:  # where the grid before is smaller there is nothing to be like
            before = tokens[starts[g - 1] : starts[g]]
            scores = [-cosine(x, before[i]) if i < len(before) else 0.0 for i, x in enumerate(grid)]
        kept += [starts[g] + i for i in first_best(scores, max(1, int(len(grid) * (1 - removed) + 1e-6)))]
    return sorted(kept)


# ---- tests


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    video=RATIOS,
    audio=RATIOS,
    threshold=st.sampled_from([-0.2, 0.4]),
    shortest=st.sampled_from([1, 4, 30]),
)
def test_equals_loops(
    seed: int, layouts: tuple[str, str], video: float, audio: float, threshold: float, shortest: int
) -> None:
    """Every step of the method, on two prompts at once, of other lengths, padded with NaN; and within its promise."""
    method = DASH(
        video_ratio=video, audio_ratio=audio, merged=seed % 4, threshold=threshold, shortest=shortest, neighbours=5
    )
    clips = [clip(seed + row, layout) for row, layout in enumerate(layouts)]
    frames, sound = media(clips, "v", empty=seed % 3), media(clips, "a", empty=seed % 2)
    kept_video, kept_sound = method.before(frames, sound)
    assert (kept_sound is None) == (sound is None)
    for row, one in enumerate(clips):
        wanted: list[int] = []
        changed: dict[int, list[float]] = {}
        if len(one.sound):
            wanted, changed = keep_sound(Clip(**vars(one) | {"received": torch.tensor(worth(one))}), method)
            wanted = wanted or first_best(worth(one), 1)
        of_video, of_sound = kept_rows(kept_video, frames, row), kept_rows(kept_sound, sound, row)
        assert of_sound == wanted
        assert of_video == keep_video(one, method, wanted)
        assert len(of_video) + len(of_sound) <= method.entering(one.grids, [len(one.sound)])[0]
        assert_merged(kept_sound, sound, row, one.sound, changed)


@pytest.mark.parametrize(
    ("grids", "of_video", "of_sound", "anchors"),
    [
        (
            (3, 4, 3),
            [1, 9, 14, 16, 24, 27, 42, 46, 53, 56, 63, 64, 73, 81, 85, 91, 102, 103, 115, 117],
            [0, 1, 2, 3, 6, 11, 12, 22, 25, 26, 29, 30, 42, 49, 54, 60, 70, 71, 78, 83, 84, 88, 90, 97, 99],
            {1: -0.0774, 22: -0.1861, 42: 0.9374, 60: 1.2330, 78: -0.0543},
        ),
        (
            (3, 4, 1),
            [1, 9, 14, 16, 24, 27, 42, 46, 53, 56, 63, 64, 73, 81, *range(84, 96)],
            [0, 1, 3, 6, 11, 12, 21, 25, 26, 29, 30, 41, 49, 54, 59, 70, 71, 76, 77, 79],
            {1: -0.2250, 21: -0.0121, 41: 1.0812, 59: 0.7489},
        ),
    ],
)
def test_keeps_what_the_authors_code_keeps(
    grids: tuple[int, ...], of_video: list[int], of_sound: list[int], anchors: dict[int, float]
) -> None:
    """What `dash` of dash/dash_units.py, github.com/laychou666/DASH at f8b67b31, gave for segments of so many grids.

    merging_ratio_audio 0.8, contextual_ratio 0.05, g 3, merging_ratio_v 0.76, as many frames as grids, of 12 tokens of
    video and 10 of sound. anchors: the first channel of each. A segment of one grid, which is less than two frames, it
    leaves whole: there alone we differ, and keep two.
    """
    number = torch.arange(len(grids)).repeat_interleave(torch.tensor(grids) * 10)
    frames = described(drawn(3, sum(grids) * 12, 16), width=12)
    heard = drawn(1, len(grids), 16)[number] + 0.5 * drawn(2, len(number), 16)
    sound = described(heard, drawn(4, len(number)).abs(), width=50)
    kept_video, kept_sound = DASH(video_ratio=0.24, audio_ratio=0.25).before(frames, sound)
    found = picked(kept_video, frames, 0)
    if grids[-1] == 1:
        last = 12 * (sum(grids) - 1)
        of_video = [token for token in of_video if token < last] + found[-2:]
        assert found[-2] >= last > found[-3]
    assert found == of_video
    assert picked(kept_sound, sound, 0) == of_sound
    assert kept_sound is not None and kept_sound.features is not None
    merged = kept_sound.features.flatten(0, 2)[list(anchors), 0]
    torch.testing.assert_close(merged, torch.tensor(list(anchors.values())), rtol=0, atol=1e-4)


@settings(max_examples=60)
@given(
    changes=st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=1, max_size=3),
    shortest=st.integers(1, 50),
)
def test_segments_begin_one_after_another(changes: list[list[bool]], shortest: int) -> None:
    found = segment_begins(torch.tensor(changes), shortest)
    for row, mine in zip(found.tolist(), changes, strict=True):
        last, expected = 0, [True]
        for at, change in enumerate(mine[1:], start=1):
            begins = change and at - last >= shortest
            expected.append(begins)
            last = at if begins else last
        assert row == expected


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory changes nothing, nor does what pads a window; a token alone is in no crowd."""
    sizes = torch.tensor([9, 4, 1, 9, 0])
    features = torch.randn(5, 9, 8, generator=torch.Generator().manual_seed(0))
    features[torch.arange(9) >= sizes[:, None]] = float("nan")
    whole = crowding(features, sizes, 5)
    for window, size in enumerate(sizes.tolist()):
        tokens = features[window, :size].tolist()
        torch.testing.assert_close(whole[window, :size], torch.tensor(crowd(tokens) if size else []))
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 1)
    again = crowding(features, sizes, 5)
    for window, size in enumerate(sizes.tolist()):
        torch.testing.assert_close(again[window, :size], whole[window, :size])


def test_is_a_sound_operator() -> None:
    """Schema, fake implementation and tracing agree with what it does."""
    features = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(crowding.overload, (features, torch.tensor([7, 4]), 5))


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="shortest must be at least 1, not 0"):
        DASH(video_ratio=0.5, audio_ratio=0.5, shortest=0)
    with pytest.raises(ValueError, match="least_removed and most_removed must rise"):
        DASH(video_ratio=0.5, audio_ratio=0.5, most_removed=0.05)
