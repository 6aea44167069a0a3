"""OmniZip: what it keeps and merges is what loops over the method's text do, whatever surrounds a prompt."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from seats.method import Kept, Media
from seats.methods import omnizip
from seats.methods.omnizip import OmniZip, best_cosines, density_peaks, peaks_of, to_budget

CHANNELS = 8
SOUND_WINDOW = 10
PADDED_PLACE = 10_000


@dataclass
class Clip:
    """A prompt: kinds, a letter for each of its tokens, t, v or a; grids, sizes of its temporal grids."""

    kinds: str
    grids: list[int]
    video: Tensor
    sound: Tensor
    received: Tensor


def clip(seed: int, layout: str) -> Clip:
    """Random features in one of the layouts of the two families, with one or two videos of different sizes."""
    chance = random.Random(seed)
    kinds, grids = "t" * chance.randint(0, 1), []
    for _ in range(chance.choice((1, 2))):
        size, count = chance.randint(1, 9), chance.randint(1, 8)
        grids += [size] * count
        if layout == "mute":
            kinds += "v" * size * count + "t"
        elif layout == "apart":
            kinds += "v" * size * count + "t" + "a" * chance.randint(1, 40) + "t"
        elif layout == "cut":  # a token alone, then the rest of its grid
            for _ in range(count):
                kinds += "v" + "a" * chance.randint(1, 6) + "v" * (size - 1) + "a" * chance.randint(0, 6)
            kinds += "t"
        else:
            step = {"one grid": 1, "two grids": 2}[layout]
            for first in range(0, count, step):
                kinds += "v" * size * min(step, count - first)
                kinds += "a" * chance.randint(1, 12) if chance.random() < 0.8 else ""
            kinds += "a" * chance.randint(0, 15) + "t"
    generator = torch.Generator().manual_seed(seed)
    sound = kinds.count("a")
    return Clip(
        kinds,
        grids,
        torch.randn(sum(grids), CHANNELS, generator=generator),
        torch.randn(sound, CHANNELS, generator=generator),
        torch.rand(sound, generator=generator),
    )


def windows_of(tokens: int) -> list[int]:
    return [min(SOUND_WINDOW, tokens - first) for first in range(0, tokens, SOUND_WINDOW)]


def media(clips: list[Clip], kind: str, empty: int = 0) -> Media | None:
    """One modality of a batch, in windows padded with what would spread if it were read, and `empty` windows more."""
    sizes = [one.grids if kind == "v" else windows_of(len(one.sound)) for one in clips]
    count, longest = max(map(len, sizes)) + empty, 9 if kind == "v" else SOUND_WINDOW
    if not any(sizes):
        return None
    shape = (len(clips), count, longest)
    features = torch.full((*shape, CHANNELS), float("nan"))
    received = torch.full(shape, float("nan"))
    place = torch.full(shape, PADDED_PLACE)
    padded = torch.zeros(shape[:2], dtype=torch.long)
    for row, one in enumerate(clips):
        padded[row, : len(sizes[row])] = torch.tensor(sizes[row], dtype=torch.long)
        there = torch.arange(longest) < padded[row, :, None]
        features[row, there] = one.video if kind == "v" else one.sound
        received[row, there] = torch.ones(len(one.video)) if kind == "v" else one.received
        place[row, there] = torch.tensor(
            [at for at, letter in enumerate(one.kinds) if letter == kind], dtype=torch.long
        )
    return Media(features, received, None, padded, torch.where(padded > 0, 0, -1), place)


def kept_rows(kept: Kept | None, of: Media | None, row: int) -> list[int]:
    """Numbers of the tokens that are kept of a prompt's real ones, in order."""
    if kept is None or of is None:
        return []
    assert not (kept.keep[row] & ~of.there[row]).any()
    return kept.keep[row][of.there[row]].nonzero().flatten().tolist()


def assert_merged(
    kept: Kept | None, of: Media | None, row: int, sound: Tensor, changed: dict[int, list[float]]
) -> None:
    """Anchors are what was merged into them, all other tokens as they were."""
    if kept is None or of is None or kept.features is None:
        return
    expected = sound.clone()
    for anchor, vector in changed.items():
        expected[anchor] = torch.tensor(vector)
    found = kept.features[row][of.there[row]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    unchanged = [token for token in range(len(expected)) if token not in changed]
    assert torch.equal(found[unchanged], sound[unchanged])


# ---- the method's text, in loops


def norm(x: list[float]) -> float:
    return math.sqrt(sum(value * value for value in x))


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (norm(x) * norm(y))


def first_best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


def keep_sound(one: Clip, method: OmniZip) -> tuple[list[int], dict[int, list[float]]]:
    sound, video = one.sound.tolist(), one.video.tolist()
    dominant = first_best(
        one.received.tolist(), round(min(max(method.audio_ratio - (0.05 if method.merged else 0), 0), 1) * len(sound))
    )
    rest = [i for i in range(len(sound)) if i not in dominant]
    count = min(round(0.05 * len(sound)), len(rest)) if method.merged else 0
    if not count:
        return sorted(dominant), {}
    step = max(1, len(rest) // count)
    anchors = rest[::step][:count]
    members: dict[int, list[tuple[float, int]]] = {anchor: [] for anchor in anchors}
    for i in rest:
        if i in anchors:
            continue
        likeness = [cosine(sound[i], sound[anchor]) for anchor in anchors]
        nearest = anchors[first_best(likeness, 1)[0]]
        members[nearest].append((max((cosine(sound[i], frame) for frame in video), default=max(likeness)), i))
    changed = {}
    for anchor, joined in members.items():
        best = sorted(joined, key=lambda pair: -pair[0])[: method.merged]
        weights = [math.exp(score) for score, _ in best]
        changed[anchor] = sound[anchor]
        if best:
            mean = [
                sum(w * sound[i][d] for w, (_, i) in zip(weights, best, strict=True)) / sum(weights)
                for d in range(CHANNELS)
            ]
            changed[anchor] = [(a + b) / 2 for a, b in zip(sound[anchor], mean, strict=True)]
    return sorted([*dominant, *anchors]), changed


def runs_of(kinds: str, kind: str) -> list[list[int]]:
    """Numbers of the tokens of one kind, by runs."""
    runs, number = [], 0
    for letter, run in groupby(kinds):
        if letter == kind:
            length = len(list(run))
            runs.append(list(range(number, number + length)))
            number += length
    return runs


def clamp(share: float) -> float:
    return min(max(share, 0.35), 0.75)


def shares_of_groups(saliency: list[float], sizes: list[int], removed: float) -> list[float]:
    first = [clamp(0.75 + (0.35 - 0.75) * s) for s in saliency]
    wanted = removed * sum(sizes)
    if len(first) <= 2 or abs(sum(b * n for b, n in zip(first, sizes, strict=True)) - wanted) <= 1e-3:
        return first
    low, high = first.index(min(first)), first.index(max(first))
    others = [i for i in range(len(first)) if i not in (low, high)]
    scale = (wanted - first[low] * sizes[low] - first[high] * sizes[high]) / sum(first[i] * sizes[i] for i in others)
    shares = [clamp(b * scale) if i in others else b for i, b in enumerate(first)]
    missing = wanted - sum(b * n for b, n in zip(shares, sizes, strict=True))
    if abs(missing) > 1e-3:
        size = sum(sizes[i] for i in others)
        shares = [clamp(b + missing / size) if i in others else b for i, b in enumerate(shares)]
    return shares


def peaks(tokens: list[list[float]]) -> list[float]:
    n = len(tokens)
    apart = [[1 - cosine(x, y) if i != j else 0.0 for j, y in enumerate(tokens)] for i, x in enumerate(tokens)]
    near = [sorted(apart[i][j] for j in range(n) if j != i)[:5] for i in range(n)]
    density = [math.exp(-sum(d) / max(1, len(d))) for d in near]
    scores = []
    for i in range(n):
        denser = [apart[i][j] for j in range(n) if density[j] > density[i]]
        scores.append(density[i] * (min(denser) if denser else max(apart[i])))
    return scores


def keep_video(one: Clip, method: OmniZip, sound: list[int]) -> list[int]:
    removed = 1 - method.video_ratio
    video_runs, sound_runs = runs_of(one.kinds, "v"), runs_of(one.kinds, "a")
    starts = [sum(one.grids[:g]) for g in range(len(one.grids))]
    groups: dict[int, list[int]] = {}  # run → grids that begin in it
    for g, start in enumerate(starts):
        run = next(r for r, tokens in enumerate(video_runs) if start in tokens)
        groups.setdefault(run, []).append(g)
    guided = [run for run in groups if run < len(sound_runs)]
    shares = dict.fromkeys(groups, removed)
    saliency = [
        float(torch.tensor([token in sound for token in sound_runs[run]]).float().mean()) for run in guided
    ]  # in float32, as the authors' code
    sizes = [sum(one.grids[g] for g in groups[run]) for run in guided]
    shares.update(zip(guided, shares_of_groups(saliency, sizes, removed), strict=True))
    tokens, kept = one.video.tolist(), []
    for run, grids in groups.items():
        for number, g in enumerate(grids):
            n, start = one.grids[g], starts[g]
            grid = tokens[start : start + n]
            if number % 2 == 0:
                scores = peaks(grid)
            else:
                before = tokens[starts[g - 1] : starts[g - 1] + n]
                scores = [-cosine(x, y) for x, y in zip(grid, before, strict=True)]
            kept += [start + i for i in first_best(scores, int(n * (1 - shares[run]) + 1e-6))]
    return sorted(kept)


# ---- tests

LAYOUTS = st.sampled_from(["one grid", "two grids", "apart", "cut", "mute"])
RATIOS = st.floats(0.02, 1)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**16), layouts=st.tuples(LAYOUTS, LAYOUTS), video=RATIOS, audio=RATIOS)
def test_equals_loops(seed: int, layouts: tuple[str, str], video: float, audio: float) -> None:
    """Every step of the method, on two prompts at once, of other lengths, padded with NaN."""
    method = OmniZip(video_ratio=video, audio_ratio=audio, merged=seed % 4)
    clips = [clip(seed + row, layout) for row, layout in enumerate(layouts)]
    frames, sound = media(clips, "v", empty=seed % 3), media(clips, "a", empty=seed % 2)
    kept_video, kept_sound = method.before(frames, sound)
    assert (kept_sound is None) == (sound is None)
    for row, one in enumerate(clips):
        wanted, changed = keep_sound(one, method)
        assert kept_rows(kept_sound, sound, row) == wanted
        assert kept_rows(kept_video, frames, row) == keep_video(one, method, wanted)
        assert_merged(kept_sound, sound, row, one.sound, changed)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**16), layouts=st.tuples(LAYOUTS, LAYOUTS), video=RATIOS, audio=RATIOS)
def test_what_surrounds_a_prompt_changes_nothing(
    seed: int, layouts: tuple[str, str], video: float, audio: float
) -> None:
    """Each prompt of a batch keeps what it keeps alone, with the windows of a larger plan after its own, every time."""
    method = OmniZip(video_ratio=video, audio_ratio=audio)
    clips = [clip(seed + row, layout) for row, layout in enumerate(layouts)]
    frames, sound = media(clips, "v", empty=3), media(clips, "a", empty=5)
    together, again = method.before(frames, sound), method.before(frames, sound)
    for row, one in enumerate(clips):
        alone = [media([one], "v"), media([one], "a")]
        for kept, repeated, single, whole, part in zip(
            together, again, method.before(*alone), (frames, sound), alone, strict=True
        ):
            assert kept_rows(kept, whole, row) == kept_rows(single, part, 0) == kept_rows(repeated, whole, row)


@given(
    seed=st.integers(0, 2**16),
    layout=LAYOUTS,
    video=RATIOS,
    audio=RATIOS,
    power=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_enters_no_more_than_planned(seed: int, layout: str, video: float, audio: float, power: float) -> None:
    """The bound holds with sound heard early, late or anywhere; sound alone and video alone are known exactly."""
    method = OmniZip(video_ratio=video, audio_ratio=audio)
    one = clip(seed, layout)
    one.received = one.received + power * torch.arange(len(one.sound))
    frames, sound = media([one], "v"), media([one], "a")
    kept_video, kept_sound = method.before(frames, sound)
    of_video, of_sound = len(kept_rows(kept_video, frames, 0)), len(kept_rows(kept_sound, sound, 0))
    windows = windows_of(len(one.sound))
    assert of_sound == method.entering([], windows)[0] == len(kept_rows(method.before(None, sound)[1], sound, 0))
    most, asked = method.entering(one.grids, windows)
    assert of_video + of_sound <= most
    assert asked == 0
    mute = method.before(frames, None)[0]
    assert len(kept_rows(mute, frames, 0)) == method.entering(one.grids, [])[0]


def test_the_planned_number_can_be_reached() -> None:
    """The bound is no larger than it must be: beside a run of sound that is all kept, video keeps the most it can."""
    method = OmniZip(video_ratio=0.2, audio_ratio=0.3)
    one = clip(0, "mute")
    one = Clip(
        "t" + "v" * 27 + "a" + "t" + "a" * 19 + "t", [9, 9, 9], torch.randn(27, 8), torch.randn(20, 8), one.video
    )
    one.received = torch.arange(20, 0, -1).float()
    frames, sound = media([one], "v"), media([one], "a")
    kept = [len(kept_rows(*pair, 0)) for pair in zip(method.before(frames, sound), (frames, sound), strict=True)]
    assert sum(kept) == method.entering(one.grids, windows_of(20))[0] == 3 * 5 + 5 + 1


EQUAL = [0.9, 0.74, 0.6, 0.8, 0.7]


@pytest.mark.parametrize(
    ("saliency", "removed", "expected"),
    [
        (EQUAL, 0.6, [0.39, 0.7041, 0.51, 0.6669, 0.7290]),
        (EQUAL, 0.7, [0.39, 0.75, 0.51, 0.75, 0.75]),
        (EQUAL, 0.9, [0.39, 0.75, 0.51, 0.75, 0.75]),
        (EQUAL, 0.3, [0.39, 0.35, 0.51, 0.35, 0.35]),
        ([0.75] * 4, 0.6, [0.45, 0.65, 0.65, 0.65]),
        ([0.9, 0.7, 0.65], 0.7, [0.39, 0.75, 0.49]),
    ],
)
def test_shares_are_brought_near_the_budget(saliency: list[float], removed: float, expected: list[float]) -> None:
    """Worked by hand, with groups of two grids of 144: two groups are left alone, the others make up for them."""
    initial = torch.tensor([0.75 - 0.4 * s for s in saliency], dtype=torch.float64).repeat_interleave(2)[None]
    run = torch.arange(len(saliency)).repeat_interleave(2)[None]
    sizes = torch.full_like(run, 144)
    shares = to_budget(initial, sizes, run, torch.ones_like(run, dtype=torch.bool), removed, (0.35, 0.75))
    torch.testing.assert_close(shares[0, ::2], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)
    assert torch.equal(shares[:, ::2], shares[:, 1::2])


def test_two_groups_are_left_at_what_their_sound_gives() -> None:
    """Whatever the ratio asks for, also where both have the same share of sound, all of it here."""
    video, sound = torch.randn(36, CHANNELS), torch.randn(10, CHANNELS)
    one = Clip(("v" * 18 + "a" * 5) * 2, [9] * 4, video, sound, torch.arange(10).float())
    frames = media([one], "v")
    kept, _ = OmniZip(video_ratio=0.2, audio_ratio=1.0).before(frames, media([one], "a"))
    assert kept is not None and kept.keep.sum(dim=-1).tolist() == [[5, 5, 5, 5]]


def test_sound_kept_counts_anchors() -> None:
    """The published setting: of 50 tokens 35 dominant ones and 2 anchors, as 2.5 is rounded half to even."""
    method = OmniZip(video_ratio=0.4, audio_ratio=0.75)
    counts = method.sound_counts(torch.tensor([50, 150, 140, 250, 78, 130, 0]))
    assert torch.stack(counts, dim=1).tolist() == [[35, 2], [105, 8], [98, 7], [175, 12], [55, 4], [91, 6], [0, 0]]
    everything = torch.arange(5000)
    assert torch.equal(sum(OmniZip(video_ratio=0.4, audio_ratio=1.0).sound_counts(everything)), everything)


def test_equal_tokens_are_kept_from_the_first_on() -> None:
    """A still picture and a hum: ties go to the lower index and the counts hold."""
    one = Clip("v" * 18 + "a" * 40, [9, 9], torch.ones(18, CHANNELS), torch.ones(40, CHANNELS), torch.ones(40))
    frames, sound = media([one], "v"), media([one], "a")
    kept_video, kept_sound = OmniZip(video_ratio=0.4, audio_ratio=0.5).before(frames, sound)
    assert kept_rows(kept_sound, sound, 0) == [*range(18), 18, 29]
    # Half of the sound: 0.55 of the video goes.
    assert kept_rows(kept_video, frames, 0) == [*range(4), *range(9, 13)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype: torch.dtype) -> None:
    clips = [clip(1, "two grids"), clip(2, "cut")]
    frames, sound = media(clips, "v"), media(clips, "a")
    assert frames is not None and sound is not None
    method = OmniZip(video_ratio=0.4, audio_ratio=0.4)
    frames.features, sound.features = frames.features.to(dtype), sound.features.to(dtype)
    kept = method.before(frames, sound)
    frames.features, sound.features = frames.features.float(), sound.features.float()
    exact = method.before(frames, sound)
    for one, other in zip(kept, exact, strict=True):
        assert one is not None and other is not None and torch.equal(one.keep, other.keep)
    assert kept[1].features.dtype == dtype
    there = sound.there
    assert torch.equal(kept[1].features[there], exact[1].features[there].to(dtype))


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory changes nothing: the best key of all, the first of equal ones, from whichever block."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 23, CHANNELS, generator=generator), torch.randn(2, 31, CHANNELS, generator=generator)
    keys[:, 20] = keys[:, 3]
    there = torch.rand(2, 31, generator=generator) < 0.7
    there[:, [3, 20]] = True
    queries[:, 0] = keys[:, 3]
    keys = keys.masked_fill(~there[..., None], float("nan"))
    asked = torch.ones(2, 23, dtype=torch.bool)
    asked[:, 19:] = False
    whole = best_cosines(queries, asked, keys, there)
    assert whole[1][:, 0].tolist() == [3, 3]
    cosines = torch.nn.functional.cosine_similarity(queries[:, :, None], keys[:, None], dim=-1)
    assert torch.equal(whole[1][:, :19], cosines.masked_fill(~there[:, None], -2).argmax(dim=-1)[:, :19])
    monkeypatch.setattr(omnizip, "BLOCK", 5)
    value, index = best_cosines(queries, asked, keys, there)
    assert torch.equal(index[:, :19], whole[1][:, :19])
    torch.testing.assert_close(value[:, :19], whole[0][:, :19])
    nothing = best_cosines(queries, asked, keys, torch.zeros_like(there))
    assert nothing[0].isneginf().all() and not nothing[1].any()

    sizes = torch.tensor([9, 4, 1, 9, 0])
    features = torch.randn(5, 9, CHANNELS, generator=generator)
    monkeypatch.setitem(omnizip.blocks.__globals__["BLOCK_BYTES"], "cpu", 1)
    for window, size in enumerate(sizes.tolist()):
        alone = peaks_of(features[window : window + 1, :size], sizes[window : window + 1], 5) if size else None
        found = density_peaks(features, sizes, 5)[window, :size]
        assert alone is None or torch.allclose(found, alone[0])


def test_are_sound_operators() -> None:
    """Schemas, fake implementations and tracing agree with what they do."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 7, CHANNELS, generator=generator)
    there = torch.arange(7) < torch.tensor([[7], [4]])
    torch.library.opcheck(best_cosines.overload, (features, there, features.flip(1), there.flip(0)))
    torch.library.opcheck(density_peaks.overload, (features, torch.tensor([7, 4]), 5))


def test_compiles_without_a_break() -> None:
    """The whole of `before` is one graph of static shape, which keeps and merges the same."""
    clips = [clip(3, "two grids"), clip(4, "cut")]
    frames, sound = media(clips, "v", empty=1), media(clips, "a", empty=2)
    assert frames is not None and sound is not None
    method = OmniZip(video_ratio=0.4, audio_ratio=0.4)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video, audio = (Media(some[0], some[1], None, *some[2:]) for some in (tensors[:5], tensors[5:]))
        kept_video, kept_audio = method.before(video, audio)
        assert kept_video is not None and kept_audio is not None and kept_audio.features is not None
        return kept_video.keep, kept_audio.keep, kept_audio.features

    tensors = [
        tensor for one in (frames, sound) for tensor in (one.features, one.received, one.sizes, one.clip, one.place)
    ]
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    for found, expected in zip(compiled(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_refuses_shares_out_of_range() -> None:
    for ratios in ((0.0, 0.5), (0.5, 1.1)):
        with pytest.raises(ValueError, match=r"_ratio must lie in \(0, 1\]"):
            OmniZip(video_ratio=ratios[0], audio_ratio=ratios[1])
    with pytest.raises(ValueError, match="least_removed and most_removed must rise"):
        OmniZip(video_ratio=0.5, audio_ratio=0.5, least_removed=0.8)
