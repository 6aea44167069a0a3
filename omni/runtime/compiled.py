"""A thinker whose prefill, encoders and decoding steps run as compiled graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from omni import stages
from omni.cache import Cache
from omni.runtime.graphs import Graphs, capture, warm_up
from omni.runtime.sampling import Sampling, pick
from omni.stages import Request, Staged
from omni.thinker import Thinker
from seats.plan import StagePlan


def step(
    thinker: Thinker, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
) -> None:
    """One decoding step in place: `token` and `position`, (B,), become the next, the cache is written."""
    logits = thinker.decode(token, position, cache)
    token.copy_(pick(logits, sampling, noise))
    position += 1


def _step(
    thinker: Thinker,
    sampling: Sampling,
    token: Tensor,
    position: Tensor,
    noise: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
) -> None:
    step(thinker, sampling, token, position, noise, Cache(keys, values, lengths))


def _prefill(thinker: Thinker, plan: StagePlan, pruned: bool, request: Request) -> Staged:
    return stages.prefill(thinker, plan, request, pruned=pruned)


class Compiled:
    """Graphs of one thinker: a prefill for every plan, encoders for every frame size, steps for every cache size.

    eager_until_warm: graphs are made inside of `warming` alone; what has none runs without.
    """

    def __init__(self, thinker: Thinker, *, eager_until_warm: bool = False) -> None:
        self.thinker, self.eager_until_warm = thinker, eager_until_warm
        self._warming = threading.local()
        self.on_gpu = thinker.embedding.weight.is_cuda
        self.prefills = Graphs(_prefill, captures=self.on_gpu)
        self.steps = Graphs(_step, captures=False)  # `stepper` captures
        self.encoders: dict[str, Graphs] = {}

    @property
    def makes(self) -> bool:
        """Whether this thread makes graphs: others answer meanwhile, without."""
        return not self.eager_until_warm or getattr(self._warming, "depth", 0) > 0

    @contextmanager
    def warming(self) -> Iterator[None]:
        self._warming.depth = getattr(self._warming, "depth", 0) + 1
        try:
            yield
        finally:
            self._warming.depth -= 1

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a method of an encoder, whose arguments are of one shape per frame size, and of one shape of sound."""
        module, function = method.__self__, method.__func__  # type: ignore[attr-defined]
        graphs = self.encoders.setdefault(function.__qualname__, Graphs(function, captures=self.on_gpu))
        return graphs.run(shapes(arguments), (module,), *arguments, makes=self.makes)

    def prefill(self, plan: StagePlan, request: Request, *, pruned: bool) -> Staged:
        key = (plan, pruned, shapes(request))
        return self.prefills.run(key, (self.thinker, plan, pruned), request, makes=self.makes)

    def stepper(
        self, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
    ) -> Callable[[], None]:
        """What runs `step` on these tensors, in place.

        On a GPU captured for these very tensors: the cache stays where the prefill wrote it, and a later answer, whose
        cache lies elsewhere, captures the same compiled code anew.
        """
        state = (token, position, noise, cache.keys, cache.values, cache.lengths)
        key = (sampling, *(shapes(value) for value in state))
        run = partial(self.steps.run, key, (self.thinker, sampling), *state, makes=self.makes)
        if not self.on_gpu or not (self.makes or key in self.steps.graphs):
            return run
        if key not in self.steps.graphs:
            before = [tensor.clone() for tensor in (token, position, cache.lengths)]
            warm_up(run)
            for tensor, value in zip((token, position, cache.lengths), before, strict=True):
                tensor.copy_(value)
        captured = capture(run)

        def replay(_: object = self.steps.graphs[key]) -> None:  # holds the memory of what was captured
            captured.replay()

        return replay

    def clear(self) -> None:
        """Drops all graphs and what they hold."""
        for graphs in (self.prefills, self.steps, *self.encoders.values()):
            graphs.clear()


def shapes(values: Any) -> Hashable:
    """What of a nest of tensors, lists and dataclasses a graph depends on."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.dtype
    if isinstance(values, (list, tuple)):
        return tuple(shapes(value) for value in values)
    if hasattr(values, "__dataclass_fields__"):
        return tuple(shapes(value) for value in vars(values).values())
    return values
