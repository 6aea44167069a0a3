"""Methods that select once, before the decoder, so that every layer sees the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from seats.counts import Counts
from seats.method import Needs, Step, require_ratio


@dataclass(frozen=True, kw_only=True)
class BeforeDecoder:
    """video_ratio, audio_ratio: the shares of video and of sound that are kept, in (0, 1]."""

    video_ratio: float
    audio_ratio: float

    needs: ClassVar[Needs | None] = None
    window_grids: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_ratio("video_ratio", self.video_ratio)
        require_ratio("audio_ratio", self.audio_ratio)

    @property
    def keeps_everything(self) -> bool:
        return self.video_ratio == 1 and self.audio_ratio == 1

    def check(self, num_layers: int) -> None:
        """Any depth will do."""

    def steps(self, num_layers: int) -> list[Step]:
        return []

    def left(self, media: int, step: Step, counts: Counts) -> int:
        raise AssertionError("nothing is selected after a layer")

    def after(self, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor | None = None) -> Tensor:
        raise AssertionError("nothing is selected after a layer")
