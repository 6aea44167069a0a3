"""Attention of what comes after keys and values that are there: a number of positions at a time, exactly."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from omni import decoder
from omni.decoder import attend_after
from omni.layers import HALVES
from tests.omni.pairs import FAMILIES, make_request

HEADS, KV_HEADS, DIM = 6, 2, 8


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_may_have_keys_of_their_own(make_pair, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: where no kernel knows shared keys, as on a GPU in float32 and before Ampere, the same is computed."""
    pair = make_pair(family)
    inputs = make_request(pair, [("text", 4), ("video", 3, 6, 8, 1.0, 300), ("text", 3)])
    expected = pair.model.prefill(inputs).logits
    asked: list[torch.Size] = []
    attention = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **named: bool) -> Tensor:
        if named.get("is_causal"):
            assert not named["enable_gqa"]
            assert q.shape == k.shape == v.shape
            asked.append(q.shape)
        return attention(q, k, v, **named)

    monkeypatch.setattr(decoder, "groups_in_kernels", lambda q: False)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    torch.testing.assert_close(pair.model.prefill(inputs).logits, expected, atol=1e-5, rtol=1e-5)
    assert len(asked) == pair.model.config.decoder.num_layers


def test_which_processors_have_a_kernel_for_shared_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = {dtype: SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda") for dtype in (torch.float32, *HALVES)}
    assert decoder.groups_in_kernels(torch.zeros(1))
    for capability, halves in (((8, 0), True), ((9, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert not decoder.groups_in_kernels(on_gpu[torch.float32])
        assert all(decoder.groups_in_kernels(on_gpu[half]) == halves for half in HALVES)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [decoder.groups_in_kernels(q) for q in on_gpu.values()] == [dtype == torch.bfloat16 for dtype in on_gpu]


def of_each_position(q: Tensor, keys: Tensor, values: Tensor, known: list[int]) -> Tensor:
    """Position by position, without a mask, in float64."""
    keys, values = (each.double().repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
    rows = []
    for row, count in enumerate(known):
        mixed = []
        for place in range(q.shape[2]):
            there = slice(None, count + place + 1)
            scores = q[row, :, place, None].double() @ keys[row, :, there].mT * DIM**-0.5
            mixed.append((scores.softmax(dim=-1) @ values[row, :, there]).flatten())
        rows.append(torch.stack(mixed))
    return torch.stack(rows)


@pytest.mark.parametrize("elements", [1, 2 * 3 * 17 * 4, 2 * 3 * 17 * 5 + 1, 2**28])
@pytest.mark.parametrize("known", [[7, 7], [0, 5]], ids=["alike", "unlike"])
def test_positions_see_what_is_before_them(elements: int, known: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(decoder, "MASK", 4 * elements)
    masks: list[int] = []
    attention = F.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor) -> Tensor:
        masks.append(attn_mask.numel())
        return attention(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    q = torch.randn(2, HEADS, 10, DIM)
    keys, values = torch.randn(2, 2, KV_HEADS, 17, DIM).unbind()
    mixed = attend_after(q, keys, values, torch.tensor(known), 7)
    torch.testing.assert_close(mixed.double(), of_each_position(q, keys, values, known), atol=1e-6, rtol=1e-5)
    # One position at least; the mask of an hour's clip after another has tens of billions of elements.
    assert max(masks) <= max(elements, 2 * 3 * 17)
    assert len(masks) == {1: 10, 2 * 3 * 17 * 4: 3, 2 * 3 * 17 * 5 + 1: 2, 2**28: 1}[elements]
