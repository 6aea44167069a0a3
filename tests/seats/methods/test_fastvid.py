"""FastVID: what it keeps and merges is what loops over the method's definition do, whatever surrounds a prompt."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import CHANNELS, media, one, picked
from torch import Tensor

from seats.method import Kept, Media
from seats.methods import fastvid
from seats.methods.fastvid import FastVID, gathered, gathered_in_row, peaks, peaks_of
from seats.methods.ranking import sound_intact

WIDTH = 14

Clips = list[tuple[int, int]]
"""Of each clip of a prompt, tokens in a frame and frames."""


def sizes_of(clips: Clips) -> list[int]:
    return [size for size, frames in clips for _ in range(frames)]


def film(seed: int, prompts: list[Clips], empty: int = 0) -> Media:
    """Clips with stills, slow changes and cuts: cosines between frames on either side of both thresholds."""
    video = media(seed, [sizes_of(clips) for clips in prompts], WIDTH, empty=empty)
    generator = torch.Generator().manual_seed(seed)
    for row, clips in enumerate(prompts):
        window = 0
        for number, (size, frames) in enumerate(clips):
            scene = torch.randn(CHANNELS, generator=generator) * 3
            for _ in range(frames):
                video.clip[row, window] = number
                video.features[row, window, :size] += scene
                step = (0, 0, 1.3, 4)[int(torch.randint(4, (), generator=generator))]
                scene = scene + step * torch.randn(CHANNELS, generator=generator)
                window += 1
    return video


# ---- the method's definition, in loops

Token = list[float]


def dot(x: Token, y: Token) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def cosine(x: Token, y: Token) -> float:
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def mean(tokens: list[Token]) -> Token:
    return [sum(values) / len(tokens) for values in zip(*tokens, strict=True)]


def first_best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda i: (-scores[i], i))[:count]


def cut_at(cuts: list[int], frames: list[int]) -> list[list[int]]:
    """Runs of frames, each of which but the last ends at a cut."""
    runs: list[list[int]] = [[]]
    for frame in frames:
        runs[-1].append(frame)
        if frame in cuts and frame != frames[-1]:
            runs.append([])
    return runs


def peak_scores(tokens: list[Token], among: list[int]) -> dict[int, float]:
    apart = {(i, j): math.dist(tokens[i], tokens[j]) / math.sqrt(CHANNELS) for i in among for j in among}
    near = {i: sorted(apart[i, j] ** 2 for j in among)[:4] for i in among}
    density = {i: math.exp(-sum(near[i]) / len(near[i])) for i in among}
    scores = {}
    for i in among:
        denser = [apart[i, j] for j in among if density[j] > density[i]]
        scores[i] = density[i] * (min(denser) if denser else max(apart.values()))
    return scores


def condense_clip(
    frames: list[list[Token]], attention: list[list[float]], ratio: float, method: FastVID
) -> dict[tuple[int, int], Token]:
    """One clip: the frame and the number of each token that is kept, and what it becomes."""
    n = len(frames[0])
    means = [mean(frame) for frame in frames]
    like = [cosine(means[t], means[t + 1]) for t in range(len(frames) - 1)]
    least = sorted(range(len(like)), key=lambda t: like[t])[: method.min_segments - 1]
    cuts = [t for t in range(len(like)) if t in least or like[t] < method.threshold]
    changes = [t for t in range(len(like)) if like[t] < method.duplicate]
    kept = {}
    for segment in cut_at(cuts, list(range(len(frames)))):
        budget = max(1, int(ratio * n)) * len(segment)
        context = max(int(budget * method.context_share), 1)
        salient = budget - context
        keeping = [run[-1] for run in cut_at(changes, segment)]
        anchor_frames = keeping[::-1][:: method.anchor_step]
        anchors_of = dict.fromkeys(keeping, 0)
        for k, t in enumerate(anchor_frames):
            anchors_of[t] = context // len(anchor_frames) + (k < context % len(anchor_frames))
            if len(segment) > 1:
                anchors_of[t] = min(anchors_of[t], n // 2)
        salient_of = {}
        for v, t in enumerate(keeping):
            count = salient // len(keeping) + (v < salient % len(keeping))
            salient_of[t] = first_best(dict(enumerate(attention[t])), min(count, n - anchors_of[t]))
            kept.update({(t, i): frames[t][i] for i in salient_of[t]})
        for t in anchor_frames:
            others = [i for i in range(n) if i not in salient_of[t]]
            anchors = first_best(peak_scores(frames[t], others), anchors_of[t])
            joined: dict[int, list[Token]] = {a: [] for a in anchors}
            for source in segment if anchors else []:
                for i, token in enumerate(frames[source]):
                    if i in salient_of.get(source, []) or (source == t and i in anchors):
                        continue
                    joined[first_best({a: cosine(token, frames[t][a]) for a in sorted(anchors)}, 1)[0]].append(token)
            for a, tokens in joined.items():
                weight = max(method.anchor_weight, 1 / (len(tokens) + 1))
                rest = mean(tokens) if tokens else frames[t][a]
                kept[t, a] = [weight * x + (1 - weight) * y for x, y in zip(frames[t][a], rest, strict=True)]
    return kept


def condense(video: Media, row: int, clips: Clips, ratio: float, method: FastVID) -> tuple[list[int], list[Token]]:
    """A prompt: numbers of its tokens that are kept, and what they become."""
    features, received = video.features[row][video.there[row]].tolist(), video.received[row][video.there[row]].tolist()
    kept, at = {}, 0
    for size, frames in clips:
        starts = [at + t * size for t in range(frames)]
        clip = condense_clip(
            [features[start : start + size] for start in starts],
            [received[start : start + size] for start in starts],
            ratio,
            method,
        )
        kept.update({starts[t] + i: token for (t, i), token in clip.items()})
        at += size * frames
    return sorted(kept), [kept[number] for number in sorted(kept)]


# ---- tests

CLIPS = st.lists(st.tuples(st.integers(1, WIDTH), st.integers(1, 12)), min_size=1, max_size=3)
SOUND = st.lists(st.integers(1, 50), min_size=1, max_size=2)
RATIOS = st.tuples(st.floats(0.03, 1), st.floats(0.3, 1))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    prompts=st.lists(CLIPS, min_size=2, max_size=2),
    sound=st.none() | SOUND,
    ratios=RATIOS,
    segments=st.integers(1, 8),
    step=st.integers(1, 4),
    context=st.sampled_from([0.0, 0.4, 0.7]),
    weight=st.sampled_from([0.0, 0.3, 0.6]),
)
def test_equals_loops(
    seed: int,
    prompts: list[Clips],
    sound: list[int] | None,
    ratios: tuple[float, float],
    segments: int,
    step: int,
    context: float,
    weight: float,
) -> None:
    """Every step of the method, on two prompts of several clips at once, padded with NaN."""
    method = FastVID(
        video_ratio=ratios[0],
        audio_ratio=ratios[1],
        min_segments=segments,
        anchor_step=step,
        context_share=context,
        anchor_weight=weight,
    )
    video, audio = film(seed, prompts, empty=seed % 3), media(seed, [sound, sound], 50) if sound else None
    kept, kept_audio = method.before(video, audio)
    assert kept is not None and kept.features is not None
    tokens = video.sizes.sum(dim=-1), torch.full((2,), sum(sound or []))
    of_video, of_audio = sound_intact(*tokens, *ratios)
    for row, clips in enumerate(prompts):
        expected, becomes = condense(video, row, clips, float(of_video[row]), method)
        assert picked(kept, video, row) == expected
        found = kept.features[row][kept.keep[row]]
        torch.testing.assert_close(found, torch.tensor(becomes), rtol=0, atol=2e-5)
        dropped = video.there[row] & ~kept.keep[row]
        assert torch.equal(kept.features[row][dropped], video.features[row][dropped])
        if audio is not None:
            assert len(picked(kept_audio, audio, row)) == max(1, int(float(of_audio[row]) * sum(sound or [])))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), prompts=st.lists(CLIPS, min_size=2, max_size=2), sound=SOUND, ratios=RATIOS)
def test_what_surrounds_a_prompt_changes_nothing(
    seed: int, prompts: list[Clips], sound: list[int], ratios: tuple[float, float]
) -> None:
    """Each prompt of a batch keeps what it keeps alone, whatever empty windows follow, every time, and within the
    number that was planned."""
    method = FastVID(video_ratio=ratios[0], audio_ratio=ratios[1])
    video, audio = film(seed, prompts, empty=5), media(seed + 1, [sound, sound], 50, empty=2)
    together, again = method.before(video, audio), method.before(video, audio)
    for row, clips in enumerate(prompts):
        mine = one(video, row), one(audio, row)
        alone = method.before(*mine)
        for single, kept, repeated, whole, part in zip(alone, together, again, (video, audio), mine, strict=True):
            assert kept is not None and single is not None
            assert not (kept.keep & ~whole.there).any()
            assert picked(single, part, 0) == picked(kept, whole, row) == picked(repeated, whole, row)
        assert alone[0] is not None and together[0] is not None
        torch.testing.assert_close(becomes(alone[0], 0), becomes(together[0], row))
        of_video, of_audio = len(picked(alone[0], mine[0], 0)), len(picked(alone[1], mine[1], 0))
        assert of_video >= 1
        planned = method.entering(sizes_of(clips), sound)
        assert of_video + of_audio <= planned[0]
        assert planned[1] == 0
        assert len(picked(method.before(None, mine[1])[1], mine[1], 0)) == method.entering([], sound)[0]


def becomes(kept: Kept, row: int) -> Tensor:
    assert kept.features is not None
    return kept.features[row][kept.keep[row]]


def dealt(likeness: list[float], size: int, ratio: float, method: FastVID) -> list[list[int]]:
    """Segments, salient tokens and anchors of the frames of one clip with these cosines between them."""
    frames = len(likeness) + 1
    video = media(0, [[size] * frames], size)
    shares = method.shares(video, torch.tensor([[*likeness, 0.0]]), torch.tensor([ratio], dtype=torch.float64))
    return [part[0].tolist() for part in shares]


def test_budgets_worked_by_hand() -> None:
    """Of 6 frames, each of 10 tokens, at 0.3: 18 tokens, 7 of them context."""
    method = FastVID(video_ratio=0.3, audio_ratio=1.0, min_segments=1)
    changing, still = [0.9, 0.96, 0.9, 0.9, 0.9], [0.99] * 5
    # The second frame is like the third; of the five others the last and the first have anchors.
    assert dealt(changing, 10, 0.3, method) == [[0] * 6, [3, 0, 2, 2, 2, 2], [3, 0, 0, 0, 0, 4]]
    # All in the last frame, where half may be anchors and 8 of the 18 find no room.
    assert dealt(still, 10, 0.3, method) == [[0] * 6, [0] * 5 + [5], [0] * 5 + [5]]
    # A cut after the third frame: 9 tokens for either side, 3 of them context.
    cut = [0.96, 0.9, 0.5, 0.96, 0.96]
    assert dealt(cut, 10, 0.3, method) == [[0, 0, 0, 1, 1, 1], [0, 3, 3, 0, 0, 6], [0, 0, 3, 0, 0, 3]]
    # The two least like the next, of equals the first, are cuts too.
    three = FastVID(video_ratio=0.3, audio_ratio=1.0, min_segments=3)
    assert dealt(still, 10, 0.3, three)[0] == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_clips_of_few_frames(frames: int) -> None:
    """With no more frames than segments each is one, and keeps its whole share."""
    method = FastVID(video_ratio=0.5, audio_ratio=1.0, min_segments=8)
    clips = [(10, frames), (1, 1), (3, frames)]
    video = film(0, [clips])
    kept, _ = method.before(video, None)
    assert kept is not None
    assert kept.keep.sum(dim=-1).tolist() == [[5] * frames + [1] + [1] * frames]
    assert int(kept.keep.sum()) == method.entering(sizes_of(clips), [])[0]


def test_a_still_picture() -> None:
    """Ties everywhere: the lower index stays, and only in the last frame of each segment."""
    method = FastVID(video_ratio=0.4, audio_ratio=1.0, min_segments=2)
    video = film(0, [[(10, 5)]])
    video.features, video.received = torch.ones_like(video.features), torch.ones_like(video.received)
    kept, _ = method.before(video, None)
    assert kept is not None
    # Equal cosines: the cut is after the first frame, with 3 salient tokens and 1 anchor.
    chosen = [window.nonzero().flatten().tolist() for window in kept.keep[0]]
    assert chosen == [[0, 1, 2, 3], [], [], [], list(range(10))]
    assert torch.equal(becomes(kept, 0), torch.ones(14, CHANNELS))


def test_an_equal_token_is_no_second_peak() -> None:
    """Of two copies the first counts as denser, so that the other peak of a frame is chosen before its copy."""
    tokens = torch.randn(9, CHANNELS, generator=torch.Generator().manual_seed(0)) * 0.1
    tokens[5:] += 3
    tokens[6], tokens[1] = tokens[5], tokens[0]
    scores = peaks_of(tokens[None], torch.ones(1, 9, dtype=torch.bool))[0]
    assert scores[1] < scores[0] and scores[6] < scores[5]
    assert len({int(token) // 5 for token in scores.topk(2).indices}) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype: torch.dtype) -> None:
    method = FastVID(video_ratio=0.4, audio_ratio=1.0)
    video = film(4, [[(12, 10)], [(9, 12), (4, 2)]])
    video.features = video.features.to(dtype)
    kept, _ = method.before(video, None)
    video.features = video.features.float()
    exact, _ = method.before(video, None)
    assert kept is not None and exact is not None and torch.equal(kept.keep, exact.keep)
    assert becomes(kept, 0).dtype == dtype
    for row in range(2):
        assert torch.equal(becomes(kept, row), becomes(exact, row).to(dtype))


def test_blocks_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory, a frame at a time, changes nothing, nor does looking at all anchors, as on a GPU."""
    method = FastVID(video_ratio=0.5, audio_ratio=1.0, min_segments=3)
    video = film(2, [[(14, 12), (9, 5)], [(3, 9)]], empty=2)
    whole, _ = method.before(video, None)
    assert whole is not None
    with monkeypatch.context() as patch:
        patch.setattr(fastvid, "slots_of", lambda segments, slot_segment: slice(0, len(slot_segment)))
        everything, _ = method.before(video, None)
    monkeypatch.setitem(fastvid.BLOCK_BYTES, "cpu", 1)
    frame, _ = method.before(video, None)
    for other in (everything, frame):
        assert other is not None and torch.equal(other.keep, whole.keep)
        for row in range(2):
            torch.testing.assert_close(becomes(other, row), becomes(whole, row))


@pytest.mark.parametrize("all_slots", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_token_unlike_every_anchor_joins_one(seed: int, all_slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are not of length 1: their products with all of a frame's anchors may lie far below -1. The other prompt
    has more anchors, so that slots are empty; as on a GPU, too, which looks at all of them."""
    method = FastVID(video_ratio=0.2, audio_ratio=1.0, min_segments=1, threshold=-1.0)
    prompts: list[Clips] = [[(5 + seed % 3, 5)], [(WIDTH, 6), (3, 2)]]
    video = media(seed, [sizes_of(clips) for clips in prompts], WIDTH)
    video.clip[1, 6:] = 1
    video.features *= 3
    if all_slots:
        monkeypatch.setattr(fastvid, "slots_of", lambda segments, slot_segment: slice(0, len(slot_segment)))
    kept, _ = method.before(video, None)
    assert kept is not None
    for row, clips in enumerate(prompts):
        expected, tokens = condense(video, row, clips, 0.2, method)
        assert picked(kept, video, row) == expected
        torch.testing.assert_close(becomes(kept, row), torch.tensor(tokens), rtol=0, atol=2e-5)


def test_gathers_by_hand() -> None:
    """One segment of two frames, an anchor in each: another frame's anchor joins, the own one does not."""
    features = torch.tensor([[[1.0, 0.0], [4.0, 0.0]], [[0.0, 2.0], [0.0, 6.0]]])
    anchor = torch.tensor([[True, False], [True, False]])
    rest = torch.tensor([[True, True], [True, False]])
    segment, position = torch.tensor([0, 0]), torch.tensor([0, 2, 0])
    found = gathered_in_row(features, rest, anchor, segment, position, torch.tensor([True, True, False]), 0.6)
    torch.testing.assert_close(found[:2], torch.tensor([[0.6 + 0.4 * 2, 0.4 * 1], [0.4 * 2.5, 0.6 * 2]]))
    alone = gathered_in_row(
        features, anchor, anchor, torch.tensor([0, 1]), position, torch.tensor([True, True, False]), 0.6
    )
    assert torch.equal(alone[:2], features[:, 0])


def test_are_sound_operators() -> None:
    """Schemas, fake implementations and tracing agree with what they do."""
    features = torch.randn(2, 3, 5, CHANNELS, generator=torch.Generator().manual_seed(0))
    rest = torch.arange(5) < torch.tensor([[5, 5, 0], [4, 4, 4]])[..., None]
    anchor = rest & (torch.arange(5) % 3 == 1)
    segment = torch.tensor([[0, 0, 1], [0, 1, 1]])
    position, count = torch.tensor([[1, 4, 6, 9, 0, 0, 0], [1, 6, 11, 0, 0, 0, 0]]), torch.tensor([4, 3])
    torch.library.opcheck(gathered.overload, (features, rest, anchor, segment, position, count, 0.6))
    torch.library.opcheck(peaks.overload, (features.flatten(0, 1), rest.flatten(0, 1)))


def test_compiles_without_a_break() -> None:
    """The whole of `before` is one graph of static shape, which keeps and merges the same."""
    video, audio = film(3, [[(12, 9), (5, 2)], [(8, 6)]], empty=2), media(4, [[50, 20], [30]], 50, empty=1)
    method = FastVID(video_ratio=0.5, audio_ratio=0.8)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        video, audio = (Media(some[0], some[1], None, *some[2:]) for some in (tensors[:5], tensors[5:]))
        kept, kept_audio = method.before(video, audio)
        assert kept is not None and kept_audio is not None and kept.features is not None
        return kept.keep, kept_audio.keep, kept.features

    tensors = [part for one in (video, audio) for part in (one.features, one.received, one.sizes, one.clip, one.place)]
    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    for found, expected in zip(compiled(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_asks_for_the_mean_query() -> None:
    needs = FastVID(video_ratio=0.5, audio_ratio=0.5).needs
    assert needs is not None and needs.grids == 1 and needs.mean_query and not needs.keys


def test_refuses_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"video_ratio must lie in \(0, 1\]"):
        FastVID(video_ratio=0.0, audio_ratio=0.5)
    with pytest.raises(ValueError, match="min_segments must be at least 1, not 0"):
        FastVID(video_ratio=0.5, audio_ratio=0.5, min_segments=0)
    with pytest.raises(ValueError, match="anchor_step must be at least 1, not 0"):
        FastVID(video_ratio=0.5, audio_ratio=0.5, anchor_step=0)
    with pytest.raises(ValueError, match=r"context_share must lie in \[0, 1\], not 1.5"):
        FastVID(video_ratio=0.5, audio_ratio=0.5, context_share=1.5)
    with pytest.raises(ValueError, match=r"anchor_weight must lie in \[0, 1\], not -1"):
        FastVID(video_ratio=0.5, audio_ratio=0.5, anchor_weight=-1)
