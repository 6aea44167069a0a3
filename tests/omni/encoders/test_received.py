"""Attention that positions receive: against the whole matrix at once."""

from __future__ import annotations

import pytest
import torch

from omni.encoders import received
from omni.encoders.received import received_attention
from tests.kernels import compiled_for_hopper, interpreted, needs_triton


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
"""


@needs_triton
def test_kernel_weighs_the_same_under_tritons_interpreter() -> None:
    """Blocks that are not full, windows of padding alone."""
    interpreted(KERNEL)


@needs_triton
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_kernels_compile_for_a_gpu_that_is_not_there(kind: str) -> None:
    """At the vision encoder's head size."""
    from omni.encoders import kernels

    types = {"q": f"*{kind}", "k": f"*{kind}", "valid": "*u8", "scales": "*fp32", "factor": "fp32", "received": "*fp32"}
    for kernel in (kernels.scale_kernel, kernels.received_kernel):
        # The assembler's own optimisation takes longer than all the rest and changes no shared memory.
        made = compiled_for_hopper(kernel, types, {"BLOCK": 64, "DIM": 128}, ptx_options="-O0")
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
