"""A thinker that runs as machine code of its parts, and on a GPU as graphs of its encoders, prefills and steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from omni import stages
from omni.cache import Cache
from omni.layers import compiling
from omni.request import PrefillBatch
from omni.runtime.graphs import Graphs, Parts, capture, replay, structure, warm_up
from omni.runtime.sampling import Sampling, pick
from omni.stages import Prefix, Staged
from omni.thinker import Thinker
from seats.plan import StagePlan


def step(
    thinker: Thinker, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
) -> None:
    """One decoding step in place: `token` and `position`, (B,), become the next, the cache is written."""
    logits = thinker.decode(token, position, cache)
    token.copy_(pick(logits, sampling, noise))
    position += 1


class Compiled:
    """A thinker whose parts run as machine code, and on a GPU wholes as CUDA graphs.

    What is compiled serves every plan. What is captured belongs to one: a prefill, an encoder's batch of one frame
    size, the steps of an answer; that takes a few runs of it.
    eager_until_warm: code and graphs are made inside of `warming` alone; what has none runs without.
    """

    def __init__(self, thinker: Thinker, *, eager_until_warm: bool = False) -> None:
        self.thinker, self.eager_until_warm = thinker, eager_until_warm
        self._warming = threading.local()
        self.on_gpu = thinker.embedding.weight.is_cuda
        self.parts = Parts()
        self.prefills, self.encoders = Graphs(), Graphs()
        self.stepped: set[Hashable] = set()

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
        run = partial(self._with_parts, method)
        if not self.on_gpu:
            return run(*arguments)
        key = (method.__qualname__, shapes(arguments))
        return self.encoders.run(key, run, *arguments, makes=self.makes)

    def prefill(self, plan: StagePlan, *tensors: Prefix | PrefillBatch, pruned: bool, keep: bool) -> Staged:
        """`stages.prefill` of a batch, or `stages.extend` of a prefix and a batch."""
        function = stages.prefill if len(tensors) == 1 else stages.extend
        run = partial(self._with_parts, function, self.thinker, plan, pruned=pruned, keep=keep)
        if not self.on_gpu:
            return run(*tensors)
        return self.prefills.run((plan, pruned, keep, shapes(tensors)), run, *tensors, makes=self.makes)

    def stepper(
        self, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
    ) -> Callable[[], None]:
        """What runs `step` on these tensors, in place.

        On a GPU captured for these very tensors: the cache stays where the prefill wrote it, and a later answer, whose
        cache lies elsewhere, is captured anew.
        """
        run = partial(self._with_parts, step, self.thinker, sampling, token, position, noise, cache)
        # Experts choose their kernels by the number of tokens, and a capture is no place to compile and load them.
        key = (sampling.temperature == 0, len(token), structure((token, noise, cache.keys)))
        if not self.on_gpu or not (self.makes or key in self.stepped):
            return run
        if key not in self.stepped:
            before = [tensor.clone() for tensor in (token, position, cache.lengths)]
            try:
                warm_up(run)
            finally:  # where memory was too little, the same step runs once more
                for tensor, value in zip((token, position, cache.lengths), before, strict=True):
                    tensor.copy_(value)
            self.stepped.add(key)
        cache.places_on_device()
        captured = capture(run)
        return partial(replay, captured)

    def clear(self) -> None:
        """Drops what is captured, which holds memory of the device; machine code holds none."""
        for graphs in (self.prefills, self.encoders):
            graphs.clear()

    def _with_parts(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with compiling(partial(self.parts.run, makes=self.makes)):
            return function(*arguments, **named)


def shapes(values: Any) -> Hashable:
    """What of a nest of tensors, lists and dataclasses a graph depends on."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.dtype
    if isinstance(values, (list, tuple)):
        return tuple(shapes(value) for value in values)
    if hasattr(values, "__dataclass_fields__"):
        return tuple(shapes(value) for value in vars(values).values())
    return values
