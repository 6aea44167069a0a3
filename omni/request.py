"""What a prompt is made into: where its tokens stand, and their tensors in the slots of a plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from omni.config import OmniConfig
from omni.encoders.received import Signals
from omni.inputs import InputError, Inputs
from omni.processing.positions import Layout
from seats.counts import AUDIO_WINDOW, Counts
from seats.method import Method
from seats.plan import StagePlan, counts_of
from seats.selection import AUDIO, TEXT, VIDEO, count_windows


@dataclass(frozen=True)
class Prompt:
    """Where the tokens of one prompt stand: what a plan is made from, and what fills it.

    text, video, audio: (n,) positions in the prompt; image tokens count as text. video_sizes, audio_sizes: tokens in
    each window that a method looks into before the decoder, in order; video_clips, audio_clips: of which clip or sound
    it is. windows: between the layers, and those of them with both modalities (`count_windows`). start: the first
    position; what is before it is no part of this.
    """

    text: Tensor
    video: Tensor
    audio: Tensor
    video_sizes: tuple[int, ...]
    audio_sizes: tuple[int, ...]
    video_clips: tuple[int, ...]
    audio_clips: tuple[int, ...]
    windows: tuple[int, int]
    start: int = 0
    _counted: list[tuple[Method, Counts]] = field(default_factory=list, init=False, repr=False, compare=False)

    def counts(self, method: Method | None) -> Counts:
        """method: None where every token stays, as in a `whole_prompt`."""
        if method is None:
            return Counts(len(self.text), len(self.text), 0, 0, 1, 0, 0, 0)
        for known, counts in self._counted:  # asked several times on a request's way
            if known is method:
                return counts
        counts = counts_of(
            method,
            text=len(self.text),
            video_sizes=self.video_sizes,
            audio_sizes=self.audio_sizes,
            windows=self.windows,
        )
        self._counted.append((method, counts))
        return counts


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
    # One token of each run tells as much of windows as all of them.
    begins = F.pad((kind[1:] != kind[:-1]) | (layout.clip[1:] != layout.clip[:-1]), (1, 0), value=True).nonzero()[:, 0]
    return Prompt(
        text=(kind == TEXT).nonzero().flatten(),
        video=layout.video,
        audio=layout.audio,
        video_sizes=tuple(chain(*videos)),
        audio_sizes=tuple(chain(*sounds)),
        video_clips=tuple(chain(*([clip] * len(sizes) for clip, sizes in enumerate(videos)))),
        audio_clips=tuple(chain(*([clip] * len(sizes) for clip, sizes in enumerate(sounds)))),
        windows=count_windows(kind[begins], layout.clip[begins]),
    )


def whole_prompt(length: int, start: int = 0) -> Prompt:
    """A prompt, or what of it begins at `start`, of which every token stays, whatever its kind."""
    none = torch.empty(0, dtype=torch.long)
    return Prompt(torch.arange(start, length), none, none, (), (), (), (), (0, 0), start)


def _windows(tokens: int, size: int) -> list[int]:
    """Sizes of windows that cut `tokens` in order, the last of which may be shorter."""
    full, rest = divmod(tokens, size)
    return [size] * full + [rest] * (rest > 0)


NOWHERE = 2**40
"""The place of what is no token: beyond every prompt's length."""


@dataclass(frozen=True)
class PrefillBatch:
    """Prompts of one plan, their tokens in the plan's pool: text, then video by windows, then audio by windows.

    ids: (B, P) token ids. positions: (3, B, P). place: (B, P) where each token stands in its prompt; NOWHERE in slots
    that hold none. media: (1 + deepstack levels, B, P, hidden), what the encoders made, in their order and not in
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


def fill_pool(
    plan: StagePlan,
    prompt: Prompt,
    layout: Layout,
    ids: Tensor,
    features: dict[str, Tensor],
    signals: dict[str, Signals],
    device: torch.device,
) -> PrefillBatch:
    """The tensors of one prompt in the slots of its plan, on `device`.

    ids: (1, S). features, signals: `Thinker.encode`. Raises ValueError where the plan does not hold the prompt.
    """
    return with_media(assign_slots(plan, prompt, layout, ids, device), features, signals)


def assign_slots(plan: StagePlan, prompt: Prompt, layout: Layout, ids: Tensor, device: torch.device) -> PrefillBatch:
    """`fill_pool` as far as it needs no encoder: a GPU can still be encoding."""
    plan.check_holds(prompt.counts(plan.method))
    counts = plan.counts
    place = torch.full((counts.pool,), NOWHERE)
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
    media = media[media >= prompt.start]
    source[media] = torch.arange(len(media))
    there = place < NOWHERE
    at = torch.where(there, place, 0)
    return PrefillBatch(
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


def with_media(slots: PrefillBatch, features: dict[str, Tensor], signals: dict[str, Signals]) -> PrefillBatch:
    """A batch with what the encoders made of the media in its prompt, in the order of `Thinker.encode`."""
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


def join(batches: list[PrefillBatch]) -> PrefillBatch:
    """Batches of one plan as one, one behind the other."""
    if len(batches) == 1:
        return batches[0]
    some = [batch.media for batch in batches if batch.media is not None]
    media = keys = None
    if some:
        levels = max(map(len, some))
        # Prompts without pictures have no deepstack, those without any media nothing: their part stays zero.
        media = some[0].new_zeros(levels, len(batches), *some[0].shape[2:])
        for row, batch in enumerate(batches):
            if batch.media is not None:
                media[: len(batch.media), row] = batch.media[:, 0]
    known = [batch.keys for batch in batches if batch.keys is not None]
    if known:
        keys = known[0].new_zeros(len(batches), known[0].shape[1], max(each.shape[2] for each in known))
        for row, batch in enumerate(batches):
            if batch.keys is not None:
                keys[row, :, : batch.keys.shape[2]] = batch.keys[0]
    return PrefillBatch(
        ids=torch.cat([batch.ids for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches], dim=1),
        place=torch.cat([batch.place for batch in batches]),
        media=media,
        source=torch.cat([batch.source for batch in batches]),
        received=torch.cat([batch.received for batch in batches]),
        keys=keys,
        clip=torch.cat([batch.clip for batch in batches]),
        video_sizes=torch.cat([batch.video_sizes for batch in batches]),
        audio_sizes=torch.cat([batch.audio_sizes for batch in batches]),
        video_clips=torch.cat([batch.video_clips for batch in batches]),
        audio_clips=torch.cat([batch.audio_clips for batch in batches]),
    )
