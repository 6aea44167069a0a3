"""Requests together, from several threads, through compiled graphs: the same answers as one by one and eagerly."""

from __future__ import annotations

import copy
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_golden import STOP, load, read_request
from test_stages import CASES, REQUESTS, SETTINGS, config_of, golden

import omni
from omni import engine, layers, moe, stages
from omni.layers import directly
from omni.model import Omni
from omni.runtime.graphs import capture, renewed, warm_up
from seats.methods import METHODS
from tests.omni.pairs import FAMILIES, NamedStream, Pair, captures_without_a_gpu, make_request

MIXED = {"seats": SETTINGS, "max_new_tokens": 12, "stop_token_ids": []}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": 6})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Omni]:
    """A compiled model whose parts are traced whole but not turned into machine code, which takes long
    (`pytest -m slow` does it)."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.utils.counters.clear()

    def compiled(model: Omni, **options: Any) -> Omni:
        return Omni(model.thinker, model.folder, compile=True, **{"reuse": 0, **options})

    return compiled


@pytest.fixture(scope="module")
def made(pair: Pair) -> Omni:
    """A compiled model that keeps what one test traced for the next."""
    return Omni(pair.model.thinker, pair.model.folder, compile=True, reuse=0)


def same_prefill(one: omni.Prefill, other: omni.Prefill, tolerance: float = 1e-4) -> None:
    assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in other.kept]
    torch.testing.assert_close(one.logits, other.logits, atol=tolerance, rtol=tolerance)


@cache
def compiled(folder: Path) -> Omni:
    return Omni(load(folder).thinker, folder, compile=True, reuse=0)


@golden
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_cases_through_the_compiled_model(path: Path) -> None:
    model = compiled(path.parent)
    inputs, expected = read_request(path)
    seats = config_of(path)
    prefill = model.prefill(inputs, seats=seats)
    for step, kept in enumerate(prefill.kept):
        assert kept.tolist() == expected[f"keep_{step}"].tolist()
    torch.testing.assert_close(prefill.logits, expected["logits"], atol=1e-3, rtol=0)
    generated = expected["generated"].tolist()
    answer = model.generate(inputs, seats=seats, kv="pruned", max_new_tokens=len(generated), stop_token_ids=[STOP])
    assert answer.tokens == generated


@golden
@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_cases_as_machine_code(path) -> None:
    """With the default compiler, on every recorded case."""
    eager = load(path.parent)
    model = omni.load(eager.folder, device="cpu", dtype=torch.float32, compile=True)
    inputs, expected = read_request(path)
    seats = config_of(path)
    prefill = model.prefill(inputs, seats=seats)
    same_prefill(prefill, eager.prefill(inputs, seats=seats))
    torch.testing.assert_close(prefill.logits, expected["logits"], atol=1e-3, rtol=0)
    generated = expected["generated"].tolist()
    answer = model.generate(inputs, seats=seats, kv="pruned", max_new_tokens=len(generated), stop_token_ids=[STOP])
    assert answer.tokens == generated


def random_parts(draw: random.Random) -> list[tuple]:
    grids = draw.choice([1, 2, 3, 4, 9, 20])
    return [
        ("text", draw.randint(2, 200)),
        ("video", grids, 6, 10, 1.0, *([100 * grids + draw.randint(-40, 40)] if draw.random() < 0.7 else [])),
        *([("audio", draw.randint(100, 900))] if draw.random() < 0.3 else []),
        ("text", draw.randint(2, 60)),
    ]


@pytest.mark.usefixtures("traced")
def test_random_requests_over_the_ladder(pair: Pair, made: Omni) -> None:
    """Compiled and eager keep the same tokens; machine code is made once for clips of all lengths, without a break."""
    draw, graphs = random.Random(0), []
    for seed in range(8):
        inputs = make_request(pair, random_parts(draw), seed=seed)
        same_prefill(made.prefill(inputs, seats=SETTINGS), pair.model.prefill(inputs, seats=SETTINGS))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3], "a later plan needs no other code"
    assert made.engine.compiled.parts.code
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
def test_a_hundred_random_requests_over_twenty_plans(pair: Pair, traced) -> None:
    model, draw = traced(pair.model), random.Random(1)
    for seed in range(100):
        if seed % 5 == 0:
            parts = random_parts(draw)
        inputs = make_request(pair, parts, seed=seed)
        same_prefill(model.prefill(inputs, seats=SETTINGS), pair.model.prefill(inputs, seats=SETTINGS))
        if seed == 40:
            made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.fixture(scope="module")
def shallow(make_pair) -> Pair:
    """Methods know no model: of the family that has more of them, as few layers as FastV needs."""
    return make_pair("qwen3", text={"num_hidden_layers": 3, "mlp_only_layers": [0, 1, 2]})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_one_graph(shallow: Pair, traced, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole prefill traced at once, in a plan larger than needed, and in a batch: the same tokens kept as eagerly and
    alone; no break."""
    model = traced(shallow.model)
    whole = torch.compile(renewed(stages.prefill), fullgraph=True, dynamic=False)
    side = captures_without_a_gpu(model, monkeypatch)
    monkeypatch.setattr(side, "prefill", partial(whole, model.thinker))
    monkeypatch.setattr(side, "call", directly)
    method = METHODS[name](video_ratio=0.7, audio_ratio=0.8)
    batch = [make_request(shallow, REQUESTS["several media"], seed=seed) for seed in (0, 1)]
    for one, together in zip(batch, shallow.model.prefill(batch, seats=method), strict=True):
        alone = shallow.model.prefill(one, seats=method)
        same_prefill(alone, together)
        same_prefill(alone, model.prefill(one, seats=method))
        assert alone.segments[-1] < one.input_ids.shape[1]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_as_machine_code(pair: Pair, name: str) -> None:
    method = METHODS[name](video_ratio=0.5, audio_ratio=0.6)
    inputs = make_request(pair, REQUESTS["clip with sound"])
    compiled = Omni(pair.model.thinker, pair.model.folder, compile=True, reuse=0)
    same_prefill(compiled.prefill(inputs, seats=method), pair.model.prefill(inputs, seats=method))


@pytest.mark.usefixtures("traced")
def test_full_prefill_and_decoding_are_compiled_too(pair: Pair, made: Omni) -> None:
    inputs = make_request(pair, REQUESTS["several media"])
    same_prefill(made.prefill(inputs), pair.model.prefill(inputs))
    for options in ({}, {"temperature": 0.8, "seed": 3}):
        eager = pair.model.generate(inputs, max_new_tokens=9, stop_token_ids=[], **options)
        assert made.generate(inputs, max_new_tokens=9, stop_token_ids=[], **options).tokens == eager.tokens
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs, "steps are traced"
    longer = made._tokens(
        [make_request(pair, REQUESTS["several media"], seed=1)], max_new_tokens=140, stop_token_ids=[]
    )
    for _ in range(3):
        next(longer)
    longer.close()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "a larger cache needs no other code"


@pytest.mark.parametrize("options", [MIXED, {**MIXED, "kv": "pruned"}, {**MIXED, "seats": None}])
def test_requests_together_answer_as_one_by_one(pair: Pair, options: dict) -> None:
    """Of one size and of several, down to one without a picture."""
    names = ["clip with sound", "clip with sound", "several media", "sound", "clip without sound"]
    requests = [make_request(pair, REQUESTS[name], seed=seed) for seed, name in enumerate(names)]
    together = pair.model.generate(requests, **options)
    alone = [pair.model.generate(inputs, **options) for inputs in requests]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    prefills = pair.model.prefill(requests, seats=options["seats"], kv=options.get("kv", "layerwise"))
    for prefill, inputs in zip(prefills, requests, strict=True):
        same_prefill(prefill, pair.model.prefill(inputs, seats=options["seats"]))


def test_a_request_that_stops_first_waits_for_the_others(pair: Pair) -> None:
    requests = [make_request(pair, REQUESTS["clip with sound"], seed=seed) for seed in range(3)]
    free = pair.model.generate(requests, **MIXED)
    stop = free[1].tokens[3]
    answers = pair.model.generate(requests, **{**MIXED, "stop_token_ids": [stop]})
    for answer, whole in zip(answers, free, strict=True):
        cut = whole.tokens.index(stop) + 1 if stop in whole.tokens else len(whole.tokens)
        assert answer.tokens == whole.tokens[:cut]


def test_what_cannot_run_together_is_refused(pair: Pair) -> None:
    clip, text = make_request(pair, REQUESTS["clip with sound"]), make_request(pair, [("text", 9)])
    with pytest.raises(ValueError, match="cannot be run together"):
        pair.model.prefill([clip, text], seats=SETTINGS)
    with pytest.raises(ValueError, match="no request"):
        pair.model.prefill([])


def test_threads_get_their_own_answers(pair: Pair) -> None:
    requests = [make_request(pair, REQUESTS[name], seed=seed) for seed, name in enumerate([*REQUESTS, *REQUESTS])]
    expected = [pair.model.generate(inputs, **MIXED).tokens for inputs in requests]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda inputs: pair.model.generate(inputs, **MIXED).tokens, requests))
    assert answers == expected


def test_out_of_memory_is_one_sentence_and_the_next_request_works(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_request(pair, REQUESTS["sound"])
    expected = pair.model.prefill(inputs, seats=SETTINGS).logits

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "select_before_decoder", fail)
        with pytest.raises(MemoryError, match="lower retention, max_frames"):
            pair.model.prefill(inputs, seats=SETTINGS)
    assert torch.equal(pair.model.prefill(inputs, seats=SETTINGS).logits, expected)


def short_of_memory_once(work: Callable[..., Any]) -> Callable[..., Any]:
    """Says so the first time."""
    failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")]

    def tried(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return work(*arguments, **named)

    return tried


def test_a_first_token_that_finds_too_little_memory_is_picked_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept goes, as for every other step."""
    model = Omni(pair.model.thinker, pair.model.folder)
    inputs = make_request(pair, REQUESTS["sound"])
    expected = model.generate(inputs, **MIXED).tokens
    monkeypatch.setattr(engine, "pick", short_of_memory_once(engine.pick))
    assert model.engine.kept.nbytes > 0
    assert model.generate(inputs, **MIXED).tokens == expected
    assert model.engine.kept.nbytes == 0


@pytest.mark.parametrize("on_gpu", [False, True])
def test_graphs_make_room_where_nothing_else_is_kept(pair: Pair, on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects batches, which keep nothing between questions unless they repeat."""
    model = Omni(pair.model.thinker, pair.model.folder, compile=True, reuse=0)
    monkeypatch.setattr(model.engine.compiled, "on_gpu", on_gpu)
    with nullcontext() if on_gpu else pytest.raises(MemoryError):
        assert model.engine.attempt(short_of_memory_once(lambda: 3)) == 3


def test_callers_on_other_streams_wait(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects what threads share: all of it runs on one stream, after what the caller launched and before what it
    launches then."""
    waits: list[tuple[str, str]] = []
    own, other = NamedStream("default", waits), NamedStream("other", waits)
    current = [other]
    monkeypatch.setattr(engine.Engine, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: own)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: waits.append(("on", stream.name)) or nullcontext())
    with pytest.raises(ValueError), pair.model.engine.running():
        raise ValueError
    assert waits == [("default", "other"), ("on", "default"), ("other", "default")]
    current[0] = own
    with pair.model.engine.running():
        assert len(waits) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_answers_end_while_another_thread_captures(pair: Pair) -> None:
    """Protects both: to wait for the whole device spoils a capture, and fails itself."""
    model = Omni(copy.deepcopy(pair.model.thinker).cuda(), pair.model.folder, reuse=0)
    captured, x = threading.Event(), torch.ones(8, device="cuda")

    def ends() -> None:
        while not captured.wait(1e-3):
            model.engine._synchronize()

    def launch() -> None:
        x.add_(1)
        time.sleep(0.02)  # while the other thread waits for the device

    with ThreadPoolExecutor(1) as pool:
        ending = pool.submit(ends)
        try:
            for _ in range(10):
                capture(launch)
        finally:
            captured.set()
        ending.result()


def test_warmup_makes_the_graphs_that_clips_need(pair: Pair, traced) -> None:
    model = traced(pair.model, eager_until_warm=True)
    inputs = make_request(pair, [("text", 24), ("video", 3, 6, 10, 1.0, 300), ("text", 74)])
    before = model.prefill(inputs, seats=SETTINGS)
    parts = model.engine.compiled.parts
    assert not parts.code, "what is not warm runs eagerly"
    model.warmup([3.0], seats=SETTINGS, max_new_tokens=9, height=84, width=140)
    made = list(parts.code)
    same_prefill(model.prefill(inputs, seats=SETTINGS), before)
    assert list(parts.code) == made != []
    longer = make_request(pair, [("text", 24), ("video", 9, 6, 10, 1.0, 900), ("text", 74)])
    same_prefill(model.prefill(longer, seats=SETTINGS), pair.model.prefill(longer, seats=SETTINGS))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(made), "warm for clips of any length"


@pytest.mark.usefixtures("traced")
def test_warmup_cuts_bytes_into_patches(made: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: frames come as bytes, of which patches are made on a GPU; the first question finds that warm, too."""
    compiled = captures_without_a_gpu(made, monkeypatch)
    made.warmup([3.0], seats=SETTINGS, max_new_tokens=9, height=84, width=140)
    assert any(name.endswith("VisionEncoder.cut") for name, _ in compiled.encoders.graphs)
    compiled.clear()


@pytest.mark.usefixtures("traced")
def test_a_plan_is_captured_once(pair: Pair, made: Omni, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a stand-in for CUDA graphs: whatever the clips of a plan show, they share its graph."""
    model, draw = made, random.Random(0)
    compiled = captures_without_a_gpu(model, monkeypatch)
    sizes = [random_parts(draw) for _ in range(3)]
    plans = set()
    for seed in range(6):
        inputs = make_request(pair, sizes[seed % len(sizes)], seed=seed)
        plans.add(model.engine.plan(inputs, SETTINGS))
        same_prefill(model.prefill(inputs, seats=SETTINGS), pair.model.prefill(inputs, seats=SETTINGS))
    assert {key[0] for key in compiled.prefills.graphs} == plans
    assert len(compiled.prefills.graphs) == len(plans) <= len(sizes)
    expected = pair.model.generate(inputs, **MIXED).tokens
    assert model.generate(inputs, **MIXED).tokens == expected
    assert model.generate(inputs, **MIXED).tokens == expected, "captured anew for each answer"


def test_an_answer_cut_short_leaves_the_model_as_it_was(pair: Pair) -> None:
    """A reader that goes away after three tokens; another request in between."""
    inputs, other = (make_request(pair, REQUESTS[name]) for name in ("clip with sound", "sound"))
    expected = [pair.model.generate(each, **MIXED).tokens for each in (inputs, other)]
    steps = pair.model._tokens([inputs], **MIXED)
    begun = [next(steps)[0] for _ in range(3)]
    assert pair.model.generate(other, **MIXED).tokens == expected[1]
    steps.close()
    assert begun == expected[0][:3]
    assert pair.model.generate(inputs, **MIXED).tokens == expected[0]


def test_one_row_on_a_cpu_is_a_sum_of_products(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What compiled decoding multiplies with, also experts and sums in parts: the same answers."""
    inputs = make_request(pair, REQUESTS["clip with sound"])
    expected = pair.model.generate(inputs, **MIXED).tokens
    thinker = copy.deepcopy(pair.model.thinker)
    for parameter in thinker.parameters():
        parameter.data = parameter.data.contiguous()
    monkeypatch.setattr(layers, "LONGEST_SUM", 40)
    products: list[torch.Size] = []
    by_sum = layers.matrix_vector

    def counted(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        products.append(weight.shape)
        return by_sum(weight, x)

    for module in (layers, moe):
        monkeypatch.setattr(module, "matrix_vector", counted)
        monkeypatch.setattr(module, "one_row_on_a_cpu", lambda x: x.shape[:-1].numel() == 1, raising=False)
    assert Omni(thinker, pair.model.folder).generate(inputs, **MIXED).tokens == expected
    assert len(products) >= 11 * 4 * thinker.config.decoder.num_layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graphs_answer_as_the_cpu_does(pair: Pair) -> None:
    """With machine code, on a GPU: three clips through one prefill, several threads, a step ahead of the host."""
    model = Omni(copy.deepcopy(pair.model.thinker).cuda(), pair.model.folder, compile=True, reuse=0)
    requests = [make_request(pair, REQUESTS["clip with sound"], seed=seed) for seed in range(3)]
    expected = [pair.model.generate(inputs, **MIXED).tokens for inputs in requests]
    for inputs in requests:
        ours, theirs = model.prefill(inputs, seats=SETTINGS), pair.model.prefill(inputs, seats=SETTINGS)
        assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in theirs.kept]
        torch.testing.assert_close(ours.logits.cpu(), theirs.logits, atol=1e-3, rtol=1e-3)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda inputs: model.generate(inputs, **MIXED).tokens, requests)) == expected
    assert len(model.engine.compiled.prefills.graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2])
def test_captured_steps_of_16_bits_are_near_float32(pair: Pair, rows: int) -> None:
    """By the kernels of decoding, whose launches overlap: every replay is of another token, so that nothing which is
    read before it is there would be right. A token that meets another expert is off by some per cent."""
    thinker = copy.deepcopy(pair.model.thinker).bfloat16()
    exact = Omni(copy.deepcopy(thinker).float(), pair.model.folder, reuse=0)
    model = Omni(thinker.cuda(), pair.model.folder, compile=True, reuse=0)
    requests = [make_request(pair, REQUESTS["clip with sound"], seed=seed) for seed in range(rows)]
    sides = [side.engine.prefill(requests, 16, None, "layerwise") for side in (model, exact)]
    (prefills, cache), (_, expected) = sides
    position = torch.tensor([float(prefill.next_position) for prefill in prefills])
    at, token = position.cuda(), torch.zeros(rows, dtype=torch.long, device="cuda")
    found: list[torch.Tensor] = []

    def decode() -> None:
        found[:] = [model.thinker.decode(token, at, cache)]

    with torch.inference_mode():
        run, lengths = partial(model.engine.compiled._with_parts, decode), cache.lengths.clone()
        warm_up(run)
        cache.lengths.copy_(lengths)
        graph = capture(run)
        for number in range(8):
            ids = torch.arange(rows) + 5 * number + 9
            token.copy_(ids)
            at.copy_(position + number)
            graph.replay()
            wanted = exact.thinker.decode(ids, position + number, expected)
            assert (found[0].cpu() - wanted).norm() < 0.2 * wanted.norm()
