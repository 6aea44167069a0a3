"""PyramidDrop against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import drawn

from seats.methods.pyramiddrop import PyramidDrop
from seats.plan import Counts
from seats.relevance import relevance
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


def test_keeps_what_the_authors_code_keeps() -> None:
    """What `pdrop_rank_drop` of llava/model/modeling_llama_pdrop.py, github.com/Cooperx521/PyramidDrop at 6444f304,
    gave, called for its stages 0, 1 and 2 with image_token_ratio_list [1, 0.5, 0.25, 0.125].

    32 tokens of a picture after 3 of text and before 4; two heads, no norm, no rotation. At other shares counts differ
    by rounding: that code cuts off λ^k of all tokens to a whole number, here λ of those left is rounded.
    """
    hidden, left = drawn(1, 39, 8), list(range(39))
    found = []
    method = PyramidDrop(video_ratio=0.46875, audio_ratio=0.5)
    for stage, step in enumerate(method.steps(28)):
        some = hidden[left]
        query, keys = (
            (tokens @ drawn(seed + stage, 8, 8).T).view(1, -1, 2, 4).transpose(1, 2)
            for seed, tokens in ((11, some[-1:]), (21, some))
        )
        scores = relevance(query, keys, torch.ones(1, len(left), dtype=torch.bool))
        kind = torch.tensor([[VIDEO if 3 <= token < 35 else TEXT for token in left]], dtype=torch.uint8)
        keep = method.after(scores, kind, step, 1)[0]
        left = [token for token, stays in zip(left, keep.tolist(), strict=True) if stays]
        found.append([token - 3 for token in left if 3 <= token < 35])
    assert found == [
        [2, 3, 4, 6, 7, 8, 11, 12, 19, 20, 22, 24, 25, 26, 27, 29],
        [2, 3, 4, 8, 12, 25, 26, 27],
        [3, 12, 25, 27],
    ]


def test_what_is_out_of_reach() -> None:
    with pytest.raises(ValueError, match="PyramidDrop cannot keep 20% of video on average: the first 7 of 28 layers"):
        PyramidDrop(video_ratio=0.20, audio_ratio=0.55).check(28)
    assert [step.layer for step in PyramidDrop(video_ratio=0.5, audio_ratio=0.5).steps(3)] == [1, 2]
    with pytest.raises(ValueError, match="the first 1 of 1 layers see every token"):
        PyramidDrop(video_ratio=0.5, audio_ratio=0.5).check(1)
