"""Random prompts for the tests of methods: windows of several sizes, padded with what would spread if it were read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seats.method import Kept, Media

CHANNELS, KEYS = 12, 5


def media(seed: int, prompts: list[list[int]], width: int, *, empty: int = 0, start: int = 0) -> Media:
    """prompts: for each, the sizes of its windows; `empty` windows more at the end, and NaN wherever nothing is."""
    generator = torch.Generator().manual_seed(seed)
    most = max(map(len, prompts)) + empty
    sizes = torch.tensor([[*row, *[0] * (most - len(row))] for row in prompts])
    clip = torch.tensor([[*[0] * len(row), *[-1] * (most - len(row))] for row in prompts])
    features = torch.full((len(prompts), most, width, CHANNELS), float("nan"))
    keys = torch.full((len(prompts), most, width, KEYS), float("nan"))
    received = torch.full((len(prompts), most, width), float("nan"))
    place = torch.full((len(prompts), most, width), 10**6)
    for row, windows in enumerate(prompts):
        at = start
        for window, size in enumerate(windows):
            features[row, window, :size] = torch.randn(size, CHANNELS, generator=generator)
            keys[row, window, :size] = torch.randn(size, KEYS, generator=generator)
            received[row, window, :size] = torch.rand(size, generator=generator)
            place[row, window, :size] = torch.arange(at, at + size)
            at += size
    return Media(features, received, keys, sizes, clip, place)


def one(whole: Media, row: int) -> Media:
    """A prompt of a batch alone, without the windows that it does not have."""
    windows = int((whole.sizes[row] > 0).sum())
    parts: dict[str, Tensor] = {name: value[row : row + 1, :windows] for name, value in vars(whole).items()}
    return Media(**parts)


def flat(whole: Media, row: int, name: str) -> Tensor:
    """The real values of a prompt, (N, …)."""
    values: Any = getattr(whole, name)
    return values[row][whole.there[row]]


def picked(kept: Kept | None, whole: Media, row: int) -> list[int]:
    """Which of a prompt's real tokens stay, by number."""
    assert kept is not None
    return kept.keep[row][whole.there[row]].nonzero().flatten().tolist()
