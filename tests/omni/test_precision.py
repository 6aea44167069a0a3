"""In 16 bits: how far prefill and decoding are from float32, with weights like the released ones.

    pytest -n 0 -s tests/omni/test_precision.py    # prints the table, transformers beside it

Random weights are harmless: their scores are near 0, and what rounding does to a score of hundreds does not show.
Released ones have biases of tens on queries and keys (Qwen2.5), norms far from 1 (Qwen3), a few channels a hundred
times as large as the rest.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omni
from omni import decoder
from omni.config import OmniConfig
from omni.decoder import attend
from omni.encoders.received import received_attention
from omni.layers import float32_linear
from omni.model import Omni
from omni.moe import Experts
from omni.processing.positions import layout
from seats.relevance import relevance
from tests.omni.pairs import FAMILIES, Pair, as_batch, make_request

BIASES = (0, 5, 20, 60)
HALVES = (torch.bfloat16, torch.float16)
PROMPT, NEW = 90, 6
PARTS = [("text", 8), ("audio", 200), ("text", PROMPT)]


def like_released(thinker: Any, bias: float) -> None:
    """Makes transformers' thinker of random weights like a released one, in place.

    bias: of every fourth channel of keys, with signs at random, and a twentieth of it on queries. Qwen3 has no biases:
    there the norm of keys has such weights in every twelfth channel, and a sixtieth of them that of queries.
    """
    with torch.no_grad():
        for name, parameter in thinker.named_parameters():
            owner, _, leaf = name.rpartition(".")
            kind = owner.rpartition(".")[2]
            if "visual" in name or "audio" in name:
                continue
            if (kind == "k_proj" and leaf == "bias") or kind == "k_norm":
                large = torch.arange(len(parameter)) % (4 if leaf == "bias" else 12) == 0
                parameter[large] += bias * torch.randn(int(large.sum())).sign()
            elif (kind == "q_proj" and leaf == "bias") or kind == "q_norm":
                parameter += bias / (20 if leaf == "bias" else 60) * torch.randn_like(parameter)
            elif kind.endswith("layernorm") or kind == "norm":
                parameter.copy_(torch.empty_like(parameter).uniform_(0.2, 3))
                parameter[:2] /= 100  # of the channels that are so large
            elif kind == "embed_tokens":
                parameter[:, :2] *= 100


def round_weights(whole: nn.Module) -> None:
    """So that they are exact in bfloat16 and in float16."""
    for parameter in whole.parameters():
        parameter.data = parameter.data.bfloat16().float()


def pair_like_released(make_pair: Any, family: str, bias: float) -> Pair:
    def adjusted(whole: Any) -> None:
        like_released(whole.thinker, bias)
        round_weights(whole)

    return make_pair(family, adjust=adjusted)


def relative(logits: Tensor, exact: Tensor) -> float:
    return float((logits.float() - exact).norm() / exact.norm())


@dataclass
class Errors:
    """Relative, of the logits of the last positions, one by one through the decoder's cache or all at once."""

    prefill: float
    decode: float
    sdpa_prefill: float
    sdpa_decode: float
    eager_prefill: float
    eager_decode: float


def ours(model: Omni, inputs: omni.Inputs, *, decode: bool) -> Tensor:
    """(NEW, V) float32 logits after each of the last NEW tokens but one."""
    ids = inputs.input_ids
    found = []
    if not decode:
        for end in range(ids.shape[1] - NEW, ids.shape[1]):
            found.append(model.prefill(shortened(inputs, end)).logits)
        return torch.stack(found)
    start = ids.shape[1] - NEW
    (prefill,), cache = model.engine.prefill([shortened(inputs, start)], NEW, None, "layerwise")
    found.append(prefill.logits)
    with torch.inference_mode():
        for step in range(NEW - 1):
            position = torch.tensor([float(prefill.next_position) + step])
            found.append(model.thinker.decode(ids[:, start + step], position, cache)[0])
    return torch.stack(found)


def shortened(inputs: omni.Inputs, length: int) -> omni.Inputs:
    fields = {**vars(inputs), "input_ids": inputs.input_ids[:, :length]}
    return omni.Inputs(**fields)


@torch.inference_mode()
def theirs(thinker: Any, inputs: omni.Inputs, config: OmniConfig, *, decode: bool) -> Tensor:
    length = inputs.input_ids.shape[1]
    batch = as_batch(inputs)
    if not decode:
        return thinker(**batch, use_cache=False).logits[0, length - NEW - 1 : length - 1].float()
    out = thinker(**as_batch(shortened(inputs, length - NEW)), use_cache=True)
    found = [out.logits[0, -1]]
    first = layout(shortened(inputs, length - NEW), config).next_position
    for step in range(NEW - 1):
        out = thinker(
            input_ids=inputs.input_ids[:, length - NEW + step, None],
            position_ids=torch.full((3, 1, 1), int(first) + step),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        found.append(out.logits[0, -1])
    return torch.stack(found).float()


def in_dtype(module: nn.Module, dtype: torch.dtype) -> Any:
    """A copy with parameters in this dtype; tables stay as exact as they are."""
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(dtype)
    return other


def measure(make_pair: Any, family: str, bias: float) -> dict[torch.dtype, Errors]:
    """Of one model, whose weights are exact in bfloat16 and in float16."""

    pair = pair_like_released(make_pair, family, bias)
    config = pair.model.config
    inputs = make_request(pair, PARTS)
    exact = theirs(pair.reference, inputs, config, decode=False)
    errors = {}
    for dtype in HALVES:
        rounded = Omni(in_dtype(pair.model.thinker, dtype), pair.model.folder)
        row = [relative(ours(rounded, inputs, decode=decode), exact) for decode in (False, True)]
        reference = in_dtype(pair.reference, dtype)
        for kind in ("sdpa", "eager"):
            reference.set_attn_implementation(kind)
            row += [relative(theirs(reference, inputs, config, decode=decode), exact) for decode in (False, True)]
        errors[dtype] = Errors(*row)
    return errors


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_as_near_to_float32_as_prefill(make_pair, family: str, bias: float) -> None:
    """Whatever the size of scores, and no farther than transformers is."""
    for dtype, errors in measure(make_pair, family, bias).items():
        figures = " ".join(f"{name} {100 * each:.2f} %" for name, each in vars(errors).items())
        print(f"\n{family} {str(dtype)[6:]} bias {bias}: {figures}")
        assert errors.decode <= 1.2 * max(errors.prefill, errors.sdpa_decode) + 1e-3
        assert errors.prefill <= 1.5 * errors.sdpa_prefill + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_are_as_near_to_float32_as_transformers(make_pair, family: str) -> None:
    """With scores as large in pictures, clips and sounds."""

    def adjusted(whole: Any) -> None:
        for name, bias in whole.thinker.named_parameters():
            owner, _, leaf = name.rpartition(".")
            kind = owner.rpartition(".")[2]
            if (
                leaf == "bias"
                and ("visual" in name or "audio" in name)
                and kind in ("q", "k", "qkv", "q_proj", "k_proj")
            ):
                asked = bias.data[: 2 * len(bias) // 3] if kind == "qkv" else bias.data
                asked[::4] += 60 * torch.randn_like(asked[::4]).sign()
        round_weights(whole)

    pair: Pair = make_pair(family, adjust=adjusted)
    inputs = make_request(pair, [("image", 8, 6), ("video", 3, 6, 8, 1.0, 300), ("audio", 220), ("text", 3)])
    exact = pair.model.thinker.encode(inputs)[0]
    for dtype in HALVES:
        rounded = in_dtype(pair.model.thinker, dtype).encode(inputs)[0]
        reference = in_dtype(pair.reference, dtype)
        for kind, tokens in exact.items():
            error = relative(rounded[kind][0], tokens[0])
            theirs = relative(encoded(reference, inputs, kind), tokens[0])
            print(f"\n{family} {str(dtype)[6:]} {kind}: {100 * error:.2f} %, transformers {100 * theirs:.2f} %")
            assert error <= 1.3 * theirs + 1e-3


def encoded(thinker: Any, inputs: omni.Inputs, kind: str) -> Tensor:
    """(n, hidden) that transformers makes of one kind of medium."""
    with torch.inference_mode():
        if kind == "audio":
            mel, mask = inputs.input_features.to(thinker.dtype), inputs.feature_attention_mask
            return thinker.get_audio_features(mel, mask).last_hidden_state
        if kind == "image":
            made = thinker.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
        else:
            made = thinker.get_video_features(inputs.pixel_values_videos, inputs.video_grid_thw)
        return torch.cat(tuple(made.pooler_output))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_beginning_is_as_near_to_float32(make_pair, family: str) -> None:
    """What goes on after positions that are kept multiplies by other functions than a prompt as a whole."""

    pair = pair_like_released(make_pair, family, 60)
    inputs = make_request(pair, PARTS)
    other = omni.Inputs(**{**vars(inputs), "input_ids": inputs.input_ids.clone()})
    other.input_ids[:, 40 - PROMPT :] = 9
    exact = pair.model.prefill(inputs).logits
    for dtype in HALVES:
        model = Omni(in_dtype(pair.model.thinker, dtype), pair.model.folder)
        whole = relative(model.prefill(inputs).logits, exact)
        model.forget()
        model.prefill(other)
        known = model.prefill(inputs)
        assert known.reused_tokens > 50
        print(
            f"\n{family} {str(dtype)[6:]}: whole {100 * whole:.2f} %, known {100 * relative(known.logits, exact):.2f} %"
        )
        assert relative(known.logits, exact) <= 1.5 * whole + 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", [1, 16, 64, 256, 1e5])
def test_attention_of_a_step_at_large_scores(dtype: torch.dtype, size: float) -> None:
    """Within 1 % of float64 of the same numbers, also where no 16 bits hold a score; keys share a large part, as by a
    bias. Of two rows one fills its cache hardly."""
    torch.manual_seed(0)
    batch, heads, group, dim, capacity = 2, 2, 7, 64, 384
    q, keys, values = (torch.randn(batch, heads, n, dim) for n in (group, capacity + 1, capacity + 1))
    direction = nn.functional.normalize(torch.randn(batch, heads, 1, dim), dim=-1)
    # Scores of `size`, which differ by a few units.
    half = size**0.5 * dim**0.25
    q, keys = (half * direction + q / max(1, half)).to(dtype), (half * direction + keys / max(1, half / 4)).to(dtype)
    values = values.to(dtype)
    written = torch.arange(capacity) < torch.tensor([300, 5])[:, None]
    (old_keys, key), (old_values, value) = (part.split((capacity, 1), dim=2) for part in (keys, values))
    found = attend(q, key, value, old_keys, old_values, written)
    scores = q.double() @ keys.double().mT * dim**-0.5
    there = torch.cat((written, torch.ones(batch, 1, dtype=torch.bool)), dim=1)
    exact = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(dim=-1) @ values.double()
    assert float((found.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_logits_and_shares_are_not_rounded(dtype: torch.dtype) -> None:
    """Of the head and of the router: float32 of exact products, whatever is stored."""
    torch.manual_seed(0)
    x, weight = (4 * torch.randn(1, 300, 256)).to(dtype), torch.randn(3000, 256).to(dtype)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(float32_linear(x, weight).double(), exact, atol=1e-4, rtol=1e-6)
    x, weight, direction = x.requires_grad_(), weight.requires_grad_(), torch.randn(1, 300, 3000)
    gradients = torch.autograd.grad((float32_linear(x, weight) * direction).sum(), (x, weight))
    expected = torch.autograd.grad(((x.double() @ weight.double().T) * direction).sum(), (x, weight))
    for one, other in zip(gradients, expected, strict=True):
        assert relative(one, other.float()) < 0.01


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
def test_the_router_chooses_by_what_is_not_rounded(dtype: torch.dtype) -> None:
    """Scores around 20, which in bfloat16 are multiples of 1/8: most experts of a token would be alike."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "moe_intermediate_size": 8, "num_experts": 128, "num_experts_per_tok": 8}
    experts = Experts(SimpleNamespace(**sizes, norm_topk_prob=True)).to(dtype).requires_grad_(False)
    tokens = torch.randn(200, 64).to(dtype)
    experts.router.weight.copy_(torch.randn(128, 64) / 20 + 20 * torch.ones(64) / 64)
    tokens += (1 - tokens.mean(dim=1, keepdim=True)).to(dtype)
    shares, chosen = experts.route(tokens)
    scores = tokens.double() @ experts.router.weight.double().T
    torch.testing.assert_close(scores.gather(1, chosen), scores.topk(8, dim=-1).values, atol=1e-4, rtol=0)
    expected = scores.gather(1, chosen).softmax(dim=-1)
    torch.testing.assert_close(shares.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("size", [16, 256, 1e5])
def test_what_selects_sees_scores_that_are_not_rounded(dtype: torch.dtype, size: float) -> None:
    """Attention received in an encoder, and what a question looks at: as in float64 of the same numbers."""
    torch.manual_seed(0)
    heads, tokens, dim = 4, 90, 64
    half = size**0.5 * dim**0.25
    direction = nn.functional.normalize(torch.randn(1, heads, 1, dim), dim=-1)
    q, k = ((half * direction + torch.randn(1, heads, tokens, dim) / max(1, half / 4)).to(dtype) for _ in range(2))
    shares = (q.double() @ k.double().mT * dim**-0.5).softmax(dim=-1)
    for found, exact in (
        (received_attention(q, k), shares.mean(dim=1).sum(dim=1)),
        (relevance(q[:, :, -1:], k, torch.ones(1, tokens, dtype=torch.bool)), shares[:, :, -1].mean(dim=1)),
    ):
        assert found.dtype == torch.float32
        assert float((found.double() - exact).norm() / exact.norm()) < 2e-6 * max(100, size)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=lambda dtype: str(dtype)[6:])
def test_a_step_elsewhere_than_on_a_cpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, eagerly or in float32, equals the CPU's own, both of them, and traces without a break."""
    torch.manual_seed(0)
    q, key, value, keys, values = (torch.randn(2, 2, n, 32).to(dtype) for n in (3, 1, 1, 256, 256))
    written = torch.arange(256) < torch.tensor([200, 100])[:, None]
    expected = attend(q, key, value, keys, values, written)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    monkeypatch.setattr(decoder, "HALVES", (dtype,))
    torch.testing.assert_close(attend(q, key, value, keys, values, written), expected, atol=tolerance, rtol=tolerance)
    monkeypatch.setattr(decoder, "chunks_on_a_cpu", decoder.chunks_on_a_device)
    torch._dynamo.reset()
    found = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, key, value, keys, values, written)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
