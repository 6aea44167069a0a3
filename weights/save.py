"""Writing checkpoints in the public layout: safetensors shards with an index."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from weights.checkpoint import INDEX_FILE, SINGLE_FILE


def save_sharded(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], folder: str | Path, *, max_shard_bytes: int
) -> None:
    """Writes named tensors as model-0000i-of-0000n.safetensors with model.safetensors.index.json.

    A shard holds max_shard_bytes of tensors at most, or one larger tensor. `tensors` may make them as it goes:
    only the shard in work and the one before are held. The folder is made where it is absent; an error leaves
    none of its files half-written. A model.safetensors of before, which would be read instead, is removed. Raises
    ValueError for a name that comes twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    names: list[list[str]] = []
    total_bytes = 0
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        unfinished = Path(temporary)
        for shard in _shards(pairs, max_shard_bytes):
            save_file(shard, unfinished / str(len(names)), metadata={"format": "pt"})
            names.append(list(shard))
            total_bytes += sum(tensor.nbytes for tensor in shard.values())
        files = [f"model-{part + 1:05}-of-{len(names):05}.safetensors" for part in range(len(names))]
        weight_map = {name: file for file, held in zip(files, names, strict=True) for name in sorted(held)}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (unfinished / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for part, file in enumerate(files):
            (unfinished / str(part)).replace(folder / file)
        (unfinished / INDEX_FILE).replace(folder / INDEX_FILE)
        (folder / SINGLE_FILE).unlink(missing_ok=True)  # it would be read instead


def _shards(pairs: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    seen: set[str] = set()
    shard: dict[str, Tensor] = {}
    shard_bytes = 0
    for name, tensor in pairs:
        if name in seen:
            raise ValueError(f"Two tensors are named {name!r}.")
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_bytes:
            yield shard
            shard, shard_bytes = {}, 0
        # A copy, because safetensors refuses tensors that share memory, as the parts of a fused one do.
        shard[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        shard_bytes += tensor.nbytes
    if shard:
        yield shard
