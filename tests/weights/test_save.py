import json

import pytest
import torch
from safetensors.torch import load_file

from weights import read_index, save_sharded

INDEX = "model.safetensors.index.json"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_layout_is_the_public_one(tmp_path) -> None:
    """Protects: file names, index, sizes and values as other libraries read them."""
    torch.manual_seed(0)
    tensors = {f"thinker.{index}": torch.randn(4, index + 1) for index in range(6)}  # 16 … 96 bytes
    save_sharded(tensors, tmp_path / "new" / "folder", max_shard_bytes=100)
    folder = tmp_path / "new" / "folder"
    index = json.loads((folder / INDEX).read_text())
    shards = [f"model-{part:05}-of-00004.safetensors" for part in range(1, 5)]
    assert sorted(contents(folder)) == [*shards, INDEX]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert [index["weight_map"][name] for name in tensors] == [shards[part] for part in (0, 0, 0, 1, 2, 3)]
    for file in shards:
        for name, tensor in load_file(folder / file).items():
            assert index["weight_map"].pop(name) == file
            assert torch.equal(tensor, tensors[name])
    assert not index["weight_map"]


def test_a_larger_tensor_has_its_own_shard(tmp_path) -> None:
    """Protects: a bound below the largest tensor still yields every tensor, and no empty shard."""
    save_sharded({f"thinker.{size}": torch.ones(size) for size in (9, 1, 9)}, tmp_path, max_shard_bytes=4)
    assert {file.stat().st_size > 0 for file in tmp_path.iterdir()} == {True}
    assert len(contents(tmp_path)) == 3
    assert read_index(tmp_path)["thinker.9"].shape == (9,)


def test_views_of_one_tensor_and_an_iterator(tmp_path) -> None:
    """Protects: parts of a fused parameter, transposed ones too, come out as they are."""
    fused = torch.arange(12.0).view(4, 3).requires_grad_()
    save_sharded(iter([("a", fused[:2]), ("b", fused[2:]), ("c", fused.t())]), tmp_path, max_shard_bytes=1000)
    saved = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert torch.equal(saved["a"], fused[:2])
    assert torch.equal(saved["b"], fused[2:])
    assert torch.equal(saved["c"], fused.t())


def test_an_error_leaves_the_folder_as_it_was(tmp_path) -> None:
    """Protects: neither half a checkpoint nor a mixture of two."""
    save_sharded({"thinker.a": torch.ones(4)}, tmp_path, max_shard_bytes=1)
    before = contents(tmp_path)

    def breaks():
        yield "thinker.a", torch.zeros(4)
        yield "thinker.b", torch.zeros(4)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        save_sharded(breaks(), tmp_path, max_shard_bytes=1)
    assert contents(tmp_path) == before
    with pytest.raises(ValueError, match=r"Two tensors are named 'thinker\.b'"):
        save_sharded([("thinker.b", torch.ones(1))] * 2, tmp_path, max_shard_bytes=1)
    assert contents(tmp_path) == before
