"""Attention of a decoding step on a GPU: the kernels equal plain attention."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from omni import decoder
from omni.config import DecoderConfig
from omni.layers import RMSNorm
from omni.rope import rotate
from tests.kernels import bytes_spilt, compiled_for_hopper, interpreted, needs_triton, place_of_wait

KERNEL = """
import torch
from omni.decoder import CHUNK
from omni.decoder_kernels import cached_attention_by_kernels
from tests.omni.test_decoder_kernels import assert_close, inputs

# The interpreter cuts off what does not fit into bfloat16 instead of rounding.
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-1), (torch.float16, 4e-3)):
    for sizes in ((1, 2, 7, 128, 2), (3, 1, 1, 24, 3), (2, 2, 20, 16, 2), (1, 1, 2, 16, 35)):
        for normed in (False, True):
            given = inputs(*sizes, dtype, normed)
            assert_close(cached_attention_by_kernels(*given, CHUNK), given, tolerance)
"""


def inputs(
    batch: int, kv_heads: int, group: int, dim: int, chunks: int, dtype: torch.dtype, normed: bool, device: str = "cpu"
) -> tuple[Any, ...]:
    """Of each row another length, holes in it; one chunk holds nothing, and what is not written is no number. Scores
    of hundreds, as released weights make them."""
    torch.manual_seed(group)
    qkv = torch.randn(batch, (group + 2) * kv_heads * dim)
    qkv[:, : group * kv_heads * dim] *= 8
    norms = [1 + 0.5 * torch.rand(dim), 8 * torch.rand(dim)] if normed else []
    angles = torch.rand(batch, dim // 2, device=device) * 6
    keys, values = torch.randn(2, batch, kv_heads, chunks * decoder.CHUNK, dim)
    written = torch.rand(batch, chunks * decoder.CHUNK) < 0.9
    written[0, decoder.CHUNK : 2 * decoder.CHUNK] = False
    written[-1, 5 - decoder.CHUNK :] = False
    for stored in (keys, values):
        stored.masked_fill_(~written[:, None, :, None], float("nan"))
    qkv, keys, values, *norms = (tensor.to(device, dtype) for tensor in (qkv, keys, values, *norms))
    return qkv, *(norms or (None, None)), 1e-6, angles.cos(), angles.sin(), keys, values, written.to(device)


def assert_close(got: tuple[Tensor, ...], given: tuple[Any, ...], tolerance: float) -> None:
    """Beside what `Attention.project` makes of heads, and plain attention in float64 to the cache and to itself."""
    qkv, query_norm, key_norm, eps, cos, sin, keys, values, written = given
    kv_heads, dim = keys.shape[1], keys.shape[3]
    q, k, v = qkv.unflatten(1, (-1, 1, dim)).split((qkv.shape[1] // dim - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    cos, sin = cos[:, None, None], sin[:, None, None]

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.float() if norm is None else F.rms_norm(x.float(), (dim,), norm.float(), eps)
        return rotate(x, cos, sin).to(qkv.dtype)

    q, k = turned(q, query_norm), turned(k, key_norm)
    there = written[:, None, :, None]
    keys, values = (
        torch.cat((stored.masked_fill(~there, 0), own), dim=2).double() for stored, own in ((keys, k), (values, v))
    )
    scores = torch.einsum("bkgd,bknd->bkgn", q.double().flatten(1, 2).unflatten(1, (kv_heads, -1)), keys) * dim**-0.5
    scores = scores.masked_fill(~F.pad(written, (0, 1), value=True)[:, None, None], float("-inf"))
    expected = torch.einsum("bkgn,bknd->bkgd", scores.softmax(-1), values)
    mixed, key, value = got
    torch.testing.assert_close(mixed.double(), expected.flatten(1), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(key, k, atol=tolerance, rtol=tolerance)
    assert (value == v).all()


@needs_triton
def test_kernels_equal_attention_under_tritons_interpreter() -> None:
    """Groups and heads of every size, heads normed and not, chunks in part and not at all written, more of them than
    are joined at a time."""
    interpreted(KERNEL)


@needs_triton
@pytest.mark.parametrize("kind", ["*bf16", "*fp16"])
@pytest.mark.parametrize("group, norm", [(7, "constexpr"), (8, "weights")])
def test_kernels_compile_for_a_gpu_that_is_not_there(kind: str, group: int, norm: str, tmp_path: Path) -> None:
    """Those of both families. Keys and values 16 bytes at a time, products by tensor cores, nothing spilt; what is old
    is read before they wait for the kernel before."""
    from omni.decoder_kernels import CHUNKS, chunk_kernel, join_kernel

    norms = ("query_norm", "key_norm")
    types = dict.fromkeys(("qkv", "keys", "values", "out", "key", "value", *norms), kind)
    types |= dict.fromkeys(("cos", "sin", "mixed", "weights"), "*fp32")
    types |= {"written": "*u8", "eps": "fp32", "factor": "fp32"}
    sizes: dict[str, Any] = {"GROUP": group, "DIM": 128, "HALF": 64, "OVERLAPS": True}
    sizes |= dict.fromkeys(norms) if norm == "constexpr" else {}
    of_chunks = {"CHUNK": decoder.CHUNK, "ROWS": 16, "LANES": 128}
    for kernel, more, warps in ((chunk_kernel, of_chunks, 8), (join_kernel, {"CHUNKS": CHUNKS}, 4)):
        values = {name: value for name, value in (sizes | more).items() if name in kernel.arg_names}
        code = compiled_for_hopper(kernel, types, values, ("*",), num_warps=warps, launch_pdl=True)
        ptx, at = code.asm["ptx"], place_of_wait(code)
        assert sum("ld.global" in line and "v4.b32" in line for line in ptx.splitlines()) >= 8
        assert ("mma" in ptx) == (kernel is chunk_kernel)
        assert "ld.global" in ptx[:at] and "ld.global" in ptx[at:]
        assert not bytes_spilt(code, tmp_path)


def one_step(
    normed: bool, dtype: torch.dtype, device: str, batch: int = 2
) -> tuple[decoder.Attention, tuple[Any, ...]]:
    """Attention as in the released families, narrower, and what `decode` is given of some sequences."""
    sizes: dict[str, Any] = {"hidden_size": 256, "num_heads": 14, "num_kv_heads": 2, "head_dim": 128, "qk_norm": normed}
    rest = (field.name for field in fields(DecoderConfig) if field.default is MISSING and field.name not in sizes)
    with torch.device(device):
        attention = decoder.Attention(DecoderConfig(**{**dict.fromkeys(rest, 1), **sizes})).to(dtype)
        norm = RMSNorm(256, 1e-6).to(dtype)
    _, _, _, _, cos, sin, *cache, written = inputs(batch, 2, 7, 128, 5, dtype, normed, device)
    x = torch.randn(batch, 1, 256).to(device, dtype)
    rotary = (cos[:, None, None], sin[:, None, None])
    return attention, (x, norm, rotary, *(stored.nan_to_num() for stored in cache), written)


@pytest.mark.parametrize("normed", [False, True])
def test_what_is_compiled_for_a_gpu_goes_through_the_kernels(normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on a device that is not there: what the kernels are said to yield goes through the rest of it."""
    monkeypatch.setattr(decoder, "compiled_on_a_gpu", lambda x: True)
    attention, given = one_step(normed, torch.bfloat16, "meta")
    with torch.no_grad():
        graph = make_fx(lambda x, keys, values: attention.decode(x, *given[1:3], keys, values, given[5]))(
            given[0], *given[3:5]
        )
    assert torch.ops.omni.cached_attention.default in [node.target for node in graph.graph.nodes]
    got = graph(given[0], *given[3:5])
    assert [tuple(each.shape) for each in got] == [(2, 1, 256), (2, 2, 1, 128), (2, 2, 1, 128)]
    assert {each.dtype for each in got} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [7, 8])
@pytest.mark.parametrize("normed", [False, True])
def test_cuda_equals_attention(normed: bool, group: int, dtype: torch.dtype) -> None:
    """On the device, also of more chunks than are joined at a time."""
    for batch, chunks in ((2, 5), (1, 70)):
        given = inputs(batch, 4, group, 128, chunks, dtype, normed, "cuda")
        assert_close(decoder.cached_attention(*given), given, 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("normed", [False, True])
def test_cuda_compiled_steps_equal_eager(normed: bool, batch: int) -> None:
    """Layer after layer, launches overlapping, each time of another x: what is read before it is there is another
    round's, or no number."""
    attention, (x, norm, *rest) = one_step(normed, torch.bfloat16, "cuda", batch)

    def steps(x: Tensor) -> list[Tensor]:
        found = []
        for _ in range(8):
            x, *own = attention.decode(x, norm, *rest)
            found += [x, *own]
        return found

    with torch.inference_mode():
        compiled = torch.compile(steps, fullgraph=True)
        compiled(x)
        for _ in range(5):
            x = torch.randn_like(x)
            expected = steps(x)
            old = [torch.full((size,), float("nan"), device="cuda") for size in (256, 1024, 2304, 20_000) * 8]
            del old
            for got, one in zip(compiled(x), expected, strict=True):
                torch.testing.assert_close(got, one, atol=5e-2, rtol=5e-2)
