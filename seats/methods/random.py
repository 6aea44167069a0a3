"""Any tokens: what every other method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from seats.method import Kept, Media
from seats.methods.before import BeforeDecoder
from seats.methods.ranking import apart, part, take_any


@dataclass(frozen=True, kw_only=True)
class Random(BeforeDecoder):
    """max(1, int(ratio · n)) tokens of each modality, any of the whole prompt's, before the decoder.

    As in the comparison of arXiv 2605.20035. Which ones depends on a token's number in its modality alone.
    """

    def entering(self, video: Sequence[int], audio: Sequence[int]) -> tuple[int, int]:
        counts = zip((video, audio), (self.video_ratio, self.audio_ratio), strict=True)
        return sum(int(part(torch.tensor(sum(sizes)), ratio)) for sizes, ratio in counts), 0

    def before(self, video: Media | None, audio: Media | None) -> tuple[Kept | None, Kept | None]:
        return apart(any_of, video, audio, (self.video_ratio, self.audio_ratio))


def any_of(media: Media, ratio: float) -> Kept:
    return Kept(take_any(media, part(media.sizes.sum(dim=-1), ratio)))
