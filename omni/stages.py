"""The prefill: layers of the decoder, with the stages of token selection between them (arXiv 2605.20035)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from einops import rearrange
from torch import Tensor

from omni.decoder import Layer
from omni.layers import part
from omni.request import NOWHERE, PrefillBatch
from omni.thinker import Thinker
from seats.counts import AUDIO_WINDOW, Counts
from seats.method import Media, Method, Step
from seats.plan import StagePlan
from seats.relevance import relevance
from seats.selection import AUDIO, PADDING, TEXT, VIDEO, compact


@dataclass
class Sequence:
    """What is left of the prompts: survivors first and in order, then padding. `count`: (B,) survivors."""

    x: Tensor
    positions: Tensor
    place: Tensor
    kind: Tensor
    clip: Tensor
    deepstack: Tensor | None
    count: Tensor

    def take(self, index: Tensor, count: Tensor) -> Sequence:
        """The tokens at `index`, (B, slots), of which the first `count` are real."""
        kind = self.kind.gather(1, index)
        real = torch.arange(index.shape[1], device=index.device) < count[:, None]
        deepstack = None
        if self.deepstack is not None:
            deepstack = torch.stack([_rows(level, index) for level in self.deepstack])
        return Sequence(
            x=_rows(self.x, index),
            positions=torch.stack([axis.gather(1, index) for axis in self.positions]),
            place=self.place.gather(1, index),
            kind=torch.where(real, kind, PADDING),
            clip=self.clip.gather(1, index),
            deepstack=deepstack,
            count=count,
        )

    def then(self, other: Sequence) -> Sequence:
        """The slots of both, one after another, padding included."""
        levels = max(0 if some.deepstack is None else len(some.deepstack) for some in (self, other))
        deepstack = torch.cat((self.levels(levels), other.levels(levels)), dim=2) if levels else None
        return Sequence(
            x=torch.cat((self.x, other.x), dim=1),
            positions=torch.cat((self.positions, other.positions), dim=2),
            place=torch.cat((self.place, other.place), dim=1),
            kind=torch.cat((self.kind, other.kind), dim=1),
            clip=torch.cat((self.clip, other.clip), dim=1),
            deepstack=deepstack,
            count=self.count + other.count,
        )

    def levels(self, levels: int) -> Tensor:
        """deepstack of at least so many levels."""
        return self.x.new_zeros(levels, *self.x.shape) if self.deepstack is None else self.deepstack

    def expand(self, batch: int) -> Sequence:
        """One row as so many, in the same memory; so many as they are."""
        return Sequence(
            x=self.x.expand(batch, -1, -1),
            positions=self.positions.expand(-1, batch, -1),
            place=self.place.expand(batch, -1),
            kind=self.kind.expand(batch, -1),
            clip=self.clip.expand(batch, -1),
            deepstack=None if self.deepstack is None else self.deepstack.expand(-1, batch, -1, -1),
            count=self.count.expand(batch),
        )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class Prefix:
    """Beginnings of prompts that went through the layers before the first selection: those are causal.

    sequence: as these layers left it; where no layer comes after, its `x` has width 0. keys, values: of each of these
    layers, (B, kv_heads, slots, head_dim). The first `sequence.count` slots count; the rest is never looked at.
    """

    sequence: Sequence
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Staged:
    """A finished prefill. logits: (B, vocab) float32. kept: after each step, places (B, slots) and counts (B,).

    relevance: for each step after a layer, (B, slots) float32 scores of what was there before it, or None.
    keys, values: per layer, (B, kv_heads, slots, head_dim). lengths: per layer, (B,) of these slots that are real.
    first: what other prompts that begin alike need, where it was asked for. Its keys and values are those above, and
    are not listed twice, unless the cache was pruned.
    """

    logits: Tensor
    kept: list[tuple[Tensor, Tensor]]
    relevance: list[Tensor | None]
    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[Tensor]
    first: Prefix | None


def prefill(thinker: Thinker, plan: StagePlan, batch: PrefillBatch, *, pruned: bool, keep: bool = False) -> Staged:
    """Runs prompts through the stages and layers. Static shapes: nothing here depends on what the prompts hold.

    pruned: `Omni.prefill`'s kv. keep: whether `Staged.first` is wanted.
    """
    sequence = select_before_decoder(plan, batch, *thinker.embed(batch.ids, batch.source, batch.media))
    keys, values = through(thinker, sequence, plan.segments[0].layers)
    return finish(thinker, plan, sequence, sequence, keys, values, pruned=pruned, keep=keep)


def extend(
    thinker: Thinker, plan: StagePlan, prefix: Prefix, batch: PrefillBatch, *, pruned: bool, keep: bool = False
) -> Staged:
    """`prefill` of prompts that begin with `prefix`, which is read and not changed, and go on with `batch`.

    prefix: of one row for all of them, or of as many. batch: all of it is text to its plan, as nothing of it is
    selected from before the decoder. plan: of the prompts as a whole.
    """
    rest = as_text(batch, *thinker.embed(batch.ids, batch.source, batch.media))
    rows, slots, _ = rest.x.shape
    before = prefix.sequence.expand(rows)
    known = before.count[:, None]
    # Where slots of the whole lie in prefix and rest, one behind the other: either may end with padding.
    slot = torch.arange(plan.segments[0].length, device=rest.x.device)
    index = torch.where(slot < known, slot, before.place.shape[1] + slot - known)
    index = index.clamp(max=before.place.shape[1] + slots - 1)
    rotary = thinker.rotary(rest.positions)
    keys, values = [], []
    for number in range(*plan.segments[0].layers):
        known_keys, known_values = (some[number].expand(rows, -1, -1, -1) for some in (prefix.keys, prefix.values))
        layer = cast(Layer, thinker.layers[number])
        rest.x, layer_keys, layer_values = layer.extend(rest.x, rotary, known_keys, known_values, index, before.count)
        keys.append(layer_keys)
        values.append(layer_values)
        add_deepstack(rest, number)
    ends_here = len(plan.segments) == 1
    joined = before.then(narrowed(rest) if ends_here else rest)
    sequence = joined.take(index, joined.count)
    return finish(thinker, plan, sequence, rest if ends_here else sequence, keys, values, pruned=pruned, keep=keep)


def as_text(batch: PrefillBatch, x: Tensor, deepstack: Tensor | None) -> Sequence:
    """A pool that is all text, in order already: an hour of video is not copied. Arguments: `select_before_decoder`."""
    there = batch.place < NOWHERE
    return Sequence(
        x=x,
        positions=batch.positions,
        place=batch.place,
        kind=torch.where(there, TEXT, PADDING).to(torch.uint8),
        clip=batch.clip,
        deepstack=deepstack,
        count=there.sum(dim=1),
    )


def narrowed(sequence: Sequence) -> Sequence:
    """Without what a next layer would see: its `x` has width 0."""
    return replace(sequence, x=sequence.x.new_empty(*sequence.x.shape[:2], 0))


def through(thinker: Thinker, sequence: Sequence, layers: tuple[int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Takes a whole sequence, which is changed, through some layers; their keys and values."""
    rotary = thinker.rotary(sequence.positions)
    keys, values = [], []
    for index in range(*layers):
        sequence.x, layer_keys, layer_values = cast(Layer, thinker.layers[index]).prefill(sequence.x, rotary)
        keys.append(layer_keys)
        values.append(layer_values)
        add_deepstack(sequence, index)
    return keys, values


def add_deepstack(sequence: Sequence, index: int) -> None:
    """What a layer's own level of pictures adds after it."""
    if sequence.deepstack is not None:
        sequence.x = sequence.x + sequence.deepstack[index]
        if index + 1 == len(sequence.deepstack):
            sequence.deepstack = None


def finish(
    thinker: Thinker,
    plan: StagePlan,
    sequence: Sequence,
    ending: Sequence,
    keys: list[Tensor],
    values: list[Tensor],
    *,
    pruned: bool,
    keep: bool,
) -> Staged:
    """A prefill from the first selection between the layers on.

    sequence, keys, values: of the layers before it. ending: what holds the last tokens after them.
    """
    kept = [(sequence.place, sequence.count)]
    scored: list[Tensor | None] = []
    first = None
    if keep:
        alone = len(plan.segments) == 1
        listed = (list(keys), list(values)) if pruned and not alone else ([], [])
        first = Prefix(narrowed(sequence) if alone else replace(sequence), *listed)
    for before, segment in pairwise(plan.segments):
        assert before.step is not None
        if before.step.video is not None:
            layer = cast(Layer, thinker.layers[before.layers[1] - 1])
            rotary = thinker.rotary(sequence.positions)
            query, all_keys = layer.query_and_keys(sequence.x, rotary, sequence.count - 1)
            scores = relevance(query, all_keys, sequence.kind != PADDING)
            scored.append(scores)
            keep_these = choose(plan, scores, sequence, before.step)
        else:
            scored.append(None)
            keep_these = sequence.kind == TEXT
        chosen, count = compact(keep_these, keep_these.shape[1])
        ending = sequence = sequence.take(chosen[:, : segment.length], count.clamp(max=segment.length))
        kept.append((sequence.place, sequence.count))
        for stored, more in zip((keys, values), through(thinker, sequence, segment.layers), strict=True):
            stored += more
    last = _rows(ending.x, (ending.count - 1)[:, None])[:, 0]
    lengths = [count for segment, (_, count) in zip(plan.segments, kept, strict=True) for _ in range(*segment.layers)]
    if pruned and len(plan.segments) > 1:
        prune(keys, values, plan, kept, sequence)
        lengths = [sequence.count] * len(lengths)
    return Staged(thinker.logits(last), kept, scored, keys, values, lengths, first)


def choose(plan: StagePlan, scores: Tensor, sequence: Sequence, step: Step) -> Tensor:
    """Which tokens of a sequence with these scores, (B, S), stay: (B, S) bool."""
    assert plan.method is not None
    inputs = scores, sequence.kind, step, plan.windows, sequence.clip
    if scores.device.type == "cpu":  # a few small tensors, not worth compiling
        return plan.method.after(*inputs)
    return _after(plan.method, *inputs)


@part
def _after(method: Method, scores: Tensor, kind: Tensor, step: Step, windows: int, clip: Tensor) -> Tensor:
    return method.after(scores, kind, step, windows, clip)


def prune(
    keys: list[Tensor],
    values: list[Tensor],
    plan: StagePlan,
    seen: list[tuple[Tensor, Tensor]],
    survivors: Sequence,
) -> None:
    """Cuts the keys and values of every layer to the survivors; `seen` are the places and counts in each segment."""
    for segment, (place, count) in zip(plan.segments, seen, strict=True):
        # Survivors are in order in both, so each is found by search; what lies beyond `count` is never looked at.
        real = torch.arange(place.shape[1], device=place.device) < count[:, None]
        sought = torch.where(real, place, torch.iinfo(place.dtype).max)
        found = torch.searchsorted(sought, survivors.place).clamp(max=place.shape[1] - 1)
        for stored in (keys, values):
            for index in range(*segment.layers):
                whole = stored[index]
                stored[index] = whole.gather(2, found[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))


def select_before_decoder(plan: StagePlan, batch: PrefillBatch, x: Tensor, deepstack: Tensor | None) -> Sequence:
    """What enters the decoder, in the order of the prompt: all of the text and what the method keeps of the rest.

    x: (B, P, hidden), deepstack: (levels, B, P, hidden) or None, in the order of the pool.
    """
    rows, slots, _ = x.shape
    counts = plan.counts
    if slots == counts.text:
        return as_text(batch, x, deepstack)
    keep = [batch.place[:, : counts.text] < NOWHERE]
    kind = [torch.full((counts.text,), TEXT, dtype=torch.uint8, device=x.device)]
    if plan.method is not None:
        windows = media_by_windows(counts, batch, x)
        for one, kept, medium in zip(windows, plan.method.before(*windows), (VIDEO, AUDIO), strict=True):
            if one is None or kept is None:
                continue
            start = sum(part.shape[1] for part in keep)
            keep.append(kept.keep.flatten(1))
            kind.append(torch.full((keep[-1].shape[1],), medium, dtype=torch.uint8, device=x.device))
            if kept.features is not None:
                changed = kept.features.flatten(1, 2).to(x.dtype)
                x = torch.cat((x[:, :start], changed, x[:, start + changed.shape[1] :]), dim=1)
    kept_slots = torch.cat(keep, dim=1)
    everything = Sequence(
        x=x,
        positions=batch.positions,
        place=batch.place,
        kind=torch.cat(kind).expand(rows, -1),
        clip=batch.clip,
        deepstack=deepstack,
        count=kept_slots.sum(dim=1),
    )
    order = torch.where(kept_slots, batch.place, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return everything.take(order[:, : plan.segments[0].length], everything.count)


def media_by_windows(counts: Counts, batch: PrefillBatch, x: Tensor) -> tuple[Media | None, Media | None]:
    """Video and sound of the pool."""
    source = batch.source.clamp(min=0)
    received = batch.received.gather(1, source)
    keys = None if batch.keys is None else _rows(batch.keys, source)
    found: list[Media | None] = []
    start = counts.text
    for windows, size, sizes, clips in (
        (counts.video_windows, counts.video_window, batch.video_sizes, batch.video_clips),
        (counts.audio_windows, AUDIO_WINDOW, batch.audio_sizes, batch.audio_clips),
    ):
        slots = slice(start, start + windows * size)
        start = slots.stop
        found.append(
            Media(
                features=rearrange(x[:, slots], "b (w n) d -> b w n d", w=windows),
                received=rearrange(received[:, slots], "b (w n) -> b w n", w=windows),
                keys=None if keys is None else rearrange(keys[:, slots], "b (w n) d -> b w n d", w=windows),
                sizes=sizes,
                clip=clips,
                place=rearrange(batch.place[:, slots], "b (w n) -> b w n", w=windows),
            )
            if windows
            else None
        )
    return found[0], found[1]
