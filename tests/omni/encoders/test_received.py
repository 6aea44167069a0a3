"""Attention that positions receive: against the whole matrix at once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from omni.encoders import received
from omni.encoders.received import received_attention


@pytest.mark.parametrize("scores", [1, 50, 2**20])
def test_equals_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    """However few queries are taken at a time."""
    monkeypatch.setattr(received, "SCORES_AT_A_TIME", scores)
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 3, 17, 8).unbind()
    expected = (q @ k.mT / 8**0.5).softmax(-1).mean(1).sum(1)
    torch.testing.assert_close(received_attention(q, k), expected)


def test_invalid_positions_neither_ask_nor_are_asked() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(2, 3, 2, 10, 8).unbind()
    valid = torch.arange(10) < torch.tensor([10, 6, 0])[:, None]
    got = received_attention(q, k, valid)
    torch.testing.assert_close(got[0], received_attention(q[:1], k[:1])[0])
    torch.testing.assert_close(got[1, :6], received_attention(q[1:2, :, :6], k[1:2, :, :6])[0])
    assert not got[1, 6:].any()
    assert not got[2].any()


KERNEL = """
import torch
from omni.encoders.kernels import received_on_device
from omni.encoders.received import received_attention

torch.manual_seed(0)
for windows, heads, positions, dim in ((2, 2, 9, 8), (1, 3, 130, 20), (3, 1, 64, 16)):
    q, k = torch.randn(2, windows, heads, positions, dim).unbind()
    valid = torch.arange(positions) < torch.tensor([positions, 5, 0][:windows])[:, None]
    torch.testing.assert_close(received_on_device(q, k, valid), received_attention(q, k, valid))
print("same weights")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernel_weighs_the_same_under_tritons_interpreter() -> None:
    """Blocks that are not full, windows of padding alone; in a process of its own, as Triton reads its mode once."""
    root = Path(__file__).parents[3]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "same weights\n", done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_kernels_compile_for_a_gpu_that_is_not_there(kind: str) -> None:
    """For Hopper, at the vision encoder's head size: the interpreter does not check types, shapes and memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from omni.encoders import kernels

    inputs = {"q": f"*{kind}", "k": f"*{kind}", "valid": "*u8", "scales": "*fp32"}
    sizes = {"positions": "i32", "dim": "i32", "factor": "fp32", "BLOCK": "constexpr", "DIM": "constexpr"}
    for kernel, outputs in ((kernels.scale_kernel, {}), (kernels.received_kernel, {"received": "*fp32"})):
        source = ASTSource(kernel, {**inputs, **outputs, **sizes}, {"BLOCK": 64, "DIM": 128})
        made = compile(source, target=GPUTarget("cuda", 90, 32))
        assert made.asm["cubin"]
        assert made.metadata.shared <= 227 * 1024


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_weighs_the_same_as_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    q, k = torch.randn(2, 3, 4, 1152, 80).to(dtype).unbind()
    valid = torch.arange(1152) < torch.tensor([1152, 576, 0])[:, None]
    on_device = received_attention(q.cuda(), k.cuda(), valid.cuda())
    torch.testing.assert_close(on_device.cpu(), received_attention(q, k, valid), atol=1e-4, rtol=1e-4)
