"""Clips are encoded while they are read, and whatever goes wrong on the way changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omni
from omni import ahead
from omni.ahead import BackgroundEncoder
from omni.engine import Encoded, Engine
from omni.inputs import Medium
from omni.model import Omni
from omni.processing.frames import Pixels, VisionSizes
from omni.thinker import Thinker
from seats import preset_for
from seats.method import Method

GRIDS, SIDE = 19, 4
FRAMES = 2 * GRIDS - 1


@pytest.fixture(scope="module")
def thinker(checkpoint: Path) -> Thinker:
    return omni.load(checkpoint, device="cpu").thinker


@pytest.fixture
def engine(thinker: Thinker) -> Engine:
    return Engine(thinker, compile=False, eager_until_warm=False, reuse=2**26)


@pytest.fixture
def method(engine: Engine) -> Method:
    return preset_for(engine.thinker.config, 0.2)


@pytest.fixture
def batches(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Counts the batches of a vision encoder."""
    return Batches(engine, monkeypatch)


class Batches:
    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed, self.done = threading.Condition(), 0
        encode = engine.thinker.vision.encode_batch

        def counted(*arguments: Any) -> Any:
            found = encode(*arguments)
            with self.changed:
                self.done += 1
                self.changed.notify_all()
            return found

        monkeypatch.setattr(engine.thinker.vision, "encode_batch", counted)

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.done >= count, 60)


def make_clip(engine: Engine, seed: int = 0) -> Pixels:
    """A clip whose frames are still to come: they are zeros."""
    vision = engine.thinker.config.vision
    side = SIDE * vision.patch_size
    sizes = VisionSizes(patch_size=vision.patch_size)
    return Pixels((torch.zeros(FRAMES, 3, side, side, dtype=torch.uint8),), sizes, of_clip=True)


def frames_of(clip: Pixels, seed: int) -> Tensor:
    return torch.randint(256, clip.frames[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def decode(
    clip: Pixels, tell: Callable[[Pixels, int], None], seed: int = 0, count: int = FRAMES, *, after: int = 0
) -> None:
    """Frames come one by one."""
    shown = frames_of(clip, seed)
    for number in range(after, count):
        clip.frames[0][number] = shown[number]
        tell(Pixels(clip.frames, clip.sizes, clip.of_clip), number + 1)


def kept(engine: Engine, clip: Pixels) -> Encoded | None:
    found = engine.kept.get(Medium("video", clip, clip.grid_thw).digest())
    assert found is None or isinstance(found, Encoded)
    return found


def is_right(engine: Engine, clip: Pixels, method: Method | None) -> bool:
    """Whether there is, to the bit, what the encoder makes of a whole clip."""
    found, needs = kept(engine, clip), None if method is None else method.needs
    with torch.inference_mode():
        tokens, signals = engine.thinker.encode_medium(Medium("video", clip, clip.grid_thw), needs)
    if found is None or found.needs != needs or not torch.equal(found.tokens, tokens):
        return False
    if signals is None or found.signals is None:
        return signals is found.signals
    return torch.equal(signals.received, found.signals.received)


def test_the_first_batch_is_encoded_before_the_last_frame_is_there(
    engine: Engine, method: Method, batches: Batches
) -> None:
    """Protects: encoding runs beside reading; never ahead of it; what comes of it is what a whole clip gives."""
    clip = make_clip(engine)
    with BackgroundEncoder(engine, method) as early:
        decode(clip, early.tell, count=15)
        assert batches.done == 0  # eight grids are sixteen frames
        decode(clip, early.tell, count=16, after=15)
        batches.wait_for(1)
        decode(clip, early.tell, count=FRAMES - 1, after=16)
        batches.wait_for(2)
        assert kept(engine, clip) is None and batches.done == 2
        engine.kept.clear()
        decode(clip, early.tell, after=FRAMES - 1)
    assert batches.done == 3
    assert is_right(engine, clip, method)


@pytest.mark.parametrize("selects", [False, True])
def test_several_clips_one_after_another(engine: Engine, method: Method, selects: bool) -> None:
    """Protects: a clip that is read before the one before is encoded loses nothing."""
    clips, wanted = [make_clip(engine) for _ in range(3)], method if selects else None
    with BackgroundEncoder(engine, wanted) as early:
        for seed, clip in enumerate(clips):
            decode(clip, early.tell, seed)
    assert all(is_right(engine, clip, wanted) for clip in clips)


def test_what_is_read_again_is_encoded_again(engine: Engine, method: Method, batches: Batches) -> None:
    """Protects: of a damaged file, whose frames come a second time and are others, nothing of the first is kept."""
    first, again = make_clip(engine), make_clip(engine)
    with BackgroundEncoder(engine, method) as early:
        decode(first, early.tell, seed=1, count=20)
        batches.wait_for(1)
        decode(again, early.tell, seed=2)
    assert is_right(engine, again, method)
    assert len(engine.kept) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_reading_that_fails_ends_it(
    engine: Engine, method: Method, batches: Batches, error: type[BaseException]
) -> None:
    """Protects: the reader's own error is what is raised; no thread stays, nothing half done is kept."""
    clip, before = make_clip(engine), threading.active_count()
    with pytest.raises(error, match="of the file"), BackgroundEncoder(engine, method) as early:
        decode(clip, early.tell, count=20)
        batches.wait_for(1)
        raise error("of the file")
    assert threading.active_count() == before
    assert len(engine.kept) == 0


def test_errors_of_the_encoder(engine: Engine, method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: too little memory is for the prefill to say; what else fails is not hidden."""

    def fail(error: Exception) -> None:
        def raised(*_: Any) -> None:
            raise error

        monkeypatch.setattr(engine.thinker.vision, "encode_batch", raised)
        with BackgroundEncoder(engine, method) as early:
            decode(make_clip(engine), early.tell)

    fail(torch.OutOfMemoryError("Tried to allocate 1.00 GiB."))
    assert len(engine.kept) == 0
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_what_is_known_is_not_encoded_again(engine: Engine, method: Method, batches: Batches) -> None:
    """Protects: a next question about a clip costs no encoder, be it told of at once and as a whole."""
    clip = make_clip(engine)
    for _ in range(2):
        with BackgroundEncoder(engine, method) as early:
            decode(clip, early.tell, after=0 if not len(engine.kept) else FRAMES - 1)
    assert batches.done == 3


def test_what_would_not_be_kept_is_not_encoded(
    thinker: Thinker, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a clip whose tokens take more than what is kept may would be encoded twice."""
    engine = Engine(thinker, compile=False, eager_until_warm=False, reuse=1000)
    batches = Batches(engine, monkeypatch)
    with BackgroundEncoder(engine, method) as encoder:
        encoder.tell(make_clip(engine), FRAMES)
    assert batches.done == 0


def test_others_use_the_device_meanwhile(engine: Engine, method: Method, batches: Batches) -> None:
    """Protects: while a file is read, which may take minutes, no other thread waits for its encoding."""
    with BackgroundEncoder(engine, method) as early:
        decode(make_clip(engine), early.tell, count=20)
        batches.wait_for(1)
        other = threading.Thread(target=lambda: engine.attempt(lambda: None))
        other.start()
        other.join(60)
        assert not other.is_alive()
        decode(early.latest.pixels, early.tell, after=20)  # type: ignore[union-attr]


def test_a_question_about_a_file(checkpoint: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a prompt that was encoded while it was read is answered as any other, and encodes no clip again."""
    model, plain = (omni.load(checkpoint, device="cpu", reuse=reuse) for reuse in (2**28, 0))
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What?"}]
    asked: Any = [{"role": "user", "content": content}]
    expected = plain.generate(plain.prepare(asked), seats=0.2, max_new_tokens=4, stop_token_ids=[]).tokens
    assert not ahead.can_encode_ahead(model.engine)  # on a CPU
    monkeypatch.setattr("omni.model.can_encode_ahead", lambda engine: engine.reuses)
    encoded = model.prepare(asked, encode_while_reading=True, seats=0.2)
    assert len(model.engine.kept) == 1
    seen: list[Any] = []
    monkeypatch.setattr(model.thinker.vision, "walk", lambda *_: seen.append(1))
    assert model.generate(encoded, seats=0.2, max_new_tokens=4, stop_token_ids=[]).tokens == expected
    assert not seen
    assert isinstance(model, Omni)
