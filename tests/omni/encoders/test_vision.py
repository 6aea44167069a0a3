"""The walk over clips: bytes and patches, groups of grids, how attention lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from omni.config import VisionConfig
from omni.encoders import vision
from omni.encoders.batches import batch_sizes
from omni.encoders.qwen2_5_vision import Qwen25VisionEncoder
from omni.encoders.qwen3_vision import Qwen3VisionEncoder
from omni.encoders.vision import VisionEncoder, windowed
from omni.processing.frames import QWEN3_OMNI_SIZES, Pixels, VisionSizes
from seats.method import Needs

FAMILIES = {"qwen2.5": (Qwen25VisionEncoder, VisionSizes()), "qwen3": (Qwen3VisionEncoder, QWEN3_OMNI_SIZES)}


def small(family: str, dtype: torch.dtype) -> tuple[VisionEncoder, VisionSizes]:
    """Two blocks, of Qwen2.5-Omni one with windows of two tokens a side and one without."""
    kind, sizes = FAMILIES[family]
    config = VisionConfig(
        depth=2,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        in_channels=3,
        patch_size=sizes.patch_size,
        temporal_patch_size=2,
        spatial_merge_size=2,
        out_hidden_size=16,
        window_size=4 * sizes.patch_size,
        full_attention_blocks=(1,),
        num_position_embeddings=49,
        deepstack_blocks=(0,),
    )
    torch.manual_seed(0)
    encoder = kind(config)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder.to(dtype).eval(), sizes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_give_the_tokens_of_their_patches(family: str, dtype: torch.dtype) -> None:
    """Protects: what goes over as bytes is, cut and normalised there, what went over as patches, bit for bit.

    Clips of other sizes, of an odd count, of more and of fewer grids than a group.
    """
    encoder, sizes = small(family, dtype)
    unit = sizes.factor
    shapes = [(1, unit, unit), (37, 2 * unit, 3 * unit), (4, 4 * unit, 2 * unit)]
    pixels = Pixels(tuple(torch.randint(256, (n, 3, h, w), dtype=torch.uint8) for n, h, w in shapes), sizes)
    patches = pixels.patches()
    assert patches.dtype == torch.float32
    assert tuple(patches.shape) == pixels.shape
    assert pixels.grid_thw.tolist() == [[1, 2, 2], [19, 4, 6], [2, 8, 4]]
    with torch.inference_mode():
        from_bytes, signals = encoder(pixels, pixels.grid_thw, Needs(grids=2, keys=True))
        from_patches, same_signals = encoder(patches, pixels.grid_thw, Needs(grids=2, keys=True))
    assert from_bytes.shape[1] == int(pixels.grid_thw.prod(1).sum()) // 4
    assert torch.equal(from_bytes, from_patches)
    assert torch.equal(signals.received, same_signals.received)
    assert torch.equal(signals.keys, same_signals.keys)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_for_a_gpu_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: tokens, and what methods need of them, do not depend on how many grids run together."""
    encoder, sizes = small(family, torch.float32)
    frames = torch.randint(256, (2 * 21 - 1, 3, 2 * sizes.factor, 3 * sizes.factor), dtype=torch.uint8)
    pixels = Pixels((frames, frames[:1]), sizes)
    seen: list[int] = []

    def call(method: Callable[..., Any], x: Tensor, *arguments: Any) -> Any:
        seen.extend([len(x)] if method.__name__ == "encode_batch" else [])
        return method(x, *arguments)

    with torch.inference_mode():
        tokens, signals = encoder(pixels, pixels.grid_thw, Needs(grids=2, keys=True))
        gpu = torch.device("cuda")
        monkeypatch.setattr(vision, "batch_sizes", lambda count, _, **some: batch_sizes(count, gpu, **some))
        same, same_signals = encoder(pixels, pixels.grid_thw, Needs(grids=2, keys=True), call=call)
    assert seen == [16, 8, 1]
    torch.testing.assert_close(same, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_signals.received, signals.received, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_signals.keys, signals.keys, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=str)
def test_cuda_takes_bytes_for_patches(family: str, dtype: torch.dtype, least: float) -> None:
    """Protects: bytes that a GPU fetches by itself, group by group, are those of the clip when it cuts them."""
    encoder, sizes = small(family, dtype)
    shapes = [(1, 1, 1), (75, 4, 6), (8, 8, 2)]
    frames = (torch.randint(256, (n, 3, h * sizes.factor, w * sizes.factor), dtype=torch.uint8) for n, h, w in shapes)
    pixels = Pixels(tuple(frames), sizes)
    needs = Needs(grids=2, keys=True)
    with torch.inference_mode():
        expected, weights = encoder(pixels, pixels.grid_thw, needs)
        encoder = encoder.cuda()
        from_bytes, signals = encoder(pixels, pixels.grid_thw, needs)
        from_patches, same_signals = encoder(pixels.patches(), pixels.grid_thw, needs)
    # Cut on the device or here, colours are normalised by another order of the same two operations.
    for found, other in ((from_bytes, from_patches), (from_bytes.cpu(), expected)):
        assert (found.float() - other.float()).norm() <= least * other.float().norm()
    for received in (same_signals.received, weights.received.cuda()):
        torch.testing.assert_close(signals.received, received, rtol=10 * least, atol=least)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_adjacent_in_memory(family: str) -> None:
    """Protects: between the products of attention only the turning of queries and keys passes over memory."""
    encoder, _ = small(family, torch.float32)
    attention = encoder.blocks[0].attention
    layout = encoder.layout(4, 4)
    x = torch.randn(3, 16, 32)
    q, k, v = attention.project(x, layout.rotary)
    assert q.shape == k.shape == v.shape == (3, 2, 16, 16)
    assert all(part.transpose(1, 2).stride()[2:] == (16, 1) for part in (q, k, v))
    mixed = windowed(q, k, v, ((1, 16),))
    torch.testing.assert_close(mixed, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert mixed.transpose(1, 2).is_contiguous()
