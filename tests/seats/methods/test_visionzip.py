"""VisionZip against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import media
from torch import Tensor

from seats.methods.visionzip import VisionZip, window_counts, zipped


def zip_by_loop(features: Tensor, received: Tensor, keys: Tensor, ratio: float) -> tuple[list[int], Tensor]:
    """One window: what stays, and all embeddings after merging."""
    n = len(features)
    share = ratio - 0.05
    dominant = 0
    if share > 0:
        dominant = min(n, max(1, int(float(torch.tensor(share, dtype=torch.float32) * torch.tensor(float(n))))))
    contextual = min(n - dominant, max(1, round(0.05 * n)))
    kept = sorted(range(n), key=lambda i: -float(received[i]))[:dominant]
    rest = [i for i in range(n) if i not in kept]
    merged = features.clone()
    if contextual:
        step = max(1, len(rest) // contextual)
        anchors = rest[::step][:contextual]
        members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
        norms = [keys[i] / (keys[i].norm() + 1e-6) for i in range(n)]
        for i in rest:
            if i not in members:
                members[max(anchors, key=lambda a: float(norms[i] @ norms[a]))].append(i)
        for anchor, joined in members.items():
            if joined:
                merged[anchor] = features[anchor] + features[joined].mean(0)
        kept = kept + anchors
    return sorted(kept), merged


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    ratio=st.floats(0.01, 1),
)
def test_windows(seed: int, sizes: list[int], ratio: float) -> None:
    whole = media(seed, [sizes], 60, empty=1)
    kept = zipped(whole, ratio)
    assert whole.keys is not None and kept.features is not None
    for window, size in enumerate(sizes):
        parts = (part[0, window, :size] for part in (whole.features, whole.received, whole.keys))
        chosen, merged = zip_by_loop(*parts, ratio)
        assert kept.keep[0, window].nonzero().flatten().tolist() == chosen
        torch.testing.assert_close(kept.features[0, window, chosen], merged[chosen])


def test_dominant_counts_are_truncated_in_single_precision() -> None:
    """0.65 of 40 is 26 there, and 25.99… in double."""
    assert int((0.7 - 0.05) * 40) == 25
    dominant, contextual = window_counts(torch.tensor([[40, 0, 1]]), 0.7)
    assert dominant.tolist() == [[26, 0, 1]]
    assert contextual.tolist() == [[2, 0, 0]]


def test_ratio_of_each_prompt() -> None:
    """The plain one takes the whole budget from video: prompts with more sound keep less of it."""
    video, audio = media(0, [[40] * 5, [40] * 5], 40), media(1, [[20], [50] * 2], 50)
    method = VisionZip(video_ratio=0.5, audio_ratio=0.6, both=False)
    kept_video, kept_audio = method.before(video, audio)
    assert kept_video is not None and kept_audio is not None
    assert kept_audio.keep.sum(dim=(1, 2)).tolist() == [20, 100]
    # (200 · 0.5 + 20 · 0.6 - 20) / 200 = 0.46 and (100 + 60 - 100) / 200 = 0.3, rounded in every grid.
    assert kept_video.keep.sum(dim=(1, 2)).tolist() == [5 * (16 + 2), 5 * (10 + 2)]
    assert method.entering([40] * 5, [20])[0] == 110


def test_keys_are_needed() -> None:
    assert VisionZip(video_ratio=0.5, audio_ratio=0.5).needs is not None
    with pytest.raises(AssertionError):
        whole = media(0, [[4]], 4)
        whole.keys = None
        zipped(whole, 0.5)
