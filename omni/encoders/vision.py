"""What the vision encoders of both families share: batches of temporal grids, and attention inside a frame.

Temporal grids (pairs of frames) never see each other, so they run as dense batches of a fixed number of grids: few
static shapes per frame size, whatever the duration, and memory bounded by one batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from omni.config import VisionConfig
from omni.encoders.batches import batch_sizes
from omni.encoders.received import Signals, joined, mean_keys, received_attention
from omni.layers import Call, directly
from omni.processing.frames import Pixels, cut_patches
from omni.rope import rotate
from seats.method import Needs

PATCHES_PER_BATCH = 2304
"""Patches that a batch of grids aims at on a CPU: four grids of 144 tokens, enough rows for full matrix speed."""
PATCHES_PER_GPU_BATCH = 9216
"""On a GPU: sixteen such grids. They take about 0.4 GB beside the weights, in bfloat16."""
LAYOUT_BYTES = 64 * 2**20
"""Of tables of frame sizes: hundreds of those of clips, three of photographs of 12 megapixels."""


class VisionEncoder(nn.Module):
    """The walk over clips and pictures; a family says how one batch of grids is encoded.

    A family sets `patch_embedding` (hidden, channels, time, height, width) and has

    make_layout(height, width, device) → whatever its `encode_batch` needs to know of frames of so many patches.
    encode_batch(patches, layout, real, needs): (grids, N, patch_dim) of one frame size, N patches in groups of merge ×
    merge, → (1 + deepstack levels, grids, N / merge², out_hidden_size): the tokens, then what is added to them after
    each of the first decoder layers. And, with `needs`, `signals`; real: (grids,), which of the grids are.
    """

    patch_embedding: nn.Parameter

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layouts: OrderedDict[tuple[int, int, torch.device], Any] = OrderedDict()

    def make_layout(self, height: int, width: int, device: torch.device) -> Any:
        raise NotImplementedError

    def layout(self, height: int, width: int) -> Any:
        """That of a frame size, kept for the next time: those last used, LAYOUT_BYTES of them at most."""
        key = (height, width, self.patch_embedding.device)
        found = self.layouts.pop(key, None) or self.make_layout(*key)
        self.layouts[key] = found
        while sum(map(nbytes, self.layouts.values())) > LAYOUT_BYTES:
            self.layouts.popitem(last=False)
        return found

    def encode_batch(
        self, patches: Tensor, layout: Any, real: Tensor | None, needs: Needs | None
    ) -> tuple[Tensor, Signals | None]:
        raise NotImplementedError

    def forward(
        self, patches: Tensor | Pixels, grid_thw: Tensor, needs: Needs | None = None, *, call: Call = directly
    ) -> tuple[Tensor, Signals | None]:
        """Encodes pictures or clips, one after another.

        patches: (ΣT·H·W, patch_dim), on any device, or the bytes that they are made of: those go to the device, and
        are cut and normalised there. grid_thw: (n, 3) patches in time, height and width.
        Returns (levels, ΣT·H·W / merge², out_hidden_size) in the encoder's dtype, on its device; and what a method
        `needs` of these tokens.
        """
        tokens, signals = zip(*self.walk(patches, grid_thw.tolist(), needs, call), strict=True)
        return torch.cat(tokens, dim=1), joined(signals)

    def walk(
        self, patches: Tensor | Pixels, grids_thw: list[list[int]], needs: Needs | None, call: Call
    ) -> Iterator[tuple[Tensor, Signals | None]]:
        """`forward`, batch by batch (`grid_batches` of each picture or clip): looks at the frames of one at a time."""
        device = self.patch_embedding.device
        if isinstance(patches, Pixels):
            mean, std = patches.normalisation(device)
        start = 0
        for clip, (grids, height, width) in enumerate(grids_thw):
            layout = self.layout(height, width)
            first = 0
            for batch in grid_batches(grids, height * width, self.config.temporal_patch_size, device):
                real = min(batch, grids - first)
                if isinstance(patches, Pixels):
                    frames = sent(patches.grids(clip, first, batch), device)
                    group = call(self.cut, frames, mean, std)
                else:
                    group = patches[start : start + real * height * width].to(device).to(self.patch_embedding.dtype)
                    group = F.pad(group.view(real, height * width, -1), (0, 0, 0, 0, 0, batch - real))
                    start += real * height * width
                valid = None if needs is None else torch.arange(batch, device=device) < real
                tokens, signals = call(self.encode_batch, group, layout, valid, needs)
                if signals is not None:
                    received, keys = signals.first(real)
                    signals = Signals(received.flatten(), None if keys is None else keys.flatten(0, 1))
                first += real
                yield tokens[:, :real].flatten(1, 2), signals

    def cut(self, frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """`cut_patches` in the encoder's dtype."""
        sizes = {"merge": self.config.spatial_merge_size, "step": self.config.temporal_patch_size}
        patches = cut_patches(frames, mean, std, patch=self.config.patch_size, **sizes)
        return patches.to(self.patch_embedding.dtype)


def sent(frames: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; on a GPU without waiting for it, by way of memory that it reads by itself."""
    if device.type == "cuda" and frames.device.type == "cpu":
        return frames.pin_memory().to(device, non_blocking=True)
    return frames.to(device)


def nbytes(values: Any) -> int:
    """Of the tensors in a dataclass or tuple, however deep."""
    if isinstance(values, Tensor):
        return values.nbytes
    if is_dataclass(values):
        values = tuple(vars(values).values())
    return sum(map(nbytes, values)) if isinstance(values, tuple) else 0


def grid_batches(grids: int, patches: int, step: int, device: torch.device) -> list[int]:
    """How many temporal grids of so many patches run together, batch by batch: `step` or a multiple of it, or one.

    A window of pairs of grids, which methods ask for, never crosses two batches.
    """
    if grids == 1:
        return [1]
    cpu, gpu = (
        step * max(1, min(most, aim // patches) // step)
        for most, aim in ((8, PATCHES_PER_BATCH), (16, PATCHES_PER_GPU_BATCH))
    )
    return batch_sizes(grids, device, cpu=cpu, gpu=gpu, least=step)


def patch_coordinates(tokens: Tensor, columns: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, (n · merge²,) each, where patches come in groups of merge × merge.

    tokens: (n,) numbers of the groups, row by row. columns: groups in a row.
    """
    patch = torch.arange(merge**2)
    row = (tokens // columns * merge)[:, None] + patch // merge
    column = (tokens % columns * merge)[:, None] + patch % merge
    return row.flatten(), column.flatten()


class Attention(nn.Module):
    """Every patch of a frame attends to all others of the frame."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], windows: tuple[tuple[int, int], ...] = ()) -> Tensor:
        """x: (grids, N, hidden). windows: how many, patches of each, by size, in order; none: the whole frame."""
        q, k, v = self.project(x, rotary)
        mixed = windowed(q, k, v, windows) if windows else F.scaled_dot_product_attention(q, k, v)
        return self.output(rearrange(mixed, "g h n d -> g n (h d)"))

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, and values, (grids, heads, N, dim) each.

        In memory a patch's heads are adjacent, as the products before and after have them: nothing is copied for that.
        """
        qkv = rearrange(self.qkv(x), "g n (three h d) -> g n three h d", three=3, h=self.heads)
        cos, sin = (table[:, None, None] for table in rotary)
        q, k = rotate(qkv[:, :, :2], cos, sin).unbind(2)
        return q.transpose(1, 2), k.transpose(1, 2), qkv[:, :, 2].transpose(1, 2)


def signals(q: Tensor, k: Tensor, real: Tensor | None, group: int, needs: Needs) -> Signals:
    """What a method needs of merged tokens, in the order of the patches.

    q, k: (grids, heads, N, dim). real: (grids,). Returns (grids, N / group, …).
    """
    keys = mean_keys(k, group) if needs.keys else None
    if needs.mean_query:
        grouped = reduce(k.float(), "g h (n group) d -> g h n d", "mean", group=group)
        scores = (grouped @ q.float().mean(dim=2)[..., None]).squeeze(-1) * q.shape[-1] ** -0.5
        return Signals(scores.softmax(dim=-1).mean(dim=1), keys)
    # A window is so many grids, whatever the block itself attends to.
    assert real is not None
    span = min(needs.grids, len(q))
    q, k = (rearrange(x, "(w span) h n d -> w h (span n) d", span=span) for x in (q, k))
    valid = repeat(real, "(w span) -> w (span n)", span=span, n=q.shape[2] // span)
    received = received_attention(q, k, valid)
    return Signals(reduce(received, "w (span n group) -> (w span) n", "mean", span=span, group=group), keys)


def windowed(q: Tensor, k: Tensor, v: Tensor, windows: tuple[tuple[int, int], ...]) -> Tensor:
    """Attention inside windows of adjacent patches; those of one size are one dense batch. (grids, heads, N, dim)."""
    parts = [count * size for count, size in windows]
    mixed = []
    for (_, size), *qkv in zip(windows, *(x.split(parts, dim=2) for x in (q, k, v)), strict=True):
        by_window = (rearrange(x, "g h (w n) d -> (g w) h n d", n=size) for x in qkv)
        part = F.scaled_dot_product_attention(*by_window)
        mixed.append(rearrange(part, "(g w) h n d -> g h (w n) d", g=len(q)))
    return torch.cat(mixed, dim=2) if len(mixed) > 1 else mixed[0]
