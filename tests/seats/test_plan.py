"""Plans hold what they promise, few of them serve many clips, and what a prefill costs by count."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seats
from seats.budget import keep_counts
from seats.config import PRESETS
from seats.cost import prefill_macs
from seats.counts import AUDIO_WINDOW, Counts
from seats.method import Step
from seats.plan import StagePlan, counts_of, make_plan
from seats.selection import AUDIO, TEXT, VIDEO, count_windows, select

SEATS = seats.preset("qwen2.5-omni-7b")
GRID_TOKENS = 144
MAX_FRAMES = 768


@dataclass(frozen=True)
class Family:
    """What tells how many tokens a clip has."""

    preset: str
    audio_rate: float
    """Audio tokens per second."""
    run_seconds: float
    """How long a run of video and a run of sound take in turns."""


QWEN2_5 = Family("qwen2.5-omni-7b", 25, 2)
QWEN3 = Family("qwen3-omni-30b-a3b", 13, 1)


def sizes(tokens: int, window: int) -> list[int]:
    return [window] * (tokens // window) + [tokens % window] * (tokens % window > 0)


def clip_counts(family: Family, config: seats.SeatsConfig, seconds: float, text: int) -> Counts:
    """A clip with sound at 2 frames per second."""
    grids = min(int(2 * seconds), MAX_FRAMES) // 2
    runs = -(-int(seconds * 10) // int(family.run_seconds * 10))
    return counts_of(
        config,
        text=text,
        video_sizes=sizes(grids * GRID_TOKENS, 2 * GRID_TOKENS),
        audio_sizes=sizes(int(seconds * family.audio_rate), AUDIO_WINDOW),
        windows=(runs, min(runs, grids)),
    )


def padded(plan: StagePlan, counts: Counts) -> tuple[float, float]:
    """Padding as a share of the tokens: in the first segment, and over all layers.

    Where a selection may keep a few more tokens than its ratio says, the slots for these count as padding.
    """
    media = counts.tokens - counts.text
    real = slots = 0
    for segment in plan.segments:
        width = segment.layers[1] - segment.layers[0]
        real += width * (counts.text + media)
        slots += width * segment.length
        # Both modalities keep the same share here.
        media = round(media * (segment.step.video or 0)) if segment.step else 0
    return plan.segments[0].length / counts.tokens - 1, slots / real - 1


@pytest.mark.parametrize("family", [QWEN2_5, QWEN3], ids=lambda family: family.preset)
def test_few_plans_serve_every_clip(family: Family, capsys: pytest.CaptureFixture[str]) -> None:
    """Clips with sound from 5 s to 1 h, with 10 to 500 text tokens: at most 200 plans, and a mean padding below 5 % of
    the tokens. On a logarithmic scale of durations, where short clips weigh as much as long ones, that holds for the
    first segment; over all layers it is 5 % at 35 % retention and 8 % at 10 %, where a short clip is mostly text, whose
    length has coarse rungs. The four retentions take the half seconds in turns, with four lengths of text drawn for
    each; all 3.5 million pairs were counted once: at most 199 plans. Prints the figures.
    """
    chosen = PRESETS[family.preset]
    for turn, retention in enumerate((0.35, 0.25, 0.15, 0.10)):
        config = seats.preset(family.preset, retention)
        generator = random.Random(0)
        plans: dict[Counts, StagePlan] = {}
        rows: list[tuple[float, float, float]] = []
        for seconds in (half / 2 for half in range(10 + turn, 7201, 4)):
            clip = clip_counts(family, config, seconds, 0)
            for text in generator.choices(range(10, 501), k=4):
                counts = replace(clip, text=text, tokens=clip.tokens + text)
                rounded = counts.rounded()
                if rounded not in plans:
                    plans[rounded] = make_plan(config, chosen.num_layers, rounded)
                rows.append((1 / seconds, *padded(plans[rounded], counts)))
        total = sum(weight for weight, _, _ in rows)
        first, everywhere = fmean(row[1] for row in rows), fmean(row[2] for row in rows)
        log_first, log_everywhere = (sum(row[0] * row[axis] for row in rows) / total for axis in (1, 2))
        with capsys.disabled():
            print(
                f"\n{family.preset} at {retention:.0%}: {len(set(plans.values()))} plans; mean padding over all layers "
                f"{everywhere:.1%} (first segment {first:.1%}); on a logarithmic scale {log_everywhere:.1%} "
                f"({log_first:.1%})",
                end="",
            )
        assert len(set(plans.values())) <= 200
        assert everywhere < 0.05
        assert log_first < 0.05
        assert log_everywhere < 0.09


@given(
    text=st.integers(1, 9000),
    video=st.integers(0, 60),
    window=st.sampled_from([1, 8, 288, 1440, 20000]),
    audio=st.integers(0, 2000),
    windows=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    kept=st.integers(1, 100_000),
)
def test_rungs_hold_what_they_round(
    text: int, video: int, window: int, audio: int, windows: tuple[int, int], kept: int
) -> None:
    """Nothing is rounded down, a rung is its own rung, and a modality that is not there stays away."""
    counts = Counts(
        text=text,
        tokens=text + min(kept, video * window + audio * AUDIO_WINDOW),
        audio=audio,
        video_windows=video,
        video_window=window,
        audio_windows=audio,
        windows=max(windows) if video or audio else 0,
        pairs=min(windows) if video and audio else 0,
    )
    rounded = counts.rounded()
    assert rounded.rounded() == rounded
    config = seats.preset("qwen2.5-omni-7b", 0.1)
    plan = make_plan(config, 28, rounded)
    plan.check_holds(counts)
    assert rounded.tokens <= rounded.pool
    exact = make_plan(config, 28, counts)
    for larger, smaller in zip(plan.segments, exact.segments, strict=True):
        assert larger.length >= smaller.length
    assert (rounded.video_windows == 0) == (video == 0)
    assert (rounded.audio_windows == 0) == (audio == 0)


@settings(max_examples=400)
@given(
    runs=st.lists(
        st.tuples(st.sampled_from([TEXT, VIDEO, AUDIO]), st.integers(1, 6), st.booleans()), min_size=1, max_size=24
    ),
    video=st.floats(0.01, 1),
    audio=st.floats(0.01, 1),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_a_segment_holds_whatever_is_kept(
    runs: list[tuple[int, int, bool]], video: float, audio: float, spread: float, seed: int
) -> None:
    """However relevance falls, even on a few windows alone, the next segment has a slot for every survivor. Runs are
    of one clip up to one that opens another."""
    modality = torch.tensor([kind for kind, length, _ in runs for _ in range(length)], dtype=torch.uint8)
    owner: list[int] = []
    for kind, length, opens in runs:
        number = owner[-1] if owner else -1
        owner += [number + (kind != TEXT and (opens or number < 0))] * length
    clip = torch.tensor(owner)
    scores = spread * torch.rand(len(modality), generator=torch.Generator().manual_seed(seed))
    windows, pairs = count_windows(modality, clip)
    media = int((modality != TEXT).sum())
    if not media:
        return
    there = [int((modality == kind).any()) for kind in (VIDEO, AUDIO)]
    counts = Counts(1, 1 + media, 0, there[0], 1, there[1], windows, pairs)
    keep = select(scores[None], modality[None], video, audio, 0.1, max(1, windows), clip[None])[0]
    assert int((keep & (modality != TEXT)).sum()) <= SEATS.left(media, Step(1, video, audio), counts)


def test_a_plan_names_what_it_cannot_hold() -> None:
    config = seats.preset("qwen2.5-omni-7b", 0.35)
    counts = clip_counts(QWEN2_5, config, 20, 40)
    plan = make_plan(config, 28, counts)
    plan.check_holds(counts)
    with pytest.raises(ValueError, match="has 11 of audio_windows and its plan holds 10: make a plan from its own"):
        plan.check_holds(replace(counts, audio_windows=11))


SIZE_7B = {
    "num_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_heads": 28,
    "num_kv_heads": 4,
    "vocab_size": 152064,
}
TERA = {1.0: 111.0, 0.35: 31.9, 0.25: 22.1, 0.15: 13.0, 0.10: 8.7}
"""Multiply-accumulates, in units of 10^12."""


def test_cost_of_the_papers_clip(capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen2.5-Omni-7B, 10,000 video, 1,667 audio and 100 text tokens, by count. Prints the table."""
    text = 100
    table = Counter()
    for retention in TERA:
        config = seats.preset("qwen2.5-omni-7b", retention)
        kept = {"video": 10_000, "audio": 1_667}
        if not config.keeps_everything:
            for (name, tokens), window, ratio in zip(
                list(kept.items()), (2 * GRID_TOKENS, AUDIO_WINDOW), config.encoder_ratios, strict=True
            ):
                kept[name] = int(keep_counts(torch.tensor(sizes(tokens, window)), ratio).sum())
        first = text + sum(kept.values())
        drops = []
        for step, layer in enumerate(config.drop_layers if not config.keeps_everything else ()):
            for name, target, encoder in zip(
                kept, (config.video_ratio, config.audio_ratio), config.encoder_ratios, strict=True
            ):
                ratio = seats.keep_ratios(target, encoder, config.drop_layers, config.late_layer, 28)[step]
                kept[name] = max(1, round(ratio * kept[name]))
            drops.append((layer - 1, text + sum(kept.values())))
        if drops and config.late_layer is not None:
            drops.append((config.late_layer - 2, text))
        table[retention] = prefill_macs(first, drops, **SIZE_7B)
        with capsys.disabled():
            lengths = " > ".join(str(tokens) for tokens in (first, *(left for _, left in drops)))
            print(
                f"\n{retention:.0%}: {table[retention] / 1e12:.1f} T, "
                f"{table[1.0] / table[retention]:.1f} times fewer; tokens {lengths}",
                end="",
            )
    assert {retention: round(macs / 1e12, 1) for retention, macs in table.items()} == TERA
