"""What is known by count alone: the decay schedule and multiply-accumulates."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise
from operator import mul
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seats import keep_ratios, prefill_macs

SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 100}


def test_schedule_equals_golden(golden: Path) -> None:
    for case in json.loads((golden / "schedule.json").read_text()):
        for modality in ("video", "audio"):
            target = case[f"{modality}_ratio"]
            encoder = min(1.0, case["encoder_ratio_scale"] * target)
            layers = case["drop_layers"], case["late_block_layer"], case["num_layers"]
            assert keep_ratios(target, encoder, *layers) == case[f"{modality}_keep"], case


@given(
    target=st.floats(0.02, 1),
    scale=st.floats(1, 2),
    drops=st.sets(st.integers(1, 20), min_size=1, max_size=4).map(sorted),
    tail=st.integers(2, 12),
    late=st.booleans(),
)
def test_schedule_meets_the_target_on_average(
    target: float, scale: float, drops: list[int], tail: int, late: bool
) -> None:
    """The levels fall and, unless clamped, average to the target over all layers."""
    num_layers = drops[-1] + tail
    removal = num_layers - 1 if late else num_layers
    if drops[-1] >= removal:
        return
    encoder = min(1.0, scale * target)
    ratios = keep_ratios(target, encoder, drops, removal + 1 if late else None, num_layers)
    assert len(ratios) == len(drops)
    assert all(0 <= ratio <= 1 for ratio in ratios)
    assert sorted(ratios, reverse=True) == ratios
    levels = accumulate([encoder, *ratios], mul)
    seen = sum(
        level * (end - start) for level, (start, end) in zip(levels, pairwise([0, *drops, removal]), strict=True)
    )
    if ratios[-1] == 0:  # as much as can fall has fallen
        assert seen >= (target - 1e-3) * num_layers
    elif ratios[0] == 1:
        assert seen <= (target + 1e-3) * num_layers
    else:
        assert seen == pytest.approx(target * num_layers, abs=1e-3 * num_layers)


def test_drops_at_or_past_the_removal_have_no_ratio() -> None:
    assert keep_ratios(0.3, 0.42, [16, 18, 20, 23, 25], 24, 28) == keep_ratios(0.3, 0.42, [16, 18, 20], 24, 28)
    assert keep_ratios(0.3, 0.42, [28], None, 28) == []


def test_macs_equal_golden(golden: Path) -> None:
    for case in json.loads((golden / "macs.json").read_text()):
        assert prefill_macs(case["seq_len"], case["drop_events"], **case["dims"]) == case["macs"], case


def test_macs_of_one_layer_by_hand() -> None:
    """8 channels, key and value rows of 4: q and output 64 each, k and v 32 each, MLP 3 · 96; 5 tokens."""
    by_hand = 5 * (2 * 64 + 2 * 32 + 3 * 96) + 2 * 5 * 5 * 8 + 5 * 8 * 100
    assert prefill_macs(5, [], num_layers=1, **SIZES) == by_hand


def test_macs_with_heads_wider_than_the_residual() -> None:
    """Heads of 6 channels make rows of 24 and 12."""
    by_hand = 5 * (2 * 8 * 24 + 2 * 8 * 12 + 3 * 96) + 2 * 5 * 5 * 24 + 5 * 8 * 100
    assert prefill_macs(5, [], num_layers=1, head_dim=6, **SIZES) == by_hand


def test_macs_after_a_drop_count_fewer_tokens() -> None:
    """A drop after layer 0 leaves the later layers and the head with the shorter sequence."""
    whole, short = (prefill_macs(n, [], num_layers=2, **SIZES) for n in (5, 3))
    first = prefill_macs(5, [], num_layers=1, **SIZES) - prefill_macs(5, [], num_layers=0, **SIZES)
    first_short = prefill_macs(3, [], num_layers=1, **SIZES) - prefill_macs(3, [], num_layers=0, **SIZES)
    assert prefill_macs(5, [(0, 3)], num_layers=2, **SIZES) == first + short - first_short < whole
