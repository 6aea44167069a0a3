"""What prompts that begin alike need not compute twice: keys and values up to the first selection between the layers.

What a method keeps before the decoder depends on the media alone, and the layers that follow are causal. So what they
make of a prompt's beginning is the same for every question that comes after it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from omni import stages
from omni.config import OmniConfig
from omni.inputs import Inputs, Medium
from omni.processing.positions import Layout
from omni.request import Prompt
from omni.reuse import LRUCache
from omni.stages import Prefix
from seats.method import Method

LEAST_REST = 2
"""Tokens that are run anew even where a whole prompt is known: the last makes the logits, and one row alone would be
another shape to the compiler."""

LONG_REST = 1024
"""Tokens after a beginning from which on their attention counts: by a mask, it takes twice the operations of a whole
prompt's, by slower kernels. Where they are more than what the beginning spares, to start over is faster."""


@dataclass(frozen=True)
class PendingPrompt:
    """A request on its way, with what is known of it before it runs. media: in the order of the encoders."""

    inputs: Inputs
    layout: Layout
    prompt: Prompt
    media: list[Medium]
    config: OmniConfig

    @property
    def ids(self) -> Tensor:
        return self.inputs.input_ids[0]

    @property
    def length(self) -> int:
        return self.layout.positions.shape[1]

    @cached_property
    def digests(self) -> list[bytes]:
        return [medium.digest() for medium in self.media]

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """The first place of each medium's tokens and one past the last."""
        merge = self.config.vision.spatial_merge_size**2
        spans = []
        for kind in ("image", "video", "audio"):
            some = [medium for medium in self.media if medium.kind == kind]
            places = getattr(self.layout, kind)
            counts = (
                self.config.audio.token_count(int(each.size)) if kind == "audio" else int(each.size.prod()) // merge
                for each in some
            )
            ends = accumulate(counts, initial=0)
            spans += [(int(places[start]), int(places[end - 1]) + 1) for start, end in pairwise(ends)]
        return spans

    def is_spared_by(self, entered: int, tokens: int) -> bool:
        """Whether a beginning of so many tokens, of which some entered the decoder, spares as much as what follows it
        costs (`LONG_REST`)."""
        return self.length - tokens <= max(entered, LONG_REST)

    def keys(self, method: Method | None) -> list[Hashable]:
        """Under which a beginning of this prompt may be kept, that with the most media first.

        With a method all of the video and sound must be in it, which is chosen from as a whole.
        """
        order = sorted(range(len(self.media)), key=lambda number: self.spans[number])
        if not order:
            return []
        head = tuple(self.ids[: self.spans[order[0]][0]].tolist())
        known = [self.digests[number] for number in order]
        least = 1
        if method is not None:
            heard = [number for number, medium in enumerate(order) if self.media[medium].kind != "image"]
            least = max(heard) + 1
        return [(method, head, *known[:count]) for count in range(len(known), least - 1, -1)]


@dataclass(frozen=True)
class CachedPrefix:
    """A prompt that has run. ids: (S,), positions: (3, S), entered: (n,) the places of what entered the decoder, all on
    the CPU. prefix: what became of these, of one row; what its tensors hold past them is not looked at."""

    ids: Tensor
    positions: Tensor
    entered: Tensor
    prefix: Prefix

    @property
    def nbytes(self) -> int:
        sequence = self.prefix.sequence
        held = [value for value in vars(sequence).values() if isinstance(value, Tensor)]
        return sum(each.nbytes for each in (*held, *self.prefix.keys, *self.prefix.values))

    def common(self, pending: PendingPrompt) -> int:
        """How many tokens another prompt with all of these media has in common with this one, and need not run.

        Never a part of a medium, nor all of a prompt (`LEAST_REST`).
        """
        length = min(len(self.ids), pending.length)
        same = self.ids[:length] == pending.ids[:length].cpu()
        same &= (self.positions[:, :length] == pending.layout.positions[:, :length]).all(dim=0)
        differing = (~same).nonzero()
        cut = min(int(differing[0]) if len(differing) else length, pending.length - LEAST_REST)
        return max(0, min([cut, *(start for start, end in pending.spans if start < cut < end)]))


@dataclass(frozen=True)
class PrefixMatch:
    """So many tokens of a prompt are those of a prefix that is kept."""

    cached: CachedPrefix
    tokens: int

    def is_outgrown_by(self, pending: PendingPrompt) -> bool:
        """Whether the prompt goes on where the other one ended, as a conversation does, or has media that it had not:
        then the next one will have more in common with this."""
        return self.tokens == len(self.cached.ids) or max(pending.spans)[0] >= self.tokens

    @property
    def entered(self) -> int:
        """Of these tokens."""
        return int(torch.searchsorted(self.cached.entered, self.tokens))


def longest_match(kept: LRUCache[CachedPrefix], pending: PendingPrompt, method: Method | None) -> PrefixMatch | None:
    """The longest beginning of a prompt that is kept, where it spares more than text and, of a long prompt, as much as
    it leaves (`LONG_REST`)."""
    for key in pending.keys(method):
        cached = kept.get(key)
        if cached is None:
            continue
        tokens = cached.common(pending)
        selected = [span for span, medium in zip(pending.spans, pending.media, strict=True) if medium.kind != "image"]
        least = min(pending.spans)[1] if method is None else max(end for _, end in selected)
        match = PrefixMatch(cached, tokens)
        if tokens >= least and pending.is_spared_by(match.entered, tokens):
            return match
    return None


def gathered(matches: Sequence[PrefixMatch], slots: int) -> Prefix:
    """Beginnings as one, in so many slots: of one row where all of them are the same.

    slots: at least `PrefixMatch.entered` of each.
    """
    prefixes = [each.cached.prefix for each in matches]
    counts = torch.tensor([each.entered for each in matches], device=prefixes[0].sequence.count.device)
    if all(prefix is prefixes[0] for prefix in prefixes):
        prefixes = prefixes[:1]
    sequences = [prefix.sequence for prefix in prefixes]
    levels = max(0 if some.deepstack is None else len(some.deepstack) for some in sequences)
    return Prefix(
        stages.Sequence(
            x=_stacked([some.x for some in sequences], slots, 1),
            positions=_stacked([some.positions for some in sequences], slots, 2, batch=1),
            place=_stacked([some.place for some in sequences], slots, 1),
            kind=_stacked([some.kind for some in sequences], slots, 1),
            clip=_stacked([some.clip for some in sequences], slots, 1),
            deepstack=_stacked([some.levels(levels) for some in sequences], slots, 2, batch=1) if levels else None,
            count=counts,
        ),
        *(
            [_stacked(list(layer), slots, 2) for layer in zip(*some, strict=True)]
            for some in ([prefix.keys for prefix in prefixes], [prefix.values for prefix in prefixes])
        ),
    )


def _stacked(tensors: list[Tensor], slots: int, axis: int, batch: int = 0) -> Tensor:
    """Tensors with so many slots along an axis, cut or filled up, and one behind the other along that of the batch."""
    fitting = []
    for tensor in tensors:
        some = tensor.narrow(axis, 0, min(slots, tensor.shape[axis]))
        lacking = slots - some.shape[axis]
        fitting.append(F.pad(some, (0, 0) * (some.dim() - axis - 1) + (0, lacking)) if lacking else some)
    return fitting[0] if len(fitting) == 1 else torch.cat(fitting, dim=batch)


def cached_prefix(
    pending: PendingPrompt, row: int, entered: Tensor, first: Prefix, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> CachedPrefix:
    """What to keep of one row of a prefill.

    entered: (n,) places, on the CPU. keys, values: of the layers before the first selection, (B, kv_heads, slots, dim),
    shared where there is one row and copied where they would hold others' memory.
    """
    alone = len(keys[0]) == 1

    def own(tensor: Tensor, batch: int = 0) -> Tensor:
        return tensor if alone else tensor.narrow(batch, row, 1).clone()

    some = first.sequence
    sequence = replace(
        some,
        x=own(some.x),
        positions=own(some.positions, 1),
        place=own(some.place),
        kind=own(some.kind),
        clip=own(some.clip),
        deepstack=None if some.deepstack is None else own(some.deepstack, 1),
        count=some.count[row : row + 1],
    )
    prefix = Prefix(sequence, [own(each) for each in keys], [own(each) for each in values])
    # Ids and places are copied: who asked may write to theirs.
    return CachedPrefix(pending.ids.cpu().clone(), pending.layout.positions, entered.clone(), prefix)
