"""Writing a position into all layers of a cache at once on a GPU: the same as layer by layer, and nothing else."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from omni.cache import Cache, places
from omni.layers import compiling, directly
from tests.kernels import compiled_for_hopper, interpreted, needs_triton

KERNEL = """
import torch
from omni.cache import places
from omni.cache_kernels import append_by_kernel
from tests.omni.test_cache_kernels import assert_same, cache_and_new

for dtype in (torch.float32, torch.bfloat16):
    for batch, row in ((1, None), (3, None), (3, 0), (3, 1)):
        whole, keys, values = cache_and_new(batch, dtype)
        expected, *_ = cache_and_new(batch, dtype)
        got, same = (each if row is None else each.row(row) for each in (whole, expected))
        if row is not None:
            keys, values = ([each[row : row + 1] for each in some] for some in (keys, values))
        for _ in range(2):
            stored = [*got.keys, *got.values]
            append_by_kernel(stored, torch.tensor(places(stored)), got.lengths, [*keys, *values])
            same.append(keys, values)
        assert_same(whole, expected)

got, keys, values = cache_and_new(1, torch.float32)
stored = [*got.keys, *got.values]
before = [each.clone() for each in stored]
got.lengths[:] = torch.tensor([[each.shape[2]] for each in got.keys])
append_by_kernel(stored, torch.tensor(places(stored)), got.lengths, [*keys, *values])
assert all(map(torch.equal, stored, before))
"""


def cache_and_new(batch: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Cache, list[Tensor], list[Tensor]]:
    """Three layers of two capacities and of unlike lengths, one of them lying the other way, and keys and values of
    one position more. The same on every call."""
    generator = torch.Generator().manual_seed(batch)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    capacities = (256, 384, 256)
    keys, values = ([random(batch, 3, capacity, 24) for capacity in capacities] for _ in range(2))
    keys[1] = random(batch, capacities[1], 3, 24).transpose(1, 2)
    lengths = torch.randint(0, 250, (3, batch), generator=generator).to(device)
    new_keys, new_values = ([random(batch, 3, 1, 24) for _ in capacities] for _ in range(2))
    return Cache(keys, values, lengths), new_keys, new_values


def assert_same(cache: Cache, expected: Cache) -> None:
    """Bit by bit, all memory."""
    pairs = zip(
        (*cache.keys, *cache.values, cache.lengths), (*expected.keys, *expected.values, expected.lengths), strict=True
    )
    for got, same in pairs:
        assert torch.equal(got.cpu(), same.cpu())


@needs_triton
def test_kernel_equals_layer_by_layer_under_tritons_interpreter() -> None:
    """Of one sequence, of several and of one of several; beyond a capacity nothing is written."""
    interpreted(KERNEL)


@needs_triton
@pytest.mark.parametrize("kind", ["*bf16", "*fp16", "*fp32"])
def test_kernel_compiles_for_a_gpu_that_is_not_there(kind: str) -> None:
    """It waits for what is launched before it, and what stops it at a full cache is there."""
    from omni.cache_kernels import append_kernel

    types = {"places": "*i64", "lengths": "*i64", "new": kind}
    for heads in (2, 4):
        sizes = {"HEADS": heads, "DIM": 128, "BLOCK": heads * 128, "OVERLAPS": True}
        options = {"num_warps": 4, "launch_pdl": True, "debug": True, "sanitize_overflow": False}
        code = compiled_for_hopper(append_kernel, types, sizes, ("*bf", "*fp"), **options)
        ptx = code.asm["ptx"]
        assert "griddepcontrol.launch_dependents" in ptx and "call.uni __assertfail" in ptx
        assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global") < ptx.index("st.global")
        # The length comes last, when every thread has read it.
        *_, before, after = ptx.split("st.global")
        assert "bar.sync" in before and after.startswith(".b64")
        assert not code.metadata.global_scratch_size


@needs_triton
def test_only_what_a_cache_holds_is_written_by_address() -> None:
    """Protects memory: another type, another size, a layer too few."""
    from omni.cache_kernels import append_by_kernel

    cache, keys, values = cache_and_new(2, torch.float32)
    stored = [*cache.keys, *cache.values]
    table = torch.tensor(places(stored))
    double = [each.double() for each in (*keys, *values)]
    wider = [each.expand(-1, -1, 2, -1) for each in (*keys, *values)]
    for new in (double, wider, keys, [*keys, *values[:-1], values[-1][:1]]):
        with pytest.raises(ValueError, match="one position of every layer"):
            append_by_kernel(stored, table, cache.lengths, new)
    with pytest.raises(ValueError, match="one position of every layer"):
        append_by_kernel(stored, table, cache.lengths[:, :1], [*keys, *values])


def test_addresses_are_those_of_its_own_tensors() -> None:
    """Protects: a copy writes to the copy, and a cache whose tensors are exchanged to the new ones."""
    cache, *_ = cache_and_new(2, torch.float32)
    table = cache.places_on_device()
    assert cache.places_on_device() is table
    other = copy.deepcopy(cache)
    assert other.places_on_device().tolist() == places([*other.keys, *other.values]) != table.tolist()
    cache.values[1] = cache.values[1].clone()
    assert cache.places_on_device().tolist() == places([*cache.keys, *cache.values]) != table.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "row"), [(1, None), (3, None), (3, 1)])
def test_cuda_equals_layer_by_layer(batch: int, row: int | None, dtype: torch.dtype) -> None:
    """Launched, and captured in a graph that is replayed, beside a cache on the CPU."""
    from omni.cache_kernels import append_kernel
    from omni.runtime.graphs import capture, warm_up

    whole, *new = cache_and_new(batch, dtype, "cuda")
    expected, *same_new = cache_and_new(batch, dtype)
    cache, same = (each if row is None else each.row(row) for each in (whole, expected))
    if row is not None:
        new, same_new = ([[each[row : row + 1] for each in some] for some in both] for both in (new, same_new))
    run = partial(cache.append, *new)
    with torch.inference_mode(), compiling(directly):
        warm_up(run)  # twice
        compiled = len(append_kernel.device_caches[torch.cuda.current_device()][0])
        captured = capture(run)
        assert len(append_kernel.device_caches[torch.cuda.current_device()][0]) == compiled > 0
        for each in (*new[0], *new[1]):
            each.mul_(2)
        for _ in range(2):
            captured.replay()
    torch.cuda.synchronize()
    for factor in (1, 1, 2, 2):
        same.append(*([factor * each for each in some] for some in same_new))
    assert_same(whole, expected)
