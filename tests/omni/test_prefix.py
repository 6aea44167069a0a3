"""The next question about known media: the same tokens kept and the same logits as asked alone, for less work."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import load, read_request
from test_stages import CASES, REQUESTS, SETTINGS, config_of, golden

import omni
from omni import prefix, stages
from omni.cache import Cache
from omni.engine import KV
from omni.inputs import Medium
from omni.model import Omni
from omni.thinker import Thinker
from seats.methods import METHODS, method_for
from tests.omni.pairs import FAMILIES, Pair, captures_without_a_gpu, make_request, text_ids


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


@pytest.mark.parametrize(
    ("name", "kv"), [*((name, "layerwise") for name in (*METHODS, None)), ("seats", "pruned"), ("fastv", "pruned")]
)
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


def test_a_conversation_keeps_what_it_grows_to(pair: Pair) -> None:
    """Each turn goes on where the last one ended: only what is new runs, and what is kept is replaced."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    inputs = make_request(pair, REQUESTS["clip with sound"])
    model.prefill(inputs, SETTINGS)
    torch.manual_seed(5)
    for _ in range(3):
        before, kept = inputs.input_ids.shape[1], len(model.engine.kept)
        inputs = replace(inputs, input_ids=torch.cat((inputs.input_ids, torch.tensor([text_ids(7)])), dim=1))
        found = model.prefill(inputs, SETTINGS)
        same(found, alone.prefill(inputs, SETTINGS))
        assert found.reused_tokens == before
        assert len(model.engine.kept) == kept


def test_a_prompt_that_was_asked_before(pair: Pair) -> None:
    """All but its last tokens is known; what is kept stays as it was."""
    model = fresh(pair.model)
    inputs = make_request(pair, REQUESTS["several media"])
    first, kept = model.prefill(inputs, SETTINGS), model.engine.kept.nbytes
    again = model.prefill(inputs, SETTINGS)
    same(again, first)
    assert again.reused_tokens == inputs.input_ids.shape[1] - 2
    assert model.engine.kept.nbytes == kept


def test_with_every_token_a_later_medium_runs_alone(pair: Pair) -> None:
    """Where nothing is selected a prompt may go on with media; where something is, all of them are chosen from anew."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    parts = [("text", 4), ("video", 3, 6, 6, 1.0, 320), ("text", 3)]
    more = [*parts, ("image", 6, 6), ("audio", 150), ("text", 4)]
    for method in (None, SETTINGS):
        model.forget()
        first, later = make_request(pair, parts), make_request(pair, more)
        fields = ("pixel_values_videos", "input_features")
        ids = torch.cat((first.input_ids, later.input_ids[:, first.input_ids.shape[1] :]), dim=1)
        sounds = later.input_features.clone()
        sounds[0, :, :320] = first.input_features[0, :, :320]
        later = replace(later, input_ids=ids, **dict(zip(fields, (first.pixel_values_videos, sounds), strict=True)))
        model.prefill(first, method)
        found = model.prefill(later, method)
        same(found, alone.prefill(later, method))
        assert found.reused_tokens == (first.input_ids.shape[1] if method is None else 0)
        assert found.encode_seconds > 0


def test_long_questions_of_one_call_share_a_longer_clip(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a clip of more tokens than each question's text runs once; one of fewer is no detour."""
    monkeypatch.setattr(prefix, "LONG_REST", 10)
    for grids, shared in ((9, True), (1, False)):
        model = fresh(pair.model)
        clip = make_request(pair, [("text", 4), ("video", grids, 6, 6, 1.0), ("text", 4)])
        asked = [ending(clip, seed, words=30) for seed in range(3)]
        together = model.prefill(asked)
        assert [each.reused_tokens > 0 for each in together] == [shared] * 3
        for found, inputs in zip(together, asked, strict=True):
            same(found, fresh(pair.model, reuse=0).prefill(inputs))


def test_a_short_beginning_of_a_long_prompt_is_run_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a picture of a few tokens before a clip of many spares less than the clip's attention then costs."""
    monkeypatch.setattr(prefix, "LONG_REST", 20)
    model = fresh(pair.model)
    first = [("text", 5), ("image", 6, 6), ("text", 4)]
    one = make_request(pair, first, seed=3)
    two = make_request(pair, [*first[:2], ("text", 4), ("image", 12, 12), ("text", 4)], seed=3)
    model.prefill(one)
    long = model.prefill(two)
    assert long.reused_tokens == 0
    same(long, fresh(pair.model, reuse=0).prefill(two))
    assert model.prefill(ending(two, 0)).reused_tokens > 0


@pytest.mark.parametrize("change", ["seconds per grid", "a frame", "a sample", "a word before", "another method"])
def test_what_differs_is_not_reused(pair: Pair, change: str) -> None:
    """Other media, other times, another beginning or another selection: nothing of the prompt's middle is taken."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    inputs, method = make_request(pair, REQUESTS["clip with sound"]), SETTINGS
    model.prefill(inputs, method)
    if change == "seconds per grid":
        inputs = replace(inputs, video_second_per_grid=torch.tensor([1.4]))
    elif change == "a frame":
        inputs.pixel_values_videos[-1, -1] += 1
    elif change == "a sample":
        inputs.input_features[0, 5, 7] += 1
    elif change == "a word before":
        ids = inputs.input_ids.clone()
        ids[0, 2] = 9 if ids[0, 2] != 9 else 10
        inputs = replace(inputs, input_ids=ids)
    else:
        method = replace(SETTINGS, video_ratio=0.35)
    found = model.prefill(inputs, method)
    assert found.reused_tokens == 0
    same(found, alone.prefill(inputs, method))


@pytest.mark.parametrize("seats", [SETTINGS, None], ids=["selected", "every token"])
def test_whoever_asks_may_write_to_what_is_theirs(pair: Pair, seats: Any) -> None:
    """To ids, pixels and mel frames, also by way of NumPy, and to what came back: what is kept is apart from it."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    inputs = make_request(pair, REQUESTS["clip with sound"])
    for name in ("input_ids", "pixel_values_videos", "input_features"):
        first = model.prefill(inputs, seats)
        for theirs in (first.logits, *first.kept):
            theirs.numpy()[...] = 0
        written = getattr(inputs, name).numpy()
        written[..., -3] += 1
        found = model.prefill(inputs, seats)
        same(found, alone.prefill(inputs, seats))
        assert (found.reused_tokens > 0) == (name == "input_ids")


@pytest.mark.parametrize("kv", ["layerwise", "pruned"])
@pytest.mark.parametrize("seats", [SETTINGS, None], ids=["selected", "every token"])
def test_questions_of_one_call_share_their_beginning(pair: Pair, seats: Any, kv: str) -> None:
    """Encoders and prefix once; one of another clip among them, and one that was known, change nothing."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    clip = make_request(pair, REQUESTS["clip with sound"])
    other = make_request(pair, REQUESTS["clip shorter than a window"], seed=3)
    asked = [ending(clip, seed, words=3 + 4 * seed) for seed in range(3)]
    options = {"seats": seats, "kv": kv, "max_new_tokens": 5, "stop_token_ids": []}
    encoded: list[int] = []
    encode = model.thinker.encode_medium
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.thinker, "encode_medium", lambda *a, **n: (encoded.append(1), encode(*a, **n))[1])
        for requests, media in ((asked, 2), ([*asked, other], 2), ([ending(clip, 9), ending(other, 8)], 0)):
            encoded.clear()
            together = model.prefill(requests, seats, kv)
            assert len(encoded) == media
            for found, inputs in zip(together, requests, strict=True):
                same(found, alone.prefill(inputs, seats, kv))
                assert found.reused_tokens > found.tokens["video"]
            answers = model.generate(requests, **options)
            assert [each.tokens for each in answers] == [alone.generate(each, **options).tokens for each in requests]


def test_answers_write_beside_what_is_kept(pair: Pair) -> None:
    """A cache shares memory with the kept prefix, from several threads and while answers are under way."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    clip = make_request(pair, REQUESTS["clip with sound"])
    asked = [ending(clip, seed) for seed in range(6)]
    options = {"seats": SETTINGS, "max_new_tokens": 20, "stop_token_ids": []}
    expected = [alone.generate(inputs, **options).tokens for inputs in asked]
    steps = model._tokens([clip], **options)
    next(steps)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda inputs: model.generate(inputs, **options).tokens, asked))
    assert found == expected
    tokens = [next(steps)[0] for _ in range(10)]
    steps.close()
    assert alone.generate(clip, **options).tokens[1:11] == tokens


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_sequence_of_requests(pair: Pair, data: st.DataObject) -> None:
    """Questions, clips, retentions, caches and batches in any order, with room for some of what could be kept: always
    what a model says that has answered nothing before."""
    clips = [make_request(pair, REQUESTS[name], seed=seed) for seed, name in enumerate(REQUESTS)]
    model = fresh(pair.model, reuse=data.draw(st.sampled_from([1, 150_000, 600_000, 2**30])))
    alone = fresh(pair.model, reuse=0)
    for _ in range(data.draw(st.integers(2, 5))):
        method = data.draw(st.sampled_from([None, SETTINGS, replace(SETTINGS, video_ratio=0.5)]))
        kv = data.draw(st.sampled_from(["layerwise", "pruned"]))
        requests = [
            ending(clips[data.draw(st.integers(0, len(clips) - 1))], data.draw(st.integers(0, 3)))
            for _ in range(data.draw(st.integers(1, 3)))
        ]
        for found, inputs in zip(model.prefill(requests, method, kv), requests, strict=True):
            same(found, alone.prefill(inputs, method, kv))
        assert model.engine.kept.nbytes <= model.engine.kept.limit


def test_what_is_kept_goes_before_a_request_fails(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory once: dropped, and the request answered, be it in the prefill or in a step."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    clip = make_request(pair, REQUESTS["clip with sound"])
    options = {"seats": SETTINGS, "max_new_tokens": 6, "stop_token_ids": []}
    for owner, name, call in ((stages, "extend", 1), (Cache, "append", 3), (Thinker, "logits", 4)):
        model.generate(clip, **options)
        inputs, function, calls = ending(clip, call), getattr(owner, name), []

        def once(
            *arguments: Any, function: Any = function, calls: list[int] = calls, at: int = call, **named: Any
        ) -> Any:
            calls.append(1)
            result = function(*arguments, **named)
            if len(calls) == at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, once)
            found = model.generate(inputs, **options)
        assert found.tokens == alone.generate(inputs, **options).tokens
        assert found.stats.reused_tokens == (0 if owner is stages else found.stats.reused_tokens)


def test_what_a_request_keeps_itself_goes_before_it_fails(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first question that has room beside nothing that is kept, not even for the next one."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    clip, prefill = make_request(pair, REQUESTS["clip with sound"]), stages.prefill

    def tight(*arguments: Any, keep: bool, **named: Any) -> stages.Staged:
        if keep or len(model.engine.kept):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return prefill(*arguments, keep=keep, **named)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "prefill", tight)
        same(model.prefill(clip, SETTINGS), alone.prefill(clip, SETTINGS))
    model.prefill(clip, SETTINGS)
    assert model.prefill(clip, SETTINGS).reused_tokens > 0


def test_nothing_is_kept_where_nothing_may_be(pair: Pair) -> None:
    model = fresh(pair.model, reuse=0)
    inputs = make_request(pair, REQUESTS["clip with sound"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Medium, "digest", lambda _: pytest.fail("hashed for nothing"))
        for _ in range(2):
            assert model.prefill(inputs, SETTINGS).reused_tokens == 0
    assert len(model.engine.kept) == 0
    with pytest.raises(ValueError, match="0 bytes or more"):
        fresh(pair.model, reuse=-1)


def test_forgetting(pair: Pair) -> None:
    model = fresh(pair.model)
    inputs = make_request(pair, REQUESTS["clip with sound"])
    model.prefill(inputs, SETTINGS)
    assert model.engine.kept.nbytes > 0
    model.forget()
    assert model.engine.kept.nbytes == 0
    assert model.prefill(inputs, SETTINGS).reused_tokens == 0


@pytest.mark.parametrize("pair", ["qwen3"], indirect=True)
def test_deepstack_that_outlasts_the_first_selection(pair: Pair) -> None:
    """Pictures add to layers after the one that is dropped after: what is left of a clip and of a later picture."""
    model, alone = fresh(pair.model), fresh(pair.model, reuse=0)
    early = replace(SETTINGS, drop_layers=(1, 3))
    clip = make_request(pair, [("text", 3), ("video", 5, 6, 10, 1.0, 530), ("text", 4), ("image", 6, 6), ("text", 5)])
    model.prefill(clip, early)
    for seed in range(2):
        same(model.prefill(ending(clip, seed), early), alone.prefill(ending(clip, seed), early))
    sound = make_request(pair, [("text", 3), ("audio", 530), ("text", 4)])
    later = make_request(pair, [("text", 3), ("audio", 530), ("text", 4), ("image", 6, 6), ("text", 5)])
    ids = torch.cat((sound.input_ids, later.input_ids[:, sound.input_ids.shape[1] :]), dim=1)
    later = replace(later, input_ids=ids, input_features=sound.input_features)
    model.prefill(sound, early)
    found = model.prefill(later, early)
    same(found, alone.prefill(later, early))
    assert found.reused_tokens == sound.input_ids.shape[1]


@pytest.mark.parametrize("seats", [SETTINGS, None], ids=["selected", "every token"])
def test_as_on_a_gpu(pair: Pair, seats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded prefixes and questions, through graphs: one for each pair of rungs, whatever the words."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, alone = fresh(pair.model, compile=True), fresh(pair.model, reuse=0)
    side = captures_without_a_gpu(model, monkeypatch)
    clip = make_request(pair, REQUESTS["several media"])
    model.prefill(clip, seats)
    for seed in range(4):
        inputs = ending(clip, seed, words=3 + seed)
        same(model.prefill(inputs, seats), alone.prefill(inputs, seats))
    assert len(side.prefills.graphs) == 2
    requests = [ending(clip, seed, words=40 + 9 * seed) for seed in range(3)]
    for found, inputs in zip(model.prefill(requests, seats), requests, strict=True):
        same(found, alone.prefill(inputs, seats))


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["layerwise", "pruned"])
def test_as_machine_code(pair: Pair, kv: str) -> None:
    """By the default compiler."""
    model, alone = fresh(pair.model, compile=True), fresh(pair.model, reuse=0)
    clip = make_request(pair, REQUESTS["clip with sound"])
    options = {"seats": SETTINGS, "kv": kv, "max_new_tokens": 6, "stop_token_ids": []}
    for seed in range(3):
        inputs = ending(clip, seed, words=5 + seed)
        same(model.prefill(inputs, SETTINGS, kv), alone.prefill(inputs, SETTINGS, kv))
        assert model.generate(inputs, **options).tokens == alone.generate(inputs, **options).tokens


@golden
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recorded_requests_with_another_question(path: Path) -> None:
    """The published implementation's own requests, asked a second time with other words at their end."""
    model = load(path.parent)
    inputs, _ = read_request(path)
    method, alone = config_of(path), fresh(model, reuse=0)
    known = fresh(model)
    known.prefill(inputs, method)
    ids = inputs.input_ids.clone()
    ids[0, -2] = 9 if ids[0, -2] != 9 else 10
    inputs = replace(inputs, input_ids=ids)
    for kv in KV:
        found = known.prefill(inputs, method, kv)
        same(found, alone.prefill(inputs, method, kv))
        assert found.reused_tokens == ids.shape[1] - 2


def test_the_shipped_model_asked_twice() -> None:
    """From a file to words: the second question about a clip, and about its sound alone, as asked by itself."""
    model = omni.load("tiny", device="cpu")
    alone = fresh(model, reuse=0)
    clip = str(Path(omni.__file__).parent / "demo" / "clip.mp4")

    def ask(model: Omni, kind: str, question: str, seats: Any) -> omni.Generation:
        content = [{"type": kind, kind: clip}, {"type": "text", "text": question}]
        return model.generate(model.prepare([{"role": "user", "content": content}]), seats=seats, max_new_tokens=24)

    for kind, question, seats, known in (
        ("video", "What happens here?", 0.1, False),
        ("video", "Which sound came first?", 0.1, True),
        ("video", "Which sound came first?", None, False),
        ("audio", "Which sound came first?", None, False),
        ("video", "What happens here?", None, True),
    ):
        found, expected = ask(model, kind, question, seats), ask(alone, kind, question, seats)
        assert found.text == expected.text
        assert (found.stats.reused_tokens > 300) == known
        assert found.stats.segments == expected.stats.segments


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kv", ["layerwise", "pruned"])
def test_captured_on_a_gpu(pair: Pair, kv: str) -> None:
    """Second questions through captured graphs, alone and together, while what is kept stays as it was."""
    thinker = copy.deepcopy(pair.model.thinker).cuda()
    model = Omni(thinker, pair.model.folder, compile=True)
    alone = Omni(thinker, pair.model.folder, reuse=0)
    clip = make_request(pair, REQUESTS["several media"])
    options = {"seats": SETTINGS, "kv": kv, "max_new_tokens": 6, "stop_token_ids": []}
    for seed in range(4):
        inputs = ending(clip, seed, words=3 + seed)
        found = model.prefill(inputs, SETTINGS, kv)
        same(found, alone.prefill(inputs, SETTINGS, kv), 1e-3)
        assert (found.reused_tokens > 0) == (seed > 0)
        assert model.generate(inputs, **options).tokens == alone.generate(inputs, **options).tokens
    requests = [ending(clip, seed, words=40 + 9 * seed) for seed in range(3)]
    for found, inputs in zip(model.prefill(requests, SETTINGS, kv), requests, strict=True):
        same(found, alone.prefill(inputs, SETTINGS, kv), 1e-3)
