"""Stage II: what survives a selection equals the method's plain text, for any sequence in any batch."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from seats import select_by_relevance
from seats.selection import AUDIO, PADDING, TEXT, VIDEO, compact, select

RATIOS = st.floats(0.01, 1)
TEMPERATURES = st.sampled_from([0.1, 0.3])
# Runs as (modality, tokens): clips with and without the other modality, text between them.
LAYOUTS = st.lists(
    st.tuples(st.sampled_from([TEXT, VIDEO, VIDEO, AUDIO, AUDIO]), st.integers(1, 9)), min_size=1, max_size=20
)
Layout = list[tuple[int, int]]


def sequence(layout: Layout, seed: int) -> tuple[Tensor, Tensor]:
    """Scores that add up to 1, some windows far above others, and modalities."""
    generator = torch.Generator().manual_seed(seed)
    modality = torch.tensor([kind for kind, tokens in layout for _ in range(tokens)], dtype=torch.uint8)
    scores = torch.randn(len(modality), generator=generator).mul(2).softmax(0)
    return scores, modality


def runs(modality: Tensor, kind: int) -> list[list[int]]:
    places = groupby(enumerate(modality.tolist()), key=lambda place: place[1])
    return [[index for index, _ in run] for found, run in places if found == kind]


def best(scores: Tensor, tokens: list[int], count: int) -> list[int]:
    return sorted(tokens, key=lambda token: (-float(scores[token]), token))[:count]


def count(tokens: list[list[int]], ratio: float) -> int:
    total = sum(map(len, tokens))
    return max(1, round(ratio * total)) if total else 0


def windows_by_text(modality: Tensor, clip: Tensor) -> list[list[list[int]]]:
    """Runs of video and of audio, paired inside their clip."""
    media: list[list[list[int]]] = [[], []]
    for number in sorted(set(clip.tolist())):
        of_clip = modality.masked_fill(clip != number, TEXT)
        found = [runs(of_clip, kind) for kind in (VIDEO, AUDIO)]
        size = max(map(len, found))
        for row, each in zip(media, found, strict=True):
            row += each + [[]] * (size - len(each))
    return media


def select_by_text(
    scores: Tensor, modality: Tensor, video_ratio: float, audio_ratio: float, t: float, clip: Tensor | None = None
) -> list[int]:
    """Stage II with loops and lists, rule after rule."""
    media = windows_by_text(modality, torch.zeros_like(modality) if clip is None else clip)
    keep_video, keep_audio = count(media[0], video_ratio), count(media[1], audio_ratio)
    text = [token for run in runs(modality, TEXT) for token in run]
    size = len(media[0])
    if size <= 1 or not keep_video or not keep_audio:
        video, audio = ([token for run in found for token in run] for found in media)
        return sorted(text + best(scores, video, keep_video) + best(scores, audio, keep_audio))
    means = torch.tensor([[scores[run].mean() if run else 0.0 for run in found] for found in media])
    shares = (means / t).softmax(dim=-1)
    keep = keep_video + keep_audio
    caps = [len(video) + len(audio) for video, audio in zip(*media, strict=True)]
    budgets = (keep * (shares[0] + shares[1]) / 2).round().int().tolist()
    budgets = [min(cap, max(1, budget)) for budget, cap in zip(budgets, caps, strict=True)]
    while sum(budgets) > keep and max(budgets) > 1:
        budgets[budgets.index(max(budgets))] -= 1
    while sum(budgets) < keep:
        low = min(budget for budget, cap in zip(budgets, caps, strict=True) if budget < cap)
        budgets[next(w for w in range(size) if budgets[w] == low and low < caps[w])] += 1
    kept = text
    for w, (video, audio) in enumerate(zip(*media, strict=True)):
        claims = shares[0, w] * keep_video, shares[1, w] * keep_audio
        b_v = min(len(video), round(float(budgets[w] * (claims[0] / (claims[0] + claims[1] + 1e-12)))))
        b_a = min(len(audio), budgets[w] - b_v)
        b_v = min(len(video), budgets[w] - b_a)
        b_a = min(len(audio), budgets[w] - b_v)
        if video and b_v == 0:
            b_v, b_a = 1, max(1, min(len(audio), budgets[w] - 1)) if b_a > 1 else b_a
        if audio and b_a == 0:
            b_a, b_v = 1, max(1, min(len(video), budgets[w] - 1)) if b_v > 1 else b_v
        kept = kept + best(scores, video, b_v) + best(scores, audio, b_a)
    return sorted(kept)


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_equals_golden(golden: Path, temperature: float) -> None:
    tensors = load_file(golden / "allocation.safetensors")
    for case in json.loads((golden / "allocation.json").read_text()):
        name, ratios = case["case"], (case["video_keep_ratio"], case["audio_keep_ratio"])
        result = select_by_relevance(tensors[f"{name}.scores"], tensors[f"{name}.modality"], *ratios, temperature)
        assert torch.equal(result, tensors[f"{name}.keep_t{temperature}"].long()), case


@given(LAYOUTS, st.integers(0, 2**16), RATIOS, RATIOS, TEMPERATURES)
def test_equals_the_method_rule_after_rule(layout: Layout, seed: int, video: float, audio: float, t: float) -> None:
    scores, modality = sequence(layout, seed)
    result = select_by_relevance(scores, modality, video, audio, t)
    assert result.tolist() == select_by_text(scores, modality, video, audio, t)


CLIPS = st.lists(LAYOUTS, min_size=1, max_size=5)


def several(clips: list[Layout]) -> tuple[Layout, Tensor]:
    """One after another, text between them, and of which clip a token is; clips may be silent, or sound alone."""
    layout: Layout = []
    clip: list[int] = []
    for number, one in enumerate(clips):
        part = [*one, (TEXT, 2)]
        layout += part
        clip += [number] * sum(tokens for _, tokens in part)
    return layout, torch.tensor(clip)


@given(CLIPS, st.integers(0, 2**16), RATIOS, RATIOS, TEMPERATURES)
def test_runs_pair_inside_their_clip(clips: list[Layout], seed: int, video: float, audio: float, t: float) -> None:
    layout, clip = several(clips)
    scores, modality = sequence(layout, seed)
    result = select_by_relevance(scores, modality, video, audio, t, clip)
    assert result.tolist() == select_by_text(scores, modality, video, audio, t, clip)


@given(LAYOUTS, st.integers(0, 2**16), RATIOS, RATIOS, TEMPERATURES)
def test_one_clip_pairs_by_number_over_the_whole_prompt(
    layout: Layout, seed: int, video: float, audio: float, t: float
) -> None:
    """The paper's rule, bit for bit."""
    scores, modality = sequence(layout, seed)
    one = torch.full((len(modality),), 3).masked_fill(modality == TEXT, -1)
    expected = select_by_relevance(scores, modality, video, audio, t)
    assert torch.equal(select_by_relevance(scores, modality, video, audio, t, one), expected)


@given(CLIPS, st.randoms(use_true_random=False), st.integers(0, 2**16), st.booleans(), RATIOS, RATIOS, TEMPERATURES)
def test_the_order_of_media_decides_ties_alone(
    clips: list[Layout], generator: Random, seed: int, equal: bool, video: float, audio: float, t: float
) -> None:
    """With the same scores a medium keeps as much wherever it stands, but for one token of each of its windows: where
    windows have equal claims, the first of them gets what is left over. Equal scores: windows of one make get equal
    shares, whichever medium they are of."""
    layout, clip = several(clips)
    scores, modality = sequence(layout, seed)
    if equal:
        scores = torch.full_like(scores, 1 / len(scores))
    order = list(range(len(clips)))
    generator.shuffle(order)
    _, moved = several([clips[number] for number in order])
    places = torch.cat([(clip == number).nonzero().flatten() for number in order])
    before = select_by_relevance(scores, modality, video, audio, t, clip)
    after = select_by_relevance(scores[places], modality[places], video, audio, t, moved)
    windows = windows_by_text(modality, clip)
    if len(windows[0]) <= 1 or not all(any(found) for found in windows):
        return  # ranked as a whole
    for number in range(len(clips)):
        own = sum(clip[(video + audio)[0]] == number for video, audio in zip(*windows, strict=True))
        kept = [int(((clip[found] == number) & (modality[found] != TEXT)).sum()) for found in (before, places[after])]
        assert abs(kept[0] - kept[1]) <= own


def test_a_sound_of_its_own_is_not_paired_with_a_clip() -> None:
    """Of 143 tokens of speech 12 stayed before a clip with sound, 140 after it, when runs were paired by number."""
    speech: Layout = [(AUDIO, 143)]
    clip: Layout = [(VIDEO, 36), (AUDIO, 50)] * 8
    kept = []
    for media in ([speech, clip], [clip, speech]):
        layout, owner = several(media)
        scores, modality = torch.full((len(owner),), 1 / len(owner)), sequence(layout, 0)[1]
        found = select_by_relevance(scores, modality, 0.5, 0.5, 0.1, owner)
        sound = (owner == media.index(speech)) & (modality == AUDIO)
        kept.append(int(sound[found].sum()))
    assert abs(kept[0] - kept[1]) <= 1 and 40 <= min(kept) <= 50, kept


@given(LAYOUTS, st.integers(0, 2**16), RATIOS, RATIOS, TEMPERATURES)
def test_keeps_within_bounds_and_wipes_nobody_out(
    layout: Layout, seed: int, video: float, audio: float, t: float
) -> None:
    """Between K and max(K, W) + W tokens, some of each modality in each window, the text, in order."""
    scores, modality = sequence(layout, seed)
    result = select_by_relevance(scores, modality, video, audio, t)
    assert (result.diff() > 0).all()
    kept = set(result.tolist())
    media = [runs(modality, kind) for kind in (VIDEO, AUDIO)]
    assert {token for run in runs(modality, TEXT) for token in run} <= kept
    keep = count(media[0], video) + count(media[1], audio)
    size = max(map(len, media))
    survivors = int((modality[result] != TEXT).sum())
    if size > 1 and all(media):
        assert keep <= survivors <= max(keep, size) + size
        assert all(kept & set(run) for found in media for run in found)
    else:
        assert survivors == keep
    for run in media[0] + media[1] if size > 1 and all(media) else []:
        dropped = [float(scores[token]) for token in run if token not in kept]
        assert not dropped or max(dropped) <= min(float(scores[token]) for token in run if token in kept)


@given(
    st.lists(LAYOUTS, min_size=1, max_size=4), st.integers(0, 2**16), RATIOS, RATIOS, TEMPERATURES, st.integers(0, 5)
)
def test_padded_batches_equal_one_by_one(
    layouts: list[Layout], seed: int, video: float, audio: float, t: float, spare: int
) -> None:
    """Rows padded to one length with scores that would win, and windows to spare, change nothing."""
    rows = [sequence(layout, seed) for layout in layouts]
    length = spare + max(len(modality) for _, modality in rows)
    scores, modality = torch.full((len(rows), length), 7.0), torch.full((len(rows), length), PADDING, dtype=torch.uint8)
    for row, (row_scores, row_modality) in enumerate(rows):
        scores[row, : len(row_scores)], modality[row, : len(row_scores)] = row_scores, row_modality
    keep = select(scores, modality, video, audio, t, max_windows=20 + spare)
    for row, (row_scores, row_modality) in enumerate(rows):
        alone = select_by_relevance(row_scores, row_modality, video, audio, t)
        assert keep[row].nonzero().squeeze(-1).tolist() == alone.tolist()


def test_ties_go_to_the_lower_index() -> None:
    modality = torch.tensor([TEXT, *[VIDEO] * 6, *[AUDIO] * 4, *[VIDEO] * 6, *[AUDIO] * 4, TEXT], dtype=torch.uint8)
    result = select_by_relevance(torch.full((22,), 1 / 22), modality, 0.5, 0.5, 0.1)
    assert result.tolist() == [0, 1, 2, 3, 7, 8, 11, 12, 13, 17, 18, 21]


def test_too_few_windows_join_the_last() -> None:
    """Runs past max_windows share the last window: bounds still hold, nothing is read out of range."""
    scores, modality = sequence([(TEXT, 2), *[(VIDEO, 4), (AUDIO, 4)] * 6, (TEXT, 2)], 0)
    keep = select(scores[None], modality[None], 0.5, 0.5, 0.1, max_windows=3)
    assert 24 <= int((keep & (modality != TEXT)).sum()) <= 24 + 3
    assert keep[0, modality == TEXT].all()


def test_refuses_what_does_not_fit() -> None:
    scores, modality = sequence([(VIDEO, 4), (AUDIO, 4)], 0)
    for wrong in (modality[1:], modality[None]):
        with pytest.raises(ValueError, match="scores and modality must both be"):
            select_by_relevance(scores, wrong, 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="S at least 1"):
        select_by_relevance(scores[:0], modality[:0], 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="audio_keep_ratio must lie in"):
        select_by_relevance(scores, modality, 0.5, 1.5, 0.1)
    with pytest.raises(ValueError, match=r"clip must be \(8,\)"):
        select_by_relevance(scores, modality, 0.5, 0.5, 0.1, torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="may not fall along the sequence"):
        select_by_relevance(scores, modality, 0.5, 0.5, 0.1, torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        select_by_relevance(scores, modality, 0.5, 0.5, 0)


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(1, 15))
def test_compact_lists_survivors_first_and_in_order(rows: list[list[bool]], slots: int) -> None:
    index, counts = compact(torch.tensor(rows), slots)
    assert index.shape == (len(rows), slots)
    for row, found, number in zip(rows, index.tolist(), counts.tolist(), strict=True):
        survivors = [place for place, keep in enumerate(row) if keep][:slots]
        assert number == len(survivors)
        assert found == survivors + [0] * (slots - number)
