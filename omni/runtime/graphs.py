"""Machine code of parts, for all sizes; CUDA graphs of wholes, one for every set of static shapes."""

from __future__ import annotations

import errno
import gc
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from threading import Lock
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, finalize

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code
from torch.fx.experimental import _config as fx_config
from torch.utils import _pytree as pytree

from omni.inputs import InputError

MOST_GRAPHS = 256
"""Graphs that stay; the least recently used goes. A realistic spread of clips needs fewer plans."""
GRAPH_BYTES = 8 * 2**30
"""What inputs and outputs of captured graphs may take together; the graphs' own memory is one shared pool."""
LOOKED_AT = torch.compiler.skip_guard_on_globals_unsafe
"""Before every call the compiler would look whether functions and constants that the code uses are still the same, some
hundred of them, for longer than a layer of a small model needs for a tenth of its work. They are: each `Parts` compiles
anew. Arguments, modules among them, are looked at."""
OPTIONS: dict[str, str | int | Callable[..., Any]] = {"guard_filter_fn": LOOKED_AT, "triton.enable_pdl": False}
"""The compiler's kernels never begin before the one before has ended, whatever the environment says: those that would
do not keep to the order that ours rely on (`kernels.await_inputs`)."""


class Parts:
    """Machine code of functions, each compiled whole and without a break, once for tensors of all sizes.

    The compiler takes sizes of 1, types and the structure of arguments as constants: a function has code for each
    `structure` that it was called with. Not safe for several threads at once.
    """

    def __init__(self) -> None:
        self.code: dict[Hashable, Callable[..., Any]] = {}
        self._modules: WeakKeyDictionary[nn.Module, Hashable] = WeakKeyDictionary()

    def run(self, function: Callable[..., Any], *arguments: Any, makes: bool = True) -> Any:
        """function(*arguments). What has no code gets it, unless `makes` is False: then the function runs as it is.

        Raises InputError where the compiler cannot write what it makes.
        """
        key = (function.__module__, function.__qualname__, tuple(map(self._structure, arguments)))
        if key in self.code:
            return self.code[key](*arguments)
        if not makes:
            return function(*arguments)
        own = renewed(function)
        try:
            code = torch.compile(own, fullgraph=True, dynamic=True, options={**OPTIONS})  # a copy, which it takes apart
            # The compiler's records lead from a code object to itself: neither it nor what was made of it would go.
            finalize(code, reset_code, own.__code__).atexit = False
            # Sizes that are equal in one call may differ in the next.
            with fx_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                result = code(*arguments)
        except (RuntimeError, OSError) as error:
            if reason := refusal_of_the_disk(error):
                raise InputError(
                    f"the compiler's folder cannot be written to ({reason}): make room, set TORCHINDUCTOR_CACHE_DIR to "
                    "another folder, or do not compile."
                ) from error
            raise
        self.code[key] = code  # now that it is whole: what is interrupted while it compiles is no code
        return result

    def _structure(self, value: Any) -> Hashable:
        """`structure`, of a module looked up once: a layer is asked for every token."""
        if not isinstance(value, nn.Module):
            return structure(value)
        if value not in self._modules:
            self._modules[value] = structure(value)
        return self._modules[value]

    def clear(self) -> None:
        self.code.clear()


def structure(values: Any) -> Hashable:
    """What of a nest of arguments machine code depends on: all but the sizes of tensors and the values of numbers."""
    if isinstance(values, Tensor):
        return values.dtype, tuple(size == 1 for size in values.shape)
    if isinstance(values, (list, tuple)):
        return type(values), tuple(structure(value) for value in values)
    if isinstance(values, nn.Module):
        own = (value for name, value in vars(values).items() if isinstance(value, bool) and not name.startswith("_"))
        return type(values), tuple(own), tuple(structure(child) for child in values.children())
    if hasattr(values, "__dataclass_fields__"):
        return type(values), tuple(structure(value) for value in vars(values).values())
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        return type(values), values == 1
    return values


class Graphs:
    """CUDA graphs by key, each of static shape. Not safe for several threads at once."""

    def __init__(self) -> None:
        self.graphs: OrderedDict[Hashable, Captured] = OrderedDict()

    def run(self, key: Hashable, function: Callable[..., Any], *tensors: Any, makes: bool = True) -> Any:
        """function(*tensors), nests of tensors and dataclasses.

        A key that has no graph gets one, unless `makes` is False: then the function runs as it is.
        """
        if key in self.graphs:
            self.graphs.move_to_end(key)
            return self.graphs[key](*tensors)
        if not makes:
            return function(*tensors)
        graph = Captured(function, tensors)
        outputs = graph(*tensors)
        self.graphs[key] = graph
        self._make_room()
        return outputs

    def clear(self) -> None:
        self.graphs.clear()

    @property
    def nbytes(self) -> int:
        return sum(graph.nbytes for graph in self.graphs.values())

    def _make_room(self) -> None:
        while len(self.graphs) > 1 and (len(self.graphs) > MOST_GRAPHS or self.nbytes > GRAPH_BYTES):
            self.graphs.popitem(last=False)


def refusal_of_the_disk(error: BaseException) -> str | None:
    """What the system said where writing failed, in the compiler or in what it calls; None for other errors."""
    if isinstance(error, OSError):
        return error.strerror
    if not type(error).__module__.startswith("torch._"):
        return None
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return next((words for words in map(os.strerror, (errno.ENOSPC, errno.EDQUOT)) if words in str(error)), None)


def renewed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object of its own.

    The compiler keeps what it made of a function with its code, looks through all of it on every call, and gives up
    after a few: this way each is found by its key, and is gone when it is dropped.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


class Captured:
    """A function captured in a CUDA graph with inputs of its own."""

    def __init__(self, function: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        leaves, spec = pytree.tree_flatten(unpacked(tensors))
        self.inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        arguments = packed(tensors, pytree.tree_unflatten(self.inputs, spec))

        def run() -> None:
            self.outputs = function(*arguments)

        warm_up(partial(function, *arguments))  # what that yields goes at once: keys and values of all layers
        self.graph = capture(run)

    def __call__(self, *tensors: Any) -> Any:
        leaves, _ = pytree.tree_flatten(unpacked(tensors))
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        leaves, spec = pytree.tree_flatten(unpacked((self.outputs,)))
        with _replays:  # the next one of the pool, another model's too, may write where this one's outputs lie
            self.graph.replay()
            made = copies(leaves)
        (outputs,) = packed((self.outputs,), pytree.tree_unflatten(made, spec))
        return outputs

    @property
    def nbytes(self) -> int:
        outputs, _ = pytree.tree_flatten(unpacked((self.outputs,)))
        return sum(leaf.nbytes for leaf in (*self.inputs, *outputs) if isinstance(leaf, Tensor))


def copies(values: list[Any]) -> list[Any]:
    """Copies of tensors, as they lie, and whatever else as it is. Those of one type together: keys and values of all
    layers, a hundred tensors, would be a launch each."""
    made = [torch.empty_like(value) if isinstance(value, Tensor) else value for value in values]
    by_type: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for own, value in zip(made, values, strict=True):
        if isinstance(value, Tensor):
            copied, given = by_type.setdefault(value.dtype, ([], []))
            copied.append(own)
            given.append(value)
    for copied, given in by_type.values():
        torch._foreach_copy_(copied, given)
    return made


_beside, _replays = Lock(), Lock()
_pools: dict[int, tuple[Any, WeakSet[torch.cuda.CUDAGraph]]] = {}
"""Of each device the handle of its pool, and the graphs that are in it."""


def warm_up(run: Callable[[], object]) -> None:
    """Calls `run` before it is captured for the first time: it compiles, and libraries allocate what they need."""
    with beside():
        for _ in range(2):
            run()


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `run`. All graphs of a device share one pool of memory, which goes with the last of them; other
    threads may use the device meanwhile.

    Not by `torch.cuda.graph`, which first gives all cached memory back to the device: steps are captured for each
    answer. Where memory is too little, this does so, too: inside of a capture the allocator cannot, and what running
    before has left there would lie idle.
    """
    try:
        return _captured(run)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    empty_cache()
    return _captured(run)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the host, had too little memory for what failed.

    Beside PyTorch's allocators, drivers and libraries need some of their own: for a graph, a kernel, a thread's
    products. They say so in words alone.
    """
    words = "DefaultCPUAllocator", "out of memory", "ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(some in str(error) for some in words)


def _captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with beside(), without_collection():
        device = torch.cuda.current_device()
        others = list(_pools[device][1]) if device in _pools else []  # held: a pool goes with its last graph
        if not others:  # the handle of a pool that went is refused
            _pools[device] = torch.cuda.graph_pool_handle(), WeakSet()
        pool, graphs = _pools[device]
        torch.cuda.current_blas_handle()  # a thread's first product makes it, and cannot inside of a capture
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except BaseException:
            with suppress(RuntimeError):  # the capture is spoilt: what spoilt it is the error to show
                _end_capture(graph, device)
            raise
        _end_capture(graph, device)
        graphs.add(graph)
    return graph


def _end_capture(graph: torch.cuda.CUDAGraph, device: int) -> None:
    """Where that fails, the allocator believes that the capture goes on, lets no other have its pool, and frees nothing
    that is cached: it is told, and the next graph has another pool."""
    try:
        graph.capture_end()
    except RuntimeError:
        pool, _ = _pools.pop(device)
        with suppress(RuntimeError):  # it knew
            torch._C._cuda_endAllocateToPool(device, pool)
        raise


def replay(graph: torch.cuda.CUDAGraph) -> None:
    """Not between another thread's replay and the copies of what that yields (`Captured`)."""
    with _replays:
        graph.replay()


def empty_cache() -> None:
    """Gives cached memory back to the device when no thread captures: meanwhile the allocator refuses it."""
    with _beside:
        torch.cuda.empty_cache()


@contextmanager
def without_collection() -> Iterator[None]:
    """No cyclic garbage goes inside: kernels among it, which Triton 3.7 and later then unload, and graphs would spoil a
    capture of the same thread."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def beside() -> Iterator[None]:
    """Another stream inside, in order with the current one before and after.

    One model at a time: what a second one launched on a stream that is captured would be in the first one's graph.
    """
    with _beside, on_stream(_stream(torch.cuda.current_device())):
        yield


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """On a stream of the current device inside, in order with what the caller is on before and after."""
    caller = torch.cuda.current_stream()
    if caller == stream:
        yield
        return
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:  # also what was begun before it failed
        caller.wait_stream(stream)


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all graphs of a device: libraries keep memory for each stream that they ever worked on."""
    return torch.cuda.Stream(device)


def unpacked(values: tuple[Any, ...]) -> list[Any]:
    """Dataclasses as dictionaries of their fields, so that tensors inside are found."""
    return [_fields(value) for value in values]


def _fields(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {name: _fields(field) for name, field in vars(value).items()}
    return value


def packed(like: tuple[Any, ...], values: list[Any]) -> list[Any]:
    """The inverse of `unpacked`."""
    return [_made(model, value) for model, value in zip(like, values, strict=True)]


def _made(model: Any, value: Any) -> Any:
    if hasattr(model, "__dataclass_fields__"):
        return type(model)(**{name: _made(field, value[name]) for name, field in vars(model).items()})
    return value
