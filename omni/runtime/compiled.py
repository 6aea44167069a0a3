"""A thinker whose prefill, encoders and decoding steps run as compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from torch import Tensor

from omni import stages
from omni.cache import Cache
from omni.runtime.graphs import Graphs, capture, drop_pool
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
    """Graphs of one thinker: a prefill for every plan, encoders for every frame size, steps for every cache size."""

    def __init__(self, thinker: Thinker) -> None:
        self.thinker = thinker
        device = thinker.embedding.weight.device
        self.prefills = Graphs(_prefill, device)
        self.steps = Graphs(_step, device, captures=False)
        self.device = device
        self.encoders: dict[str, Graphs] = {}

    def call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a method of an encoder, whose arguments are of one shape per frame size, and of one shape of sound."""
        module, function = method.__self__, method.__func__  # type: ignore[attr-defined]
        graphs = self.encoders.setdefault(function.__qualname__, Graphs(function, self.device))
        return graphs.run(shapes(arguments), (module,), *arguments)

    def prefill(self, plan: StagePlan, request: Request, *, pruned: bool) -> Staged:
        key = (plan, pruned, len(request.x), request.deepstack is None)
        return self.prefills.run(key, (self.thinker, plan, pruned), request)

    def has_prefill(self, plan: StagePlan) -> bool:
        """Whether a prefill of this plan has run."""
        return any(key[0] == plan for key in self.prefills.graphs)

    def stepper(
        self, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
    ) -> Callable[[], None]:
        """What runs `step` on these tensors, in place; on a GPU captured for them, since they stay where they are."""
        state = (token, position, noise, cache.keys, cache.values, cache.lengths)
        key = (sampling, *(shapes(value) for value in state))
        run = partial(self.steps.run, key, (self.thinker, sampling), *state)
        if token.device.type != "cuda":
            return run
        before = [tensor.clone() for tensor in (token, position, cache.lengths)]
        graph = capture(run)
        for tensor, value in zip((token, position, cache.lengths), before, strict=True):
            tensor.copy_(value)
        return graph.replay

    def clear(self) -> None:
        """Drops all graphs and what they hold."""
        for graphs in (self.prefills, self.steps, *self.encoders.values()):
            graphs.clear()
        drop_pool()


def shapes(values: Any) -> Hashable:
    """What of a nest of tensors, lists and dataclasses a graph depends on."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.dtype
    if isinstance(values, (list, tuple)):
        return tuple(shapes(value) for value in values)
    if hasattr(values, "__dataclass_fields__"):
        return tuple(shapes(value) for value in vars(values).values())
    return values
