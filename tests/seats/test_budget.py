"""Budgets: the closed forms equal the plain loops of the method."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seats.budget import keep_counts, pour, split_budgets, window_budgets


def balance_by_loop(budgets: list[int], tokens: list[int], keep: int) -> list[int]:
    budgets = list(budgets)
    while sum(budgets) > keep:
        above = [w for w, budget in enumerate(budgets) if budget > 1]
        if not above:
            break
        budgets[max(above, key=lambda w: (budgets[w], -w))] -= 1
    while sum(budgets) < keep:
        below = [w for w, budget in enumerate(budgets) if budget < tokens[w]]
        if not below:
            break
        budgets[min(below, key=lambda w: (budgets[w], w))] += 1
    return budgets


def split_by_hand(budget: int, for_video: int, video: int, audio: int) -> tuple[int, int]:
    keep_video = min(video, for_video)
    keep_audio = min(audio, budget - keep_video)
    left = budget - keep_video - keep_audio
    more = min(left, video - keep_video)
    keep_video, left = keep_video + more, left - more
    keep_audio += min(left, audio - keep_audio)
    if video > 0 and keep_video == 0:
        keep_video = 1
        if keep_audio > 1:
            keep_audio = max(1, min(audio, budget - 1))
    if audio > 0 and keep_audio == 0:
        keep_audio = 1
        if keep_video > 1:
            keep_video = max(1, min(video, budget - 1))
    return keep_video, keep_audio


@settings(max_examples=400)
@given(st.data())
def test_water_filling_equals_the_loop(data: st.DataObject) -> None:
    """From any shares and any number to keep, padded with windows that are not there."""
    tokens = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    weights = data.draw(st.lists(st.integers(0, 20), min_size=len(tokens), max_size=len(tokens)))
    keep = data.draw(st.integers(1, sum(tokens)))
    shares = torch.tensor(weights, dtype=torch.float32) / max(1, sum(weights))
    started = [min(n, max(1, round(float(keep * share)))) for n, share in zip(tokens, shares, strict=True)]
    absent = data.draw(st.integers(0, 3))
    result = window_budgets(
        torch.cat((shares, torch.zeros(absent)))[None], torch.tensor([tokens + [0] * absent]), torch.tensor([keep])
    )
    assert result[0].tolist() == balance_by_loop(started, tokens, keep) + [0] * absent


@given(st.data())
def test_pouring_stops_at_the_caps(data: st.DataObject) -> None:
    """More than there is room for fills every window; the rest is not given."""
    sizes = data.draw(st.lists(st.tuples(st.integers(-5, 9), st.integers(0, 9)), min_size=1, max_size=9))
    levels = torch.tensor([[level for level, _ in sizes]])
    caps = levels + torch.tensor([[room for _, room in sizes]])
    room = int((caps - levels).sum())
    amount = data.draw(st.integers(0, room + 5))
    filled = pour(levels, caps, torch.tensor([amount]))
    assert int((filled - levels).sum()) == min(amount, room)
    assert ((levels <= filled) & (filled <= caps)).all()


@settings(max_examples=300)
@given(video=st.integers(0, 12), audio=st.integers(0, 12), share=st.floats(0, 1, width=32), data=st.data())
def test_split_equals_the_method_step_by_step(video: int, audio: int, share: float, data: st.DataObject) -> None:
    if not video + audio:
        return
    budget = data.draw(st.integers(1, video + audio))
    video_share = torch.tensor([[share]], dtype=torch.float32)
    result = split_budgets(torch.tensor([[budget]]), video_share, torch.tensor([[video]]), torch.tensor([[audio]]))
    for_video = round((budget * video_share).item())
    assert tuple(keep.item() for keep in result) == split_by_hand(budget, for_video, video, audio)


def test_keep_counts_round_half_to_even_and_keep_one() -> None:
    tokens = torch.tensor([0, 1, 5, 7, 10])
    assert keep_counts(tokens, 0.5).tolist() == [0, 1, 2, 4, 5]
    assert keep_counts(tokens, 0.01).tolist() == [0, 1, 1, 1, 1]
    assert keep_counts(tokens, 0.0).tolist() == [0, 1, 1, 1, 1]
    assert keep_counts(tokens, 1.0).tolist() == tokens.tolist()
