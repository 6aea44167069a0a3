"""Filling parameters from safetensors: memory-mapped, straight to device and dtype, nothing held twice."""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from weights.checkpoint import StoredTensor, listed, read_index

PIECE_BYTES = 16 << 20
"""How much of a shard is mapped at a time, at least a row: all that loading takes besides the parameters."""


@dataclass(frozen=True)
class Destination:
    """Where a public tensor goes: a parameter, or a part of it.

    rows: `slice(a, b)` of a parameter that fuses several tensors by rows (dimension 0).
    entry: place in a parameter that stacks tensors in a new dimension 0; `rows` are then rows of the entry.
    zeros: how many of these rows, the last ones, and of the last columns are no part of the public tensor: a product
    wider than its weights, which must be zero there.
    """

    parameter: str
    rows: slice | None = None
    entry: int | None = None
    zeros: tuple[int, int] = (0, 0)

    def view(self, parameter: Tensor) -> Tensor:
        """The part of the parameter that the public tensor fills, of the public tensor's shape."""
        part = self.with_zeros(parameter)
        for dim, zeros in enumerate(self.zeros):
            part = part.narrow(dim, 0, part.shape[dim] - zeros) if zeros else part
        return part

    def with_zeros(self, parameter: Tensor) -> Tensor:
        """The same, and the zeros that belong to it."""
        part = parameter if self.entry is None else parameter[self.entry]
        return part if self.rows is None else part[self.rows]

    def clear(self, parameter: Tensor) -> None:
        """Writes the zeros, and nothing else."""
        part = self.with_zeros(parameter)
        for dim, zeros in enumerate(self.zeros):
            if zeros:
                part.narrow(dim, part.shape[dim] - zeros, zeros).zero_()


@torch.no_grad()
def fill(
    module: nn.Module,
    folder: str | Path,
    destinations: Mapping[str, Destination],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    prefix: str = "thinker.",
    ignored: Collection[str] = (),
    transposed: bool = False,
    progress: bool = False,
) -> None:
    """Replaces a module's parameters, made on `meta`, by ones on `device` in `dtype`, filled from a checkpoint.

    destinations: public tensor name → where it goes; together they cover every parameter exactly once.
    ignored: names under `prefix` that the checkpoint may hold and nobody needs. progress: a bar on stderr.
    transposed: the longer side of a matrix is contiguous, of a square one the outputs.
    Host memory besides the parameters: PIECE_BYTES, or a row where that is more. Buffers stay as they are.
    Raises CheckpointError, before anything is allocated, for a damaged checkpoint (`read_index`) and for
    tensors missing, unexpected or misshapen.
    """
    from tqdm import tqdm

    stored = read_index(folder, prefix)
    meta = dict(module.named_parameters())
    _check(Path(folder), stored, meta, destinations, ignored)
    for name, parameter in meta.items():
        owner, _, leaf = name.rpartition(".")
        empty = _allocate(parameter.shape, dtype, torch.device(device), transposed)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(empty, parameter.requires_grad))
    parameters = dict(module.named_parameters())
    clear(module, destinations)

    wanted = sorted(destinations, key=lambda name: (stored[name].path, stored[name].offset))
    total = sum(stored[name].num_bytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for path, names in groupby(wanted, key=lambda name: stored[name].path):
            with path.open("rb") as file:
                for name in names:
                    destination = destinations[name]
                    _copy(file, stored[name], destination.view(parameters[destination.parameter]))
                    bar.update(stored[name].num_bytes)


def clear(module: nn.Module, destinations: Mapping[str, Destination]) -> None:
    """Writes zeros where parameters are wider than their public tensors: after filling them with something else."""
    for destination in destinations.values():
        destination.clear(module.get_parameter(destination.parameter).detach())


def _check(
    folder: Path,
    stored: Mapping[str, StoredTensor],
    parameters: Mapping[str, Tensor],
    destinations: Mapping[str, Destination],
    ignored: Collection[str],
) -> None:
    """Raises CheckpointError, which lists all, unless checkpoint, destinations and parameters fit."""
    missing = [
        f"missing: {name!r}, for {destination.parameter}"
        for name, destination in destinations.items()
        if name not in stored
    ]
    unexpected = [
        f"unexpected: {name!r} in {tensor.path.name}"
        for name, tensor in stored.items()
        if name not in destinations and name not in ignored
    ]
    misshapen = []
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}
    for name, destination in destinations.items():
        part = destination.view(parameters[destination.parameter])
        whole = destination.with_zeros(parameters[destination.parameter])
        begin = int(whole.storage_offset())
        spans[destination.parameter].append((begin, begin + whole.numel()))
        if name in stored and stored[name].shape != part.shape:
            shapes = f"is {stored[name].shape}, the model takes {tuple(part.shape)}"
            misshapen.append(f"misshapen: {name!r} in {stored[name].path.name} {shapes}")
    unfilled = [
        f"not filled once: {name}, elements {begin} to {end}"
        for name, parameter in parameters.items()
        for begin, end in _breaks(sorted(spans[name]), parameter.numel())
    ]
    kinds = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not filled once": unfilled,
    }
    if problems := [problem for kind in kinds.values() for problem in kind]:
        counts = ", ".join(f"{len(kind)} {what}" for what, kind in kinds.items() if kind)
        raise listed(f"The checkpoint in {folder} does not fit the model ({counts}):", problems)


def _breaks(spans: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Where sorted spans that should tile 0 … size leave a gap or overlap."""
    place = 0
    for begin, end in (*spans, (size, size)):
        if begin != place:
            yield min(begin, place), max(begin, place)
        place = max(place, end)


def _allocate(shape: torch.Size, dtype: torch.dtype, device: torch.device, transposed: bool) -> Tensor:
    if transposed and len(shape) == 2 and shape[0] >= shape[1]:
        return torch.empty(shape[1], shape[0], dtype=dtype, device=device).t()
    return torch.empty(shape, dtype=dtype, device=device)


def _copy(file: BinaryIO, tensor: StoredTensor, target: Tensor) -> None:
    """Reads one tensor into a target of its shape, converting to the target's device and dtype.

    Each piece, some rows or one, is mapped and unmapped in turn, so that pages of the file never pile up in this
    process. The mapping is private rather than read-only because PyTorch wants writable memory; nothing writes.
    """
    rows = target.reshape(1) if target.dim() == 0 else target
    row = tensor.dtype.itemsize * math.prod(rows.shape[1:])
    if rows.numel() == 0:
        return
    step = max(1, PIECE_BYTES // row)
    for first in range(0, len(rows), step):
        piece = rows[first : first + step]
        begin = tensor.offset + first * row
        margin = begin % mmap.ALLOCATIONGRANULARITY  # a mapping starts on a page
        length = margin + len(piece) * row
        with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin - margin) as window:
            values = torch.frombuffer(window, dtype=tensor.dtype, count=piece.numel(), offset=margin)
            piece.copy_(values.view(piece.shape))
            del values  # a window with a view cannot be closed
