"""The expert layer: grouped products against a plain loop, and what the compiler needs of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni.moe import Experts, grouped_product


def make_experts(experts: int = 6, per_token: int = 2, hidden: int = 32, size: int = 24, **options: Any) -> Experts:
    torch.manual_seed(0)
    config: Any = SimpleNamespace(
        num_experts=experts,
        experts_per_token=per_token,
        hidden_size=hidden,
        expert_size=size,
        normalise_experts=options.get("normalise", True),
    )
    layer = Experts(config).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def loop(layer: Experts, x: Tensor) -> Tensor:
    """The same layer, one token and one expert at a time."""
    out = torch.zeros_like(x)
    for row in range(x.shape[1]):
        token = x[0, row]
        probabilities = (layer.router.weight @ token).softmax(0)
        shares, chosen = probabilities.topk(layer.per_token)
        if layer.normalise:
            shares = shares / shares.sum()
        for share, expert in zip(shares, chosen.tolist(), strict=True):
            gate, up = (layer.gate_up[expert] @ token).chunk(2)
            out[0, row] += share * (layer.down[expert] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_grouped_products_equal_a_loop(tokens: int, normalise: bool) -> None:
    """Within 1e-5 in float32; with one token most experts have none."""
    layer = make_experts(normalise=normalise)
    x = torch.randn(1, tokens, 32)
    torch.testing.assert_close(layer(x), loop(layer, x), atol=1e-5, rtol=1e-5)


def test_experts_without_a_token() -> None:
    """A router that never picks half of the experts, the first and the last among them."""
    layer = make_experts(experts=8)
    x = torch.randn(1, 50, 32).abs()
    for expert in (0, 3, 4, 7):
        layer.router.weight[expert] = -1.0
    layer.router.weight[[1, 2, 5, 6]] = torch.rand(4, 32)
    assert set(layer.route(x[0])[1].flatten().tolist()) <= {1, 2, 5, 6}
    torch.testing.assert_close(layer(x), loop(layer, x), atol=1e-5, rtol=1e-5)


def test_batches_are_independent() -> None:
    layer = make_experts()
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(layer(x), torch.cat([layer(row[None]) for row in x]), atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_any_split_into_groups(counts: list[int]) -> None:
    """Groups of any size, empty ones anywhere."""
    torch.manual_seed(sum(counts))
    rows, weights = torch.randn(sum(counts), 16), torch.randn(len(counts), 8, 16)
    ends = torch.tensor(counts).cumsum(0).int()
    parts = [part @ weight.T for part, weight in zip(rows.split(counts), weights, strict=True)]
    torch.testing.assert_close(grouped_product(rows, weights, ends), torch.cat(parts), atol=1e-5, rtol=1e-5)


def test_one_graph_whatever_the_routing() -> None:
    """No graph break, no host read and no second compilation when other experts are picked."""
    layer = make_experts()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.inference_mode():
        for seed in range(3):
            torch.manual_seed(seed)
            x = torch.randn(1, 20, 32)
            torch.testing.assert_close(compiled(x), layer(x), atol=1e-6, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_the_default_compiler_takes_it() -> None:
    """As above with code made by the default backend, which needs a C++ compiler on the CPU."""
    layer = make_experts()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    x = torch.randn(1, 20, 32)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
