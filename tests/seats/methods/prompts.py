"""Random prompts for the tests of methods: windows of several sizes, padded with what would spread if it were read."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
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


def drawn(seed: int, *shape: int) -> Tensor:
    """float32 in [-1, 1), by integers alone: the same wherever it is computed, for values that others' code gave."""
    bits = torch.arange(math.prod(shape)) + (seed << 20)
    for factor in (0x45D9F3B, 0x119DE1F3):
        bits = ((bits >> 16) ^ bits) * factor & 0xFFFFFFFF
    return ((bits >> 8).double() / 2**23 - 1).float().view(shape)


def described(features: Tensor, received: Tensor | None = None, width: int | None = None) -> Media:
    """One prompt of one clip in windows of `width` tokens, the last perhaps shorter. features: (N, D)."""
    tokens = len(features)
    width = width or tokens
    windows = -(-tokens // width)
    padding = windows * width - tokens
    received = torch.ones(tokens) if received is None else received
    sizes = torch.tensor([[width] * (windows - 1) + [width - padding]])
    return Media(
        F.pad(features, (0, 0, 0, padding), value=float("nan")).view(1, windows, width, -1),
        F.pad(received, (0, padding), value=float("nan")).view(1, windows, width),
        None,
        sizes,
        torch.zeros_like(sizes),
        torch.arange(windows * width).view(1, windows, width),
    )


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
