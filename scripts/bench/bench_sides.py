"""Two sides of a comparison with the same random weights, and how `bench.py` times them."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bench_models import as_loaded, make_config, make_reference, random_thinker, share_weights
from torch import Tensor

import omni
import seats
from omni.config import OmniConfig
from omni.decoder import Layer
from omni.runtime.blank import blank_clip
from omni.thinker import Thinker

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
Seconds = Callable[[], float]
RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)
"""Shares of the tokens that are kept where rows are measured."""


@dataclass
class Measured:
    """Seconds of sides in rounds. first: of the first call. failed: sides that did not run, and why."""

    first: dict[str, float]
    times: dict[str, list[float]]
    failed: dict[str, str]

    def ratios(self, ours: str, other: str) -> list[float]:
        """How many times as fast as the other side, round by round."""
        return [theirs / own for own, theirs in zip(self.times[ours], self.times[other], strict=True)]

    def median(self, side: str) -> float:
        return statistics.median(self.times[side])

    def row(self, sides: dict[str, str]) -> dict[str, Any]:
        """sides: name in the row → side; the first is ours. Raises RuntimeError where that one did not run."""
        there = {name: side for name, side in sides.items() if side not in self.failed}
        (name, ours), *_ = sides.items()
        if name not in there:
            raise RuntimeError(f"{name}: {self.failed[ours]}")
        row = {
            "rounds": len(self.times[ours]),
            "seconds": {name: self.median(side) for name, side in there.items()},
            "first_call_seconds": self.first[ours],
            "times_as_fast": {name: spread(self.ratios(ours, side)) for name, side in there.items() if side != ours},
        }
        if len(there) < len(sides):
            row["not_run"] = {name: self.failed[side] for name, side in sides.items() if name not in there}
        return row


@dataclass(frozen=True)
class Clip:
    """A clip of so many seconds with sound, and a question. rows, columns: tokens of its frames."""

    seconds: float
    text: int = 100
    rows: int = 12
    columns: int = 12


@dataclass
class Bench:
    """One family at one size: both sides, made when a row first needs them."""

    family: str
    size: str
    dtype: torch.dtype
    device: torch.device
    repeats: int

    @property
    def is_made(self) -> bool:
        return "thinker" in vars(self)

    def make(self) -> None:
        """Fills the weights, so that no row waits for it."""
        assert self.thinker is not None
        self.wait()

    @cached_property
    def _configs(self) -> tuple[Any, OmniConfig]:
        return make_config(self.family, self.size)

    @property
    def config(self) -> OmniConfig:
        return self._configs[1]

    @cached_property
    def thinker(self) -> Thinker:
        return random_thinker(self.config, self.device, self.dtype)

    @cached_property
    def compiled(self) -> omni.Omni:
        return omni.Omni(as_loaded(self.thinker, compiled=True), Path(os.devnull), compile=True, reuse=0)

    @cached_property
    def eager(self) -> omni.Omni:
        return omni.Omni(as_loaded(self.thinker, compiled=False), Path(os.devnull), reuse=0)

    @cached_property
    def reference(self) -> Any:
        """transformers' thinker, of the same weights in the same memory."""
        reference = make_reference(self._configs[0])
        share_weights(reference, self.thinker)
        return reference.thinker

    @property
    def language(self) -> Any:
        """transformers' decoder, which one version keeps deeper than another, as the encoders."""
        return getattr(self.reference.model, "language_model", self.reference.model)

    def encoder(self, name: str) -> Any:
        """transformers' `visual` or `audio_tower`."""
        return getattr(self.reference.model, name, None) or getattr(self.reference, name)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def inputs(self, clip: Clip) -> omni.Inputs:
        """A temporal grid of rows · columns tokens and 25 or 13 of sound a second."""
        unit = self.config.vision.patch_size * self.config.vision.spatial_merge_size
        height, width = clip.rows * unit, clip.columns * unit
        return blank_clip(
            self.config, clip.seconds, height=height, width=width, max_frames=10_000, text_tokens=clip.text
        )

    def preset(self, retention: float) -> seats.SeatsConfig | None:
        return None if retention == 1 else seats.preset_for(self.config, retention)

    def once(self, work: Callable[[], object]) -> float:
        """Seconds of one call, the device idle before and after."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def timed(self, work: Callable[[], object]) -> Seconds:
        """A side that calls `work`, on a GPU often enough to fill a twentieth of a second."""
        calls = 1

        def run() -> float:
            nonlocal calls
            seconds = self.once(lambda: [work() for _ in range(calls)]) / calls
            if self.on_gpu:
                calls = min(100, max(1, math.ceil(0.05 / seconds)))
            return seconds

        return run

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    @cached_property
    def matrix(self) -> tuple[float, Seconds]:
        """Operations of a product of two large matrices, and a side that multiplies them."""
        if self.on_gpu:
            n = 8192
        elif self.size == "small":
            n = 512
        else:  # a CPU without instructions for 16 bits takes minutes for what others do at once
            n = 3072 if self.dtype == torch.float32 else 1024
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        return 2.0 * n**3, self.timed(lambda: a @ b)

    @cached_property
    def copy(self) -> tuple[float, Seconds]:
        """Bytes that a large copy reads and writes, and a side that copies."""
        source = torch.randn((4 if self.on_gpu else 1) * 2**27, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes, self.timed(lambda: target.copy_(source))

    def measure(
        self, sides: dict[str, Seconds], *, repeats: int | None = None, may_fail: tuple[str, ...] = ()
    ) -> Measured:
        """Sides in turns, so that a slow minute slows all.

        A side for which the device has too little memory is left out, and one that may fail where it does: named, with
        the reason.
        """
        first, failed = {}, {}
        for name, side in list(sides.items()):
            try:
                first[name] = side()
                if first[name] < 1:  # what takes seconds is warm by then
                    side()
                continue
            except OUT_OF_MEMORY:
                failed[name] = "out of memory"
            except Exception as error:
                if name not in may_fail:
                    raise
                failed[name] = first_line(error)
            torch.cuda.empty_cache()
            del sides[name]
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats or self.repeats):
            for name, side in sides.items():
                times[name].append(side())
        return Measured(first, times, failed)

    def profile(self, work: Callable[[], object]) -> dict[str, float]:
        """The operations that take most of the time, and their shares."""
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CUDA if self.on_gpu else activity.CPU]) as profiler:
            self.once(work)
        attribute = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        events: dict[str, float] = {}
        for event in profiler.key_averages():
            # On a CPU the compiler's own kernels have no names.
            key = "compiled kernels" if event.key.startswith("## Call CompiledFxGraph") else event.key
            events[key] = events.get(key, 0.0) + float(getattr(event, attribute))
        total = sum(events.values()) or 1.0
        largest = sorted(events, key=lambda key: -events[key])[:6]
        return {key[:80]: round(events[key] / total, 4) for key in largest}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def target(what: str, measured: float, at_least: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "at_least": at_least}


def limit(what: str, measured: float, at_most: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "at_most": at_most}


MILLISECONDS = {
    ("vision", "qwen2.5"): 115.0,
    ("vision", "qwen3"): 85.0,
    ("audio", "qwen2.5"): 12.0,
    ("audio", "qwen3"): 12.0,
    ("first token", "qwen2.5"): 170.0,
    ("prefill at 10%", "qwen3"): 26.0,
}
"""Of a full-size model and a clip of 64 s on an H200, at most."""


def milliseconds(bench: Bench, what: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The target of the compiled side's time, where there is one."""
    most = MILLISECONDS.get((what, bench.family)) if bench.on_gpu else None
    return [] if most is None else [limit(f"milliseconds, {what}", 1e3 * row["seconds"]["compiled"], most)]


@contextmanager
def encoded(bench: Bench, inputs: omni.Inputs) -> Iterator[None]:
    """Inside, encoders give what they once made of `inputs`: rows of the prefill leave them out."""
    thinkers = {bench.compiled.thinker, bench.eager.thinker}  # one where both lie alike
    with torch.inference_mode():
        made = {
            (medium.kind, needs): bench.eager.thinker.encode_medium(medium, needs)
            for medium in inputs.media()
            for needs in (None, seats.SeatsConfig.needs)
        }
    for thinker in thinkers:
        thinker.encode_medium = lambda medium, needs, *, call: made[medium.kind, needs]  # type: ignore[assignment]
    try:
        yield
    finally:
        for thinker in thinkers:
            del thinker.encode_medium


@contextmanager
def without_layers() -> Iterator[None]:
    """Inside, decoder layers pass on what they get: what is left of a prefill is embedding, selection and head."""
    prefill = Layer.prefill

    def nothing(self: Layer, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        empty = x.new_zeros(len(x), self.attention.kv_heads, x.shape[1], self.attention.head_dim)
        return x, empty, empty.clone()

    Layer.prefill = nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Layer.prefill = prefill  # type: ignore[method-assign]


def ceilings(bench: Bench) -> dict[str, float]:
    """Matrix and copy rate now."""
    found = {}
    for name, (amount, side) in (("matrix_gflops", bench.matrix), ("copy_gb_per_second", bench.copy)):
        side()
        found[name] = amount / statistics.median(side() for _ in range(5)) / 1e9
    return found


def machine(device: torch.device) -> str:
    """The GPU's or processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0]} x{len(models)}" if models else name
    return name
