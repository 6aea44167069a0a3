"""Batches of few sizes: as many as a device wants, the last no longer than it must be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omni.config import AudioConfig
from omni.encoders.audio import AudioEncoder
from omni.encoders.batches import batch_sizes, cut
from omni.encoders.qwen2_5_audio import Qwen25AudioEncoder
from omni.encoders.qwen3_audio import Qwen3AudioEncoder
from omni.encoders.vision import grid_batches
from seats.method import Needs

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@given(count=st.integers(1, 500), gpu=st.integers(1, 40), least=st.integers(1, 2))
def test_all_fit_and_no_batch_is_larger_than_it_must_be(count: int, gpu: int, least: int) -> None:
    """Protects: nothing is left out, a clip costs at most twice its last group, and memory stays in the bound."""
    gpu *= least
    sizes = batch_sizes(count, GPU, cpu=3, gpu=gpu, least=least)
    assert all(size == gpu for size in sizes[:-1])
    rest = count - sum(sizes[:-1])
    assert 0 < rest <= sizes[-1] <= gpu
    assert sizes[-1] < 2 * rest or sizes[-1] == least
    assert sizes[-1] % least == 0
    assert batch_sizes(count, CPU, cpu=3, gpu=gpu) == [3] * -(-count // 3)


def test_grids_of_a_clip() -> None:
    """Protects: sixteen grids of 24 x 24 patches on a GPU, four on a CPU; pairs stay together; a picture is alone."""
    assert grid_batches(64, 576, 2, GPU) == [16] * 4
    assert grid_batches(64, 576, 2, CPU) == [4] * 16
    assert grid_batches(21, 576, 2, GPU) == [16, 8]
    assert grid_batches(3, 576, 2, GPU) == [4]
    assert grid_batches(5, 3072, 2, GPU) == [2, 2, 2]
    assert grid_batches(5, 16384, 2, GPU) == [2, 2, 2]
    assert grid_batches(40, 4, 2, GPU) == [16, 16, 8]
    assert grid_batches(1, 576, 2, GPU) == grid_batches(1, 576, 2, CPU) == [1]


def test_parts_are_filled_with_zeros() -> None:
    x = torch.arange(1.0, 11.0).view(2, 5)
    first, last = cut(x, [3, 4], dim=1)
    assert torch.equal(first, x[:, :3])
    assert torch.equal(last, torch.cat((x[:, 3:], torch.zeros(2, 2)), dim=1))
    assert [part.tolist() for part in cut(x.T, [6], dim=0)] == [[*x.T.tolist(), [0.0, 0.0]]]


SIZES = {"num_mel_bins": 16, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
AUDIO: dict[str, tuple[type[AudioEncoder], AudioConfig]] = {
    "qwen2.5": (Qwen25AudioEncoder, AudioConfig(**SIZES, n_window=100, output_size=24)),
    "qwen3": (
        Qwen3AudioEncoder,
        AudioConfig(**SIZES, n_window=50, output_size=24, n_window_infer=800, conv_channels=8),
    ),
}


@pytest.mark.parametrize("family", AUDIO)
def test_sound_in_batches_for_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: tokens and signals do not depend on how many chunks run together, and which batches run."""
    kind, config = AUDIO[family]
    torch.manual_seed(0)
    encoder = kind(config).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mel, lengths = torch.randn(2, 16, 7130), torch.tensor([7130, 333])
    seen: list[tuple[str, int]] = []

    def call(method: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        chunks = x.shape[1] // config.chunk_frames if method.__name__ == "encode_batch" else len(x)
        seen.append((method.__name__, chunks))
        return method(x, *arguments)

    with torch.inference_mode():
        tokens, signals = encoder(mel, lengths, Needs(keys=True))
        module = sys.modules[kind.__module__]
        monkeypatch.setattr(module, "batch_sizes", lambda count, _, **sizes: batch_sizes(count, GPU, **sizes))
        same, same_signals = encoder(mel, lengths, Needs(keys=True), call=call)
    torch.testing.assert_close(same, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_signals.received, signals.received, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_signals.keys, signals.keys, rtol=1e-4, atol=1e-5)
    if family == "qwen2.5":
        assert seen == [("encode_batch", size) for size in (32, 4, 2)]
    else:
        assert seen == [("convolve", 64), ("convolve", 8), ("attend", 8), ("attend", 1), ("convolve", 4), ("attend", 1)]
