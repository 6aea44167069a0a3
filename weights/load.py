"""Filling parameters from safetensors: memory-mapped, straight to device and dtype, nothing held twice."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from weights.checkpoint import StoredTensor, listed, read_index
from weights.memory import check_memory

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


@dataclass(frozen=True)
class LowRank:
    """What is added to one tensor: scale · left @ right. left: (out, rank); right: (rank, in, …), read when used.

    base: the tensor itself where the adapter brings it along, instead of the checkpoint's. experts: how many share the
    factors, left (out, rank · experts) and right (experts · rank, in) then, for a tensor of all of them, or of one
    `expert` and so many `rows` of its outputs.
    """

    left: StoredTensor
    right: StoredTensor
    scale: float
    base: StoredTensor | None = None
    experts: int = 0
    expert: int | None = None
    rows: slice | None = None

    def factors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(…, out, rank) and, times the scale, (…, rank, all inputs), in float32."""
        left, right = (_factor(tensor, device) for tensor in (self.left, self.right))
        if self.experts:
            left = left.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
            right = right.unflatten(0, (self.experts, -1))
            if self.expert is not None:
                left, right = left[self.expert, self.rows or slice(None)], right[self.expert]
        return left, right * self.scale


@lru_cache(maxsize=2)  # those of experts serve many tensors
def _factor(tensor: StoredTensor, device: torch.device) -> Tensor:
    return read_whole(tensor).to(device, torch.float32).flatten(1)


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
    adapter: Mapping[str, LowRank] = MappingProxyType({}),
    transposed: bool = False,
    progress: bool = False,
) -> None:
    """Replaces a module's parameters, made on `meta`, by ones on `device` in `dtype`, filled from a checkpoint.

    destinations: public tensor name → where it goes; together they cover every parameter exactly once.
    ignored: names under `prefix` that the checkpoint may hold and nobody needs. adapter: public tensor name → what is
    added to it (`weights.adapters.read_adapter`). progress: a bar on stderr.
    transposed: the longer side of a matrix is contiguous, of a square one the outputs.
    Host memory besides the parameters: PIECE_BYTES, or a row where that is more; for an adapted tensor three times
    that and its two factors. Buffers stay as they are.
    Raises CheckpointError, before anything is allocated, for a damaged checkpoint (`read_index`), for tensors missing,
    unexpected or misshapen, and for more than the device can hold.
    """
    from tqdm import tqdm

    stored = read_index(folder, prefix)
    meta = dict(module.named_parameters())
    _check(Path(folder), stored, meta, destinations, ignored)
    check_memory(module, torch.device(device), dtype)
    for name, parameter in meta.items():
        owner, _, leaf = name.rpartition(".")
        empty = _allocate(parameter.shape, dtype, torch.device(device), transposed)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(empty, parameter.requires_grad))
    parameters = dict(module.named_parameters())
    clear(module, destinations)

    wanted = sorted(destinations, key=lambda name: (stored[name].path, stored[name].offset))
    total = sum(stored[name].num_bytes for name in wanted)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for name in wanted:
            destination = destinations[name]
            delta = adapter.get(name)
            tensor = stored[name] if delta is None or delta.base is None else delta.base
            _copy(tensor, destination.view(parameters[destination.parameter]), delta)
            bar.update(stored[name].num_bytes)
    _factor.cache_clear()


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
    places = {name: f" in {tensor.path.name}" for name, tensor in stored.items()}
    kinds = {**_unmatched(places, destinations, ignored), "misshapen": misshapen, "not filled once": unfilled}
    _refuse(f"The checkpoint in {folder}", kinds)


def check_names(
    where: str, names: Collection[str], destinations: Mapping[str, Destination], ignored: Collection[str] = ()
) -> None:
    """Raises CheckpointError, which lists all, for tensors missing or unexpected, before any file is there.

    where: whose names they are, for the error. names: of the thinker's tensors, and no others.
    """
    _refuse(where, _unmatched(dict.fromkeys(names, ""), destinations, ignored))


def _unmatched(
    places: Mapping[str, str], destinations: Mapping[str, Destination], ignored: Collection[str]
) -> dict[str, list[str]]:
    """Lines about tensors missing and unexpected. places: a checkpoint's name → what is said of where it is."""
    return {
        "missing": [
            f"missing: {name!r}, for {destination.parameter}"
            for name, destination in destinations.items()
            if name not in places
        ],
        "unexpected": [
            f"unexpected: {name!r}{place}"
            for name, place in places.items()
            if name not in destinations and name not in ignored
        ],
    }


_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|SCB|absmax)'")


def _refuse(where: str, kinds: Mapping[str, Sequence[str]]) -> None:
    """Raises CheckpointError where there is a problem of any kind."""
    if problems := [problem for kind in kinds.values() for problem in kind]:
        counts = ", ".join(f"{len(kind)} {what}" for what, kind in kinds.items() if kind)
        if any(_QUANTISED.search(problem) for problem in kinds["unexpected"]):
            counts += "; quantised weights are not supported"
        raise listed(f"{where} does not fit the model ({counts}):", problems)


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


def _copy(tensor: StoredTensor, target: Tensor, delta: LowRank | None) -> None:
    """Reads one tensor into a target of its shape, converting to the target's device and dtype.

    With what an adapter adds to it: the sum is one of float32, rounded once.
    """
    rows = target.reshape(1) if target.dim() == 0 else target
    factors = None if delta is None else delta.factors(target.device)
    first = 0
    for piece in pieces(tensor):
        into = rows[first : first + len(piece)]
        if factors is None:
            into.copy_(piece)
        else:
            left, right = factors
            some = slice(first, first + len(piece))
            added = left[some] @ (right[some] if right.dim() > 2 else right)
            into.copy_(added.view(piece.shape).add_(piece.to(target.device)))
        first += len(piece)
        del piece  # or the next would be mapped beside it


def pieces(tensor: StoredTensor) -> Iterator[Tensor]:
    """A stored tensor's rows, some at a time or one. Whoever lets go of a piece before the next holds one at a time.

    A piece is mapped from the file and unmapped with its last reference, so that pages of the file never pile up in
    this process. The mapping is private rather than read-only because PyTorch wants writable memory; nothing writes.
    """
    shape = tensor.shape or (1,)
    row = math.prod(shape[1:])
    if row == 0:
        return
    step = max(1, PIECE_BYTES // (row * tensor.dtype.itemsize))
    with tensor.path.open("rb") as file:
        for first in range(0, shape[0], step):
            numbers = min(step, shape[0] - first) * row
            begin = tensor.offset + first * row * tensor.dtype.itemsize
            margin = begin % mmap.ALLOCATIONGRANULARITY  # a mapping starts on a page
            length = margin + numbers * tensor.dtype.itemsize
            window = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=begin - margin)
            held = [torch.frombuffer(window, dtype=tensor.dtype, count=numbers, offset=margin).view(-1, *shape[1:])]
            del window
            yield held.pop()


def read_whole(tensor: StoredTensor) -> Tensor:
    """All numbers of a small one, in memory of their own."""
    whole = [piece.clone() for piece in pieces(tensor)]
    return torch.cat(whole).view(tensor.shape) if whole else torch.empty(tensor.shape, dtype=tensor.dtype)


def equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two stored tensors are the same numbers. Reads them in pieces, to the first difference."""
    if a.shape != b.shape:
        return False
    pairs = zip(pieces(a), pieces(b), strict=True)
    return all(torch.equal(left.float(), right.float()) for left, right in pairs)
