"""The prefill: layers of the decoder, with the stages of token selection between them (arXiv 2605.20035)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from omni.config import OmniConfig
from omni.decoder import Layer
from omni.inputs import InputError, Inputs
from omni.processing.positions import Layout
from omni.thinker import Thinker
from seats.diversity import max_min_keep, window_counts
from seats.plan import AUDIO_WINDOW, Counts, StagePlan, counts_of
from seats.relevance import relevance
from seats.selection import AUDIO, PADDING, TEXT, VIDEO, compact, run_starts, select


@dataclass(frozen=True)
class Request:
    """Prompts of one plan, their tokens in the plan's pool: text, then video by windows, then audio by windows.

    ids: (B, P) token ids. positions: (3, B, P). place: (B, P) where each token stands in its prompt; `P` and more in
    slots that hold none. media: (1 + deepstack levels, B, P, hidden), what the encoders made, in their order and not in
    that of the pool, or None. source: (B, P) which of these a slot takes, -1 for the embedding of its id. received:
    (B, P), the attention that each of `media` received. video_sizes, audio_sizes: (B, windows) tokens in each window,
    which come first.
    """

    ids: Tensor
    positions: Tensor
    place: Tensor
    media: Tensor | None
    source: Tensor
    received: Tensor
    video_sizes: Tensor
    audio_sizes: Tensor


@dataclass
class Sequence:
    """What is left of the prompts: survivors first and in order, then padding. `count`: (B,) survivors."""

    x: Tensor
    positions: Tensor
    place: Tensor
    kind: Tensor
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
            deepstack=deepstack,
            count=count,
        )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


@dataclass
class Staged:
    """A finished prefill. logits: (B, vocab) float32. kept: after each step, places (B, slots) and counts (B,).

    keys, values: per layer, (B, kv_heads, slots, head_dim). lengths: per layer, (B,) of these slots that are real.
    """

    logits: Tensor
    kept: list[tuple[Tensor, Tensor]]
    keys: list[Tensor]
    values: list[Tensor]
    lengths: list[Tensor]


def prefill(thinker: Thinker, plan: StagePlan, request: Request, *, pruned: bool) -> Staged:
    """Runs prompts through the stages and layers. Static shapes: nothing here depends on what the prompts hold."""
    sequence = select_before_decoder(plan, request, *thinker.embed(request.ids, request.source, request.media))
    kept = [(sequence.place, sequence.count)]
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
        if segment.video_keep is not None and segment.audio_keep is not None:
            layer = cast(Layer, thinker.layers[segment.layers[1] - 1])
            query, all_keys = layer.query_and_keys(sequence.x, rotary, sequence.count - 1)
            scores = relevance(query, all_keys, sequence.kind != PADDING)
            chosen, count = choose(plan, scores, sequence.kind, segment.video_keep, segment.audio_keep)
        else:
            chosen, count = compact(sequence.kind == TEXT, sequence.kind.shape[1])
        length = plan.segments[number + 1].length
        sequence = sequence.take(chosen[:, :length], count.clamp(max=length))
        kept.append((sequence.place, sequence.count))
    last = _rows(sequence.x, (sequence.count - 1)[:, None])[:, 0]
    lengths = [count for segment, (_, count) in zip(plan.segments, seen, strict=True) for _ in range(*segment.layers)]
    if pruned and len(plan.segments) > 1:
        prune(keys, values, plan, seen, sequence)
        lengths = [sequence.count] * len(lengths)
    return Staged(thinker.logits(last), kept, keys, values, lengths)


def choose(
    plan: StagePlan, scores: Tensor, kind: Tensor, video_keep: float, audio_keep: float
) -> tuple[Tensor, Tensor]:
    """Stage II: index and count of what stays of a sequence with these scores, (B, S), as `compact` gives them.

    For the compiler, which would spend half of its time on these few small tensors: on a CPU one operator, elsewhere
    compiled once for all selections of a plan, which are brought to one shape, with ratios as tensors.
    """
    if scores.device.type == "cpu":
        return _choose_on_a_cpu(scores, kind, video_keep, audio_keep, plan.temperature, plan.windows)
    padding = plan.segments[0].length - scores.shape[1]
    ratios = (torch.full((), ratio, dtype=torch.float64, device=scores.device) for ratio in (video_keep, audio_keep))
    scores, kind = F.pad(scores, (0, padding)), F.pad(kind, (0, padding), value=PADDING)
    return _choose(scores, kind, *ratios, plan.temperature, plan.windows)


def _select(
    scores: Tensor,
    kind: Tensor,
    video_keep: float | Tensor,
    audio_keep: float | Tensor,
    temperature: float,
    windows: int,
) -> tuple[Tensor, Tensor]:
    return compact(select(scores, kind, video_keep, audio_keep, temperature, windows), kind.shape[1])


_choose = torch.compiler.nested_compile_region(_select)


@torch.library.custom_op("seats::choose", mutates_args=(), device_types="cpu")
def _choose_on_a_cpu(
    scores: Tensor, kind: Tensor, video_keep: float, audio_keep: float, temperature: float, windows: int
) -> tuple[Tensor, Tensor]:
    return _select(scores, kind, video_keep, audio_keep, temperature, windows)


@_choose_on_a_cpu.register_fake
def _(
    scores: Tensor, kind: Tensor, video_keep: float, audio_keep: float, temperature: float, windows: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(kind, dtype=torch.int64), scores.new_empty(len(scores), dtype=torch.int64)


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
    """Stage I: the most diverse tokens of every window, with all of the text, in the order of the prompt.

    x: (B, P, hidden), deepstack: (levels, B, P, hidden) or None, in the order of the pool.
    """
    batch, slots, _ = x.shape
    counts = plan.counts
    keep = [request.place[:, : counts.text] < slots]
    parts = (
        (counts.video_windows, counts.video_window, plan.video_ratio, request.video_sizes),
        (counts.audio_windows, AUDIO_WINDOW, plan.audio_ratio, request.audio_sizes),
    )
    received = request.received.gather(1, request.source.clamp(min=0))
    start = counts.text
    for windows, size, ratio, sizes in parts:
        end = start + windows * size
        if windows:
            features = rearrange(x[:, start:end], "b (w n) d -> (b w) n d", w=windows)
            weights = rearrange(received[:, start:end], "b (w n) -> (b w) n", w=windows)
            picked = max_min_keep(features, weights, sizes.flatten(), window_counts(sizes.flatten(), ratio))
            keep.append(rearrange(picked, "(b w) n -> b (w n)", b=batch))
        start = end
    kind = torch.cat(
        [
            torch.full((length,), kind, dtype=torch.uint8, device=x.device)
            for kind, length in (
                (TEXT, counts.text),
                (VIDEO, parts[0][0] * parts[0][1]),
                (AUDIO, parts[1][0] * parts[1][1]),
            )
        ]
    )
    kept = torch.cat(keep, dim=1)
    everything = Sequence(
        x=x,
        positions=request.positions,
        place=request.place,
        kind=kind.expand(batch, -1),
        deepstack=deepstack,
        count=kept.sum(dim=1),
    )
    if slots == counts.text:  # text alone, in order already: an hour of video is not copied
        return everything
    order = torch.where(kept, request.place, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    return everything.take(order[:, : plan.segments[0].length], everything.count)


@dataclass(frozen=True)
class Prompt:
    """Where the tokens of one prompt stand: what a plan is made from, and what fills it.

    text, video, audio: (n,) positions in the prompt; image tokens count as text. video_sizes, audio_sizes: tokens in
    each window of Stage I, in order. runs: of adjacent tokens of video, and of audio.
    """

    text: Tensor
    video: Tensor
    audio: Tensor
    video_sizes: tuple[int, ...]
    audio_sizes: tuple[int, ...]
    runs: tuple[int, int]

    def counts(self, encoder_ratios: tuple[float, float]) -> Counts:
        return counts_of(
            encoder_ratios,
            text=len(self.text),
            video_sizes=self.video_sizes,
            audio_sizes=self.audio_sizes,
            runs=self.runs,
        )


def read_prompt(layout: Layout, inputs: Inputs, config: OmniConfig) -> Prompt:
    """Raises InputError where the prompt does not end with text."""
    length = layout.positions.shape[1]
    kind = torch.zeros(length, dtype=torch.uint8)
    kind[layout.video], kind[layout.audio] = VIDEO, AUDIO
    if int(kind[-1]) != TEXT:
        raise InputError("token selection needs a prompt that ends with text: its last token asks for the others.")
    merge = config.vision.spatial_merge_size**2
    video_sizes: list[int] = []
    for grids, height, width in [] if inputs.video_grid_thw is None else inputs.video_grid_thw.tolist():
        video_sizes += _windows(grids * height * width // merge, 2 * height * width // merge)
    audio_sizes: list[int] = []
    for frames in inputs.mel_lengths.tolist():
        audio_sizes += _windows(config.audio.token_count(frames), AUDIO_WINDOW)
    starts = run_starts(kind[None])[0]
    video_runs, audio_runs = (int((starts & (kind == medium)).sum()) for medium in (VIDEO, AUDIO))
    return Prompt(
        text=(kind == TEXT).nonzero().flatten(),
        video=layout.video,
        audio=layout.audio,
        video_sizes=tuple(video_sizes),
        audio_sizes=tuple(audio_sizes),
        runs=(video_runs, audio_runs),
    )


def whole_prompt(length: int) -> Prompt:
    """A prompt of which every token stays, whatever its kind."""
    none = torch.empty(0, dtype=torch.long)
    return Prompt(text=torch.arange(length), video=none, audio=none, video_sizes=(), audio_sizes=(), runs=(0, 0))


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
    received: dict[str, Tensor],
    device: torch.device,
) -> Request:
    """The tensors of one prompt in the slots of its plan, on `device`.

    ids: (1, S). features, received: `Thinker.encode`. Raises ValueError where the plan does not hold the prompt.
    """
    plan.check_holds(prompt.counts(plan.encoder_ratios))
    counts = plan.counts
    place = torch.full((counts.pool,), counts.pool)
    place[: len(prompt.text)] = prompt.text
    start, sizes = counts.text, []
    for name, windows, width in (
        ("video", counts.video_windows, counts.video_window),
        ("audio", counts.audio_windows, AUDIO_WINDOW),
    ):
        tokens, filled = getattr(prompt, name), torch.tensor(getattr(prompt, f"{name}_sizes"), dtype=torch.long)
        window = torch.arange(len(filled)).repeat_interleave(filled)
        inside = torch.arange(len(tokens)) - (filled.cumsum(0) - filled).repeat_interleave(filled)
        place[start + window * width + inside] = tokens
        sizes.append(F.pad(filled, (0, windows - len(filled)))[None].to(device))
        start += windows * width

    source = torch.full((ids.shape[1],), -1)
    weights = torch.zeros(counts.pool, device=device)
    media = None
    if features:
        levels, like = max(map(len, features.values())), next(iter(features.values()))
        media = like.new_zeros(levels, 1, counts.pool, like.shape[-1], device=device)
    first = 0
    for name, tokens in features.items():
        assert media is not None
        end = first + tokens.shape[1]
        media[: len(tokens), 0, first:end] = tokens
        source[getattr(layout, name)] = torch.arange(first, end)
        if name in received:
            weights[first:end] = received[name]
        first = end
    there = place < counts.pool
    at = torch.where(there, place, 0)
    return Request(
        ids=ids[:, at.to(ids.device)].to(device),
        positions=layout.positions[:, None, at].to(device),
        place=place[None].to(device),
        media=media,
        source=torch.where(there, source[at], -1)[None].to(device),
        received=weights[None],
        video_sizes=sizes[0],
        audio_sizes=sizes[1],
    )


def join(requests: list[Request]) -> Request:
    """Requests of one plan, one after another in one batch."""
    if len(requests) == 1:
        return requests[0]
    some = [request.media for request in requests if request.media is not None]
    media = None
    if some:
        levels = max(map(len, some))
        # Prompts without pictures have no deepstack, those without any media nothing: their part stays zero.
        media = some[0].new_zeros(levels, len(requests), *some[0].shape[2:])
        for row, request in enumerate(requests):
            if request.media is not None:
                media[: len(request.media), row] = request.media[:, 0]
    return Request(
        ids=torch.cat([request.ids for request in requests]),
        positions=torch.cat([request.positions for request in requests], dim=1),
        place=torch.cat([request.place for request in requests]),
        media=media,
        source=torch.cat([request.source for request in requests]),
        received=torch.cat([request.received for request in requests]),
        video_sizes=torch.cat([request.video_sizes for request in requests]),
        audio_sizes=torch.cat([request.audio_sizes for request in requests]),
    )
