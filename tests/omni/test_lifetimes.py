"""What answers, graphs and tables hold on to, and for how long; what threads see of each other."""

from __future__ import annotations

import gc
import pickle
import random
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import omni
from omni.config import VisionConfig
from omni.encoders import vision
from omni.encoders.qwen2_5_vision import Qwen25VisionEncoder
from omni.model import Omni
from seats.methods import NAMES, method_for
from tests.omni.pairs import FAMILIES, Pair, make_request

SETTINGS = {"max_new_tokens": 6}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, text={"num_hidden_layers": 6})


def ask(model: Omni, text: str = "What?") -> omni.Generation:
    inputs = model.prepare([{"role": "user", "content": text}])
    return model.generate(inputs, **SETTINGS)


def test_an_answer_lets_the_model_go_and_is_pickled(checkpoint: Path, tmp_path: Path) -> None:
    """Its text is there where neither model nor checkpoint is."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    model = omni.load(folder, device="cpu", dtype=torch.float32)
    answer = ask(model, "What? " * 800)  # the prompt is not needed any more
    gone = weakref.ref(model.thinker)
    packed = pickle.dumps(answer)
    expected = answer.text, answer.thought, answer.tokens, answer.stats, answer.thought_cut
    del model
    gc.collect()
    assert gone() is None
    assert len(packed) < 5000
    shutil.rmtree(folder)
    other = pickle.loads(packed)
    assert (other.text, other.thought, other.tokens, other.stats, other.thought_cut) == expected
    assert other == answer


def test_an_answer_without_a_tokenizer_is_pickled(pair: Pair) -> None:
    """Whatever the prompt is a part of."""
    ids = torch.ones(1, 100_000, dtype=torch.long)
    answer = pair.model.generate(omni.Inputs(ids[:, :9]), max_new_tokens=3, stop_token_ids=[])
    packed = pickle.dumps(answer)
    assert pickle.loads(packed).tokens == answer.tokens
    assert len(packed) < 5000


def test_text_is_read_after_the_model_went(checkpoint: Path) -> None:
    model = omni.load(checkpoint, device="cpu", dtype=torch.float32)
    answer = ask(model)
    assert answer.text is not None
    expected, lazily = answer.text, ask(model)
    del model
    gc.collect()
    assert lazily.text == expected


def test_a_relative_folder_outlives_the_working_directory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    model = omni.load(checkpoint.name, device="cpu", dtype=torch.float32)
    monkeypatch.chdir(tmp_path)
    assert model.folder == checkpoint.resolve()
    assert ask(model).tokens


def test_tables_of_frame_sizes_belong_to_the_model(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded in bytes, the last used ones stay; dropped where memory ends, and with the model."""
    model = Omni(pair.model.thinker, pair.model.folder)
    encoder = model.thinker.vision
    encoder.layouts.clear()
    one = vision.nbytes(encoder.layout(20, 20))
    assert one == sum(tensor.nbytes for tensor in tensors_of(encoder.layout(20, 20)))
    monkeypatch.setattr(vision, "LAYOUT_BYTES", 3 * one)
    for side in (4, 6, 8, 20, 20, 22, 4):
        encoder.layout(side, 20)
    assert sum(map(vision.nbytes, encoder.layouts.values())) <= 3 * one
    assert [key[0] for key in encoder.layouts][-2:] == [22, 4]
    encoder.layout(60, 60)  # larger than all that may stay
    assert not encoder.layouts
    kept = weakref.ref(encoder.layout(20, 20))
    with pytest.raises(MemoryError), model.engine.running():
        raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")
    gc.collect()
    assert kept() is None


def test_tables_of_photographs_are_bounded_and_go_with_the_model() -> None:
    """Of 12 megapixels and the released size of head: 20 MB each, of which few stay."""
    sizes = {"hidden_size": 1280, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
    others = {
        "depth": 1,
        "intermediate_size": 3420,
        "in_channels": 3,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
    }
    config = VisionConfig(**sizes, **others, full_attention_blocks=(0,), num_position_embeddings=0, deepstack_blocks=())
    with torch.device("meta"):
        encoder = Qwen25VisionEncoder(config)
    tables = [weakref.ref(encoder.layout(216, 288 + 2 * number)) for number in range(5)]
    there = [vision.nbytes(table()) for table in tables if table() is not None]
    assert 2 <= len(there) <= 3 and sum(there) <= vision.LAYOUT_BYTES
    del encoder
    gc.collect()
    assert not any(table() for table in tables)


def tensors_of(layout: object) -> list[torch.Tensor]:
    found = []
    for value in vars(layout).values():
        found += [value] if isinstance(value, torch.Tensor) else [part for part in value if torch.is_tensor(part)]
    return found


def test_graphs_are_dropped_before_another_thread_runs(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory ends: who waits must not have found a graph that is then gone."""
    model = Omni(pair.model.thinker, pair.model.folder, compile=True)
    events: list[str] = []
    inside, waiting = threading.Event(), threading.Event()

    def clear() -> None:
        waiting.wait(5)
        threading.Event().wait(0.2)  # long enough for the other, were the lock free
        events.append("cleared")

    monkeypatch.setattr(model.engine.compiled, "clear", clear)

    def fails() -> None:
        with pytest.raises(MemoryError), model.engine.running():
            inside.set()
            raise torch.OutOfMemoryError("Tried to allocate 3.00 GiB")

    def waits() -> None:
        inside.wait(5)
        waiting.set()
        with model.engine.running():
            events.append("ran")

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(fails), pool.submit(waits)]:
            job.result()
    assert events == ["cleared", "ran"]


def test_warm_ups_of_several_threads(pair: Pair) -> None:
    """Overlapping ones leave `eager_until_warm` as it was, and other threads run without graphs meanwhile."""
    compiled = Omni(pair.model.thinker, pair.model.folder, compile=True, eager_until_warm=True).engine.compiled
    first, second = threading.Event(), threading.Event()
    seen: list[bool] = []

    def one() -> None:
        with compiled.warming():
            first.set()
            second.wait(5)
            seen.append(compiled.makes)

    def other() -> None:
        first.wait(5)
        seen.append(compiled.makes)
        with compiled.warming():
            second.set()
            thread.join(5)
            with compiled.warming():
                pass
            seen.append(compiled.makes)

    thread = threading.Thread(target=one)
    thread.start()
    other()
    assert seen == [False, True, True]
    assert not compiled.makes


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_keeps_what_each_keeps_alone(pair: Pair, name: str) -> None:
    """Requests of unlike lengths, frame sizes and numbers of clips, pictures and sounds, whatever the method."""
    draw = random.Random(name)
    compared = 0
    for ratio in (0.9, 0.6, 0.35):
        requests = [make_request(pair, unlike(draw), seed=draw.randrange(1000)) for _ in range(3)]
        try:
            method = method_for(name, pair.model.config, ratio)
            alone = [pair.model.prefill(inputs, seats=method) for inputs in requests]
        except ValueError:  # a budget that this method cannot keep to
            continue
        for one, other in zip(pair.model.prefill(requests, seats=method), alone, strict=True):
            assert [kept.tolist() for kept in one.kept] == [kept.tolist() for kept in other.kept]
            torch.testing.assert_close(one.logits, other.logits, atol=1e-3, rtol=1e-3)
        compared += 1
    assert compared


def unlike(draw: random.Random) -> list[tuple]:
    def clip() -> tuple:
        grids = draw.randint(1, 7)
        sound = [100 * grids + draw.randint(-40, 40)] if draw.random() < 0.7 else []
        return ("video", grids, 2 * draw.randint(1, 5), 2 * draw.randint(1, 6), 1.0, *sound)

    media = [clip() for _ in range(draw.randint(0, 3))] + [("audio", draw.randint(100, 700))] * draw.randint(0, 2)
    media = media or [clip()]
    media += [("image", 4, 2 * draw.randint(1, 5))] * draw.randint(0, 1)
    draw.shuffle(media)
    return [("text", draw.randint(2, 40)), *media, ("text", draw.randint(2, 20))]
