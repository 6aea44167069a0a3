"""The context limit: the message has the numbers, and what it says makes a prompt fit does."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import omni
from omni.config import OmniConfig
from omni.context import check_context
from omni.inputs import InputError
from omni.model import Omni
from omni.processing.positions import layout
from omni.request import read_prompt, whole_prompt
from seats import preset_for
from seats.method import Method
from seats.methods import NAMES, method_for
from tests.omni.pairs import Pair, make_request

PARTS = [("text", 30), ("video", 8, 6, 8, 1.0, 1600), ("text", 20)]
NEW = 16


@pytest.fixture(scope="module")
def pair(make_pair) -> Pair:
    return make_pair(text={"num_hidden_layers": 6})


def limited(pair: Pair, limit: int) -> Omni:
    """The same model, of a shorter context."""
    config = replace(pair.model.config, decoder=replace(pair.model.config.decoder, max_position_embeddings=limit))
    model = Omni(pair.model.thinker, pair.model.folder)
    model.config = model.thinker.config = config
    return model


@pytest.fixture(autouse=True)
def whole_context(pair: Pair):
    """Puts the limit back: models of a test share their thinker."""
    config = pair.model.config
    yield
    pair.model.thinker.config = config


def retention_of(error: pytest.ExceptionInfo[InputError]) -> float:
    found = re.search(r"it fits at retention ([\d.]+) or less", str(error.value))
    assert found, str(error.value)
    return float(found[1])


def refused(inputs: omni.Inputs, config: OmniConfig, method: Method | None) -> str:
    place = layout(inputs, config)
    prompt = whole_prompt(place.positions.shape[1])
    if method is not None:
        prompt = read_prompt(place, inputs, config, method.window_grids)
    try:
        check_context(inputs, place, prompt, config, method, NEW)
    except InputError as error:
        return str(error)
    return ""


def test_the_retention_that_is_named_fits_and_a_larger_one_does_not(pair: Pair) -> None:
    """With every token and with too many kept: limit, tokens by modality, and a value to pass; with it there is an
    answer, of as many tokens as were asked for."""
    inputs = make_request(pair, PARTS)
    model = limited(pair, 260)
    length = inputs.input_ids.shape[1]
    options = {"max_new_tokens": NEW, "stop_token_ids": []}
    with pytest.raises(InputError) as error:
        model.generate(inputs, **options)
    assert f"has {length} tokens (" in str(error.value) and "96 video, 400 audio) and the answer may take 16" in str(
        error.value
    )
    assert "the model's 260" in str(error.value)
    retention = retention_of(error)
    with pytest.raises(InputError, match=r"of which \d+ enter the decoder, and") as again:
        model.generate(inputs, seats=preset_for(model.config, retention + 0.001), **options)
    assert retention_of(again) == retention
    answer = model.generate(inputs, seats=preset_for(model.config, retention), **options)
    assert len(answer.tokens) == NEW
    assert answer.stats.segments[0] + NEW <= 260 < answer.stats.segments[0] + NEW + 10


@pytest.mark.parametrize("name", NAMES)
def test_what_is_named_fits_the_method_in_use(pair: Pair, name: str) -> None:
    """Each keeps in its own way; the first layers of FastV and PyramidDrop see everything: no retention helps."""
    inputs = make_request(pair, PARTS)
    config = limited(pair, 340).config
    message = refused(inputs, config, method_for(name, config, 0.9))
    assert "together more than the model's 340" in message
    found = re.search(r"it fits at retention ([\d.]+) or less", message)
    if name in ("fastv", "fastv-om", "pyramiddrop", "pyramiddrop-om"):
        assert found is None
        return
    assert found, message
    assert refused(inputs, config, method_for(name, config, float(found[1]))) == ""


def test_no_retention_is_named_where_none_helps(pair: Pair) -> None:
    """Text alone, an answer longer than the context, a prompt that does not end with text, a model too shallow."""
    model = limited(pair, 64)
    for parts, new in (
        ([("text", 90)], NEW),
        (PARTS, 64),
        ([("text", 5), ("audio", 4000)], NEW),
    ):
        inputs = make_request(pair, parts)
        if parts[-1][0] == "audio":  # without the mark that ends it
            inputs = replace(inputs, input_ids=inputs.input_ids[:, :-1])
        with pytest.raises(InputError, match="more than the model's 64: lower fps") as error:
            model.generate(inputs, max_new_tokens=new, stop_token_ids=[])
        assert "retention" not in str(error.value)
    shallow = replace(model.config, decoder=replace(model.config.decoder, num_layers=3))
    message = refused(make_request(pair, PARTS), shallow, None)
    assert "more than the model's 64" in message and "retention" not in message


def test_what_selection_leaves_out_may_exceed_the_context(pair: Pair) -> None:
    """The same answer as from a model of a longer context: the limit changes nothing else."""
    inputs = make_request(pair, PARTS)
    method = preset_for(pair.model.config, 0.1)
    options = {"seats": method, "max_new_tokens": NEW, "stop_token_ids": []}
    expected = pair.model.generate(inputs, **options)
    length = expected.stats.segments[0]
    model = limited(pair, length + NEW)
    assert inputs.input_ids.shape[1] > length + NEW
    assert model.generate(inputs, **options).tokens == expected.tokens
    with pytest.raises(InputError, match=f"of which {length} enter the decoder"):
        limited(pair, length + NEW - 1).generate(inputs, **options)
    assert torch.isfinite(model.prefill(inputs, method).logits).all()
