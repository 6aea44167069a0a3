"""Block-wise decay: how much each selection between decoder layers keeps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import exp, fsum


def keep_ratios(
    target: float, encoder: float, drop_layers: Sequence[int], late_layer: int | None, num_layers: int
) -> list[float]:
    """The share of a modality's tokens that each selection keeps (arXiv 2605.20035, block-wise decay).

    target: average retention over all `num_layers` layers. encoder: what Stage I keeps. drop_layers: selections run
    after these layers, counted from 1, rising; `late_layer` and the layers after it see text alone (None: never).

    The retention starts at `encoder` and falls after selection i by a part that grows as e^i, so that the average over
    all layers is `target`; where no such fall exists, by nothing or down to 0. One ratio, to 4 decimals, for each drop
    layer before the removal; drop layers at or past it have no effect and get none.
    """
    removal = num_layers if late_layer is None else late_layer - 1
    drops = [layer for layer in drop_layers if layer < removal]
    if not drops:
        return []
    parts = [exp(i) for i in range(len(drops))]
    # The retention after selection i is encoder · (1 - x · fallen[i]): its average is linear in x.
    fallen = [part / fsum(parts) for part in accumulate(parts)]
    segments = [after - before for before, after in pairwise([*drops, removal])]
    flat = encoder * removal
    steepest = encoder * fsum(length * part for length, part in zip(segments, fallen, strict=True))
    x = min(1.0, max(0.0, (flat - target * num_layers) / steepest))
    levels = [1.0] + [max(0.0, 1 - x * part) for part in fallen]
    return [round(after / before, 4) for before, after in pairwise(levels)]
