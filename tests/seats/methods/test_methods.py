"""What every method has in common: what it promises before the data, batches, padding, the compiler, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import media, one, picked

from seats.config import preset
from seats.counts import Counts
from seats.method import Kept, Media, Method
from seats.methods import METHODS, NAMES, method_for
from seats.plan import counts_of
from seats.selection import AUDIO, PADDING, TEXT, VIDEO

ALL = ("seats", *METHODS)

WHOLE = {"random", "divprune", "divprune-om", "evs", "fastv", "fastv-om", "pyramiddrop", "pyramiddrop-om"}
"""What rounds its share once; others once for each window."""

DATA_DECIDES = {"omnizip", "dash", "fastvid", "vidcom2"}
"""How many stay of video."""

WINDOWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3)


class Config:
    """What `method_for` asks of a model's configuration."""

    family = "qwen2_5_omni"

    class decoder:  # noqa: N801
        num_layers = 28
        hidden_size = 3584


def make(name: str, video: float, audio: float) -> Method:
    if name == "seats":
        return replace(preset("qwen2.5-omni-7b"), video_ratio=video, audio_ratio=audio)
    return METHODS[name](video_ratio=video, audio_ratio=audio)


def run(method: Method, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
    return method.before(video, audio)


def prompt(seed: int, video: list[list[int]], audio: list[list[int]], empty: int = 0) -> tuple[Media, Media]:
    return media(seed, video, 9, empty=empty), media(seed + 1, audio, 50, empty=empty, start=1000)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    windows=WINDOWS,
    sounds=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    ratios=st.tuples(st.floats(0.26, 1), st.floats(0.3, 1)),
)
def test_no_more_is_kept_than_was_promised(
    name: str, seed: int, windows: list[list[int]], sounds: list[int], ratios: tuple[float, float]
) -> None:
    """At most `entering`, something of each modality, nothing that is not there; the same alone and in a batch, and
    whatever empty windows follow."""
    method = make(name, *ratios)
    if name == "fastvid":  # windows of a clip are of one size
        windows = [[row[0]] * len(row) for row in windows]
    audio_sizes = [sounds] * len(windows)
    video, audio = prompt(seed, windows, audio_sizes)
    together = run(method, *prompt(seed, windows, audio_sizes, empty=2))
    for row in range(len(windows)):
        mine = one(video, row), one(audio, row)
        alone = run(method, *mine)
        kept = 0
        for kept_alone, kept_together, medium, whole in zip(alone, together, mine, (video, audio), strict=True):
            assert kept_alone is not None and kept_together is not None
            assert not (kept_alone.keep & ~medium.there).any()
            chosen = picked(kept_alone, medium, 0)
            wide = kept_together.keep[row, : whole.there.shape[1]][whole.there[row]].nonzero().flatten().tolist()
            assert chosen == wide
            kept += len(chosen)
            if kept_alone.features is not None and kept_together.features is not None:
                torch.testing.assert_close(
                    kept_alone.features[0][kept_alone.keep[0]], kept_together.features[row][kept_together.keep[row]]
                )
        try:
            promised, _ = method.entering(windows[row], sounds)
        except ValueError:
            assert name in ("dycoke", "evs")  # whose whole frames have no room in so short a prompt
            continue
        assert (name != "omnizip") <= kept <= promised  # OmniZip has no floor: of one token it keeps none
        if name not in DATA_DECIDES:
            assert kept == promised


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("present", ["video", "audio"])
@pytest.mark.parametrize("ratios", [(0.3, 0.8), (0.8, 0.3)])
def test_one_modality_alone(name: str, present: str, ratios: tuple[float, float]) -> None:
    """Without sound, or without video, the other is kept by its own ratio, on average over the layers: to a token, or
    to one of each window where these are rounded by themselves, or to 5 % where the data decide."""
    method, layers = make(name, *ratios), 28
    sizes, kind, ratio = ([40] * 8, VIDEO, ratios[0]) if present == "video" else ([50, 50, 50, 20], AUDIO, ratios[1])
    medium = media(0, [sizes], max(sizes))
    kept_video, kept_audio = method.before(*((medium, None) if kind == VIDEO else (None, medium)))
    kept, other = (kept_video, kept_audio) if kind == VIDEO else (kept_audio, kept_video)
    assert other is None and kept is not None
    left = int(kept.keep.sum())
    sizes_of = {"video_sizes": sizes if kind == VIDEO else [], "audio_sizes": sizes if kind == AUDIO else []}
    counts = counts_of(method, text=1, windows=(1, 0), **sizes_of)
    assert left <= counts.tokens - 1 and (name in DATA_DECIDES or left == counts.tokens - 1)
    seen, layer = 0, 0
    for step in method.steps(layers):
        seen, layer = seen + left * (step.layer - layer), step.layer
        at_most = 0 if step.video is None else method.left(left, step, counts)
        if step.video is not None:
            scores = torch.rand(1, left + 1, generator=torch.Generator().manual_seed(layer))
            kinds = torch.tensor([[kind] * left + [TEXT]], dtype=torch.uint8)
            left = int(method.after(scores, kinds, step, 1).sum()) - 1
        left = min(left, at_most)
    average = (seen + left * (layers - layer)) / layers
    rounding = 1 if name in WHOLE else sum(sizes) / 20 if name in DATA_DECIDES else len(sizes)
    assert average == pytest.approx(ratio * sum(sizes), abs=rounding)


@pytest.mark.parametrize("name", [name for name in METHODS if make(name, 0.5, 0.6).steps(28)])
def test_steps_keep_what_was_promised(name: str) -> None:
    """Each selection between the layers: text and no padding, no more of media than `left`, the same alone and in a
    batch, in one graph."""
    method = make(name, 0.5, 0.6)
    kinds = [[TEXT, *[VIDEO] * 20, *[AUDIO] * 11, TEXT], [*[VIDEO] * 9, *[AUDIO] * 30, *[VIDEO] * 9, TEXT, TEXT]]
    longest = max(map(len, kinds)) + 3
    kind = torch.tensor([row + [PADDING] * (longest - len(row)) for row in kinds], dtype=torch.uint8)
    scores = torch.rand(kind.shape, generator=torch.Generator().manual_seed(0)).masked_fill(kind == PADDING, 9)
    for step in method.steps(28):
        keep = method.after(scores, kind, step, 2)
        torch._dynamo.reset()
        traced = torch.compile(method.after, fullgraph=True, dynamic=False, backend="aot_eager")
        assert torch.equal(traced(scores, kind, step, 2), keep)
        for row, mine in enumerate(kinds):
            count, sound, text = len(mine), mine.count(AUDIO), mine.count(TEXT)
            alone = method.after(scores[row : row + 1, :count], kind[row : row + 1, :count], step, 2)[0]
            assert torch.equal(keep[row, :count], alone) and not keep[row, count:].any()
            assert keep[row][kind[row] == TEXT].all()
            counts = Counts(text, count, sound, 1, 20, 1, 2, 1)
            assert 0 < int(keep[row].sum()) - text <= method.left(count - text, step, counts)


@pytest.mark.parametrize("name", ALL)
def test_traced_without_a_break(name: str) -> None:
    """One graph, which selects what runs without."""
    method = make(name, 0.5, 0.6)
    video, audio = prompt(3, [[8] * 6, [8] * 4], [[50, 20], [50]])
    video.features, audio.features = video.features.bfloat16(), audio.features.bfloat16()

    def flat(video: Media, audio: Media) -> Any:
        return [part for kept in method.before(video, audio) if kept is not None for part in kept if part is not None]

    torch._dynamo.reset()
    traced = torch.compile(flat, fullgraph=True, dynamic=False, backend="aot_eager")
    for expected, found in zip(flat(*vary(video, audio)), traced(video, audio), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def vary(video: Media, audio: Media) -> tuple[Media, Media]:
    """The same in other objects: a method may change what it gets."""
    return Media(**vars(video)), Media(**vars(audio))


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_computed_in_full(name: str) -> None:
    """Features in bfloat16 are compared in float32: the same tokens as when they come in float32."""
    method = make(name, 0.4, 0.6)
    half, full = prompt(5, [[9] * 8], [[50, 50]]), prompt(5, [[9] * 8], [[50, 50]])
    for narrow, wide in zip(half, full, strict=True):
        narrow.features = narrow.features.bfloat16()
        wide.features = narrow.features.float()
    for first, second in zip(run(method, *half), run(method, *full), strict=True):
        assert first is not None and second is not None
        assert torch.equal(first.keep, second.keep)


@pytest.mark.parametrize("name", METHODS)
def test_ratios_out_of_range(name: str) -> None:
    with pytest.raises(ValueError, match=r"video_ratio must lie in \(0, 1\], not 0"):
        METHODS[name](video_ratio=0.0, audio_ratio=0.5)
    with pytest.raises(ValueError, match=r"audio_ratio must lie in \(0, 1\], not 1.5"):
        METHODS[name](video_ratio=0.5, audio_ratio=1.5)


def test_names() -> None:
    """A method is found by its name, at the ratios that SEATS has at a retention."""
    for name in NAMES:
        method = method_for(name, Config, 0.35)
        assert (method.video_ratio, method.audio_ratio) == (0.30, 0.65)
        assert not method.keeps_everything
    assert method_for("random", Config, 0.35, video_ratio=0.5).video_ratio == 0.5
    with pytest.raises(ValueError, match="No method 'best'; choose one of seats, random"):
        method_for("best", Config)


def test_methods_are_keys() -> None:
    """Equal settings share a plan, others do not."""
    for name, made in METHODS.items():
        counts = counts_of(make(name, 0.5, 0.6), text=9, video_sizes=[9, 9], audio_sizes=[50], windows=(1, 1))
        assert hash(counts) == hash(
            counts_of(make(name, 0.5, 0.6), text=9, video_sizes=[9, 9], audio_sizes=[50], windows=(1, 1))
        )
        assert made(video_ratio=0.5, audio_ratio=0.6) == made(video_ratio=0.5, audio_ratio=0.6)
        assert made(video_ratio=0.5, audio_ratio=0.6) != made(video_ratio=0.4, audio_ratio=0.6)
