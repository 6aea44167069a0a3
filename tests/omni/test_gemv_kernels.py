"""Matrix-vector products: kernels equal plain products."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni import layers
from omni.layers import RMSNorm, SwiGLU
from tests.kernels import bytes_spilt, compiled_for_hopper, interpreted, needs_triton, place_of_wait

KERNELS = """
import torch
import torch.nn.functional as F
from omni import gemv_kernels
from tests.omni.test_moe import loop_over

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for rows, columns in ((3, 40), (5, 1100)):
        torch.manual_seed(rows)
        x, norm = torch.randn(columns).to(dtype), (1 + 0.1 * torch.randn(columns)).to(dtype)
        weight, added = columns**-0.5 * torch.randn(2 * rows, columns).to(dtype), torch.randn(2 * rows).to(dtype)
        exact = [value.double() for value in (x, weight, added)]
        normed = F.rms_norm(exact[0], norm.shape, norm.double(), 1e-6)
        gate, up = (exact[1] @ normed).chunk(2)
        for tile in ((1, 2048, 4), (4, 512, 4)):
            for arguments, expected in (
                ((None, None, 0.0, False, False), exact[1] @ exact[0]),
                ((added, norm, 1e-6, False, True), exact[1] @ normed + exact[2]),
                ((None, norm, 1e-6, True, False), F.silu(gate) * up),
            ):
                got = gemv_kernels.product_by_kernel(x, weight, *arguments, tile)
                assert got.dtype == (torch.float32 if arguments[-1] else dtype)
                torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
                if not arguments[-1]:
                    got = gemv_kernels.product_by_library(x, weight, *arguments)
                    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    x, residual = torch.randn(2, 2, 40).to(dtype)
    gate_up, down = 0.2 * torch.randn(5, 48, 40).to(dtype), 0.2 * torch.randn(5, 40, 24).to(dtype)
    shares, chosen = torch.randn(2, 5).softmax(-1).topk(3)
    weights = (gate_up.float(), down.float())
    for factor in (None, (1 + 0.1 * torch.randn(40)).to(dtype)):
        got = gemv_kernels.experts_of_rows(x, shares.to(dtype), chosen, gate_up, down, residual, factor, 1e-6)
        normed = x.float() if factor is None else F.rms_norm(x.float(), factor.shape, factor.float(), 1e-6)
        expected = residual.float() + loop_over(normed, shares, chosen, *weights)
        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
"""


@needs_triton
def test_kernels_equal_products_under_tritons_interpreter() -> None:
    """With and without what comes before and after."""
    interpreted(KERNELS)


@needs_triton
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """16 bytes of the matrix at a time, the first of them before it waits for the kernel before; no register spilt."""
    from omni import gemv_kernels

    types = dict.fromkeys(("x", "norm", "weight", "weights", "added", "out", "inner", "shares"), "*bf16")
    types |= {"chosen": "*i32", "residual": "*bf16", "eps": "fp32"}

    def check(kernel: Any, values: dict[str, Any], warps: int, ahead: int) -> None:
        values |= {"OVERLAPS": True}
        code = compiled_for_hopper(kernel, types, values, ("*", "i32"), num_warps=warps, launch_pdl=True)
        loads = re.findall(r"ld\.global.*evict_first.*", code.asm["ptx"])
        assert all("v4.b32" in load for load in loads)
        assert len(re.findall(r"ld\.global.*evict_first", code.asm["ptx"][: place_of_wait(code)])) == ahead < len(loads)
        assert not bytes_spilt(code, tmp_path)

    for rows, columns, warps in gemv_kernels.TILES:
        tile, loads = {"ROWS": rows, "COLUMNS": columns}, rows * columns // (8 * 32 * warps)
        check(gemv_kernels.row_kernel, {"added": None, "GATED": True, **tile}, warps, 2 * loads)
        check(gemv_kernels.row_kernel, {"norm": None, "GATED": False, **tile}, warps, loads)
    sizes = {"PER_TOKEN": 8, "HIDDEN": 2048, "SIZE": 768}
    for kernel, (rows, columns, warps), norm, ahead in (
        (gemv_kernels.gate_up_rows_kernel, gemv_kernels.GATE_UP, {}, 0),
        (gemv_kernels.gate_up_rows_kernel, gemv_kernels.GATE_UP, {"norm": None}, 0),
        (gemv_kernels.down_rows_kernel, gemv_kernels.DOWN, {}, 3),
    ):
        check(kernel, {**sizes, **norm, "ROWS": rows, "COLUMNS": columns}, warps, ahead)


def test_products_take_a_norm_before_and_a_sum_after() -> None:
    """What layers say in one call is what they said in three."""
    torch.manual_seed(0)
    norm, mlp, x = RMSNorm(16, 1e-6), SwiGLU(16, 24, bias=False), torch.randn(1, 3, 16)
    torch.testing.assert_close(mlp(x, norm=norm, residual=x), x + mlp(norm(x)))
    weight, bias = torch.randn(8, 16), torch.randn(8)
    got = layers.linear(x, weight, bias, norm=norm, residual=torch.ones(1, 3, 8))
    torch.testing.assert_close(got, 1 + F.linear(norm(x), weight, bias))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", [(4608, 3584), (2048, 4096), (1000, 1001)])
def test_cuda_equals_products(shape: tuple[int, int]) -> None:
    """On the device, whatever is chosen for the shape, and captured."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape[1], device="cuda"), torch.randn(shape, device="cuda")
    x, weight = x.bfloat16(), weight.bfloat16()
    norm = torch.rand(shape[1], device="cuda").bfloat16()
    with torch.inference_mode():
        got = layers.row_product(x, weight, None, norm, 1e-6, False, False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = layers.row_product(x, weight, None, norm, 1e-6, False, False)
        graph.replay()
    expected = weight.double() @ F.rms_norm(x.double(), norm.shape, norm.double(), 1e-6)
    assert (got.double() - expected).norm() / expected.norm() < 1e-2
    assert torch.equal(got, again)
