"""What a way of keeping tokens consists of. SEATS is one, in `seats.config`; others are in `seats.methods`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from seats.counts import Counts


@dataclass(frozen=True)
class Needs:
    """What a method looks at in the last block of each encoder, beside the tokens that it makes.

    grids: temporal grids of video whose patches ask each other, for the attention that tokens receive (sound:
    arXiv 2605.20035, whatever the method). mean_query: of pictures, what a grid's mean query pays to each of its
    tokens instead. keys: the keys, too, means over heads and over what is merged into a token.
    """

    grids: int = 2
    mean_query: bool = False
    keys: bool = False


@dataclass
class Media:
    """The tokens of one modality of B prompts, by windows, before the decoder.

    features: (B, W, n, D) as they enter it. received: (B, W, n) float32, the attention that each received. keys:
    (B, W, n, d) or None. sizes: (B, W) int64, tokens of each window, which come first; what lies beyond is padding,
    of any value. clip: (B, W) int64, which of the prompt's clips or sounds a window is of. place: (B, W, n) int64,
    where each token stands in its prompt.
    """

    features: Tensor
    received: Tensor
    keys: Tensor | None
    sizes: Tensor
    clip: Tensor
    place: Tensor

    @property
    def there(self) -> Tensor:
        """(B, W, n) bool: no padding."""
        return torch.arange(self.received.shape[-1], device=self.sizes.device) < self.sizes[..., None]


class Kept(NamedTuple):
    """keep: (B, W, n) bool, padding false. features: (B, W, n, D), where a method changes what is kept, else None."""

    keep: Tensor
    features: Tensor | None = None


class Step(NamedTuple):
    """A selection after a layer, counted from 1. video, audio: shares that it keeps; None: text alone is left."""

    layer: int
    video: float | None = None
    audio: float | None = None


class Method(Protocol):
    """A frozen dataclass, which is a part of the key of a plan: what it keeps has a size known before the data.

    All that it computes is of static shape and traced by `torch.compile` without a break.
    """

    @property
    def video_ratio(self) -> float:
        """The share of video tokens that is kept, the average over all decoder layers; `audio_ratio` of sound."""

    @property
    def audio_ratio(self) -> float: ...

    @property
    def needs(self) -> Needs | None:
        """None: nothing of the encoders but their tokens."""

    @property
    def window_grids(self) -> int:
        """Temporal grids in a window of video, as `before` gets it. Windows of sound have 50 tokens."""

    @property
    def keeps_everything(self) -> bool:
        """Nothing has to run."""

    def check(self, num_layers: int) -> None:
        """Raises ValueError where a decoder of so many layers cannot follow."""

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        """From the sizes of their windows: how many tokens of media enter the decoder at most, and how many of sound.

        0 of sound where `left` does not ask.
        """

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        """What enters the decoder. A modality that no prompt of the plan has is None."""

    def steps(self, num_layers: int) -> list[Step]:
        """The selections between the layers."""

    def left(self, media: int, step: Step, counts: Counts) -> int:
        """How many of so many tokens of media a step that keeps some leaves at most."""

    def after(self, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor | None = None) -> Tensor:
        """Which tokens a step keeps: (B, S) bool.

        scores: (B, S) float32, what the last token of text pays to each. kind, clip: (B, S), modality and clip of each,
        and windows: how many there are at most, as in `seats.selection.select`.
        """


def require_ratio(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], not {value}.")
