"""A model that is asked for long, at once and with interruptions answers as a fresh one."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
from omni import engine, stages
from omni.cache import Cache
from omni.decoder import Layer
from omni.encoders import vision
from omni.encoders.audio import AudioEncoder
from omni.encoders.vision import VisionEncoder
from omni.model import Omni
from omni.processing import processor, reader
from omni.processing.reasoning import AnswerStream
from omni.runtime import graphs
from omni.thinker import Thinker
from seats import preset_for
from tests.omni.pairs import FAMILIES, Pair, captures_without_a_gpu, make_request

REQUEST = [("text", 9), ("video", 4, 6, 8, 1.0, 500), ("text", 6)]
NEW = 8


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": 6})


def fresh(model: Omni) -> Omni:
    """A model that has answered nothing yet."""
    return omni.load(model.folder, device="cpu", dtype=torch.float32)


def options_of(model: Omni, selects: bool = True) -> dict[str, Any]:
    method = preset_for(model.config) if selects else None
    return {"seats": method, "kv": "pruned", "max_new_tokens": NEW, "stop_token_ids": []}


def random_parts(draw: random.Random) -> list[tuple]:
    grids, height, width = draw.randint(1, 6), draw.choice([4, 6, 8]), draw.choice([4, 6, 10])
    sound = [100 * grids + draw.randint(-30, 30)] if draw.random() < 0.7 else []
    picture = [("image", 4, 6)] if draw.random() < 0.3 else []
    return [("text", draw.randint(2, 40)), *picture, ("video", grids, height, width, 1.0, *sound), ("text", 5)]


def test_a_soak_answers_as_fresh_models(pair: Pair) -> None:
    """Forty requests over six plans in random order, every token and SEATS, some closed half-way: each as from a model
    that has answered nothing else."""
    draw = random.Random(0)
    requests = [make_request(pair, random_parts(draw), seed=seed) for seed in range(6)]
    expected: dict[tuple[int, bool], list[int]] = {}
    for _ in range(40):
        number, selects = draw.randrange(6), draw.random() < 0.5
        options = options_of(pair.model, selects)
        if draw.random() < 0.2:
            steps = pair.model._tokens([requests[number]], **options)
            for _ in range(draw.randint(0, 3)):
                next(steps)
            steps.close()
            continue
        if (number, selects) not in expected:
            expected[number, selects] = fresh(pair.model).generate(requests[number], **options).tokens
        assert pair.model.generate(requests[number], **options).tokens == expected[number, selects]
    assert len(expected) > 8


def test_eight_threads_at_a_new_model_answer_as_one_by_one(model: Omni, clip: Path) -> None:
    """From the file on, and all of them the first to need tokenizer and template; one goes away after a piece."""
    questions = [f"What {'really ' * number}happens?" for number in range(8)]

    def ask(asked: Omni, question: str, pieces: int | None = None) -> str:
        content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": question}]
        inputs = asked.prepare([{"role": "user", "content": content}], max_pixels=56 * 56)
        stream = asked.stream(inputs, **options_of(asked))
        answer = "".join(piece for piece, _ in zip(stream, range(pieces or NEW), strict=False))
        stream.close()
        return answer

    expected = [ask(model, question) for question in questions]
    new = fresh(model)
    pieces = [1 if number == 3 else None for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [new] * 8, questions, pieces))
    assert expected[3].startswith(answers[3])
    assert [*answers[:3], *answers[4:]] == [*expected[:3], *expected[4:]]


INTERRUPTED = {
    "video encoder": (VisionEncoder, "forward", 1),
    "audio encoder": (AudioEncoder, "forward", 1),
    "slots": (engine, "assign_slots", 1),
    "pool": (engine, "with_media", 1),
    "selection before the decoder": (stages, "select_before_decoder", 1),
    "a layer of the prefill": (Layer, "prefill", 3),
    "selection between layers": (stages, "choose", 2),
    "cutting the cache": (stages, "prune", 1),
    "the cache": (Cache, "of_prefill", 1),
    "a layer of a step": (Layer, "decode", 8),
    "writing the cache": (Cache, "append", 3),
    "the head": (Thinker, "logits", 4),
}


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Raises KeyboardInterrupt after that call of a function, whose work is done by then."""
    function, calls = getattr(owner, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("place", INTERRUPTED)
def test_an_interrupted_request_leaves_the_next_one_right(
    pair: Pair, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the work: others are not locked out, gradients are on again, answers are the same."""
    inputs, options = make_request(pair, REQUEST), options_of(pair.model)
    expected = pair.model.generate(inputs, **options).tokens
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, *INTERRUPTED[place])
        pair.model.generate(inputs, **options)
    assert not pair.model.engine._lock.locked()
    assert not torch.is_inference_mode_enabled()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pair.model.generate, inputs, **options).result(timeout=300).tokens == expected


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (processor, "apply_chat_template", 1),
        (reader, "resize", 1),
        (vision, "cut_patches", 1),
        (AnswerStream, "push", 2),
    ],
    ids=["template", "picture", "patches", "text"],
)
def test_an_interrupt_around_the_model_leaves_the_next_request_right(
    model: Omni, owner: Any, name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While media are prepared and while text is put together."""
    model = Omni(model.thinker, model.folder, reuse=0)  # each time anew
    picture = torch.randint(0, 255, (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]

    def ask() -> str:
        inputs = model.prepare([{"role": "user", "content": content}])
        return "".join(model.stream(inputs, max_new_tokens=NEW))

    expected = ask()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, owner, name, call)
        ask()
    assert ask() == expected


@pytest.mark.slow
def test_graphs_that_made_room_are_made_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, two plans and room for one graph: captured, dropped and captured again, the answers stay."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    model = Omni(pair.model.thinker, pair.model.folder, compile=True, reuse=0)
    captures_without_a_gpu(model, monkeypatch)
    requests = [make_request(pair, REQUEST), make_request(pair, [("text", 9), ("video", 2, 4, 4, 1.0), ("text", 90)])]
    options = options_of(pair.model)
    expected = [pair.model.generate(inputs, **options).tokens for inputs in requests]
    for _ in range(3):
        for inputs, tokens in zip(requests, expected, strict=True):
            assert model.generate(inputs, **options).tokens == tokens
            assert len(model.engine.compiled.prefills.graphs) == 1
