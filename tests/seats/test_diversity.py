"""Stage I: the operator picks what the method's plain loop picks, whatever surrounds a window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from seats import diversity, win_div_prune
from seats.budget import keep_counts
from seats.diversity import cosines_between, max_min_keep
from tests.kernels import compiled_for_hopper, interpreted, needs_triton


def pick_by_loop(features: Tensor, attention: Tensor, count: int) -> list[int]:
    """One window by the method's text, with the whole matrix of distances."""
    features = features.float() / (features.float().norm(dim=-1, keepdim=True) + 1e-8)
    matrix = (1 - features @ features.T) * attention.float() * 1e6
    if count >= len(features):
        return list(range(len(features)))
    first = int(matrix.sort(dim=0).values[1].argmax())
    picked, nearest = [first], matrix[first].clone()
    nearest[first] = -1
    for _ in range(count - 1):
        token = int(nearest.argmax())
        nearest = nearest.minimum(matrix[token])
        nearest[token] = -1
        picked.append(token)
    return sorted(picked)


def windows(seed: int, sizes: list[int], channels: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Random windows padded to the longest with what would spread if it were read."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(sizes)
    features = torch.randn(len(sizes), longest, channels, generator=generator)
    weights = torch.rand(len(sizes), longest, generator=generator) + 0.05
    padding = torch.arange(longest) >= torch.tensor(sizes)[:, None]
    return features.masked_fill(padding[..., None], float("nan")), weights.masked_fill(padding, float("nan")), padding


def kept(keep: Tensor) -> list[list[int]]:
    return [row.nonzero().squeeze(-1).tolist() for row in keep]


def test_equals_golden(golden: Path) -> None:
    tensors = load_file(golden / "windivprune.safetensors")
    for case in json.loads((golden / "windivprune.json").read_text()):
        name = case["case"]
        result = win_div_prune(
            tensors[f"{name}.features"], tensors[f"{name}.attention"], case["window_tokens"], case["ratio"]
        )
        assert torch.equal(result, tensors[f"{name}.keep"].long()), case


@given(seed=st.integers(0, 2**16), sizes=st.lists(st.integers(0, 24), min_size=1, max_size=6), ratio=st.floats(0.01, 1))
def test_every_window_equals_the_loop(seed: int, sizes: list[int], ratio: float) -> None:
    """All windows at once, padded with NaN: each as if it were alone."""
    sizes = [*sizes, 1]
    features, weights, _ = windows(seed, sizes)
    counts = keep_counts(torch.tensor(sizes), ratio)
    assert counts.tolist() == [min(n, max(1, round(ratio * n))) for n in sizes]
    result = max_min_keep(features, weights, torch.tensor(sizes), counts)
    assert kept(result) == [
        pick_by_loop(features[w, :n], weights[w, :n], int(counts[w])) if n else [] for w, n in enumerate(sizes)
    ]


@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100), ratio=st.floats(0.05, 0.95))
def test_rotated_features_and_scaled_weights_keep_the_same(seed: int, scale: float, ratio: float) -> None:
    features, weights, _ = windows(seed, [20])
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)))[0]
    expected = win_div_prune(features[0], weights[0], 7, ratio)
    assert torch.equal(win_div_prune(features[0] @ rotation, weights[0], 7, ratio), expected)
    assert torch.equal(win_div_prune(features[0], weights[0] * scale, 7, ratio), expected)
    assert torch.equal(win_div_prune(features[0] * scale, weights[0], 7, ratio), expected)


def test_copies_of_one_token_still_fill_the_count() -> None:
    """A still picture with heavy weights: distances round to below zero, and yet no token is picked twice."""
    features = torch.randn(40, 1, 64, generator=torch.Generator().manual_seed(0)).expand(40, 12, 64)
    sizes = torch.tensor([12, 12, 9, 12] * 10)
    counts = torch.tensor([5, 12, 8, 11] * 10)
    keep = max_min_keep(features, torch.full((40, 12), 200.0), sizes, counts)
    assert keep.sum(dim=-1).tolist() == counts.tolist()
    assert not keep[2::4, 9:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32(dtype: torch.dtype) -> None:
    features, weights, _ = windows(1, [30, 30])
    features, weights = features.to(dtype), weights.to(dtype)
    sizes, counts = torch.tensor([30, 30]), torch.tensor([9, 4])
    exact = max_min_keep(features.float(), weights.float(), sizes, counts)
    assert torch.equal(max_min_keep(features, weights, sizes, counts), exact)


def test_blocks_of_windows_keep_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded memory, one window or two at a time, changes nothing."""
    features, weights, _ = windows(2, [20, 20, 13, 20, 1])
    sizes = torch.tensor([20, 20, 13, 20, 1])
    counts = keep_counts(sizes, 0.3)
    whole = max_min_keep(features, weights, sizes, counts)
    for count in (1, 2):
        monkeypatch.setitem(diversity.BLOCK_BYTES, "cpu", count * 4 * 20 * (2 * 16 + 20))
        assert len(diversity.blocks(5, features)) == -(-5 // count)
        assert torch.equal(max_min_keep(features, weights, sizes, counts), whole)


def test_is_a_sound_operator() -> None:
    """Schema, fake implementation and tracing agree with what it does."""
    features, weights, _ = windows(3, [9, 6])
    torch.library.opcheck(max_min_keep.overload, (features, weights, torch.tensor([9, 6]), torch.tensor([4, 2])))


def test_nothing_to_prune() -> None:
    assert win_div_prune(torch.empty(0, 8), torch.empty(0), 5, 0.5).tolist() == []
    assert win_div_prune(torch.randn(7, 8), torch.rand(7), 5, 1.0).tolist() == list(range(7))


def test_refuses_what_does_not_fit() -> None:
    features, attention = torch.randn(7, 8), torch.rand(7)
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        win_div_prune(features, attention[1:], 5, 0.5)
    with pytest.raises(ValueError, match="window_tokens must be at least 1"):
        win_div_prune(features, attention, 0, 0.5)
    with pytest.raises(ValueError, match="ratio must lie in"):
        win_div_prune(features, attention, 5, 0.0)


KERNEL = """
import torch
from seats.budget import keep_counts
from seats.diversity import begin, pick
from seats.kernels import pick_on_device

torch.manual_seed(0)
for sizes, ratio in (([20, 20, 13, 1, 0], 0.3), ([33, 7], 0.9), ([16], 1.0)):
    sizes = torch.tensor(sizes)
    windows, tokens = len(sizes), int(sizes.max())
    counts = keep_counts(sizes, ratio)
    begun = begin(torch.randn(windows, tokens, 16), torch.rand(windows, tokens), sizes)
    keep = torch.zeros(windows, tokens, dtype=torch.bool)
    pick_on_device(*begun, sizes, counts, keep)
    assert torch.equal(keep, pick(*begun, sizes, counts)), (sizes, ratio)
"""


@needs_triton
def test_kernel_picks_the_same_under_tritons_interpreter() -> None:
    interpreted(KERNEL)


@needs_triton
def test_kernel_compiles_for_a_gpu_that_is_not_there() -> None:
    """At a window of two grids of 144 tokens."""
    from seats.kernels import pick_kernel

    types = {"cosines": "*fp32", "weights": "*fp32", "first": "*i64", "sizes": "*i64", "counts": "*i64", "keep": "*u8"}
    assert compiled_for_hopper(pick_kernel, types, {"BLOCK": 512}).asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_keeps_the_same_as_the_cpu() -> None:
    features, weights, _ = windows(4, [288, 288, 144, 1], channels=64)
    sizes = torch.tensor([288, 288, 144, 1])
    arguments = (features, weights, sizes, keep_counts(sizes, 0.1))
    on_device = max_min_keep(*(argument.cuda() for argument in arguments))
    assert torch.equal(on_device.cpu(), max_min_keep(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_cosines_of_bfloat16_are_those_of_float32() -> None:
    """Protects: the matrix units' way loses nothing but the last bits; a token of zeros is no NaN."""
    torch.manual_seed(0)
    features = (torch.randn(3, 200, 512) * torch.rand(3, 200, 1)).bfloat16()
    features[1, 7] = 0
    expected = F.normalize(features.double(), dim=-1)
    found = cosines_between(features.cuda()).cpu().double()
    torch.testing.assert_close(found, expected @ expected.mT, atol=2e-6, rtol=0)
