"""What `evaluate.py` compares: every token, methods at their retentions, and SEATS with parts taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import seats
from omni.model import Omni
from seats import Method, SeatsConfig
from seats.budget import keep_counts
from seats.method import Kept, Media, Step
from seats.selection import AUDIO, VIDEO, highest_of_each


@dataclass(frozen=True)
class Setting:
    """One row of the comparison. method: EVERY, NO_VIDEO, NO_SOUND, a name of `seats.methods.names` or of ABLATIONS."""

    method: str
    retention: float = 1.0
    kv: str = "layerwise"

    @property
    def name(self) -> str:
        kept = "" if self.retention == 1 else f" {self.retention:.0%}"
        return f"{self.method}{kept}{', pruned' if self.kv == 'pruned' else ''}"


EVERY, NO_VIDEO, NO_SOUND = "every token", "every token, no video", "every token, no sound"


@dataclass(frozen=True, kw_only=True)
class Unweighted(SeatsConfig):
    """Stage I without attention weights."""

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        for media in (video, audio):
            if media is not None:
                media.received = torch.ones_like(media.received)
        return super().before(video, audio)


@dataclass(frozen=True, kw_only=True)
class Windowless(SeatsConfig):
    """Stage II without windows: the most relevant of the whole sequence, of each modality its share."""

    def after(self, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor | None = None) -> Tensor:
        assert step.video is not None and step.audio is not None
        video, audio = (
            keep_counts((kind == medium).sum(-1), ratio) for medium, ratio in ((VIDEO, step.video), (AUDIO, step.audio))
        )
        return highest_of_each(scores, kind, video, audio)


def stage_one_alone(config: SeatsConfig) -> SeatsConfig:
    """All of the reduction before the decoder: what stays stays to the end."""
    return replace(config, encoder_ratio_scale=1.0, drop_layers=(), late_layer=None)


def without_stage_one(config: SeatsConfig) -> SeatsConfig:
    return replace(config, encoder_ratio_scale=1 / min(config.video_ratio, config.audio_ratio))


ABLATIONS: dict[str, Callable[[SeatsConfig], SeatsConfig]] = {
    "stage I alone": stage_one_alone,
    "stage II alone": lambda config: replace(without_stage_one(config), late_layer=None),
    "stage III alone": lambda config: replace(without_stage_one(config), drop_layers=()),
    "no windows": lambda config: Windowless(**vars(config)),
    "no attention weights": lambda config: Unweighted(**vars(config)),
}


BETWEEN_LAYERS = {"seats", "fastv", "fastv-om", "pyramiddrop", "pyramiddrop-om", *ABLATIONS} - {"stage I alone"}
"""Where layers see different tokens, so that it matters what the cache keeps; of the rest both caches are one."""


def settings(methods: Sequence[str], retentions: Sequence[float], ablated: float) -> list[Setting]:
    """ablated: the retention that ablations are made at, 0 for none."""
    asked = [(method, retention) for retention in retentions for method in methods]
    asked += [(method, ablated) for method in ABLATIONS if ablated]
    found = [Setting(EVERY), Setting(NO_VIDEO), Setting(NO_SOUND)]
    for method, retention in asked:
        found.append(Setting(method, retention))
        if method in BETWEEN_LAYERS:
            found.append(Setting(method, retention, "pruned"))
    return found


def method_of(setting: Setting, model: Omni) -> Method | None:
    """None for every token. Raises ValueError where the method cannot run at the setting's retention."""
    if setting.method in (EVERY, NO_VIDEO, NO_SOUND):
        return None
    if setting.method in ABLATIONS:
        return ABLATIONS[setting.method](seats.preset_for(model.config, setting.retention))
    return seats.method_for(setting.method, model.config, setting.retention)
