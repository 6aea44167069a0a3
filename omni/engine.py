"""Runs requests through the thinker, eagerly or as compiled graphs: several at a time, from any thread."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import reduce
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor

from omni import stages
from omni.cache import Cache
from omni.config import OmniConfig
from omni.context import check_context
from omni.encoders.received import Signals
from omni.inputs import InputError, Inputs
from omni.layers import Call, directly
from omni.prefix import CachedPrefix, PendingPrompt, PrefixMatch, cached_prefix, gathered, longest_match
from omni.processing.positions import Layout, layout
from omni.request import PrefillBatch, Prompt, assign_slots, join, read_prompt, whole_prompt, with_media
from omni.reuse import LRUCache
from omni.runtime.compiled import Compiled, step
from omni.runtime.graphs import empty_cache, is_out_of_memory, on_stream
from omni.runtime.sampling import Sampling, draw_noise, pick
from omni.stages import Prefix, Staged
from omni.thinker import Thinker, collected
from seats.counts import Counts, rung
from seats.method import Method, Needs
from seats.plan import StagePlan, make_plan, plan_without_selection

R = TypeVar("R")
KV = ("layerwise", "pruned")
"""What the cache keeps of a prefill: `Omni.prefill`."""


@dataclass(repr=False)
class Prefill:
    """A prompt that went through the decoder. logits: (vocab,) float32 of the next token.

    kept: the surviving original positions after each selection step, in order; empty where every token is kept.
    tokens: of the prompt by kind, under "text", "image", "video" and "audio". segments: how many of them each run of
    decoder layers between two selections saw, from the first layer to the last; where every token is kept one number.
    relevance: for each step after the first, float32 scores of the positions that it chose from, those of `kept`
    before it; None where it leaves text alone. config: the model's. method: what chose them, None where every token is
    kept. cache and next_position are what decoding continues from. macs, full_macs: multiply-accumulates of this
    prefill and of one with every token, as if it had run from its first token on; reused_tokens: the prompt's that
    did not run again, as they had before. Seconds are those of the whole batch.
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
    reused_tokens: int
    encode_seconds: float
    prefill_seconds: float

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.tokens.items() if count)
        kept = f", kept {' > '.join(map(str, self.segments))}" if self.kept else ""
        return f"Prefill({counts} tokens{kept}, {self.prefill_seconds:.2f} s)"


@dataclass(frozen=True)
class Encoded:
    """What an encoder made of one medium: `Thinker.encode_medium`, for a method with these needs."""

    needs: Needs | None
    tokens: Tensor
    signals: Signals | None

    @property
    def nbytes(self) -> int:
        signals = [] if self.signals is None else [each for each in self.signals if each is not None]
        return sum(each.nbytes for each in (self.tokens, *signals))


class Engine:
    """Runs prefills and decoding steps of one thinker, eagerly or as graphs: of several requests together, and one
    after the other whichever threads ask. Keeps what later requests need not compute again.

    compiled: the graphs, or None. eager_until_warm: what has no graph yet runs without, except inside `warming`.
    reuse: bytes that may be kept between requests: what encoders made of media (`Encoded`, by their digest), and what
    became of the beginnings of prompts (`CachedPrefix`).
    """

    def __init__(self, thinker: Thinker, *, compile: bool, eager_until_warm: bool, reuse: int) -> None:
        self.thinker = thinker
        self.kept: LRUCache[Any] = LRUCache(reuse)
        self.compiled = Compiled(thinker, eager_until_warm=eager_until_warm) if compile else None
        self._lock = Lock()
        self._is_short = False

    @property
    def device(self) -> torch.device:
        return self.thinker.embedding.weight.device

    @property
    def reuses(self) -> bool:
        return self.kept.limit > 0 and not self._is_short

    @property
    def call(self) -> Call:
        """Runs what sees tensors of static shape."""
        return directly if self.compiled is None else self.compiled.call

    def encoded(self, digest: bytes, needs: Needs | None) -> Encoded | None:
        """What is kept of a medium for a method with these needs."""
        found = self.kept.get(digest)
        return found if found is not None and needs in (None, found.needs) else None

    def attempt(self, work: Callable[[], R], again: Callable[[], R] | None = None) -> R:
        """`work` while `running`. Where memory was too little, once more, or `again`, and nothing is kept: not what
        was, graphs among it, nor what this makes itself."""
        try:
            with self.running():
                return work()
        except MemoryError:
            if self.kept.limit == 0 and (self.compiled is None or not self.compiled.on_gpu):
                raise  # nothing was there to make room
        with self.running():
            self._is_short = True
            try:
                return (again or work)()
            finally:
                self._is_short = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """One thread at a time, without gradients; others wait. Raises MemoryError where the device has too little."""
        with self._lock, torch.inference_mode(), self._on_default_stream():
            try:
                yield
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
            # Outside of the handler, whose traceback keeps the tensors of the failed request; before another thread
            # goes on, which may have found a graph already.
            self.clear()
        raise MemoryError(
            f"the device has too little memory for this request{f' (it asked for {asked[1]})' if asked else ''}: lower "
            "retention, max_frames, max_pixels or max_new_tokens, or send fewer requests at a time."
        )

    @contextmanager
    def _on_default_stream(self) -> Iterator[None]:
        """On a GPU, whatever stream a caller is on: what is kept and the memory that graphs share are all threads'."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), on_stream(torch.cuda.default_stream()):
            yield

    def clear(self) -> None:
        """Drops what is kept between requests: graphs, the tables of frame sizes, media and beginnings of prompts."""
        self.kept.clear()
        if self.compiled is not None:
            self.compiled.clear()
        self.thinker.vision.layouts.clear()
        empty_cache()

    def forget(self) -> None:
        """Drops media and beginnings of prompts."""
        with self._lock:
            self.kept.clear()

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
        pending = []
        for inputs, place in zip(requests, places, strict=True):
            prompt = self._prompt(inputs, place, method)
            check_context(inputs, place, prompt, config, method, new)
            pending.append(PendingPrompt(inputs, place, prompt, inputs.media(config.audio.alone_from), config))
        self._plan([one.prompt for one in pending], method)  # what no plan fits is said before anything runs
        if self.reuses:
            for one in pending:
                _ = one.digests  # computed while others use the device
        return self.attempt(lambda: self._prefill(pending, method, new, pruned=kv == "pruned"))

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

    def _prompt(self, inputs: Inputs, place: Layout, method: Method | None) -> Prompt:
        if method is None:
            return whole_prompt(place.positions.shape[1])
        return read_prompt(place, inputs, self.thinker.config, method.window_grids)

    @property
    def _rounds(self) -> bool:
        """Whether lengths are rounded: machine code takes any, a CUDA graph has one."""
        return self.compiled is not None and self.compiled.on_gpu

    def _plan(self, prompts: list[Prompt], method: Method | None, *, rounded: bool | None = None) -> StagePlan:
        num_layers = self.thinker.config.decoder.num_layers
        try:
            counts = reduce(Counts.joined, (prompt.counts(method) for prompt in prompts))
        except ValueError as error:
            raise InputError(f"token selection cannot run on this prompt: {error}") from None
        counts = counts.rounded() if (self._rounds if rounded is None else rounded) else counts
        return plan_without_selection(num_layers, counts) if method is None else make_plan(method, num_layers, counts)

    def _prefill(
        self, pending: list[PendingPrompt], method: Method | None, new: int, *, pruned: bool
    ) -> tuple[list[Prefill], Cache]:
        started = time.perf_counter()
        matches, encode_seconds = self._matches(pending, method)
        if matches:
            if len({id(each.cached) for each in matches}) == 1:  # one row serves all
                matches = [min(matches, key=lambda each: each.tokens)] * len(pending)
            wanted = [each.is_outgrown_by(one) for each, one in zip(matches, pending, strict=True)]
            plan, staged, seconds = self._extend(pending, matches, method, pruned=pruned, keep=any(wanted))
        else:
            wanted = [self._keeps(one, method) for one in pending]
            plan, staged, seconds = self._run(pending, method, pruned=pruned, keep=any(wanted))
        encode_seconds += seconds
        cache = Cache.of_prefill(staged.keys, staged.values, staged.lengths, new)
        # The one read of what was selected, when all work is under way.
        kept = [(place.cpu(), count.tolist()) for place, count in staged.kept]
        relevance = [None if scores is None else scores.cpu() for scores in staged.relevance]
        if staged.first is not None:
            # In the cache's own memory where that was not pruned: answers write behind what is kept.
            stored = staged.first if staged.first.keys else cache
            for row, one in enumerate(pending):
                if wanted[row]:
                    self._keep(one, method, plan, staged.first, stored, row, kept[0][0][row, : kept[0][1][row]])
        self._synchronize()
        seconds = time.perf_counter() - started - encode_seconds
        ends = [segment.layers[1] for segment in plan.segments[:-1]]
        decoder = self.thinker.config.decoder
        prefills = []
        for row, one in enumerate(pending):
            survivors = [where[row, : count[row]].clone() for where, count in kept]  # apart from what stays here
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
                    cache=cache.row(row) if len(pending) > 1 else cache,
                    config=self.thinker.config,
                    method=method,
                    next_position=one.layout.next_position,
                    tokens=one.layout.counts,
                    segments=segments,
                    macs=decoder.macs(segments[0], drops),
                    full_macs=decoder.macs(one.length),
                    reused_tokens=matches[row].tokens if matches else 0,
                    encode_seconds=encode_seconds,
                    prefill_seconds=seconds,
                )
            )
        return prefills, cache

    def _matches(self, pending: list[PendingPrompt], method: Method | None) -> tuple[list[PrefixMatch], float]:
        """What of each prompt has run before; nothing where they are to run as a whole. And seconds for encoders.

        Where one of several is known, or two begin alike, the others' beginnings run one by one.
        """
        if not self.reuses:
            return [], 0.0
        found = [longest_match(self.kept, one, method) for one in pending]
        begin_alike = len({one.keys(method)[0] if one.media else id(one) for one in pending}) < len(pending)
        if not any(found) and not begin_alike:
            return [], 0.0
        media_ends = [max((end for _, end in one.spans), default=0) for one in pending]
        if not any(found) and not any(one.is_spared_by(end, end) for one, end in zip(pending, media_ends, strict=True)):
            return [], 0.0  # what they have in common would be taken by none
        if not all(each or self._keeps(one, method) for each, one in zip(found, pending, strict=True)):
            return [], 0.0
        matches, encode_seconds = [], 0.0
        for before, one in zip(found, pending, strict=True):
            each = before or longest_match(self.kept, one, method)
            if each is None:
                plan, staged, seconds = self._run([one], method, pruned=False, keep=True)
                encode_seconds += seconds
                assert staged.first is not None
                place, count = staged.kept[0]
                entered = place[0, : int(count)].cpu()
                cached = self._keep(one, method, plan, staged.first, staged, 0, entered)
                each = PrefixMatch(cached, cached.common(one))
            matches.append(each)
        return matches, encode_seconds

    def _keeps(self, pending: PendingPrompt, method: Method | None) -> bool:
        """Whether there is something to keep of a prompt, and room for it."""
        if not self.reuses or not pending.media:
            return False
        plan = self._plan([pending.prompt], method)
        layers, decoder = plan.segments[0].layers[1], self.thinker.config.decoder
        numbers = 2 * layers * decoder.num_kv_heads * decoder.head_dim
        numbers += decoder.hidden_size if len(plan.segments) > 1 else 0
        nbytes = plan.segments[0].length * numbers * self.thinker.embedding.weight.element_size()
        return nbytes <= self.kept.limit

    def _keep(
        self,
        pending: PendingPrompt,
        method: Method | None,
        plan: StagePlan,
        first: Prefix,
        stored: Prefix | Staged | Cache,
        row: int,
        entered: Tensor,
    ) -> CachedPrefix:
        layers = plan.segments[0].layers[1]
        cached = cached_prefix(pending, row, entered, first, stored.keys[:layers], stored.values[:layers])
        self.kept.put(pending.keys(method)[0], cached, cached.nbytes)
        return cached

    def _run(
        self, pending: list[PendingPrompt], method: Method | None, *, pruned: bool, keep: bool
    ) -> tuple[StagePlan, Staged, float]:
        """Prompts from their first token on. And seconds for encoders."""
        plan = self._plan([one.prompt for one in pending], method)
        batch, seconds = self._batch(pending, plan, [one.prompt for one in pending])
        return plan, self._staged(plan, batch, pruned=pruned, keep=keep), seconds

    def _extend(
        self,
        pending: list[PendingPrompt],
        matches: list[PrefixMatch],
        method: Method | None,
        *,
        pruned: bool,
        keep: bool,
    ) -> tuple[StagePlan, Staged, float]:
        """Prompts from the first token on that has not run before. And seconds for encoders."""
        plan = self._plan([one.prompt for one in pending], method)
        entered = rung(max(each.entered for each in matches)) if self._rounds else max(each.entered for each in matches)
        rests = [whole_prompt(one.length, each.tokens) for one, each in zip(pending, matches, strict=True)]
        batch, seconds = self._batch(pending, self._plan(rests, None), rests)
        return plan, self._staged(plan, gathered(matches, entered), batch, pruned=pruned, keep=keep), seconds

    def _batch(
        self, pending: list[PendingPrompt], plan: StagePlan, prompts: list[Prompt]
    ) -> tuple[PrefillBatch, float]:
        """The tensors of prompts in the slots of a plan, their media encoded. And the seconds that took."""
        started = time.perf_counter()
        needs = None if plan.method is None else plan.method.needs
        encoded = [collected(self._encoded(one, prompt, needs)) for one, prompt in zip(pending, prompts, strict=True)]
        slots = [  # while a GPU encodes
            assign_slots(plan, prompt, one.layout, one.inputs.input_ids, self.device)
            for one, prompt in zip(pending, prompts, strict=True)
        ]
        self._synchronize()
        seconds = time.perf_counter() - started
        filled = []
        for slot in slots:
            features, signals = encoded.pop(0)  # of an hour of video: gigabytes, not held twice for longer
            filled.append(with_media(slot, features, signals))
            del features, signals
        return join(filled), seconds

    def _encoded(
        self, pending: PendingPrompt, prompt: Prompt, needs: Needs | None
    ) -> Iterator[tuple[str, tuple[Tensor, Signals | None]]]:
        """Of each medium in a prompt its kind and what its encoder makes of it, or made of it before."""
        for number, medium in enumerate(pending.media):
            if pending.spans[number][0] < prompt.start:
                continue
            found = self.encoded(pending.digests[number], needs) if self.reuses else None
            if found is None:
                found = Encoded(needs, *self.thinker.encode_medium(medium, needs, call=self.call))
                if self.reuses:
                    self.kept.put(pending.digests[number], found, found.nbytes)
            yield medium.kind, (found.tokens, None if needs is None else found.signals)

    def _staged(self, plan: StagePlan, *tensors: Any, pruned: bool, keep: bool) -> Staged:
        """stages.prefill of a batch, or stages.extend of a prefix and a batch."""
        if self.compiled is not None:
            return self.compiled.prefill(plan, *tensors, pruned=pruned, keep=keep)
        function: Callable[..., Staged] = stages.prefill if len(tensors) == 1 else stages.extend
        return function(self.thinker, plan, *tensors, pruned=pruned, keep=keep)

    def decode(
        self, prefills: list[Prefill], cache: Cache, new: int, sampling: Sampling, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """Yields the next token of every row, `new` times at most.

        On a GPU the host is one step behind: the next step is under way before this one's tokens are read.
        """
        ahead = self.device.type == "cuda"

        def first() -> tuple[Tensor | None, Tensor, Tensor, Tensor, Callable[[], list[int]]]:
            logits = torch.stack([prefill.logits for prefill in prefills])
            if bool(logits.isnan().any()):  # the likeliest token of which would be the first of all, "!"
                raise InputError(
                    f"what the model makes of this prompt in {str(self.thinker.embedding.weight.dtype)[6:]} are no "
                    "numbers. float16 may be too small a range, where bfloat16 or float32 are not."
                )
            noise = draw_noise(sampling, (len(logits), logits.shape[1]), generator)
            token = pick(logits, sampling, noise)
            position = torch.tensor([float(prefill.next_position) for prefill in prefills], device=self.device)
            return noise, token, position, cache.lengths.clone(), read_later(token)

        noise, token, position, lengths, read = self.attempt(first)
        launch: Callable[[], None] | None = None
        done = 0

        def run() -> Callable[[], list[int]]:
            nonlocal launch
            launch = launch or self._stepper(sampling, token, position, noise, cache)
            if noise is not None:
                noise.exponential_(generator=generator)
            launch()
            return read_later(token)

        def run_again() -> Callable[[], list[int]]:
            cache.lengths.copy_(lengths + done)  # the step may have come as far as writing
            return run()

        def advance() -> Callable[[], list[int]]:
            nonlocal done
            read = self.attempt(run, run_again)
            done += 1
            return read

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
        """So that seconds are those of the work, not of its launch. Of one stream: to wait for the whole device would
        spoil what another thread captures there."""
        if self.device.type == "cuda":
            torch.cuda.default_stream(self.device).synchronize()


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
