"""Prefills with token selection against what the published implementation recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from test_golden import STOP, load, read_request
from torch import Tensor
from torch._subclasses import FakeTensorMode

import omni
from omni import stages
from omni.cache import CHUNK, LEAST_CAPACITY
from omni.inputs import InputError
from omni.processing.positions import layout
from omni.request import PrefillBatch, fill_pool, join, read_prompt, whole_prompt
from omni.rope import multimodal_rotary, rotate
from seats.config import SeatsConfig
from seats.plan import StagePlan, make_plan, plan_without_selection
from tests.omni.pairs import FAMILIES, GOLDEN, Pair, make_request

golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data beside this checkout")
CASES = [path for family in FAMILIES for path in sorted((GOLDEN / family).glob("case_*.safetensors"))]


@cache
def settings_of(folder: Path) -> dict[str, Any]:
    return {case["case"]: case for case in json.loads((folder / "manifest.json").read_text())}


def config_of(path: Path) -> SeatsConfig:
    case = settings_of(path.parent)[path.stem]
    return SeatsConfig(
        video_ratio=case["video_ratio"],
        audio_ratio=case["audio_ratio"],
        encoder_ratio_scale=case["encoder_ratio_scale"],
        drop_layers=tuple(case["drop_layers"]),
        late_layer=case["late_layer"],
        window_temperature=0.1 if path.parent.name == "qwen2_5" else 0.3,
    )


@golden
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_selections(path: Path) -> None:
    """Every step keeps the recorded positions; logits within 1e-3; the answers of the pruned cache are equal."""
    model = load(path.parent)
    inputs, expected = read_request(path)
    seats = config_of(path)
    prefill = model.prefill(inputs, seats=seats, kv="pruned")
    steps = sorted((name for name in expected if name.startswith("keep_")), key=lambda name: int(name[5:]))
    assert [kept.tolist() for kept in prefill.kept] == [expected[step].tolist() for step in steps]
    torch.testing.assert_close(prefill.logits, expected["logits"], atol=1e-3, rtol=0)
    generated = expected["generated"].tolist()
    answer = model.generate(inputs, seats=seats, kv="pruned", max_new_tokens=len(generated), stop_token_ids=[STOP])
    assert answer.tokens == generated


@golden
@pytest.mark.parametrize("path", [path for path in CASES if path.stem == "case_001"], ids=lambda path: path.parent.name)
def test_recorded_selections_in_one_graph(path: Path) -> None:
    """A whole prefill traced without a break; all cases go through the parts of a compiled model in test_engine.py."""
    model = load(path.parent)
    inputs, expected = read_request(path)
    torch._dynamo.reset()
    compiled = torch.compile(stages.prefill, fullgraph=True, dynamic=False, backend="eager")
    with torch.inference_mode():
        plan, batch = prepared(model, inputs, config_of(path))
        staged = compiled(model.thinker, plan, batch, pruned=True)
    for step, (place, count) in enumerate(staged.kept):
        assert place[0, : int(count)].tolist() == expected[f"keep_{step}"].tolist()
    torch.testing.assert_close(staged.logits[0], expected["logits"], atol=1e-3, rtol=0)


LAYERS = 6
SETTINGS = SeatsConfig(video_ratio=0.3, audio_ratio=0.4, drop_layers=(2, 3), late_layer=5, window_temperature=0.1)
REQUESTS: dict[str, list[tuple]] = {
    "clip with sound": [("text", 5), ("video", 5, 6, 10, 1.0, 530), ("text", 4)],
    "sound": [("text", 5), ("audio", 437), ("text", 4)],
    "clip without sound": [("text", 5), ("video", 3, 6, 10, 1.0), ("text", 4)],
    "clip shorter than a window": [("text", 2), ("video", 1, 4, 4, 1.0, 60), ("text", 2)],
    "several media": [
        *[("text", 3), ("video", 2, 6, 6, 1.0, 300), ("text", 3), ("video", 4, 8, 4, 1.0, 700)],
        *[("text", 4), ("audio", 333), ("image", 6, 6), ("text", 2)],
    ],
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": LAYERS})


def prepared(
    model: omni.Omni, inputs: omni.Inputs, seats: SeatsConfig = SETTINGS, *, rounded: bool = False
) -> tuple[StagePlan, PrefillBatch]:
    """A prompt in the pool of a plan made for it, or of the next plan of the ladder."""
    places = layout(inputs, model.config)
    prompt = read_prompt(places, inputs, model.config, seats.window_grids)
    counts = prompt.counts(seats)
    plan = make_plan(seats, model.config.decoder.num_layers, counts.rounded() if rounded else counts)
    features, received = model.thinker.encode(inputs, seats.needs)
    return plan, fill_pool(plan, prompt, places, inputs.input_ids, features, received, model.device)


def reference_logits(model: omni.Omni, inputs: omni.Inputs, kept: list[Tensor], new: list[int], kv: str) -> Tensor:
    """Logits after `new` tokens, all recomputed with masks over the whole prompt; `kept` after each step."""
    thinker, decoder = model.thinker, model.config.decoder
    places = layout(inputs, model.config)
    length = inputs.input_ids.shape[1]
    whole = whole_prompt(length)
    plan = plan_without_selection(LAYERS, whole.counts(None))
    features, _ = thinker.encode(inputs)
    batch = fill_pool(plan, whole, places, inputs.input_ids, features, {}, model.device)
    x, deepstack = thinker.embed(batch.ids, batch.source, batch.media)
    x = torch.cat([x, thinker.embedding(torch.tensor([new], dtype=torch.long))], dim=1)
    after = places.next_position + torch.arange(len(new)).expand(3, -1)
    positions = torch.cat([places.positions, after.to(places.positions.dtype)], dim=1)[:, None]
    cos, sin = multimodal_rotary(
        positions, decoder.head_dim, decoder.rope_theta, decoder.mrope_section, interleaved=decoder.mrope_interleaved
    )
    ends = [*SETTINGS.drop_layers, (SETTINGS.late_layer or 0) - 1, LAYERS]
    order = torch.arange(x.shape[1])
    for index, layer in enumerate(thinker.layers):
        here = kept[next(step for step, end in enumerate(ends) if index < end)]
        seen, late = order >= length, order >= length
        seen = seen.index_fill(0, here, True)
        late = late.index_fill(0, here if kv == "layerwise" else kept[-1], True)
        mask = (order[:, None] >= order) & torch.where((order >= length)[:, None], late, seen)
        attention = layer.attention
        normed = attention.qkv(layer.attention_norm(x))
        qkv = rearrange(normed, "b s (h d) -> b h s d", d=decoder.head_dim)
        q, k, v = qkv.split((decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads), dim=1)
        if decoder.qk_norm:
            q, k = attention.query_norm(q), attention.key_norm(k)
        q, k = rotate(q, cos[:, None], sin[:, None]), rotate(k, cos[:, None], sin[:, None])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | torch.eye(len(order)).bool(), enable_gqa=True)
        x = x + attention.output(rearrange(mixed, "b h s d -> b s (h d)"))
        x = x + layer.mlp(layer.mlp_norm(x))
        if deepstack is not None and index < len(deepstack):
            x[:, :length] += deepstack[index]
    return thinker.logits(x[:, -1])[0]


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("kv", ["pruned", "layerwise"])
def test_prefill_and_a_hundred_tokens(pair: Pair, name: str, kv: str) -> None:
    """Every mix of media: text survives, order holds, and logits equal a masked computation over the whole prompt,
    after the prefill and a hundred tokens later."""
    inputs = make_request(pair, REQUESTS[name])
    prefill = pair.model.prefill(inputs, seats=SETTINGS, kv=kv)
    places = layout(inputs, pair.model.config)
    text = set(range(inputs.input_ids.shape[1])) - {*places.video.tolist(), *places.audio.tolist()}
    for before, after in zip([torch.arange(inputs.input_ids.shape[1]), *prefill.kept], prefill.kept, strict=False):
        assert after.tolist() == sorted(set(after.tolist()) & set(before.tolist()))
        assert text <= set(after.tolist())
    assert set(prefill.kept[-1].tolist()) == text
    with torch.inference_mode():
        expected = reference_logits(pair.model, inputs, prefill.kept, [], kv)
        torch.testing.assert_close(prefill.logits, expected, atol=1e-4, rtol=0)
        answer = pair.model.generate(inputs, seats=SETTINGS, kv=kv, max_new_tokens=101, stop_token_ids=[])
        for count in (1, 100):
            logits = reference_logits(pair.model, inputs, prefill.kept, answer.tokens[:count], kv)
            assert int(logits.argmax()) == answer.tokens[count]
    lengths = [len(text)] * 4 if kv == "pruned" else [len(kept) for kept in prefill.kept]
    by_layer = [length for length, layers in zip(lengths, (2, 1, 1, 2), strict=True) for _ in range(layers)]
    assert prefill.cache.lengths[:, 0].tolist() == by_layer
    decoder = pair.model.config.decoder
    if kv == "layerwise":  # a segment may hold a few slots more than it needs
        plan, _ = prepared(pair.model, inputs)
        by_layer = [segment.length for segment in plan.segments for _ in range(*segment.layers)]
    slots = sum(max(LEAST_CAPACITY, -(-length // CHUNK) * CHUNK) for length in by_layer)
    assert prefill.cache.nbytes == 4 * 2 * decoder.num_kv_heads * decoder.head_dim * slots


@pytest.mark.parametrize("parts", [[("text", 9)], [("text", 5), ("image", 6, 10), ("text", 4)]])
def test_nothing_to_select_changes_nothing(pair: Pair, parts: list[tuple]) -> None:
    inputs = make_request(pair, parts)
    prefill = pair.model.prefill(inputs, seats=SETTINGS)
    assert torch.equal(prefill.logits, pair.model.prefill(inputs).logits)
    assert prefill.kept == []


def test_retention_one_is_no_selection(pair: Pair) -> None:
    """Bit for bit."""
    inputs = make_request(pair, REQUESTS["several media"])
    everything = SeatsConfig(video_ratio=1.0, audio_ratio=1.0, drop_layers=(2, 3), late_layer=5, window_temperature=0.1)
    assert torch.equal(pair.model.prefill(inputs, seats=everything).logits, pair.model.prefill(inputs).logits)


@pytest.mark.parametrize("name", REQUESTS)
def test_padding_changes_nothing(pair: Pair, name: str) -> None:
    """The plan of the ladder, larger in every way: the same tokens kept after every step, logits equal but for
    rounding."""
    inputs = make_request(pair, REQUESTS[name])
    results = []
    with torch.inference_mode():
        for rounded in (False, True):
            plan, batch = prepared(pair.model, inputs, rounded=rounded)
            results.append(stages.prefill(pair.model.thinker, plan, batch, pruned=True))
    exact, padded = results
    for (place, count), (padded_place, padded_count) in zip(exact.kept, padded.kept, strict=True):
        assert place[0, : int(count)].tolist() == padded_place[0, : int(padded_count)].tolist()
    torch.testing.assert_close(padded.logits, exact.logits, atol=1e-5, rtol=1e-5)


def test_settings_that_cannot_work_are_refused_first(pair: Pair) -> None:
    inputs = make_request(pair, REQUESTS["sound"])
    deep = SeatsConfig(video_ratio=0.3, audio_ratio=0.4, drop_layers=(2, 7), late_layer=9, window_temperature=0.1)
    with pytest.raises(ValueError, match="6 layers"):
        pair.model.prefill(inputs, seats=deep)
    with pytest.raises(ValueError, match="kv must be one of"):
        pair.model.prefill(inputs, seats=SETTINGS, kv="none")
    silent = make_request(pair, [("text", 3), ("audio", 437)])
    last_is_sound = omni.Inputs(**{**vars(silent), "input_ids": silent.input_ids[:, :-1]})
    with pytest.raises(InputError, match="ends with text"):
        pair.model.prefill(last_is_sound, seats=SETTINGS)


def test_a_plan_too_small_is_refused(pair: Pair) -> None:
    inputs = make_request(pair, REQUESTS["several media"])
    places = layout(inputs, pair.model.config)
    prompt = read_prompt(places, inputs, pair.model.config, SETTINGS.window_grids)
    fewer = replace(prompt.counts(SETTINGS), audio_windows=1)
    with pytest.raises(ValueError, match=r"has \d+ of audio_windows and its plan holds 1"):
        fill_pool(make_plan(SETTINGS, LAYERS, fewer), prompt, places, inputs.input_ids, {}, {}, pair.model.device)


def test_one_graph_for_all_clips_of_a_plan(pair: Pair) -> None:
    """The whole prefill between encoders and logits: no graph break, one compilation, whatever the clip shows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    thinker = pair.model.thinker

    def run(plan: StagePlan, batch: PrefillBatch) -> stages.Staged:
        return stages.prefill(thinker, plan, batch, pruned=True)

    compiled = torch.compile(run, fullgraph=True, dynamic=False, backend="aot_eager")
    selections = set()
    with torch.inference_mode():
        for seed in range(3):
            inputs = make_request(pair, REQUESTS["clip with sound"], seed=seed)
            plan, batch = prepared(pair.model, inputs)
            traced, eager = compiled(plan, batch), run(plan, batch)
            for (place, count), (eager_place, eager_count) in zip(traced.kept, eager.kept, strict=True):
                assert place[0, : int(count)].tolist() == eager_place[0, : int(eager_count)].tolist()
            torch.testing.assert_close(traced.logits, eager.logits, atol=1e-5, rtol=1e-5)
            selections.add(tuple(traced.kept[1][0][0].tolist()))
    assert len(selections) == 3, "the clips were to keep different tokens"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_no_host_read(pair: Pair) -> None:
    """Tensors without data: any read of a value, or a shape that depends on one, raises."""
    inputs = make_request(pair, REQUESTS["several media"])
    plan, batch = prepared(pair.model, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fields = {name: value if value is None else mode.from_tensor(value) for name, value in vars(batch).items()}
        staged = stages.prefill(pair.model.thinker, plan, PrefillBatch(**fields), pruned=True)
    assert staged.logits.shape == (1, pair.model.config.decoder.vocab_size)


def test_batches_equal_one_by_one(pair: Pair) -> None:
    """Requests of one plan run together."""
    batches = [prepared(pair.model, make_request(pair, REQUESTS["clip with sound"], seed=seed))[1] for seed in range(3)]
    plan, _ = prepared(pair.model, make_request(pair, REQUESTS["clip with sound"]))
    with torch.inference_mode():
        together = stages.prefill(pair.model.thinker, plan, join(batches), pruned=True)
        for row, batch in enumerate(batches):
            alone = stages.prefill(pair.model.thinker, plan, batch, pruned=True)
            for (place, count), (one_place, one_count) in zip(together.kept, alone.kept, strict=True):
                assert place[row, : int(count[row])].tolist() == one_place[0, : int(one_count)].tolist()
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)
