"""The cache of compiled functions: one graph to a key, the least recently used goes first."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # reads the environment when it is first imported
from torch import Tensor

from omni.inputs import InputError
from omni.runtime import graphs
from omni.runtime.graphs import Graphs


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


def test_a_key_is_compiled_once(compilations: list[dict[str, Any]]) -> None:
    """Whole, and of static shape."""
    cache = Graphs(scaled, captures=False)
    for value in (1.0, 2.0, 3.0):
        assert cache.run(2, (2,), torch.tensor([value])).item() == 2 * value
    assert compilations == [{"fullgraph": True, "dynamic": False}]


def test_the_least_recently_used_graph_goes(
    compilations: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    cache = Graphs(scaled, captures=False)
    for key in (1, 2, 1, 3):
        assert cache.run(key, (key,), torch.ones(1)).item() == key
    assert list(cache.graphs) == [1, 3]
    assert cache.run(2, (2,), torch.ones(1)).item() == 2
    assert list(cache.graphs) == [3, 2]
    assert len(compilations) == 4


def test_a_key_without_a_graph_runs_as_it_is_where_none_may_be_made(compilations: list[dict[str, Any]]) -> None:
    cache = Graphs(scaled, captures=False)
    assert cache.run(5, (5,), torch.ones(1), makes=False).item() == 5
    assert not cache.graphs and not compilations
    cache.run(5, (5,), torch.ones(1))
    assert cache.run(5, (5,), torch.ones(1), makes=False).item() == 5
    assert len(compilations) == 1


def test_what_is_interrupted_while_it_is_made_is_no_graph(compilations: list[dict[str, Any]]) -> None:
    """Ctrl-C while a graph compiles, which it does when it is first called: the next call makes it anew, and where none
    may be made the function runs as it is."""
    interrupts = [True]

    def interrupted(factor: int, x: Tensor) -> Tensor:
        if interrupts:
            interrupts.clear()
            raise KeyboardInterrupt
        return factor * x

    cache = Graphs(interrupted, captures=False)
    with pytest.raises(KeyboardInterrupt):
        cache.run(2, (2,), torch.ones(1))
    assert not cache.graphs
    assert cache.run(2, (2,), torch.ones(1), makes=False).item() == 2
    assert len(compilations) == 1
    assert cache.run(2, (2,), torch.ones(1)).item() == 2
    assert list(cache.graphs) == [2]
    assert len(compilations) == 2


def test_a_graph_that_goes_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler made is freed with it, so that graphs can make room for ever; the one that stays still runs."""
    made: list[weakref.ref] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        made.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    cache = Graphs(scaled, captures=False)
    for key in (2, 3, 4):
        assert cache.run(key, (key,), torch.ones(1)).item() == key
    gc.collect()
    assert [graph() is not None for graph in made] == [False, False, True]
    assert cache.run(4, (4,), torch.ones(1)).item() == 4
    assert len(made) == 3
    cache.clear()
    gc.collect()
    assert made[-1]() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graphs_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays answer from what is copied in, and graphs whose tensors take too much go."""
    cache = Graphs(scaled, captures=True)
    x = torch.rand(1000, device="cuda")
    for key in (2, 3):
        for _ in range(2):
            x.uniform_()
            assert torch.equal(cache.run(key, (key,), x), key * x)
    assert cache.nbytes == 2 * 2 * x.nbytes
    monkeypatch.setattr(graphs, "GRAPH_BYTES", 3 * x.nbytes)
    assert torch.equal(cache.run(4, (4,), x), 4 * x)
    assert list(cache.graphs) == [4]
    cache.clear()  # the pool goes with its last graph
    assert torch.equal(cache.run(4, (4,), x), 4 * x)


def test_a_folder_that_the_compiler_cannot_write_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: a full or read-only folder is one sentence; with a sound one the same function compiles."""
    (tmp_path / "file").touch()
    cache = Graphs(scaled, captures=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"folder cannot be written to \(Not a directory\): make room, set TORCHIND"):
        cache.run("key", (2,), torch.ones(17))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert cache.run("key", (2,), torch.ones(17)).sum() == 34


def test_other_errors_of_a_graph_stay_what_they_are(compilations: list[dict[str, Any]]) -> None:
    """Protects: a failure of the model is no failure of the disk."""

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("No space left on device")

    with pytest.raises(RuntimeError, match="No space left"):
        Graphs(broken, captures=False).run("key", (), torch.ones(1))
