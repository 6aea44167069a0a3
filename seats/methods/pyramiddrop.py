"""PyramidDrop: fewer tokens from stage to stage, those that the question looks at (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from seats.method import Step
from seats.methods.fastv import ByRelevance

STAGES = 4


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ByRelevance):
    """PyramidDrop (arXiv 2410.17247, section 3) for video and sound together.

    The decoder has four stages of as many layers. After each but the last a share λ of the tokens stays, those that the
    last token of text looks at most. video_ratio, audio_ratio: the shares that are kept on average over all layers,
    which sets λ, one for each modality: (1 + λ + λ² + λ³) / 4 where the stages are alike. So a ratio must be above the
    share of the first stage, a quarter. A decoder of three layers or less has fewer stages. both: `ByRelevance`.

    The authors' λ is 0.5, on average 47 %. They rank by the projections of the layer after, on what enters it; here, as
    with other methods, by those of the layer before, on its output. They cut off λ^k of all tokens to a whole number;
    here λ of those that are left is rounded.
    """

    def steps(self, num_layers: int) -> list[Step]:
        ends = sorted({max(1, num_layers * stage // STAGES) for stage in range(1, STAGES)} - {num_layers})
        lengths = [after - before for before, after in zip([0, *ends], [*ends, num_layers], strict=True)]
        shares = [stage_share(ratio * num_layers, lengths) for ratio in self.averages(lengths[0], num_layers)]
        return [Step(end, *shares) for end in ends]


def stage_share(total: float, lengths: list[int]) -> float:
    """The λ in (0, 1] at which a sum of lengths · λ^stage is `total`, by halves."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        small = sum(length * middle**stage for stage, length in enumerate(lengths)) < total
        low, high = (middle, high) if small else (low, middle)
    return high
