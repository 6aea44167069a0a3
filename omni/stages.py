"""The prefill: layers of the decoder, with the stages of token selection between them (arXiv 2605.20035)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from omni.config import OmniConfig
from omni.decoder import Layer
from omni.encoders.received import Signals
from omni.inputs import InputError, Inputs
from omni.layers import part
from omni.processing.positions import Layout
from omni.thinker import Thinker
from seats.counts import AUDIO_WINDOW, Counts
from seats.method import Media, Method, Step
from seats.plan import StagePlan, counts_of
from seats.relevance import relevance
from seats.selection import AUDIO, PADDING, TEXT, VIDEO, compact, count_windows


@dataclass(frozen=True)
class Request:
    """Prompts of one plan, their tokens in the plan's pool: text, then video by windows, then audio by windows.

    ids: (B, P) token ids. positions: (3, B, P). place: (B, P) where each token stands in its prompt; `P` and more in
    slots that hold none. media: (1 + deepstack levels, B, P, hidden), what the encoders made, in their order and not in
    that of the pool, or None. source: (B, P) which of these a slot takes, -1 for the embedding of its id. received:
    (B, P), the attention that each of `media` received; keys: (B, P, dim) their keys, or None. clip: (B, P) of which
    clip or sound a token is, a clip and its sound being one (`Layout`); any where there is none. video_sizes,
    audio_sizes: (B, windows) tokens in each window, which come first; video_clips, audio_clips: of which clip or sound.
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    media: Tensor | None
    source: Tensor
    received: Tensor
    keys: Tensor | None
    clip: Tensor
    video_sizes: Tensor
    audio_sizes: Tensor
    video_clips: Tensor
    audio_clips: Tensor


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


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class Staged:
    """A finished prefill. logits: (B, vocab) float32. kept: after each step, places (B, slots) and counts (B,).

    relevance: for each step after a layer, (B, slots) float32 scores of what was there before it, or None.
    keys, values: per layer, (B, kv_heads, slots, head_dim). lengths: per layer, (B,) of these slots that are real.
    """

    logits: Tensor
    kept: list[tuple[Tensor, Tensor]]
    relevance: list[Tensor | None]
    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[Tensor]


def prefill(thinker: Thinker, plan: StagePlan, request: Request, *, pruned: bool) -> Staged:
    """Runs prompts through the stages and layers. Static shapes: nothing here depends on what the prompts hold."""
    sequence = select_before_decoder(plan, request, *thinker.embed(request.ids, request.source, request.media))
    kept = [(sequence.place, sequence.count)]
    scored: list[Tensor | None] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []  # places and counts in each segment
    for number, segment in enumerate(plan.segments):
        rotary = thinker.rotary(sequence.positions)
        seen.append((sequence.place, sequence.count))
        for index in range(*segment.layers):
            sequence.x, layer_keys, layer_values = cast(Layer, thinker.layers[index]).prefill(sequence.x, rotary)
            keys.append(layer_keys)
            values.append(layer_values)
            if sequence.deepstack is not None and index < len(sequence.deepstack):
                sequence.x = sequence.x + sequence.deepstack[index]
        if number + 1 == len(plan.segments):
            break
        assert segment.step is not None
        if segment.step.video is not None:
            layer = cast(Layer, thinker.layers[segment.layers[1] - 1])
            query, all_keys = layer.query_and_keys(sequence.x, rotary, sequence.count - 1)
            scores = relevance(query, all_keys, sequence.kind != PADDING)
            scored.append(scores)
            keep = choose(plan, scores, sequence, segment.step)
        else:
            scored.append(None)
            keep = sequence.kind == TEXT
        chosen, count = compact(keep, keep.shape[1])
        length = plan.segments[number + 1].length
        sequence = sequence.take(chosen[:, :length], count.clamp(max=length))
        kept.append((sequence.place, sequence.count))
    last = _rows(sequence.x, (sequence.count - 1)[:, None])[:, 0]
    lengths = [count for segment, (_, count) in zip(plan.segments, seen, strict=True) for _ in range(*segment.layers)]
    if pruned and len(plan.segments) > 1:
        prune(keys, values, plan, seen, sequence)
        lengths = [sequence.count] * len(lengths)
    return Staged(thinker.logits(last), kept, scored, keys, values, lengths)


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


def select_before_decoder(plan: StagePlan, request: Request, x: Tensor, deepstack: Tensor | None) -> Sequence:
    """What enters the decoder, in the order of the prompt: all of the text and what the method keeps of the rest.

    x: (B, P, hidden), deepstack: (levels, B, P, hidden) or None, in the order of the pool.
    """
    batch, slots, _ = x.shape
    counts = plan.counts
    keep = [request.place[:, : counts.text] < slots]
    kind = [torch.full((counts.text,), TEXT, dtype=torch.uint8, device=x.device)]
    if plan.method is not None:
        windows = media_by_windows(counts, request, x)
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
        positions=request.positions,
        place=request.place,
        kind=torch.cat(kind).expand(batch, -1),
        clip=request.clip,
        deepstack=deepstack,
        count=kept_slots.sum(dim=1),
    )
    if slots == counts.text:  # text alone, in order already: an hour of video is not copied
        return everything
    order = torch.where(kept_slots, request.place, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return everything.take(order[:, : plan.segments[0].length], everything.count)


def media_by_windows(counts: Counts, request: Request, x: Tensor) -> tuple[Media | None, Media | None]:
    """Video and sound of the pool."""
    source = request.source.clamp(min=0)
    received = request.received.gather(1, source)
    keys = None if request.keys is None else _rows(request.keys, source)
    found: list[Media | None] = []
    start = counts.text
    for windows, size, sizes, clips in (
        (counts.video_windows, counts.video_window, request.video_sizes, request.video_clips),
        (counts.audio_windows, AUDIO_WINDOW, request.audio_sizes, request.audio_clips),
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
                place=rearrange(request.place[:, slots], "b (w n) -> b w n", w=windows),
            )
            if windows
            else None
        )
    return found[0], found[1]


@dataclass(frozen=True)
class Prompt:
    """Where the tokens of one prompt stand: what a plan is made from, and what fills it.

    text, video, audio: (n,) positions in the prompt; image tokens count as text. video_sizes, audio_sizes: tokens in
    each window that a method looks into before the decoder, in order; video_clips, audio_clips: of which clip or sound
    it is. windows: between the layers, and those of them with both modalities (`count_windows`).
    """

    text: Tensor
    video: Tensor
    audio: Tensor
    video_sizes: tuple[int, ...]
    audio_sizes: tuple[int, ...]
    video_clips: tuple[int, ...]
    audio_clips: tuple[int, ...]
    windows: tuple[int, int]

    def counts(self, method: Method | None) -> Counts:
        """method: None where every token stays, as in a `whole_prompt`."""
        if method is None:
            return Counts(len(self.text), len(self.text), 0, 0, 1, 0, 0, 0)
        return counts_of(
            method,
            text=len(self.text),
            video_sizes=self.video_sizes,
            audio_sizes=self.audio_sizes,
            windows=self.windows,
        )


def read_prompt(layout: Layout, inputs: Inputs, config: OmniConfig, window_grids: int) -> Prompt:
    """window_grids: temporal grids of video in a window. Raises InputError where the prompt does not end with text."""
    length = layout.positions.shape[1]
    kind = torch.zeros(length, dtype=torch.uint8)
    kind[layout.video], kind[layout.audio] = VIDEO, AUDIO
    if int(kind[-1]) != TEXT:
        raise InputError("token selection needs a prompt that ends with text: its last token asks for the others.")
    merge = config.vision.spatial_merge_size**2
    grids_thw = [] if inputs.video_grid_thw is None else inputs.video_grid_thw.tolist()
    videos = [
        _windows(grids * height * width // merge, window_grids * height * width // merge)
        for grids, height, width in grids_thw
    ]
    sounds = [_windows(config.audio.token_count(frames), AUDIO_WINDOW) for frames in inputs.mel_lengths.tolist()]
    return Prompt(
        text=(kind == TEXT).nonzero().flatten(),
        video=layout.video,
        audio=layout.audio,
        video_sizes=tuple(chain(*videos)),
        audio_sizes=tuple(chain(*sounds)),
        video_clips=tuple(chain(*([clip] * len(sizes) for clip, sizes in enumerate(videos)))),
        audio_clips=tuple(chain(*([clip] * len(sizes) for clip, sizes in enumerate(sounds)))),
        windows=count_windows(kind, layout.clip),
    )


def whole_prompt(length: int) -> Prompt:
    """A prompt of which every token stays, whatever its kind."""
    none = torch.empty(0, dtype=torch.long)
    return Prompt(torch.arange(length), none, none, (), (), (), (), (0, 0))


def _windows(tokens: int, size: int) -> list[int]:
    """Sizes of windows that cut `tokens` in order, the last of which may be shorter."""
    full, rest = divmod(tokens, size)
    return [size] * full + [rest] * (rest > 0)


def fill_pool(
    plan: StagePlan,
    prompt: Prompt,
    layout: Layout,
    ids: Tensor,
    features: dict[str, Tensor],
    signals: dict[str, Signals],
    device: torch.device,
) -> Request:
    """The tensors of one prompt in the slots of its plan, on `device`.

    ids: (1, S). features, signals: `Thinker.encode`. Raises ValueError where the plan does not hold the prompt.
    """
    return with_media(assign_slots(plan, prompt, layout, ids, device), features, signals)


def assign_slots(plan: StagePlan, prompt: Prompt, layout: Layout, ids: Tensor, device: torch.device) -> Request:
    """`fill_pool` as far as it needs no encoder: a GPU can still be encoding."""
    plan.check_holds(prompt.counts(plan.method))
    counts = plan.counts
    place = torch.full((counts.pool,), counts.pool)
    place[: len(prompt.text)] = prompt.text
    start, sizes, clips = counts.text, [], []
    for name, windows, width in (
        ("video", counts.video_windows, counts.video_window),
        ("audio", counts.audio_windows, AUDIO_WINDOW),
    ):
        tokens, filled = getattr(prompt, name), torch.tensor(getattr(prompt, f"{name}_sizes"), dtype=torch.long)
        window = torch.arange(len(filled)).repeat_interleave(filled)
        inside = torch.arange(len(tokens)) - (filled.cumsum(0) - filled).repeat_interleave(filled)
        place[start + window * width + inside] = tokens
        sizes.append(F.pad(filled, (0, windows - len(filled)))[None].to(device))
        clip = torch.tensor(getattr(prompt, f"{name}_clips"), dtype=torch.long)
        clips.append(F.pad(clip, (0, windows - len(filled)), value=-1)[None].to(device))
        start += windows * width

    source = torch.full((ids.shape[1],), -1)
    media = torch.cat((layout.image, layout.video, layout.audio))
    source[media] = torch.arange(len(media))
    there = place < counts.pool
    at = torch.where(there, place, 0)
    return Request(
        ids=ids[:, at.to(ids.device)].to(device),
        positions=layout.positions[:, None, at].to(device),
        place=place[None].to(device),
        media=None,
        source=torch.where(there, source[at], -1)[None].to(device),
        received=torch.zeros(1, counts.pool, device=device),
        keys=None,
        clip=torch.where(there, layout.clip[at], -1)[None].to(device),
        video_sizes=sizes[0],
        audio_sizes=sizes[1],
        video_clips=clips[0],
        audio_clips=clips[1],
    )


def with_media(slots: Request, features: dict[str, Tensor], signals: dict[str, Signals]) -> Request:
    """A request with what the encoders made, in the order of `Thinker.encode`."""
    if not features:
        return slots
    pool, device = slots.place.shape[1], slots.place.device
    levels, like = max(map(len, features.values())), next(iter(features.values()))
    media = like.new_zeros(levels, 1, pool, like.shape[-1], device=device)
    weights, keys = torch.zeros(pool, device=device), None
    known = [signal.keys for signal in signals.values() if signal.keys is not None]
    if known:  # of the widest; what others lack are zeros, which change no likeness
        keys = torch.zeros(pool, max(some.shape[1] for some in known), device=device)
    first = 0
    for name, tokens in features.items():
        end = first + tokens.shape[1]
        media[: len(tokens), 0, first:end] = tokens
        if name in signals:
            signal = signals[name]
            weights[first:end] = signal.received
            if keys is not None and signal.keys is not None:
                keys[first:end, : signal.keys.shape[1]] = signal.keys
        first = end
    return replace(slots, media=media, received=weights[None], keys=None if keys is None else keys[None])


def join(requests: list[Request]) -> Request:
    """Requests of one plan, one after another in one batch."""
    if len(requests) == 1:
        return requests[0]
    some = [request.media for request in requests if request.media is not None]
    media = keys = None
    if some:
        levels = max(map(len, some))
        # Prompts without pictures have no deepstack, those without any media nothing: their part stays zero.
        media = some[0].new_zeros(levels, len(requests), *some[0].shape[2:])
        for row, request in enumerate(requests):
            if request.media is not None:
                media[: len(request.media), row] = request.media[:, 0]
    known = [request.keys for request in requests if request.keys is not None]
    if known:
        keys = known[0].new_zeros(len(requests), known[0].shape[1], max(each.shape[2] for each in known))
        for row, request in enumerate(requests):
            if request.keys is not None:
                keys[row, :, : request.keys.shape[2]] = request.keys[0]
    return Request(
        ids=torch.cat([request.ids for request in requests]),
        positions=torch.cat([request.positions for request in requests], dim=1),
        place=torch.cat([request.place for request in requests]),
        media=media,
        source=torch.cat([request.source for request in requests]),
        received=torch.cat([request.received for request in requests]),
        keys=keys,
        clip=torch.cat([request.clip for request in requests]),
        video_sizes=torch.cat([request.video_sizes for request in requests]),
        audio_sizes=torch.cat([request.audio_sizes for request in requests]),
        video_clips=torch.cat([request.video_clips for request in requests]),
        audio_clips=torch.cat([request.audio_clips for request in requests]),
    )
