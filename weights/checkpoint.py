"""What a checkpoint folder holds: file, place, dtype and shape of every tensor, checked before any is read.

A shard is a safetensors file: 8 bytes of header length, a JSON header, the tensors back to back (format:
https://github.com/huggingface/safetensors#format). The index maps tensor names to shards. Both are foreign
data: nothing they say is believed before it is held against the file's real size.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weights.files import LEAVES, MAX_BYTES, parse_object, read_object, stays_inside

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MAX_LINES = 20
MAX_LINE_LENGTH = 240


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, fetched, trusted or fitted to the model. Says what and where."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a shard. offset: its first byte in the file."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def listed(summary: str, problems: Sequence[str]) -> CheckpointError:
    """One error for several problems: a line each, at most MAX_LINES of them, and how many more there are."""
    lines = [summary, *(f"  {problem[:MAX_LINE_LENGTH]}" for problem in problems[:MAX_LINES])]
    if len(problems) > MAX_LINES:
        lines.append(f"  … and {len(problems) - MAX_LINES} more.")
    return CheckpointError("\n".join(lines))


def read_index(folder: str | Path, prefix: str = "thinker.") -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder whose name starts with `prefix`.

    Shards without such a tensor are not opened and need not be there. Of a single file and an index the file is read,
    with a warning. Raises CheckpointError with all that is wrong: a shard that is absent, outside the folder, truncated
    or corrupt; index and shards that disagree; tensors of other dtypes than DTYPES.
    """
    folder = Path(folder)
    listing = listing_file(folder)
    if listing is None:
        raise no_checkpoint(folder)
    shard_of = None
    shards = [SINGLE_FILE]
    if listing == INDEX_FILE:
        shard_of = read_weight_map(folder, prefix)
        shards = sorted(set(shard_of.values()))
    elif (folder / INDEX_FILE).is_file():
        warnings.warn(f"{folder}: {SINGLE_FILE} is read, {INDEX_FILE} beside it is not: remove one.", stacklevel=2)

    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for shard in shards:
        try:
            held, unsound = _read_shard(_shard_path(folder, shard), prefix)
        except OSError as error:
            problems.append(f"{shard} cannot be read: {error.strerror}.")
        except ValueError as error:
            problems.append(f"{shard} {error}.")
        else:
            tensors |= held
            problems += [f"{shard}: {problem}." for problem in unsound]
            if shard_of is not None and not unsound:
                promised = {name for name, file in shard_of.items() if file == shard}
                for name in sorted(promised ^ held.keys()):
                    does, places = ("lacks", "places") if name in promised else ("holds", "does not place")
                    problems.append(f"{shard} {does} {name!r}, which the index {places} there.")
    if problems:
        raise listed(f"The checkpoint in {folder} is damaged or not supported:", problems)
    if not tensors:
        raise CheckpointError(f"{folder / SINGLE_FILE} holds no tensor whose name starts with {prefix!r}.")
    return tensors


def read_tensors(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Every tensor of one safetensors file of a folder. Raises CheckpointError with all that is wrong."""
    try:
        tensors, problems = _read_shard(_shard_path(folder, file), "")
    except (OSError, ValueError) as error:
        tensors, problems = {}, [f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)]
    if problems:
        raise listed(f"{folder / file} is damaged or not supported:", [f"{problem}." for problem in problems])
    return tensors


def listing_file(folder: Path) -> str | None:
    """The file that says what tensors a checkpoint has: the single one before an index, which `save_pretrained` leaves
    behind, as in transformers; None where there is neither."""
    return next((name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()), None)


OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")


def other_weights(files: Iterable[str]) -> str:
    """A sentence about files of weights that are not read; nothing where there are none."""
    found = sorted(file for file in files if file.endswith(OTHER_WEIGHTS))
    if not found:
        return ""
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", file) for file in found):
        return " Shards are there without their index: fetch it."
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" Not read: {', '.join(found[:3])}{more}; pickles and other formats have to be saved as {SINGLE_FILE}."


def no_checkpoint(folder: Path) -> CheckpointError:
    adapter = " It holds an adapter: load its base, with this as the adapter."
    files: list[str] = []
    with contextlib.suppress(OSError):
        files = [path.name for path in folder.iterdir()]
    hint = adapter if "adapter_config.json" in files else other_weights(files)
    return CheckpointError(f"{folder} holds no checkpoint: neither {INDEX_FILE} nor {SINGLE_FILE} is there.{hint}")


def read_names(folder: Path) -> list[str] | None:
    """The names of all tensors, from the one file or the index; None where there is neither. Raises CheckpointError."""
    listing = listing_file(folder)
    if listing is None:
        return None
    if listing == INDEX_FILE:
        return list(_weight_map(folder / INDEX_FILE))
    try:
        header, _, _ = _read_header(_shard_path(folder, SINGLE_FILE))
    except (OSError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise listed(f"The checkpoint in {folder} is damaged or not supported:", [f"{SINGLE_FILE} {reason}."]) from None
    return [name for name in header if name != "__metadata__"]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """That of the thinker's first tensor; None where there is none yet, or it cannot be read: what is wrong will be
    said then."""
    try:
        names = read_names(folder) or []
        first = next((name for name in names if name.startswith("thinker.")), names[0])
        file = read_weight_map(folder, first)[first] if listing_file(folder) == INDEX_FILE else SINGLE_FILE
        header, _, _ = _read_header(_shard_path(folder, file))
        return DTYPES.get(_parse_entry(header[first])[0])
    except (OSError, ValueError, LookupError):
        return None


def _weight_map(path: Path) -> dict[str, Any]:
    """What an index holds, its files unchecked. Raises CheckpointError."""
    try:
        weight_map = read_object(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError('it has no "weight_map" object')
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return weight_map


def read_weight_map(folder: Path, prefix: str) -> dict[str, str]:
    """Tensor name → shard's file name, from the index of a checkpoint, for names that start with `prefix`.

    Raises CheckpointError where the index is no such map, or names a file in another folder.
    """
    path = folder / INDEX_FILE
    shard_of = {name: file for name, file in _weight_map(path).items() if name.startswith(prefix)}
    if not shard_of:
        raise CheckpointError(f"{path} names no tensor that starts with {prefix!r}.")
    # Plain names only: they reach the file system, and the hub client as patterns.
    foreign = {
        repr(file)
        for file in shard_of.values()
        if not (isinstance(file, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", file, re.ASCII))
    }
    if foreign:
        raise listed(f"{path} names files that are no safetensors files of its own folder:", sorted(foreign))
    return shard_of


def _shard_path(folder: Path, shard: str) -> Path:
    path = folder / shard
    if not path.is_file():
        raise ValueError("is absent")
    if not stays_inside(path):
        raise ValueError(f"is {LEAVES}")
    if path.with_name(f"{shard}.aria2").exists():
        raise ValueError(f"is not whole: its download goes on, or was interrupted, says {shard}.aria2")
    return path


def _read_shard(path: Path, prefix: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """A shard's tensors under `prefix`, and what is wrong with single ones.

    Raises ValueError, a phrase about the file without its name, where the file as a whole is unsound.
    """
    header, data_start, data_bytes = _read_header(path)
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    problems: list[str] = []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _parse_entry(entry)
            spans.append((begin, end, name))
            if not name.startswith(prefix):
                continue
            if dtype not in DTYPES:
                raise ValueError(
                    f"is stored as {dtype[:20]!r}: only {', '.join(DTYPES)} weights are supported, "
                    "quantised checkpoints are not"
                )
            tensors[name] = StoredTensor(path, data_start + begin, DTYPES[dtype], shape)
            if tensors[name].num_bytes != end - begin:
                raise ValueError(f"has shape {shape} in {dtype}, but {end - begin} bytes")
        except ValueError as error:
            problems.append(f"{name!r} {error}")
    if len(spans) == len(header):
        _check_spans(sorted(spans), data_bytes)
    return tensors, problems


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A shard's header, the first byte of its data, and how many bytes of data follow."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise ValueError("is a Git LFS pointer, not the tensors themselves: run `git lfs pull`")
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, MAX_BYTES):
            raise ValueError(f"is cut short or no safetensors file: {size} bytes, header of {length}")
        try:
            return parse_object(file.read(length)), 8 + length, size - 8 - length
        except ValueError as error:
            raise ValueError(f"has an unreadable header: {error}") from error


def _parse_entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, first byte and end of one tensor as its shard's header gives them."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]}:
            # A bool is an int to isinstance. Eight dimensions keep the product of absurd sizes cheap.
            counts = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
            if counts and len(shape) <= 8 and begin <= end:
                return dtype, tuple(shape), begin, end
    raise ValueError("has no sound dtype, shape and data_offsets")


def _check_spans(spans: Sequence[tuple[int, int, str]], data_bytes: int) -> None:
    """spans: (begin, end, name), sorted. They must tile the data: no gap, no overlap, nothing left over."""
    last = max((end for _, end, _ in spans), default=0)
    if last > data_bytes:
        raise ValueError(f"is cut short: {data_bytes} bytes of tensors where its header lists {last}")
    if last < data_bytes:
        raise ValueError(f"has {data_bytes - last} bytes after its last tensor")
    place = 0
    for begin, end, name in spans:
        if begin != place:
            what = "overlaps the tensor" if begin < place else "leaves a gap after the tensor"
            raise ValueError(f"is corrupt: {name!r} {what} before it (data byte {begin}, not {place})")
        place = end
