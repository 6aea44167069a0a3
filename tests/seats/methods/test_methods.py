"""What every method has in common: what it promises before the data, batches, padding, the compiler, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import media, one, picked

from seats.config import preset
from seats.method import Kept, Media, Method
from seats.methods import METHODS, NAMES, method_for
from seats.plan import counts_of

AT_ONCE = [name for name in METHODS if not name.startswith(("fastv-", "pyramiddrop")) and name != "fastv"]
"""Methods that select before the decoder."""

WINDOWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=3)


class Config:
    """What `method_for` asks of a model's configuration."""

    family = "qwen2_5_omni"

    class decoder:  # noqa: N801
        num_layers = 28
        hidden_size = 3584


def make(name: str, video: float, audio: float) -> Method:
    return preset("qwen2.5-omni-7b") if name == "seats" else METHODS[name](video_ratio=video, audio_ratio=audio)


def run(method: Method, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
    return method.before(video, audio)


def prompt(seed: int, video: list[list[int]], audio: list[list[int]], empty: int = 0) -> tuple[Media, Media]:
    return media(seed, video, 9, empty=empty), media(seed + 1, audio, 50, empty=empty, start=1000)


@pytest.mark.parametrize("name", AT_ONCE)
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
        assert (name not in ("omnizip", "dash")) <= kept <= promised  # OmniZip has no floor: of one token it keeps none
        if name not in ("omnizip", "dash", "fastvid", "vidcom2"):  # these learn from the data how many
            assert kept == promised


@pytest.mark.parametrize("name", [*AT_ONCE, "seats"])
@pytest.mark.parametrize("present", ["video", "audio"])
def test_one_modality_alone(name: str, present: str) -> None:
    """Without sound, or without video, the other is selected by its own ratio."""
    method = make(name, 0.5, 0.6)
    video, audio = prompt(0, [[8] * 6], [[50, 20]])
    kept_video, kept_audio = run(method, video if present == "video" else None, audio if present == "audio" else None)
    kept, other = (kept_video, kept_audio) if present == "video" else (kept_audio, kept_video)
    assert other is None and kept is not None
    promised, _ = method.entering([8] * 6 if present == "video" else [], [50, 20] if present == "audio" else [])
    assert 0 < int(kept.keep.sum()) <= promised
    share = promised / (48 if present == "video" else 70)
    if name != "seats":
        assert 0.3 < share < 0.9


@pytest.mark.parametrize("name", [*AT_ONCE, "seats"])
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


@pytest.mark.parametrize("name", AT_ONCE)
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
