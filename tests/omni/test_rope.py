"""Rotary tables to the last bit."""

from __future__ import annotations

import pytest
import torch

from omni.rope import inverse_frequencies


@pytest.mark.parametrize(("channels", "theta"), [(128, 1e6), (40, 1e4), (36, 1e4), (64, 5e5)])
def test_frequencies_are_those_of_the_public_models(channels: int, theta: float) -> None:
    """Protects: an angle at position 90,000 (an hour of video) is of no more digits than its frequency has."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(rope_theta=theta, head_dim=channels, rope_scaling=None)
    rotary = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(channels, theta, torch.device("cpu")), rotary.inv_freq)
