"""Runs requests through the thinker, eagerly or as compiled graphs: several at a time, from any thread."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from threading import Lock

import torch
from torch import Tensor

from omni import stages
from omni.cache import Cache
from omni.config import OmniConfig
from omni.context import check_context
from omni.inputs import InputError, Inputs
from omni.layers import directly
from omni.processing.positions import Layout, layout
from omni.runtime.compiled import Compiled, step
from omni.runtime.sampling import Sampling, draw_noise, pick
from omni.thinker import Thinker
from seats.counts import Counts
from seats.method import Method
from seats.plan import StagePlan, make_plan, plan_without_selection

KV = ("layerwise", "pruned")
"""What the cache keeps of a prefill: `Omni.prefill`."""


@dataclass(repr=False)
class Prefill:
    """A prompt that went through the decoder. logits: (vocab,) float32 of the next token.

    kept: the surviving original positions after each selection step, in order; empty where every token is kept.
    relevance: for each step after the first, float32 scores of the positions that it chose from, those of `kept`
    before it; None where it leaves text alone. config: the model's. method: what chose them, None where every token is
    kept. cache and next_position are what decoding continues from. Seconds are
    those of the whole batch.
    """

    logits: Tensor
    kept: list[Tensor]
    relevance: list[Tensor | None]
    cache: Cache
    config: OmniConfig
    method: Method | None
    next_position: float
    tokens: dict[str, int]
    segments: list[int]
    macs: int
    full_macs: int
    encode_seconds: float
    prefill_seconds: float

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.tokens.items() if count)
        kept = f", kept {' > '.join(map(str, self.segments))}" if self.kept else ""
        return f"Prefill({counts} tokens{kept}, {self.prefill_seconds:.2f} s)"


class Engine:
    """compiled: the graphs, or None. eager_until_warm: what has no graph yet runs without, except inside `warming`."""

    def __init__(self, thinker: Thinker, *, compile: bool, eager_until_warm: bool) -> None:
        self.thinker = thinker
        self.compiled = Compiled(thinker, eager_until_warm=eager_until_warm) if compile else None
        self._lock = Lock()

    @property
    def device(self) -> torch.device:
        return self.thinker.embedding.weight.device

    @contextmanager
    def running(self) -> Iterator[None]:
        """One thread at a time, without gradients; others wait. Raises MemoryError where the device has too little."""
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with self._lock, torch.inference_mode(), on_device:
            try:
                yield
                return
            except RuntimeError as error:
                # On a CPU too little memory is a RuntimeError like any other.
                if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                    raise
                asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            # Outside of the handler, whose traceback keeps the tensors of the failed request; before another thread
            # goes on, which may have found a graph already.
            self.clear()
        raise MemoryError(
            f"the device has too little memory for this request{f' (it asked for {asked[1]})' if asked else ''}: lower "
            "retention, max_frames, max_pixels or max_new_tokens, or send fewer requests at a time."
        )

    def clear(self) -> None:
        """Drops what is kept between requests: graphs, and the tables of frame sizes."""
        if self.compiled is not None:
            self.compiled.clear()
        self.thinker.vision.layouts.clear()
        torch.cuda.empty_cache()

    @contextmanager
    def warming(self) -> Iterator[None]:
        """What runs inside makes graphs, `eager_until_warm` or not."""
        with nullcontext() if self.compiled is None else self.compiled.warming():
            yield

    def prefill(
        self, requests: Sequence[Inputs], new: int, method: Method | None, kv: str
    ) -> tuple[list[Prefill], Cache]:
        """Prefills requests together, with room for `new` tokens each in the cache. Errors: `Omni.prefill`."""
        if kv not in KV:
            raise ValueError(f"kv must be one of {', '.join(KV)}, not {kv!r}.")
        if not requests:
            raise ValueError("there is no request to run.")
        config = self.thinker.config
        places = [layout(inputs, config) for inputs in requests]
        if method is not None:
            method.check(config.decoder.num_layers)
        method = method if self._selects(places, method) else None
        prompts = [self._prompt(inputs, place, method) for inputs, place in zip(requests, places, strict=True)]
        # Machine code takes any length; a CUDA graph has one.
        plan = self._plan(prompts, method, rounded=self.compiled is not None and self.compiled.on_gpu)
        for inputs, place, prompt in zip(requests, places, prompts, strict=True):
            check_context(inputs, place, prompt, config, method, new)
        with self.running():
            return self._prefill(requests, places, prompts, plan, new, pruned=kv == "pruned")

    def _selects(self, places: list[Layout], method: Method | None) -> bool:
        """Whether there is something to select from. Raises ValueError where that differs between requests."""
        if method is None or method.keeps_everything:
            return False
        answers = {bool(len(place.video) or len(place.audio)) for place in places}
        if len(answers) > 1:
            raise ValueError("requests with and without video or sound cannot be run together: they share no plan.")
        return answers.pop()

    def plan(self, inputs: Inputs, method: Method | None) -> StagePlan:
        """What a compiled model on a GPU runs a request by. Errors: `Omni.prefill`."""
        place = layout(inputs, self.thinker.config)
        method = method if self._selects([place], method) else None
        return self._plan([self._prompt(inputs, place, method)], method, rounded=True)

    def _prompt(self, inputs: Inputs, place: Layout, method: Method | None) -> stages.Prompt:
        if method is None:
            return stages.whole_prompt(place.positions.shape[1])
        return stages.read_prompt(place, inputs, self.thinker.config, method.window_grids)

    def _plan(self, prompts: list[stages.Prompt], method: Method | None, *, rounded: bool) -> StagePlan:
        num_layers = self.thinker.config.decoder.num_layers
        try:
            counts = reduce(Counts.joined, (prompt.counts(method) for prompt in prompts))
        except ValueError as error:
            raise InputError(f"token selection cannot run on this prompt: {error}") from None
        counts = counts.rounded() if rounded else counts
        return plan_without_selection(num_layers, counts) if method is None else make_plan(method, num_layers, counts)

    def _prefill(
        self,
        requests: Sequence[Inputs],
        places: list[Layout],
        prompts: list[stages.Prompt],
        plan: StagePlan,
        new: int,
        *,
        pruned: bool,
    ) -> tuple[list[Prefill], Cache]:
        thinker, method = self.thinker, plan.method
        call = directly if self.compiled is None else self.compiled.call
        run = partial(stages.prefill, thinker) if self.compiled is None else self.compiled.prefill

        started = time.perf_counter()
        needs = None if method is None else method.needs
        encoded = [thinker.encode(inputs, needs, call=call) for inputs in requests]
        slots = [  # while a GPU encodes
            stages.assign_slots(plan, prompt, place, inputs.input_ids, self.device)
            for inputs, place, prompt in zip(requests, places, prompts, strict=True)
        ]
        self._synchronize()
        encode_seconds = time.perf_counter() - started
        filled = []
        for slot in slots:
            features, signals = encoded.pop(0)  # of an hour of video: gigabytes, not held twice for longer
            filled.append(stages.with_media(slot, features, signals))
            del features, signals
        request = stages.join(filled)
        del filled
        staged = run(plan, request, pruned=pruned)
        del request
        # The one read of what was selected, when all work is under way.
        kept = [(place.cpu(), count.tolist()) for place, count in staged.kept]
        relevance = [None if scores is None else scores.cpu() for scores in staged.relevance]
        cache = Cache.of_prefill(staged.keys, staged.values, staged.lengths, new)
        self._synchronize()
        seconds = time.perf_counter() - started - encode_seconds
        ends = [segment.layers[1] for segment in plan.segments[:-1]]
        decoder = thinker.config.decoder
        prefills = []
        for row, place in enumerate(places):
            survivors = [where[row, : count[row]] for where, count in kept]
            segments = [len(some) for some in survivors]
            scored = [
                None if scores is None else scores[row, : len(before)]
                for scores, before in zip(relevance, survivors, strict=False)
            ]
            drops = [(end - 1, tokens) for end, tokens in zip(ends, segments[1:], strict=True)]
            prefills.append(
                Prefill(
                    logits=staged.logits[row],
                    kept=survivors if method is not None else [],
                    relevance=scored,
                    cache=cache.row(row) if len(places) > 1 else cache,
                    config=thinker.config,
                    method=method,
                    next_position=place.next_position,
                    tokens=place.counts,
                    segments=segments,
                    macs=decoder.macs(segments[0], drops),
                    full_macs=decoder.macs(place.positions.shape[1]),
                    encode_seconds=encode_seconds,
                    prefill_seconds=seconds,
                )
            )
        return prefills, cache

    def decode(
        self, prefills: list[Prefill], cache: Cache, new: int, sampling: Sampling, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """Yields the next token of every row, `new` times at most.

        On a GPU the host is one step behind: the next step is under way before this one's tokens are read.
        """
        logits = torch.stack([prefill.logits for prefill in prefills])
        ahead = self.device.type == "cuda"
        with self.running():
            noise = draw_noise(sampling, (len(logits), logits.shape[1]), generator)
            token = pick(logits, sampling, noise)
            position = torch.tensor([float(prefill.next_position) for prefill in prefills], device=self.device)
            read = read_later(token)
        launch: Callable[[], None] | None = None

        def advance() -> Callable[[], list[int]]:
            nonlocal launch
            with self.running():
                launch = launch or self._stepper(sampling, token, position, noise, cache)
                if noise is not None:
                    noise.exponential_(generator=generator)
                launch()
                return read_later(token)

        try:
            for left in reversed(range(new)):
                following = advance() if ahead and left else None
                yield read()
                if left:
                    read = following or advance()
        finally:
            self._synchronize()  # a step that nobody waits for may still write to the cache

    def _stepper(
        self, sampling: Sampling, token: Tensor, position: Tensor, noise: Tensor | None, cache: Cache
    ) -> Callable[[], None]:
        if self.compiled is not None:
            return self.compiled.stepper(sampling, token, position, noise, cache)
        return lambda: step(self.thinker, sampling, token, position, noise, cache)

    def _synchronize(self) -> None:
        """So that seconds are those of the work, not of its launch."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_later(token: Tensor) -> Callable[[], list[int]]:
    """Copies (B,) ids to the host without waiting; the function that it returns waits and reads."""
    if token.device.type != "cuda":
        ids = token.tolist()
        return lambda: ids
    host = torch.empty(token.shape, dtype=token.dtype, pin_memory=True)
    host.copy_(token, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return read
