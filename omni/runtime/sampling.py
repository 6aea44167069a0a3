"""The next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COLDEST = 1e-20
"""Logits differ by a billionth at least, so that this far below the likeliest token has all."""


@dataclass(frozen=True)
class Sampling:
    """How to pick: temperature 0 is greedy; top_k, then top_p keep the likeliest tokens, at least one."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}.")


def draw_noise(sampling: Sampling, shape: tuple[int, int], generator: torch.Generator) -> Tensor | None:
    """(B, vocab) float32 that `pick` chooses by, on the generator's device; None where the choice is greedy."""
    if sampling.temperature == 0:
        return None
    return torch.empty(shape, device=generator.device).exponential_(generator=generator)


def pick(logits: Tensor, sampling: Sampling, noise: Tensor | None = None) -> Tensor:
    """(B, vocab) float32 logits → (B,) token ids on the same device, without a host read; traces.

    noise: of `draw_noise`: the largest probability / exponential is a draw by probability. Order of the cuts as in
    transformers: temperature, top_k, top_p.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    # From the largest on, so that no temperature makes infinities of all: below COLDEST they draw alike.
    logits, ids = (logits - logits.amax(dim=-1, keepdim=True)).topk(
        min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    )
    probabilities = (logits / max(sampling.temperature, COLDEST)).softmax(dim=-1)
    # A token stays while the likelier ones have not yet reached top_p, so the first always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    choice = (probabilities / noise[:, : probabilities.shape[-1]]).argmax(dim=-1, keepdim=True)
    return ids.gather(-1, choice).squeeze(-1)
