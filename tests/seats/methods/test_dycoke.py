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
    """What stays of each frame when of four alike `ratio` shall."""
    kept = []
    for number, frame in enumerate(frames):
        other = {0: number, 1: number - 1, 2: number - 2, 3: number - 1}[number % 4]
        if other == number or len(frames[other]) != len(frame):
            kept.append(list(range(len(frame))))
            continue
        alike = similarity(frame, frames[other])
        count = int((ratio - 0.25) / 0.75 * len(frame))
        kept.append(sorted(sorted(range(len(frame)), key=lambda i: alike[i])[:count]))
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
