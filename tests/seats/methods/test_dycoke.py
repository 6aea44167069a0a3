"""DyCoke against its definition in loops."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import media
from torch import Tensor

from seats.methods.dycoke import DyCoke


def similarity(a: Tensor, b: Tensor) -> list[float]:
    return [float(x @ y / (x.norm() * y.norm())) for x, y in zip(a, b, strict=True)]


def keep_by_loop(frames: list[Tensor], ratio: float) -> list[list[int]]:
    """What stays of each frame when of all `ratio` shall."""
    others = [number - {0: 0, 1: 1, 2: 2, 3: 1}[number % 4] for number in range(len(frames))]
    whole = [number % 4 == 0 or len(frames[o]) != len(frames[number]) for number, o in enumerate(others)]
    tokens, stay = sum(map(len, frames)), sum(len(frame) for frame, w in zip(frames, whole, strict=True) if w)
    share = max(0.0, ratio * tokens - stay) / max(1, tokens - stay)
    kept = []
    for number, frame in enumerate(frames):
        if whole[number]:
            kept.append(list(range(len(frame))))
            continue
        alike = similarity(frame, frames[others[number]])
        kept.append(sorted(sorted(range(len(frame)), key=lambda i: alike[i])[: int(share * len(frame))]))
    return kept


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.sampled_from([6, 9]), min_size=1, max_size=10),
    ratio=st.floats(0.25, 1),
)
def test_fours(seed: int, sizes: list[int], ratio: float) -> None:
    """Without sound, video has its own ratio; frames of two sizes and groups that end early among them."""
    video = media(seed, [sizes], 9, empty=2)
    kept, _ = DyCoke(video_ratio=ratio, audio_ratio=0.5).before(video, None)
    assert kept is not None
    expected = keep_by_loop([video.features[0, w, :n] for w, n in enumerate(sizes)], ratio)
    assert [row.nonzero().flatten().tolist() for row in kept.keep[0][: len(sizes)]] == expected


@settings(max_examples=60)
@given(grids=st.integers(1, 40), ratios=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)), seconds=st.integers(0, 40))
def test_the_budget_holds(grids: int, ratios: tuple[float, float], seconds: int) -> None:
    """Whatever the number of grids: ceil(T / 4) of them are whole, and no more is kept than was asked for, or the
    prompt is refused."""
    video, audio = [16] * grids, [25] * seconds
    budget = int(ratios[0] * 16 * grids + ratios[1] * 25 * seconds)
    method = DyCoke(video_ratio=ratios[0], audio_ratio=ratios[1])
    whole = 16 * -(-grids // 4)
    try:
        promised, _ = method.entering(video, audio)
    except ValueError:
        assert whole > budget
        return
    assert whole <= promised <= budget + 1
    kept = method.before(media(0, [video], 16), media(1, [audio], 25) if seconds else None)
    assert sum(int(each.keep.sum()) for each in kept if each is not None) == promised


def test_33_grids_at_25_percent() -> None:
    """A clip of 33 grids of 144 tokens and its 825 of sound, at the ratios of an overall 25 %."""
    method = DyCoke(video_ratio=0.20, audio_ratio=0.55)
    assert int(0.20 * 33 * 144 + 0.55 * 825) == 1404
    assert method.entering([144] * 33, [50] * 16 + [25]) == (1404, 0)
    with pytest.raises(ValueError, match=r"DyCoke keeps 27% of video at least, more than 25% of video"):
        DyCoke(video_ratio=0.25, audio_ratio=0.25).entering([144] * 33, [])


def test_sound_gives_what_video_cannot() -> None:
    """A quarter of the video stays at least; where sound has too little for that, it is said."""
    method = DyCoke(video_ratio=0.06, audio_ratio=0.35)
    video, audio = media(0, [[16] * 8], 16), media(1, [[50] * 4], 50)
    kept_video, kept_audio = method.before(video, audio)
    assert kept_video is not None and kept_audio is not None
    assert int(kept_video.keep.sum()) == 32
    assert int(kept_audio.keep.sum()) == int(0.06 * 128 + 0.35 * 200) - 32
    with pytest.raises(ValueError, match="DyCoke keeps 25% of video at least, more than 6% of video and 35%"):
        method.entering([144] * 8, [50])
    with pytest.raises(ValueError, match="ask for more"):
        method.entering([144] * 8, [])
