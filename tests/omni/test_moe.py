"""The expert layer: grouped products against a plain loop, and what the compiler needs of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omni import moe
from omni.layers import RMSNorm
from omni.moe import Experts, grouped_product
from tests.kernels import bytes_spilt, compiled_for_hopper, interpreted, needs_triton, place_of_wait


def make_experts(experts: int = 6, per_token: int = 2, hidden: int = 32, size: int = 24, **options: Any) -> Experts:
    torch.manual_seed(0)
    config: Any = SimpleNamespace(
        num_experts=experts,
        num_experts_per_tok=per_token,
        hidden_size=hidden,
        moe_intermediate_size=size,
        norm_topk_prob=options.get("normalise", True),
    )
    layer = Experts(config).requires_grad_(False)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def loop(layer: Experts, x: Tensor) -> Tensor:
    """The same layer, one token and one expert at a time."""
    shares, chosen = (x[0] @ layer.router.weight.T).softmax(dim=-1).topk(layer.per_token, dim=-1)
    if layer.normalise:
        shares = shares / shares.sum(dim=-1, keepdim=True)
    return loop_over(x[0], shares, chosen, layer.gate_up, layer.down)[None]


def loop_over(x: Tensor, shares: Tensor, chosen: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for row, token in enumerate(x):
        for share, expert in zip(shares[row], chosen[row].tolist(), strict=True):
            gate, up = (gate_up[expert] @ token).chunk(2)
            out[row] += share * (down[expert] @ (F.silu(gate) * up))
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


KERNELS = """
import torch
from omni import moe_kernels
from tests.omni.test_moe import loop_over

swapped, plain = moe_kernels.TILES[0][1:], moe_kernels.TILES[-1][1:]
for dtype, tolerance, tiles in ((torch.float32, 1e-5, (swapped, plain)), (torch.bfloat16, 2e-2, (None,))):
    for tokens, per_token, experts, hidden, size in ((1, 2, 6, 32, 24), (16, 3, 5, 40, 24), (40, 2, 6, 80, 72)):
        torch.manual_seed(tokens)
        x = torch.randn(tokens, hidden).to(dtype)
        gate_up = 0.2 * torch.randn(experts, 2 * size, hidden).to(dtype)
        down = 0.2 * torch.randn(experts, hidden, size).to(dtype)
        scores = torch.randn(tokens, experts)
        scores[:, 1] = -100  # an expert without a token
        scores[: tokens // 2, 3] = 100  # and one with many
        shares, chosen = scores.softmax(-1).topk(per_token)
        arguments = (x, shares.to(dtype), chosen, gate_up, down)
        expected = loop_over(x.float(), shares, chosen, gate_up.float(), down.float())
        for pair in tiles if tokens > moe_kernels.FEW_TOKENS else (None,):
            got = moe_kernels.experts_on_device(*arguments, tiles=pair)
            torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
for tokens, experts, per_token in ((1, 6, 2), (9, 12, 3), (2, 128, 8)):
    logits = torch.randn(tokens, experts)
    for normalise in (True, False):
        shares, chosen = logits.softmax(-1).topk(per_token)
        shares = shares / shares.sum(-1, keepdim=True) if normalise else shares
        got = moe_kernels.choose_on_device(logits, per_token, normalise, torch.float32)
        torch.testing.assert_close(got[0], shares, atol=1e-6, rtol=1e-6)
        assert torch.equal(got[1], chosen.int())
nan, inf = float("nan"), float("inf")
odd = torch.tensor([[0.0] * 6, [nan] * 6, [0, nan, 5, 0, 0, 0], [inf, 0, 0, 0, inf, 0], [-inf] * 6, [1, 3, 2, 3, 1, 3]])
picks = moe_kernels.choose_on_device(odd, 3, True, torch.float32)[1]
assert picks.tolist() == [*[[0, 1, 2]] * 5, [1, 3, 5]]
shares, picks = moe_kernels.choose_on_device(torch.tensor([[1, 3, 2, 3, 1.0]]), 5, False, torch.bfloat16)
assert picks.tolist() == [[1, 3, 2, 0, 4]]
torch.testing.assert_close(shares, torch.tensor([[3, 3, 2, 1, 1.0]]).softmax(-1).bfloat16())
"""


@needs_triton
def test_kernels_equal_a_loop_under_tritons_interpreter() -> None:
    """Tiles swapped and not, sizes that fill none; of equal shares and of what is no number the lowest experts."""
    interpreted(KERNELS)


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """At the size of Qwen3-Omni-30B-A3B with every tile of the table: within its shared memory, by its matrix units.
    All wait for the kernel before, also those that then have nothing to do."""
    from omni import moe_kernels

    types = dict.fromkeys(("x", "inner", "parts", "shares", "residual", "out"), "*bf16")
    types |= {"logits": "*fp32", "chosen": "*i32", "order": "*i32", "places": "*i32", "table": "*i32"}

    def made(kernel: Any, values: dict[str, Any], **options: int) -> Any:
        if "COLUMNS" in values:
            types["weights"] = f"tensordesc<bf16[1, {values['COLUMNS'] // 2}, 2, {values['DEPTH']}]>"
        values = values | {"OVERLAPS": True}
        code = compiled_for_hopper(kernel, types, values, ("*",), launch_pdl=True, **options)
        assert "ld.global" not in code.asm["ptx"][: place_of_wait(code)]
        assert code.metadata.shared <= 227 * 1024
        return code

    few = (0, moe_kernels.NARROW, moe_kernels.NARROW)
    sizes = {"PER_TOKEN": 8, "PICKS": 8, "HIDDEN": 2048, "SIZE": 768}
    for most, *tiles in (few, *moe_kernels.TILES):
        for kernel, tile in zip((moe_kernels.gate_up_kernel, moe_kernels.down_kernel), tiles, strict=True):
            values = sizes | {"SORTED": most > 0, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
            code = made(kernel, values | {"SWAPPED": tile.swapped}, num_warps=tile.warps, num_stages=tile.stages)
            assert "wgmma" in code.asm["ptx"], tile
    for experts in (128, 256):
        values = {"EXPERTS": experts, "LANES": experts, "PER_TOKEN": 8, "NORMALISE": True}
        assert not bytes_spilt(made(moe_kernels.choose_kernel, values, num_warps=experts // 32), tmp_path)
    made(moe_kernels.sort_kernel, {"ROWS": 64, "BLOCK": 8192}, num_warps=16)
    made(moe_kernels.sum_kernel, {"PER_TOKEN": 8, "HIDDEN": 2048, "SORTED": True, "BLOCK": 2048}, num_warps=4)


def test_a_row_of_a_gpu_is_normed_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled there of one row, on a device that is not: three operators and nothing that norms."""
    monkeypatch.setattr(moe, "one_row_on_a_gpu", lambda x: True)
    layer, norm = make_experts().to("meta", torch.bfloat16), RMSNorm(32, 1e-6).to("meta", torch.bfloat16)
    x = torch.empty(1, 1, 32, dtype=torch.bfloat16, device="meta")
    graph = make_fx(lambda x, residual: layer(x, norm=norm, residual=residual))(x, x)
    named = [node.target for node in graph.graph.nodes if str(node.target).startswith("omni.")]
    assert named == [getattr(torch.ops.omni, name).default for name in ("row_product", "choose", "weighted_experts")]
    assert not any("mul" in str(node.target) or "rsqrt" in str(node.target) for node in graph.graph.nodes)
    got = graph(x, x)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_norms_a_row_where_it_is_read() -> None:
    """On the device, compiled, against the same in float64."""
    layer = make_experts(experts=16, per_token=4, hidden=256, size=192).to("cuda", torch.bfloat16)
    norm, x = RMSNorm(256, 1e-6).to("cuda", torch.bfloat16), torch.randn(1, 1, 256, device="cuda").bfloat16()
    compiled = torch.compile(lambda x: layer(x, norm=norm, residual=x), fullgraph=True)
    with torch.inference_mode():
        got = compiled(x)
        normed = F.rms_norm(x[0].double(), (256,), norm.weight.double(), 1e-6)
        shares, chosen = layer.route(norm(x)[0])
        expected = x[0] + loop_over(normed, shares.double(), chosen, layer.gate_up.double(), layer.down.double())
    assert (got[0].double() - expected).norm() / expected.norm() < 2e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 8, 102, 441, 1530])
def test_cuda_equals_a_loop(tokens: int, dtype: torch.dtype, tolerance: float) -> None:
    """On the device, by the kernels, which have no gradient: eager and captured; twice the same."""
    layer = make_experts(experts=16, per_token=4, hidden=256, size=192).to("cuda", dtype)
    x = torch.randn(1, tokens, 256, device="cuda", dtype=dtype)
    with torch.inference_mode():
        shares, chosen = layer.route(x[0])
        got = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = layer(x)
        graph.replay()
        exact = [value.double() for value in (x[0], shares, layer.gate_up, layer.down)]
        expected = loop_over(exact[0], exact[1], chosen, exact[2], exact[3])
    error = (got[0].double() - expected).norm() / expected.norm()
    assert error < tolerance
    assert torch.equal(got, again)
