"""Steps of an answer: warm before they are captured, and where that fails, as if they had not run. And what is not
compiled at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import omni
import weights
from omni.cache import Cache
from omni.config import ConfigError
from omni.runtime import compiled
from omni.runtime.compiled import Compiled
from omni.runtime.sampling import Sampling


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """As on a GPU, with a step that counts; captured is what runs it."""

    def step(_: Any, sampling: Sampling, token: Tensor, position: Tensor, noise: None, cache: Cache) -> None:
        for each in (token, position, cache.lengths):
            each += 1

    monkeypatch.setattr(compiled, "step", step)
    monkeypatch.setattr(compiled, "capture", lambda run: SimpleNamespace(replay=run))
    thinker: Any = SimpleNamespace(embedding=nn.Embedding(3, 2))
    side = Compiled(thinker)
    side.on_gpu = True
    return side


def state(batch: int) -> tuple[Tensor, Tensor, None, Cache]:
    """What steps of so many sequences change, and a cache of one layer."""
    cache = Cache([torch.zeros(batch, 1, 256, 4)], [torch.zeros(batch, 1, 256, 4)], torch.full((1, batch), 7))
    return torch.arange(batch), torch.full((batch,), 9.0), None, cache


def test_steps_are_warm_before_they_are_captured(steps: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every number of sequences, which experts choose their kernels by: one that is first met inside of a capture
    may not be loaded there. And once."""
    warmed = []

    def warm_up(run: Callable[[], None]) -> None:
        warmed.append(batch)
        run()

    monkeypatch.setattr(compiled, "warm_up", warm_up)
    for batch in (1, 8, 3, 8, 1):
        token, position, noise, cache = state(batch)
        steps.stepper(Sampling(), token, position, noise, cache)()
        assert (token.tolist(), position.tolist()) == (list(range(1, batch + 1)), [10.0] * batch)
        assert cache.lengths.eq(8).all()
    assert warmed == [1, 8, 3]


def test_steps_that_fail_to_warm_up_have_not_run(steps: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the answer where memory was too little on the way: the engine runs the same step once more."""

    def warm_up(run: Callable[[], None]) -> None:
        run()
        raise torch.OutOfMemoryError

    token, position, noise, cache = state(2)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "warm_up", warm_up)
        with pytest.raises(torch.OutOfMemoryError):
            steps.stepper(Sampling(), token, position, noise, cache)
    assert (token.tolist(), position.tolist(), cache.lengths.tolist()) == ([0, 1], [9.0, 9.0], [[7, 7]])
    monkeypatch.setattr(compiled, "warm_up", lambda run: run())
    steps.stepper(Sampling(), token, position, noise, cache)()
    assert (token.tolist(), position.tolist(), cache.lengths.tolist()) == ([1, 2], [10.0, 10.0], [[8, 8]])


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_bfloat16_is_compiled_where_a_gpu_has_it(
    capability: tuple[int, int], dtype: torch.dtype, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a flag that PyTorch 2.13 fails at, deep inside, and 2.11 ignores, is refused before anything is
    loaded."""

    class LoadsError(Exception):
        pass

    def fill(*_: Any, **__: Any) -> None:
        raise LoadsError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(omni.model, "usable_device", torch.device)
    monkeypatch.setattr(weights, "fill", fill)
    refused = compile and dtype == torch.bfloat16 and capability < (8, 0)
    with pytest.raises(ConfigError if refused else LoadsError, match=r"compute capability 7\.5" if refused else None):
        omni.load("tiny", device="cuda", dtype=dtype, compile=compile)
