"""The next question about known media: the same tokens kept and the same logits as asked alone, for less work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, Pair, make_request, text_ids
from test_stages import REQUESTS, SETTINGS

import omni
from omni.model import Omni
from seats.methods import METHODS, method_for


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": 6})


def fresh(model: Omni, **options: Any) -> Omni:
    """The same weights, nothing known."""
    return Omni(model.thinker, model.folder, **options)


def ending(inputs: omni.Inputs, seed: int, *, words: int = 9, same: int = 2) -> omni.Inputs:
    """The same prompt with another question: its last ids but `same`, which a template would put there."""
    torch.manual_seed(1000 + seed)
    ids = inputs.input_ids[0].tolist()
    last = max(place for place, id in enumerate(ids) if id in (605, 607))  # the end of the last medium
    return replace(inputs, input_ids=torch.tensor([[*ids[: last + 1], *text_ids(words), *ids[len(ids) - same :]]]))


def same(one: omni.Prefill, other: omni.Prefill, tolerance: float = 1e-4) -> None:
    assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in other.kept]
    assert (one.segments, one.macs, one.tokens) == (other.segments, other.macs, other.tokens)
    assert one.next_position == other.next_position
    torch.testing.assert_close(one.logits, other.logits, atol=tolerance, rtol=tolerance)
    for scores, expected in zip(one.relevance, other.relevance, strict=True):
        assert (scores is None) == (expected is None)
        if scores is not None:
            torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv", ["layerwise", "pruned"])
@pytest.mark.parametrize("name", [*METHODS, None])
@pytest.mark.parametrize("parts", [*REQUESTS.values()], ids=[*REQUESTS])
def test_the_next_question(pair: Pair, parts: list[tuple], name: str | None, kv: str) -> None:
    """Of every kind of prompt, by every method and without one, in both caches: as asked alone."""
    method = SETTINGS if name == "seats" else name and method_for(name, pair.model.config, 0.6)
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    first = make_request(pair, parts)
    if method is not None and not ({"video", "audio"} & {part[0] for part in parts}):
        pytest.skip("nothing to select from")
    options = {"seats": method, "kv": kv, "max_new_tokens": 6, "stop_token_ids": []}
    assert model.generate(first, **options).tokens == alone.generate(first, **options).tokens
    for seed in range(2):
        inputs = ending(first, seed, words=5 + 8 * seed)
        found, expected = model.prefill(inputs, method, kv), alone.prefill(inputs, method, kv)
        same(found, expected)
        media = max(span for span in (found.tokens["image"], found.tokens["video"], found.tokens["audio"]))
        assert found.reused_tokens > media
        assert expected.reused_tokens == 0
        assert model.generate(inputs, **options).tokens == alone.generate(inputs, **options).tokens
