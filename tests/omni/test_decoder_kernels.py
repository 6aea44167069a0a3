"""Attention of a decoding step on a GPU: the kernel equals plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omni import decoder
from tests.kernels import compiled_for_hopper, interpreted, needs_triton

KERNEL = """
import torch
from omni.decoder_kernels import chunks_by_kernel
from tests.omni.test_decoder_kernels import assert_close, inputs

for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for batch, kv_heads, group, dim, chunks in ((1, 2, 7, 128, 2), (3, 1, 1, 24, 3), (2, 2, 20, 16, 2)):
        assert_close(chunks_by_kernel, inputs(batch, kv_heads, group, dim, chunks, dtype), tolerance)
"""


def inputs(
    batch: int, kv_heads: int, group: int, dim: int, chunks: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row another length, holes in it; one chunk holds nothing, and what is not written is no number. Scores
    of hundreds, as released weights make them."""
    torch.manual_seed(group)
    q = 8 * torch.randn(batch, kv_heads, group, dim)
    keys, values = torch.randn(2, batch, kv_heads, chunks * decoder.CHUNK, dim)
    written = torch.rand(batch, chunks, decoder.CHUNK) < 0.9
    written[0, 1] = False
    written[-1, -1, 5:] = False
    for stored in (keys, values):
        stored.masked_fill_(~written.flatten(1)[:, None, :, None], float("nan"))
    return q.to(device, dtype), keys.to(device, dtype), values.to(device, dtype), written.to(device)


def assert_close(function, arguments: tuple[Tensor, Tensor, Tensor, Tensor], tolerance: float) -> None:  # type: ignore[no-untyped-def]
    """Chunk by chunk, against plain attention in float64."""
    q, keys, values, written = arguments
    mixed, weights = function(q, keys, values, written)
    assert mixed.dtype == weights.dtype == torch.float32
    size = written.shape[-1]
    keys, values = (stored.double().nan_to_num().unflatten(2, (-1, size)) for stored in (keys, values))
    scores = torch.einsum("bkgd,bkcnd->bkcgn", q.double(), keys) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~written[:, None, :, None], decoder.NOT_THERE)
    there = written.any(-1)[:, None, :, None].expand_as(weights)
    expected = torch.einsum("bkcgn,bkcnd->bkcgd", scores.softmax(-1), values)
    torch.testing.assert_close(weights[there].double(), scores.logsumexp(-1)[there], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(mixed[there].double(), expected[there], atol=tolerance, rtol=tolerance)
    assert (weights[~there] == decoder.NOT_THERE).all()
    assert (mixed[~there] == 0).all()


@needs_triton
def test_kernel_equals_attention_under_tritons_interpreter() -> None:
    """Groups and heads of every size, chunks in part and not at all written."""
    interpreted(KERNEL)


@needs_triton
@pytest.mark.parametrize("kind", ["*bf16", "*fp16"])
def test_kernel_compiles_for_a_gpu_that_is_not_there(kind: str) -> None:
    """Keys and values 16 bytes at a time, products by tensor cores, no register spilt."""
    from omni.decoder_kernels import chunk_kernel

    types = dict.fromkeys(("q", "keys", "values"), kind)
    types |= {"written": "*u8", "mixed": "*fp32", "weights": "*fp32", "factor": "fp32"}
    for group in (7, 8):
        sizes = {"GROUP": group, "DIM": 128, "CHUNK": decoder.CHUNK, "ROWS": 16, "LANES": 128}
        code = compiled_for_hopper(chunk_kernel, types, sizes, ("*",), num_warps=8)
        lines = code.asm["ptx"].splitlines()
        assert sum("ld.global" in line and "v4.b32" in line for line in lines) >= 16
        assert any("mma" in line for line in lines)
        assert not code.metadata.global_scratch_size


def test_what_is_compiled_for_a_gpu_goes_through_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a model on a device that is not there: what the kernel is said to yield goes through the rest of it."""
    monkeypatch.setattr(decoder, "compiled_on_a_gpu", lambda q: True)
    step = [torch.empty(2, 4, n, 128, dtype=torch.bfloat16, device="meta") for n in (7, 1, 1, 384, 384)]
    graph = make_fx(decoder.attend)(*step, torch.empty(2, 384, dtype=torch.bool, device="meta"))
    assert torch.ops.omni.chunk_attention.default in [node.target for node in graph.graph.nodes]
    got = graph(*step, torch.empty(2, 384, dtype=torch.bool, device="meta"))
    assert (got.shape, got.dtype) == ((2, 4, 7, 128), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [7, 8])
def test_cuda_equals_attention(group: int, dtype: torch.dtype) -> None:
    """On the device, the kernel, and what compiled code makes of a step with it."""
    arguments = inputs(2, 4, group, 128, 5, dtype, "cuda")
    assert_close(decoder.chunk_attention, arguments, 1e-2)
    q, keys, values, written = (*arguments[:1], *(stored.nan_to_num() for stored in arguments[1:3]), arguments[3])
    own = torch.randn(2, 2, 4, 1, 128, device="cuda").to(dtype).unbind()
    step = (q, *own, keys, values, written.flatten(1))
    with torch.inference_mode():
        got = torch.compile(decoder.attend, fullgraph=True)(*step)
        torch.testing.assert_close(got, decoder.attend(*step), atol=2e-2, rtol=2e-2)
