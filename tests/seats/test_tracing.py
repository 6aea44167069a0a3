"""The selections trace: one graph, static shapes, no read of the data by the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from seats import win_div_prune
from seats.budget import keep_counts
from seats.diversity import max_min_keep
from seats.relevance import relevance
from seats.selection import compact, select

CLIP = [0] * 3 + ([1] * 6 + [2] * 4) * 4 + [0] * 5 + [3] * 7
OTHER_CLIP = [0] * 5 + ([1] * 3 + [2] * 2) * 6 + [0] * 2 + [1] * 9 + [3] * 9


def stage_one(features: Tensor, weights: Tensor, sizes: Tensor) -> Tensor:
    return max_min_keep(features, weights, sizes, keep_counts(sizes, 0.3))


def stage_two(query: Tensor, keys: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    scores = relevance(query, keys, modality != 3)
    return compact(select(scores, modality, 0.5, 0.6, 0.1, 9), 40)


def make_stage_one(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return torch.randn(5, 12, 8), torch.rand(5, 12), torch.tensor([12, 12, 7 - seed, 1, 0])


def make_stage_two(seed: int) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    modality = torch.tensor([CLIP, OTHER_CLIP][:: 1 - 2 * seed], dtype=torch.uint8)
    return torch.randn(2, 4, 1, 8), torch.randn(2, 2, modality.shape[1], 8), modality


STAGES = pytest.mark.parametrize(
    ("stage", "make"), [(stage_one, make_stage_one), (stage_two, make_stage_two)], ids=["one", "two"]
)


@STAGES
def test_one_graph_serves_different_data(stage: Callable[..., Any], make: Callable[[int], tuple[Tensor, ...]]) -> None:
    """A graph break or a second compilation would raise."""
    torch.compiler.reset()
    compiled = torch.compile(stage, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(*make(0)), stage(*make(0)), atol=0, rtol=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(*make(1)), stage(*make(1)), atol=0, rtol=0)


@STAGES
def test_no_host_read(stage: Callable[..., Any], make: Callable[[int], tuple[Tensor, ...]]) -> None:
    """Tensors without data: a read, or a shape that depends on it, would raise."""
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments = [mode.from_tensor(argument) for argument in make(0)]
        shapes = [result.shape for result in tensors(stage(*arguments))]
    assert shapes == [result.shape for result in tensors(stage(*make(0)))]


def test_the_guard_sees_a_shape_that_depends_on_data() -> None:
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        win_div_prune(torch.randn(9, 8), torch.rand(9), 4, 0.5)


def tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
