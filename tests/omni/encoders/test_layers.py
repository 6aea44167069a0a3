"""Layer norms and GELU of encoders on a GPU: equal to PyTorch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omni.encoders import layers
from tests.kernels import bytes_spilt, compiled_for_hopper, interpreted, needs_triton

KERNEL = """
import torch
from omni.encoders.kernels import layer_norm_on_device
from tests.omni.encoders.test_layers import assert_close, inputs

for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)):
    for shape in ((2, 3, 72), (1, 1, 1152), (5, 2, 1)):
        x, *affine = inputs(shape, dtype)
        for rows in (x, x.transpose(0, 1)):
            assert_close(layer_norm_on_device(rows, *affine, 1e-6), rows, *affine, tolerance)
"""


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Far from zero, as encoders' are, beside what they differ by."""
    torch.manual_seed(0)
    x, weight, bias = 30 + torch.randn(shape), torch.rand(shape[-1]), torch.randn(shape[-1])
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor, tolerance: float) -> None:
    expected = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), 1e-6)
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@needs_triton
def test_kernel_equals_layer_norm_under_tritons_interpreter() -> None:
    """Rows of every size, also transposed."""
    interpreted(KERNEL)


@needs_triton
@pytest.mark.parametrize("size", [1152, 1280, 4608])
def test_kernel_compiles_for_a_gpu_that_is_not_there(size: int, tmp_path: Path) -> None:
    """16 bytes at a time, nothing spilt."""
    from omni.encoders.kernels import layer_norm_kernel

    types = dict.fromkeys(("x", "weight", "bias", "out"), "*bf16") | {"eps": "fp32"}
    lanes = 1 << (size - 1).bit_length()
    code = compiled_for_hopper(
        layer_norm_kernel, types, {"SIZE": size, "LANES": lanes}, ("*",), num_warps=lanes // 1024
    )
    loads = [line for line in code.asm["ptx"].splitlines() if "ld.global" in line]
    assert loads and all("v4.b32" in line for line in loads)
    assert not bytes_spilt(code, tmp_path)


def test_what_is_compiled_for_a_gpu_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there; elsewhere through PyTorch's."""
    norm, x = layers.LayerNorm(8, device="meta"), torch.empty(2, 3, 8, device="meta")
    operators = []
    for on_a_gpu in (False, True):
        monkeypatch.setattr(layers, "compiled_on_a_gpu", lambda x, answer=on_a_gpu: answer)
        with torch.no_grad():
            graph = make_fx(norm)(x)
        operators.append(torch.ops.omni.layer_norm.default in [node.target for node in graph.graph.nodes])
        assert graph(x).shape == x.shape
    assert operators == [False, True]


def test_gelu_by_the_exponential_is_that_by_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-30, 30, 10_001)
    expected = F.gelu(x.double(), approximate="tanh")
    for on_a_gpu in (False, True):
        monkeypatch.setattr(layers, "compiled_on_a_gpu", lambda x, answer=on_a_gpu: answer)
        torch.testing.assert_close(layers.gelu_by_tanh(x).double(), expected, atol=1e-6, rtol=1e-6)
        wide = layers.gelu_by_tanh(torch.tensor([-torch.inf, torch.inf, torch.nan, 3e4, -3e4]).bfloat16())
        assert wide[1] == torch.inf and wide[2].isnan() and wide[3] == 29952 and wide[4] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1152, 1280])
def test_cuda_equals_layer_norm_and_gelu(size: int, dtype: torch.dtype) -> None:
    """What compiled code makes of both on the device."""
    x, weight, bias = inputs((3, 100, size), dtype, "cuda")
    norm = layers.LayerNorm(size, eps=1e-6, device="cuda", dtype=dtype)
    with torch.inference_mode():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        got = torch.compile(norm, fullgraph=True)(x)
        assert_close(got, x, weight, bias, 2e-2)
        gelu = torch.compile(layers.gelu_by_tanh, fullgraph=True)(got)
        torch.testing.assert_close(gelu, F.gelu(got, approximate="tanh"), atol=1e-2, rtol=1e-2)
