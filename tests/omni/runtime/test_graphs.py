"""Machine code of parts, made once, and captured graphs: one to a key, the least recently used goes first."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # reads the environment when it is first imported
from torch import Tensor
from torch.utils import _pytree as pytree

from omni.inputs import InputError
from omni.layers import compiling, part
from omni.runtime import graphs
from omni.runtime.graphs import OPTIONS, Graphs, Parts, packed, structure, unpacked
from omni.stages import Prefix, Sequence
from tests.omni.pairs import NamedStream


def scaled(factor: int, x: Tensor) -> Tensor:
    return factor * x


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of the compiler, which does nothing here."""
    asked: list[dict[str, Any]] = []

    def compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


def test_a_part_is_compiled_once(compilations: list[dict[str, Any]]) -> None:
    """Whole, and for all sizes; a size of 1 and another type have code of their own, and numbers have none."""
    parts = Parts()
    for rows, factor in ((2, 3), (5, 4), (7, 3)):
        assert parts.run(scaled, factor, torch.ones(rows)).tolist() == [factor] * rows
    assert compilations == [{"fullgraph": True, "dynamic": True, "options": OPTIONS}]
    parts.run(scaled, 3, torch.ones(1))
    parts.run(scaled, 3, torch.ones(2, dtype=torch.float64))
    assert len(compilations) == len(parts.code) == 3


def test_structure_is_all_but_sizes_and_numbers() -> None:
    """What decides which code runs: modules by what they are made of, settings by value."""
    one, other, wider = (torch.nn.Linear(3, width, bias=bias) for width, bias in ((4, True), (4, False), (8, True)))
    same = [(one, wider), (torch.ones(2, 3), torch.ones(4, 5)), (2, 3), ([1.5, "a"], [2.5, "a"]), (None, None)]
    assert all(structure(a) == structure(b) for a, b in same)
    gate = torch.nn.Sequential(one), torch.nn.Sequential(one, torch.nn.ReLU())
    differ = [(torch.ones(2, 1), torch.ones(2, 2)), (1, 2), (1, True), ("a", "b"), ((1.5,), [1.5]), gate]
    assert not any(structure(a) == structure(b) for a, b in differ)
    assert hash(structure((one, other, [torch.ones(2)], "a")))


class Stored:
    """In the place of `graphs.Captured`."""

    nbytes = 0

    def __init__(self, function: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        self.function = function

    def __call__(self, *tensors: Any) -> Any:
        return self.function(*tensors)


def test_the_least_recently_used_graph_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs, "Captured", Stored)
    cache = Graphs()
    for key in (1, 2, 1, 3):
        assert cache.run(key, partial(scaled, key), torch.ones(1)).item() == key
    assert list(cache.graphs) == [1, 3]
    assert cache.run(2, partial(scaled, 2), torch.ones(1)).item() == 2
    assert list(cache.graphs) == [3, 2]


def test_what_is_not_made_runs_as_it_is_where_nothing_may_be_made(
    compilations: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "Captured", Stored)
    cache, parts = Graphs(), Parts()
    for _ in range(2):
        assert cache.run(5, partial(scaled, 5), torch.ones(1), makes=False).item() == 5
        assert parts.run(scaled, 5, torch.ones(1), makes=False).item() == 5
        assert not cache.graphs and not compilations and not parts.code
    for makes in (True, False):
        assert cache.run(5, partial(scaled, 5), torch.ones(1), makes=makes).item() == 5
        assert parts.run(scaled, 5, torch.ones(1), makes=makes).item() == 5
    assert len(compilations) == len(cache.graphs) == 1


def test_what_is_interrupted_while_it_is_made_is_no_code(compilations: list[dict[str, Any]]) -> None:
    """Ctrl-C while a part compiles, which it does when it is first called: the next call makes it anew, and where none
    may be made the function runs as it is."""
    interrupts = [True]

    def interrupted(factor: int, x: Tensor) -> Tensor:
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt
        return factor * x

    parts = Parts()
    with pytest.raises(KeyboardInterrupt):
        parts.run(interrupted, 2, torch.ones(1))
    assert not parts.code
    assert parts.run(interrupted, 2, torch.ones(1), makes=False).item() == 2
    assert len(compilations) == 1
    assert parts.run(interrupted, 2, torch.ones(1)).item() == 2
    assert len(parts.code) == 1
    assert len(compilations) == 2


def test_code_that_goes_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler made is freed with it: a process may load one model after another."""
    made: list[weakref.ref] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor], **options: Any) -> Callable[..., Any]:
        made.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    parts = Parts()
    for rows in (2, 3, 1):
        assert parts.run(scaled, 2, torch.ones(rows)).sum() == 2 * rows
    assert len(made) == 2 and all(graph() is not None for graph in made)
    parts.clear()
    gc.collect()
    assert [graph() for graph in made] == [None, None]


def test_parts_are_compiled_inside_of_compiling_alone() -> None:
    """By the thread that asked for it, and until it is over, whatever ends it."""
    called: list[str] = []

    @part
    def doubled(x: int) -> int:
        return 2 * x

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        called.append(function.__name__)
        return function(*arguments)

    with pytest.raises(KeyError), compiling(call):
        assert doubled(2) == 4
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(doubled, 3).result() == 6
        raise KeyError
    assert doubled(4) == 8
    assert called == ["doubled"]


class Cycle:
    """Garbage that only a collection finds."""

    def __init__(self, ended: list[bool]) -> None:
        self.itself, self.ended = self, ended

    def __del__(self) -> None:
        self.ended.append(True)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of captures without a GPU, by graphs that do nothing."""
    done: list[str] = []
    monkeypatch.setattr(graphs, "beside", nullcontext)
    monkeypatch.setattr(graphs, "_pools", {})
    for name, value in (("current_device", 0), ("graph_pool_handle", (0, 1)), ("current_blas_handle", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    ways = {f"capture_{name}": lambda self, name=name, **_: done.append(name) for name in ("begin", "end")}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), ways))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append(f"empty, locked {graphs._beside.locked()}"))
    return done


def test_a_capture_that_finds_too_little_memory_begins_anew_without_what_is_cached(captures: list[str]) -> None:
    """Protects prompts that run but would not be captured: the allocator frees nothing of its cache meanwhile. It does
    so while no other thread captures, once, and for want of memory alone."""
    errors: list[Exception] = []

    def run() -> None:
        captures.append("run")
        if errors:
            raise errors.pop()

    whole = ["begin", "run", "end"]
    graphs.capture(run)
    assert captures == whole
    captures.clear()
    errors.append(torch.OutOfMemoryError())
    graphs.capture(run)
    assert captures == [*whole, "empty, locked True", *whole]
    of_driver = RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
    for error, again in ((torch.OutOfMemoryError(), 1), *((each, 1) for each in of_driver), (RuntimeError(), 0)):
        captures.clear()
        errors += [error] * (1 + again)
        with pytest.raises(type(error)):
            graphs.capture(run)
        assert captures.count("run") == 1 + again


def test_a_capture_that_cannot_end_spoils_no_other(captures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects all later answers: the allocator would take the pool for one that is recorded to, and refuse it."""
    ended: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *of: ended.append(of))
    handles = iter([(0, 1), (0, 2), (0, 3)])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    first = graphs.capture(lambda: None)
    whole = torch.cuda.CUDAGraph.capture_end

    def fails(_: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")

    def spoilt() -> None:
        raise ValueError

    for run, error in ((lambda: None, RuntimeError), (spoilt, ValueError)):
        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fails)
        with pytest.raises(error):
            graphs.capture(run)
        monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", whole)
        latest = graphs.capture(lambda: None)
    assert ended == [(0, (0, 1)), (0, (0, 2))]
    assert graphs._pools[0][0] == (0, 3) and list(graphs._pools[0][1]) == [latest]
    assert first is not latest and captures.count("begin") == 5


def test_what_fails_beside_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects tokens: what a step that failed had begun may still write when the same step begins anew."""
    waits: list[tuple[str, str]] = []
    current, side = NamedStream("current", waits), NamedStream("side", waits)
    for name, value in (("current_device", 0), ("current_stream", current)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(graphs, "_stream", lambda device: side)
    with pytest.raises(KeyboardInterrupt), graphs.beside():
        raise KeyboardInterrupt
    assert waits == [("side", "current"), ("current", "side")]


def test_what_a_function_yields_when_it_warms_up_is_gone_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects long prompts: keys and values of all layers, twice, may be too much."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def function() -> Tensor:
        alive.append(sum(each() is not None for each in made))
        output = torch.ones(3)
        made.append(weakref.ref(output))
        return output

    monkeypatch.setattr(graphs, "beside", nullcontext)
    monkeypatch.setattr(graphs, "capture", lambda run: run())
    graphs.Captured(function, ())
    assert alive == [0, 0, 0]


def test_what_a_graph_yields_is_copied_before_another_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects models of several threads: all graphs of a device share memory, and a replay may write where another
    graph's outputs lie, that of a step, too. Here all write to the same place."""
    place = torch.zeros(1)

    class Replayed:
        def __init__(self, number: int) -> None:
            self.number = number

        def replay(self) -> None:
            place.fill_(self.number)
            time.sleep(0.001)  # others have their turn

    monkeypatch.setattr(graphs, "warm_up", lambda run: None)

    def answers(number: int) -> list[float]:
        graph: Any = graphs.Captured(lambda: place, ())
        graph.graph = Replayed(number)
        return [float(graph()) for _ in range(20)]

    def steps(_: int) -> list[float]:
        graph: Any = Replayed(3)
        for _ in range(20):
            graphs.replay(graph)
        return []

    monkeypatch.setattr(graphs, "capture", lambda run: run())
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(run, number) for number, run in enumerate((answers, answers, steps))]
        assert [each.result() for each in work] == [[0.0] * 20, [1.0] * 20, []]


def test_nothing_is_collected_inside_of_a_capture(captures: list[str]) -> None:
    """Protects the capture: kernels and graphs that go meanwhile would spoil it."""
    ended: list[bool] = []

    def run(fails: bool) -> None:
        Cycle(ended)
        held = [[number] for number in range(100_000)]  # more than starts a collection
        assert held and not ended
        if fails:
            raise ValueError

    for fails in (False, True):
        with pytest.raises(ValueError) if fails else nullcontext():
            graphs.capture(partial(run, fails))
        assert gc.isenabled()
        gc.collect()
        assert ended.pop() and not ended
    gc.disable()
    try:
        graphs.capture(partial(run, False))
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert captures == ["begin", "end"] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graphs_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays answer from what is copied in, and graphs whose tensors take too much go."""
    cache = Graphs()
    x = torch.rand(1000, device="cuda")
    for key in (2, 3):
        for _ in range(2):
            x.uniform_()
            assert torch.equal(cache.run(key, partial(scaled, key), x), key * x)
    assert cache.nbytes == 2 * 2 * x.nbytes
    monkeypatch.setattr(graphs, "GRAPH_BYTES", 3 * x.nbytes)
    assert torch.equal(cache.run(4, partial(scaled, 4), x), 4 * x)
    assert list(cache.graphs) == [4]
    cache.clear()  # the pool goes with its last graph
    assert torch.equal(cache.run(4, partial(scaled, 4), x), 4 * x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_of_two_threads_yield_their_own() -> None:
    """Two models, each asked by a thread of its own: their graphs share a pool, and may write to the same place."""
    x = torch.rand(2**20, device="cuda")

    def ask(factor: int) -> None:
        own = Graphs()
        for _ in range(50):
            assert torch.equal(own.run(factor, partial(scaled, factor), x), factor * x)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, (2, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_captures_where_what_is_left_is_cached() -> None:
    """Protects an answer on a device that is nearly full: inside of a capture the allocator gives nothing back."""
    gc.collect()
    torch.cuda.empty_cache()
    may_take, made = torch.cuda.memory_reserved() + 2**28, []
    torch.cuda.set_per_process_memory_fraction(may_take / torch.cuda.mem_get_info()[1])
    try:
        torch.empty(3 * 2**26, dtype=torch.uint8, device="cuda")
        graph = graphs.capture(lambda: made.append(torch.ones(2**27, dtype=torch.uint8, device="cuda")))
        graph.replay()
        assert len(made) == 1 and bool(made[0].all())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_folder_that_the_compiler_cannot_write_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a full or read-only folder is one sentence; with a sound one the same function compiles."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"folder cannot be written to \(Not a directory\): make room, set TORCHIND"):
        Parts().run(scaled, 2, torch.ones(17))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert Parts().run(scaled, 2, torch.ones(17)).sum() == 34


def test_other_errors_of_a_graph_stay_what_they_are(compilations: list[dict[str, Any]]) -> None:
    """Protects: a failure of the model is no failure of the disk."""

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("No space left on device")

    with pytest.raises(RuntimeError, match="No space left"):
        Parts().run(broken, torch.ones(1))


def test_tensors_of_nested_dataclasses_are_found_and_put_back() -> None:
    """What a graph has of its own: every tensor of a prefix, of its sequence too, and the same types around them."""
    tensors = [torch.full((1, 2), float(number)) for number in range(9)]
    sequence = Sequence(*tensors[:5], None, tensors[5])
    given = (Prefix(sequence, tensors[6:7], tensors[7:8]), tensors[8])
    leaves, spec = pytree.tree_flatten(unpacked(given))
    assert [id(leaf) for leaf in leaves if leaf is not None] == [id(tensor) for tensor in tensors]
    prefix, last = packed(
        given, pytree.tree_unflatten([leaf if leaf is None else leaf.clone() for leaf in leaves], spec)
    )
    assert type(prefix) is Prefix and type(prefix.sequence) is Sequence and prefix.sequence.deepstack is None
    assert prefix.keys[0] is not tensors[6] and torch.equal(prefix.keys[0], tensors[6])
    assert torch.equal(prefix.sequence.count, tensors[5]) and torch.equal(last, tensors[8])


def test_copies_are_equal_and_apart() -> None:
    """Of every type, of nothing, of tensors that lie in other orders or share memory, and what is no tensor."""
    torch.manual_seed(0)
    one = torch.randn(2, 3, 4)
    values = [
        one,
        one.mT,
        one[:, :1].expand(-1, 5, -1),
        one.bfloat16(),
        one > 0,
        torch.arange(3),
        one[:0],
        None,
        7,
        one,
    ]
    made = graphs.copies(values)
    for copy, value in zip(made, values, strict=True):
        if not isinstance(value, torch.Tensor):
            assert copy is value
            continue
        assert torch.equal(copy, value) and copy.dtype == value.dtype
        assert not copy.numel() or copy.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    one.zero_()
    assert made[0].any() and torch.equal(made[0], made[-1])
