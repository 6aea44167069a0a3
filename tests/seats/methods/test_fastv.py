"""FastV: the share after its layer, what stays, what it cannot do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seats.counts import Counts
from seats.method import Step
from seats.methods.fastv import FastV
from seats.selection import AUDIO, PADDING, TEXT, VIDEO


def keep_by_loop(scores: list[float], kind: list[int], video: float, audio: float) -> list[int]:
    kept = [i for i, each in enumerate(kind) if each == TEXT]
    for medium, ratio in ((VIDEO, video), (AUDIO, audio)):
        there = [i for i, each in enumerate(kind) if each == medium]
        if there:
            there.sort(key=lambda i: (-scores[i], i))
            kept += there[: max(1, min(len(there), round(ratio * len(there))))]
    return sorted(kept)


KINDS = st.lists(st.sampled_from([TEXT, VIDEO, AUDIO]), min_size=1, max_size=40)


@settings(max_examples=100)
@given(seed=st.integers(0, 2**16), kind=KINDS, video=st.floats(0.01, 1), audio=st.floats(0.01, 1))
def test_the_most_relevant_of_each_modality(seed: int, kind: list[int], video: float, audio: float) -> None:
    """Of the whole sequence, padding aside; and no more than the next segment has slots for."""
    scores = torch.rand(len(kind) + 2, generator=torch.Generator().manual_seed(seed))
    step = Step(2, video, audio)
    kinds = torch.tensor([[*kind, PADDING, PADDING]], dtype=torch.uint8)
    keep = FastV(video_ratio=0.5, audio_ratio=0.5).after(scores[None], kinds, step, 1)[0]
    assert keep.nonzero().flatten().tolist() == keep_by_loop(scores.tolist(), kind, video, audio)
    holds(FastV(video_ratio=0.5, audio_ratio=0.5), kind, step, int(keep.sum()))


@settings(max_examples=100)
@given(seed=st.integers(0, 2**16), kind=KINDS, video=st.floats(0.01, 1), audio=st.floats(0.01, 1))
def test_sound_intact(seed: int, kind: list[int], video: float, audio: float) -> None:
    """The budget is the same to within a token for each modality; sound goes only where video is at its floor."""
    method = FastV(video_ratio=0.5, audio_ratio=0.5, both=False)
    step = Step(2, video, audio)
    scores = torch.rand(1, len(kind), generator=torch.Generator().manual_seed(seed))
    kinds = torch.tensor([kind], dtype=torch.uint8)
    keep = method.after(scores, kinds, step, 1)[0]
    videos, sounds = kind.count(VIDEO), kind.count(AUDIO)
    left, heard = (int((keep & (kinds[0] == medium)).sum()) for medium in (VIDEO, AUDIO))
    if videos and sounds:
        total = int(videos * video + sounds * audio)
        assert abs(left + heard - max(total, 2)) <= 2
        assert heard == sounds or left <= max(1, round(0.05 * videos)) or left == videos
    holds(method, kind, step, int(keep.sum()))


def holds(method: FastV, kind: list[int], step: Step, kept: int) -> None:
    media, audio = len(kind) - kind.count(TEXT), kind.count(AUDIO)
    if media:
        counts = Counts(kind.count(TEXT), len(kind), audio, 1, media, 1, 1, 1)
        assert kept - kind.count(TEXT) <= method.left(media, step, counts)
        more = Counts(kind.count(TEXT), len(kind) + 9, audio + 5, 1, media, 1, 1, 1)  # a plan of larger prompts
        assert kept - kind.count(TEXT) <= method.left(media + 9, step, more)


def test_the_share_makes_up_for_the_layers_before() -> None:
    """2 of 28 layers at everything and 26 at the share are the average that was asked for."""
    (step,) = FastV(video_ratio=0.3, audio_ratio=0.65).steps(28)
    assert step.layer == 2
    assert step.video == pytest.approx(0.2462, abs=1e-4) and step.audio == pytest.approx(0.6231, abs=1e-4)


def test_what_it_cannot_reach() -> None:
    """10 % of Qwen2.5-Omni-7B's preset is below what two full layers cost."""
    method = FastV(video_ratio=0.06, audio_ratio=0.35)
    with pytest.raises(ValueError, match=r"FastV cannot keep 6% of video on average: the first 2 of 28 .* 7\.1% alone"):
        method.check(28)
    method.check(36)
    with pytest.raises(ValueError, match="layer 2 must come before the last of the model's 2 layers"):
        method.check(2)
    with pytest.raises(ValueError, match="layer must be at least 1"):
        FastV(video_ratio=0.5, audio_ratio=0.5, layer=0)
