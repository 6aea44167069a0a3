"""What SEATS selects and where: target ratios, layers, presets (arXiv 2605.20035)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seats.budget import keep_counts
from seats.counts import Counts
from seats.diversity import keep_most_diverse
from seats.method import Kept, Media, Needs, Step, require_ratio
from seats.schedule import keep_ratios
from seats.selection import select


@dataclass(frozen=True, kw_only=True)
class SeatsConfig:
    """The settings of one request. Layers are counted from 1.

    `video_ratio`, `audio_ratio`: the share of its tokens that a modality keeps on average over all decoder layers.
    `encoder_ratio_scale`: Stage I keeps min(1, scale · ratio).
    `drop_layers`: Stage II runs after each of these. `late_layer`: the first layer that sees text alone, so Stage III
    runs before it; None for never. `window_temperature`: of the softmax that shares tokens out between windows.

    Raises ValueError where the stages cannot run in this order.
    """

    video_ratio: float
    audio_ratio: float
    encoder_ratio_scale: float = 1.4
    drop_layers: tuple[int, ...]
    late_layer: int | None
    window_temperature: float

    def __post_init__(self) -> None:
        for name in ("video_ratio", "audio_ratio"):
            require_ratio(name, getattr(self, name))
        for name in ("encoder_ratio_scale", "window_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if any(layer < 1 for layer in self.drop_layers) or any(a >= b for a, b in pairwise(self.drop_layers)):
            raise ValueError(f"drop_layers must rise from layer 1 on, not {list(self.drop_layers)}.")
        if self.late_layer is None:
            return
        if self.late_layer < 2:
            raise ValueError(f"late_layer must be layer 2 or a later one, not {self.late_layer}.")
        if self.drop_layers and self.drop_layers[-1] >= self.late_layer - 1:
            raise ValueError(
                f"The last of drop_layers must come before layer {self.late_layer - 1}, after which only text is left "
                f"for late_layer {self.late_layer}; it is {self.drop_layers[-1]}."
            )

    needs = Needs()
    window_grids = 2

    @property
    def keeps_everything(self) -> bool:
        """Both ratios are 1: no stage runs."""
        return self.video_ratio == 1 and self.audio_ratio == 1

    @property
    def encoder_ratios(self) -> tuple[float, float]:
        """The shares of video and audio tokens that Stage I keeps."""
        scale = self.encoder_ratio_scale
        return min(1.0, scale * self.video_ratio), min(1.0, scale * self.audio_ratio)

    def check(self, num_layers: int) -> None:
        """Raises ValueError where a decoder of `num_layers` layers is too shallow for these settings."""
        if self.drop_layers and self.drop_layers[-1] >= num_layers:
            raise ValueError(
                f"drop_layers {list(self.drop_layers)} must come before the last of the model's {num_layers} layers."
            )
        if self.late_layer is not None and self.late_layer > num_layers:
            raise ValueError(f"late_layer {self.late_layer} is past the model's {num_layers} layers.")

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        ratios = zip((video, audio), self.encoder_ratios, strict=True)
        kept = [keep_counts(torch.tensor(sizes, dtype=torch.long), ratio) for sizes, ratio in ratios]
        return sum(int(counts.sum()) for counts in kept), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        """Stage I: the most diverse tokens of every window."""
        kept_video, kept_audio = (
            None if media is None else Kept(keep_most_diverse(media, ratio))
            for media, ratio in zip((video, audio), self.encoder_ratios, strict=True)
        )
        return kept_video, kept_audio

    def steps(self, num_layers: int) -> list[Step]:
        """Stage II after each of the layers that come before Stage III."""
        videos, audios = (
            keep_ratios(ratio, encoder, self.drop_layers, self.late_layer, num_layers)
            for ratio, encoder in zip((self.video_ratio, self.audio_ratio), self.encoder_ratios, strict=True)
        )
        steps = [Step(*step) for step in zip(self.drop_layers, videos, audios, strict=False)]
        return steps if self.late_layer is None else [*steps, Step(self.late_layer - 1)]

    def left(self, media: int, step: Step, counts: Counts) -> int:
        assert step.video is not None and step.audio is not None
        if not (counts.video_windows and counts.audio_windows):
            wanted = max(1, round((step.video if counts.video_windows else step.audio) * media))
            return min(media, wanted)
        # Each modality is rounded by itself, up by less than 1.
        wanted = min(media, math.floor(max(step.video, step.audio) * media) + 2)
        budget = min(media, max(wanted, counts.windows))
        # A window with a budget of 1 and both modalities keeps 2, so that neither is wiped out.
        return budget + min(counts.pairs, media - budget)

    def after(self, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor | None = None) -> Tensor:
        """Stage II."""
        assert step.video is not None and step.audio is not None
        return select(scores, kind, step.video, step.audio, self.window_temperature, windows, clip)


class Preset(NamedTuple):
    num_layers: int
    hidden_size: int
    drop_layers: tuple[int, ...]
    late_layer: int
    window_temperature: float
    rows: dict[float, tuple[float, float]]
    """Overall retention → video_ratio, audio_ratio; rising."""
    encoder_ratio_scale: float = 1.4


PRESETS = {
    "qwen2.5-omni-7b": Preset(
        num_layers=28,
        hidden_size=3584,
        drop_layers=(16, 18, 20),
        late_layer=24,
        window_temperature=0.1,
        rows={0.10: (0.06, 0.35), 0.15: (0.10, 0.45), 0.25: (0.20, 0.55), 0.35: (0.30, 0.65), 1.0: (1.0, 1.0)},
    ),
    "qwen3-omni-30b-a3b": Preset(
        num_layers=48,
        hidden_size=2048,
        drop_layers=(27, 31, 35),
        late_layer=40,
        window_temperature=0.3,
        rows={0.10: (0.07, 0.45), 0.15: (0.12, 0.50), 0.25: (0.22, 0.60), 0.35: (0.32, 0.70), 1.0: (1.0, 1.0)},
    ),
    # By scripts/tiny/analyze_layers.py (benchmarks/pages/accuracy.md): text takes in pictures in layers 2 and 3, sound
    # in layer 5, and needs neither after that. So selections are as late as they can be before the removal. Its clips
    # have more tokens of sound than of video, so both keep the same share. At a scale of 1.6 the removal alone would
    # bring the average down to the ratios; above it the selections have something to drop. Here the less the better:
    # before layer 5 text does not ask for sound, and relevance is no guide to it.
    "tiny": Preset(
        num_layers=8,
        hidden_size=192,
        drop_layers=(2, 3, 4),
        late_layer=6,
        window_temperature=0.1,
        rows={0.10: (0.10, 0.10), 0.15: (0.15, 0.15), 0.25: (0.25, 0.25), 0.35: (0.35, 0.35), 1.0: (1.0, 1.0)},
        encoder_ratio_scale=1.8,
    ),
}
FAMILIES = {"qwen2_5_omni": ("qwen2.5-omni-7b", "tiny"), "qwen3_omni_moe": ("qwen3-omni-30b-a3b",)}
"""Family of a model's configuration → its presets; the first is that of models without one of their own."""


def preset(name: str, retention: float = 0.35) -> SeatsConfig:
    """The paper's settings for a model at an overall retention in (0, 1]; 1 keeps everything.

    The paper gives the two ratios at 0.35, 0.25, 0.15 and 0.10. Between these, and up to 1, they are interpolated
    linearly; below 0.10 both shrink in proportion. Raises ValueError for another name or retention.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return _preset(name, PRESETS[name].num_layers, retention)


def preset_for(config: Any, retention: float = 0.35) -> SeatsConfig:
    """The preset of a model's family with the layers at the same fractions of the model's depth.

    config: has `family`, `decoder.num_layers` and `decoder.hidden_size`, as `omni.config.OmniConfig`. A model of the
    depth and width of one of its family's presets has that one. In a shallow model, where fractions fall on one layer,
    the selections move to earlier layers, one layer each. Raises ValueError for a family without a preset and for a
    model too shallow to hold every stage.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"No preset for the family {config.family!r}; there are presets for {', '.join(FAMILIES)}.")
    size = config.decoder.num_layers, config.decoder.hidden_size
    first, *others = FAMILIES[config.family]
    name = next((other for other in others if PRESETS[other][:2] == size), first)
    return _preset(name, config.decoder.num_layers, retention)


def _preset(name: str, num_layers: int, retention: float) -> SeatsConfig:
    chosen = PRESETS[name]
    late_layer = round(chosen.late_layer * num_layers / chosen.num_layers)
    drop_layers: list[int] = []
    limit = late_layer - 1
    for layer in reversed(chosen.drop_layers):
        limit = min(round(layer * num_layers / chosen.num_layers), limit - 1)
        drop_layers.insert(0, limit)
    if limit < 1:
        raise ValueError(
            f"{num_layers} layers are too few for the {len(drop_layers)} selections and the late layer of {name}; "
            "make a SeatsConfig with layers of your own."
        )
    video_ratio, audio_ratio = ratios_at(chosen.rows, retention)
    return SeatsConfig(
        video_ratio=video_ratio,
        audio_ratio=audio_ratio,
        drop_layers=tuple(drop_layers),
        late_layer=late_layer,
        window_temperature=chosen.window_temperature,
        encoder_ratio_scale=chosen.encoder_ratio_scale,
    )


def ratios_at(rows: dict[float, tuple[float, float]], retention: float) -> tuple[float, float]:
    """video_ratio and audio_ratio at a retention, between the rows of a preset as `preset` says."""
    require_ratio("retention", retention)
    for (low, (low_video, low_audio)), (high, (high_video, high_audio)) in pairwise([(0.0, (0.0, 0.0)), *rows.items()]):
        if retention <= high:
            share = (retention - low) / (high - low)
            # Each end has the weight 0 or 1 there, so a row's own retention yields the row to the last bit.
            return (1 - share) * low_video + share * high_video, (1 - share) * low_audio + share * high_audio
    raise AssertionError("the last row is at 1")
