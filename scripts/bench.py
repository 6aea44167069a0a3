"""Measures prefill, encoders, decoding and selection: compiled, eager and transformers side by side, in turns.

    python scripts/bench.py                         # both families, 0.5 B parameters on a CPU, full size on a GPU
    python scripts/bench.py --families qwen3 --dtypes bfloat16 --rows prefill decode
    python scripts/bench.py --size small --results /tmp/small     # see that all of it runs; measures nothing
    python scripts/bench.py --render                # benchmarks/README.md from the result files alone

Weights are random, made on the device; both sides read the same memory. A row is written to
benchmarks/results/<machine>-<date>.json when it is done, and benchmarks/README.md is rendered from all such files. Rows
that are there already are not measured again, so a run that was stopped goes on (`--again` measures anew). A product
of large matrices and a large copy run in turn with the rows: what the machine can do.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from bench_check import check
from bench_models import SIZES, as_loaded_for_eager, make_reference, random_thinker, share_weights
from bench_report import write_readme
from torch import Tensor

import omni
import seats
from omni.config import DTYPES
from omni.decoder import Layer
from omni.processing.frames import patchify, vision_sizes
from omni.processing.mel import SAMPLE_RATE, log_mel
from omni.runtime.blank import blank_clip

ROOT = Path(__file__).parents[1]
RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
Seconds = Callable[[], float]


@dataclass
class Measured:
    """Seconds of sides in rounds. first: of the first call. failed: sides for which there was too little memory."""

    first: dict[str, float]
    times: dict[str, list[float]]
    failed: list[str]

    def ratios(self, ours: str, other: str) -> list[float]:
        """How many times as fast as the other side, round by round."""
        return [theirs / own for own, theirs in zip(self.times[ours], self.times[other], strict=True)]

    def median(self, side: str) -> float:
        return statistics.median(self.times[side])

    def row(self, sides: dict[str, str]) -> dict[str, Any]:
        """sides: name in the row → side; the first is ours."""
        there = {name: side for name, side in sides.items() if side not in self.failed}
        (_, side), *others = there.items()
        row = {
            "rounds": len(self.times[side]),
            "seconds": {name: self.median(side) for name, side in there.items()},
            "first_call_seconds": self.first[side],
            "times_as_fast": {name: spread(self.ratios(side, other)) for name, other in others},
        }
        if self.failed:
            row["out_of_memory"] = [name for name in sides if name not in there]
        return row


@dataclass
class Bench:
    """One family at one size: both sides, made when a row first needs them."""

    family: str
    size: str
    dtype: torch.dtype
    device: torch.device
    repeats: int

    @cached_property
    def _sides(self) -> tuple[Any, omni.Omni, omni.Omni]:
        reference, config = make_reference(self.family, self.size)
        thinker = random_thinker(config, self.device, self.dtype)
        share_weights(reference, thinker)
        nowhere = Path(os.devnull)
        return (
            reference.thinker,
            omni.Omni(thinker, nowhere, compile=True),
            omni.Omni(as_loaded_for_eager(thinker), nowhere),
        )

    @property
    def reference(self) -> Any:
        return self._sides[0]

    @property
    def language(self) -> Any:
        """transformers' decoder, which one version keeps deeper than another, as the encoders."""
        return getattr(self.reference.model, "language_model", self.reference.model)

    def encoder(self, name: str) -> Any:
        """transformers' `visual` or `audio_tower`."""
        return getattr(self.reference.model, name, None) or getattr(self.reference, name)

    @property
    def compiled(self) -> omni.Omni:
        return self._sides[1]

    @property
    def eager(self) -> omni.Omni:
        return self._sides[2]

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def clip(self, seconds: float) -> omni.Inputs:
        """A clip with sound, a temporal grid of 144 tokens and 25 or 13 of sound a second, 100 of text."""
        vision = self.compiled.config.vision
        side = 12 * vision.patch_size * vision.spatial_merge_size
        return blank_clip(self.compiled.config, seconds, height=side, width=side, max_frames=10_000)

    def preset(self, retention: float) -> seats.SeatsConfig | None:
        return None if retention == 1 else seats.preset_for(self.compiled.config, retention)

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
        n = 8192 if self.on_gpu else 3072
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        return 2.0 * n**3, self.timed(lambda: a @ b)

    @cached_property
    def copy(self) -> tuple[float, Seconds]:
        """Bytes that a large copy reads and writes, and a side that copies."""
        source = torch.randn((4 if self.on_gpu else 1) * 2**27, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes, self.timed(lambda: target.copy_(source))

    def measure(self, sides: dict[str, Seconds], *, repeats: int | None = None) -> Measured:
        """Sides in turns, so that a slow minute slows all.

        A side for which the device has too little memory is left out, and named.
        """
        first, failed = {}, []
        for name, side in list(sides.items()):
            try:
                first[name] = side()
                if first[name] < 1:  # what takes seconds is warm by then
                    side()
            except OUT_OF_MEMORY:
                torch.cuda.empty_cache()
                failed.append(name)
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


def target(what: str, measured: float, at_least: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "at_least": at_least}


@contextmanager
def encoded(bench: Bench, inputs: omni.Inputs) -> Iterator[None]:
    """Inside, encoders give what they once made of `inputs`: rows of the prefill leave them out."""
    thinkers = {bench.compiled.thinker, bench.eager.thinker}  # one where both lie alike
    with torch.inference_mode():
        made = {needs: bench.eager.thinker.encode(inputs, needs) for needs in (None, seats.SeatsConfig.needs)}
    for thinker in thinkers:
        thinker.encode = lambda _, needs, *, call: made[needs]  # type: ignore[assignment]
    try:
        yield
    finally:
        for thinker in thinkers:
            del thinker.encode


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


def active_weights(model: omni.Omni) -> float:
    """Weights of the decoder's layers that one token meets: of experts, its share."""
    decoder, total = model.config.decoder, 0.0
    for index, layer in enumerate(model.thinker.layers):
        weights = sum(parameter.numel() for parameter in layer.parameters())
        if decoder.is_sparse(index):
            experts = layer.mlp.gate_up.numel() + layer.mlp.down.numel()
            weights -= experts * (1 - decoder.experts_per_token / decoder.num_experts)
        total += weights
    return total


def prefill_work(model: omni.Omni, segments: list[int], config: seats.SeatsConfig | None) -> float:
    """Multiply-accumulates that are really done: attention below the diagonal, the head on the last token alone.

    The paper counts the whole square and the head on every token (`seats.prefill_macs`): of a small model with a large
    vocabulary, much that no side does.
    """
    decoder = model.config.decoder
    ends = [decoder.num_layers]
    if config is not None and config.late_layer is not None:
        ends = [*config.drop_layers, config.late_layer - 1, decoder.num_layers]
    total, start = float(decoder.hidden_size * decoder.vocab_size), 0
    weights = active_weights(model) / decoder.num_layers
    for tokens, end in zip(segments, ends, strict=True):
        total += (end - start) * tokens * (weights + tokens * decoder.num_heads * decoder.head_dim)
        start = end
    return total


def prefill_rows(bench: Bench, seconds: float, retentions: tuple[float, ...]) -> list[dict[str, Any]]:
    """From what the encoders made to the logits of the next token, cache written, all stages included."""
    inputs = bench.clip(seconds)
    with encoded(bench, inputs):

        def side(model: omni.Omni, retention: float) -> float:
            return model.prefill(inputs, seats=bench.preset(retention)).prefill_seconds

        sides: dict[str, Seconds] = {}
        for retention in dict.fromkeys((1.0, *retentions)):
            sides[f"compiled {retention}"] = partial(side, bench.compiled, retention)
            if retention in retentions:
                sides[f"eager {retention}"] = partial(side, bench.eager, retention)
        if 1.0 in retentions:
            sides["transformers"] = their_prefill(bench, inputs.input_ids.shape[1])
        measured = bench.measure({**sides, "matrix": bench.matrix[1]})
        return [prefill_row(bench, inputs, retention, measured) for retention in retentions]


def prefill_row(bench: Bench, inputs: omni.Inputs, retention: float, measured: Measured) -> dict[str, Any]:
    config, ours = bench.preset(retention), f"compiled {retention}"
    other = {"transformers": "transformers"} if config is None else {"every token": "compiled 1.0"}
    row = measured.row({"compiled": ours, "eager": f"eager {retention}", **other})
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    prefill = bench.compiled.prefill(inputs, seats=config)
    if bench.on_gpu:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    work = prefill_work(bench.compiled, prefill.segments, config)
    row |= {
        "tokens": prefill.tokens,
        "segments": prefill.segments,
        "gflops": 2 * work / row["seconds"]["compiled"] / 1e9,
        "of_matrix_rate": spread([2 * work / bench.matrix[0] * ratio for ratio in measured.ratios(ours, "matrix")]),
        "macs_ratio": prefill.full_macs / prefill.macs,
        "work_ratio": prefill_work(bench.compiled, [inputs.input_ids.shape[1]], None) / work,
        "profile": bench.profile(lambda: bench.compiled.prefill(inputs, seats=config)),
    }
    if retention == RETENTIONS[-1]:
        row["selection_share"] = selection_seconds(bench, inputs, config) / row["seconds"]["compiled"]
    faster = {name: ratio["median"] for name, ratio in row["times_as_fast"].items()}
    row["targets"] = []
    if config is None:
        limit = 0.6 if bench.on_gpu else 0.95
        row["targets"] += [target("of the matrix rate", row["of_matrix_rate"]["median"], limit)]
        if "transformers" in faster and not bench.on_gpu:
            row["targets"] += [target("times as fast as transformers", faster["transformers"], 1.0)]
    elif bench.on_gpu and retention == RETENTIONS[-1]:
        row["targets"] += [
            target("times as fast as with every token", faster["every token"], 8.0),
            target("of the prefill is not selection", 1 - row["selection_share"], 0.95),
        ]
    elif not bench.on_gpu:
        of_work, of_macs = (faster["every token"] / row[ratio] for ratio in ("work_ratio", "macs_ratio"))
        row["targets"] += [
            target("speed-up over every token / ratio of multiply-accumulates done", of_work, 0.9),
            target("speed-up over every token / ratio by the paper's count", of_macs, 0.9),
        ]
    return row


def their_prefill(bench: Bench, tokens: int) -> Seconds:
    model, head = bench.language, bench.reference.lm_head
    x = torch.randn(1, tokens, bench.compiled.config.decoder.hidden_size, device=bench.device).to(bench.dtype)
    positions = torch.arange(tokens, device=bench.device).expand(3, 1, -1)

    def run() -> Tensor:
        return head(model(inputs_embeds=x, position_ids=positions, use_cache=True).last_hidden_state[:, -1])

    return bench.timed(torch.inference_mode()(run))


def selection_seconds(bench: Bench, inputs: omni.Inputs, config: seats.SeatsConfig | None) -> float:
    """What a prefill without its layers takes longer for selecting; compiled on a GPU, where launches would decide."""
    with without_layers():
        model = omni.Omni(bench.compiled.thinker, bench.compiled.folder, compile=bench.on_gpu)
        sides = {
            name: (lambda seats_config=seats_config: model.prefill(inputs, seats=seats_config).prefill_seconds)
            for name, seats_config in (("selecting", config), ("not", None))
        }
        measured = bench.measure(sides, repeats=5)
    return max(0.0, measured.median("selecting") - measured.median("not"))


def vision_row(bench: Bench, grids: int, side: int) -> dict[str, Any]:
    """So many temporal grids of side × side patches."""
    grid = torch.tensor([[grids, side, side]])
    patches = torch.randn(grids * side * side, bench.compiled.config.vision.patch_dim)
    theirs = patches.to(bench.device, bench.dtype)
    device_grid = grid.to(bench.device)
    return encoder_row(
        bench,
        lambda model, call: model.thinker.vision(patches, grid, **call),
        lambda: bench.encoder("visual")(theirs, grid_thw=device_grid),
    )


def audio_row(bench: Bench, seconds: int) -> dict[str, Any]:
    """So many seconds of sound."""
    mel, length = torch.randn(1, 128, 100 * seconds), torch.tensor([100 * seconds])
    theirs, device_length = mel[0].to(bench.device, bench.dtype), length.to(bench.device)
    return encoder_row(
        bench,
        lambda model, call: model.thinker.audio(mel, length, **call),
        lambda: bench.encoder("audio_tower")(theirs, feature_lens=device_length),
    )


def encoder_row(
    bench: Bench, ours: Callable[[omni.Omni, dict[str, Any]], object], theirs: Callable[[], object]
) -> dict[str, Any]:
    call = {"call": bench.compiled.engine.compiled.call}  # type: ignore[union-attr]
    with torch.inference_mode():
        sides = {
            "compiled": bench.timed(lambda: ours(bench.compiled, call)),
            "eager": bench.timed(lambda: ours(bench.eager, {})),
            "transformers": bench.timed(theirs),
        }
        row = bench.measure(sides, repeats=2 * bench.repeats).row({name: name for name in sides})
        row["profile"] = bench.profile(lambda: ours(bench.compiled, call))
    if not bench.on_gpu:
        against = row["times_as_fast"]["transformers"]["median"]
        row["targets"] = [target("times as fast as transformers", against, 1.5)]
    return row


def experts_row(bench: Bench, tokens: int) -> dict[str, Any]:
    """One layer of experts, beside transformers' and beside one dense product of as many multiplications."""
    decoder = bench.compiled.config.decoder
    x = torch.randn(1, tokens, decoder.hidden_size, device=bench.device).to(bench.dtype)
    width = 3 * decoder.experts_per_token * decoder.expert_size
    dense = torch.randn(width, decoder.hidden_size, device=bench.device).to(bench.dtype)
    ours, theirs = bench.eager.thinker.layers[0].mlp, bench.language.layers[0].mlp
    with torch.inference_mode():
        sides = {
            "eager": bench.timed(lambda: ours(x)),
            "transformers": bench.timed(lambda: theirs(x)),
            "one dense product": bench.timed(lambda: x @ dense.T),
        }
        return bench.measure(sides, repeats=3 * bench.repeats).row({name: name for name in sides})


def decode_row(bench: Bench, seconds: float, retention: float, new: int) -> dict[str, Any]:
    """Seconds per token, greedy, after a clip and its question; every side feeds on its own picks."""
    inputs, config = bench.clip(seconds), bench.preset(retention)
    with encoded(bench, inputs):
        starts: list[float] = []

        def ours(model: omni.Omni) -> float:
            steps = model._tokens([inputs], max_new_tokens=new, stop_token_ids=[], seats=config)
            next(steps)
            begun = time.perf_counter()
            next(steps)
            started = time.perf_counter()
            for _ in steps:
                ended = time.perf_counter()
            if model is bench.compiled:
                starts.append(started - begun)
            return (ended - started) / (new - 2)

        language, head = bench.language, bench.reference.lm_head
        prompt = bench.compiled.prefill(inputs, seats=config).cache.lengths[:, 0].tolist()
        ids = torch.zeros(1, max(prompt), dtype=torch.long, device=bench.device)

        @torch.inference_mode()
        def theirs() -> float:
            out = language(input_ids=ids, use_cache=True)
            token = head(out.last_hidden_state[:, -1]).argmax(-1)
            for step in range(new):
                if step == 1:
                    bench.wait()
                    started = time.perf_counter()
                out = language(input_ids=token[:, None], past_key_values=out.past_key_values, use_cache=True)
                token = head(out.last_hidden_state[:, -1]).argmax(-1)
                token.tolist()
            return (time.perf_counter() - started) / (new - 1)

        sides = {
            "compiled": partial(ours, bench.compiled),
            "eager": partial(ours, bench.eager),
            "transformers": theirs,
            "copy": bench.copy[1],
        }
        # After a long clip a round is all prefill, and a step as steady as any.
        measured = bench.measure(sides, repeats=1 if seconds > 100 else None)
        row = measured.row({name: name for name in sides if name != "copy"})
        steps = bench.compiled._tokens([inputs], max_new_tokens=new, stop_token_ids=[], seats=config)
        for _ in range(2):  # the prefill, and what a first step makes
            next(steps)
        row["profile"] = bench.profile(lambda: list(steps))
    decoder, size = bench.compiled.config.decoder, bench.dtype.itemsize
    cache = 2 * decoder.num_kv_heads * decoder.head_dim * sum(length + new // 2 for length in prompt)
    read = size * (active_weights(bench.compiled) + decoder.vocab_size * decoder.hidden_size + cache)
    row |= {
        "cached_tokens": max(prompt),
        "gb_per_second": read / row["seconds"]["compiled"] / 1e9,
        "of_copy_rate": spread([read / bench.copy[0] * ratio for ratio in measured.ratios("compiled", "copy")]),
        # On a GPU a step is captured for each answer.
        "second_token_seconds": statistics.median(starts[1:]),
    }
    if bench.on_gpu:
        row["targets"] = [target("of the copy rate", row["of_copy_rate"]["median"], 0.8)]
    else:
        against = row["times_as_fast"]["transformers"]["median"]
        row["targets"] = [target("times as fast as transformers", against, 2.0)]
    return row


def first_token_row(bench: Bench, seconds: int) -> dict[str, Any]:
    """From decoded frames and samples: patches, log-mel, encoders, prefill at 10 %; transformers keeps every token."""
    blank, config = bench.clip(seconds), bench.preset(RETENTIONS[-1])
    model = bench.compiled
    sizes = vision_sizes(Path(os.devnull), model.config)
    pixels = 12 * sizes.factor
    frames = torch.randint(0, 256, (2 * seconds, 3, pixels, pixels), dtype=torch.uint8)
    sound = torch.randn(seconds * SAMPLE_RATE) / 10

    def prepared() -> omni.Inputs:
        patches, _ = patchify(frames, sizes)
        return replace(blank, pixel_values_videos=patches, input_features=log_mel(sound)[None])

    language = their_prefill(bench, blank.input_ids.shape[1])
    grid, length = blank.video_grid_thw, blank.mel_lengths
    assert grid is not None

    @torch.inference_mode()
    def theirs() -> None:
        inputs = prepared()
        assert inputs.pixel_values_videos is not None and inputs.input_features is not None
        bench.encoder("visual")(
            inputs.pixel_values_videos.to(bench.device, bench.dtype), grid_thw=grid.to(bench.device)
        )
        mel = inputs.input_features[0].to(bench.device, bench.dtype)
        bench.encoder("audio_tower")(mel, feature_lens=length.to(bench.device))
        language()

    sides = {
        "compiled": partial(bench.once, lambda: bench.compiled.prefill(prepared(), seats=config)),
        "eager": partial(bench.once, lambda: bench.eager.prefill(prepared(), seats=config)),
        "transformers": partial(bench.once, theirs),
    }
    return bench.measure(sides).row({name: name for name in sides})


def start_row(bench: Bench, seconds: float) -> dict[str, Any]:
    """The first prefill at 10 % in a new process, with an empty compiler's cache on disk and with a full one."""
    command = [sys.executable, __file__, "--first-prefill", str(seconds), "--families", bench.family]
    command += [
        "--size",
        bench.size,
        "--dtypes",
        str(bench.dtype).removeprefix("torch."),
        "--device",
        str(bench.device),
    ]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        runs = [
            json.loads(
                subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                .stdout.strip()
                .splitlines()[-1]
            )
            for _ in range(2)
        ]
    return {
        "rounds": 1,
        "seconds": {
            "empty cache": runs[0]["first"],
            "empty cache, a later plan": runs[0]["first_of_a_later_plan"],
            "full cache": runs[1]["first"],
            "again": runs[1]["again"],
        },
    }


def first_prefill(bench: Bench, seconds: float) -> dict[str, float]:
    inputs, config = bench.clip(seconds), bench.preset(RETENTIONS[-1])
    with encoded(bench, inputs):
        first, second = (bench.once(lambda: bench.compiled.prefill(inputs, seats=config)) for _ in range(2))
        other = bench.once(lambda: bench.compiled.prefill(inputs, seats=bench.preset(RETENTIONS[-2])))
    return {"first": first, "again": second, "first_of_a_later_plan": other}


def rows_of(bench: Bench, tokens: int) -> dict[tuple[str, ...], Callable[[], list[dict[str, Any]]]]:
    """Names of rows that are measured together → what measures them, the most wanted first."""
    if bench.size == "full":
        # The paper's clip, then ten minutes.
        clips = {"64 s": (64, RETENTIONS), "10 min": (600, (1.0, RETENTIONS[-1]))}
        grids, new = 64, 128
    elif bench.size == "small":
        clips = {"4 s": (4, (1.0, RETENTIONS[-1])), "9 s": (9, (1.0, RETENTIONS[-1]))}
        grids, new = 8, 17
    else:
        seconds = max(1, (tokens - 100) // (144 + (25 if bench.family == "qwen2.5" else 13)))
        clips = {f"{seconds} s": (seconds, RETENTIONS)}
        grids, new = 8, 17
    (first_clip, (first_length, _)), *_ = clips.items()
    rows: dict[tuple[str, ...], Callable[[], list[dict[str, Any]]]] = {}

    def add(name: str, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        rows[(name,)] = lambda: [measure(bench, *arguments)]

    if bench.family == "qwen2.5" or not bench.on_gpu:
        add("start", start_row, first_length)
    for clip, (length, retentions) in clips.items():
        # On a CPU, whose speed changes by the minute, in the same rounds; on a GPU each for itself.
        parts = [(retention,) for retention in (1.0, *reversed(retentions[1:]))] if bench.on_gpu else [retentions]
        for part in parts:
            names = tuple(f"prefill of {clip} at {retention:.0%}" for retention in part)
            rows[names] = partial(prefill_rows, bench, length, part)
    decodes = {clip: length for clip, (length, _) in clips.items()} if bench.on_gpu else {"1 s": 1}
    for clip, length in decodes.items():
        add(f"decode after {clip}", decode_row, length, 1.0, new)
    add(f"decode after {next(iter(decodes))} at 10%", decode_row, next(iter(decodes.values())), RETENTIONS[-1], new)
    add("vision", vision_row, grids, 24)
    if bench.family == "qwen2.5":
        add("vision, windows not full", vision_row, grids, 20)
    add("audio", audio_row, 64 if bench.on_gpu else 30)
    add(f"first token of {first_clip}", first_token_row, first_length)
    if bench.family == "qwen3":
        add("experts", experts_row, tokens)
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=SIZES["small"], default=list(SIZES["small"]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16, on a CPU float32 before it")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, else 0.5B")
    parser.add_argument("--rows", nargs="+", default=[""], help="those whose names begin so (default: all)")
    parser.add_argument("--tokens", type=int, default=3000, help="of the clip's prompt at 0.5B (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of a row (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--render", action="store_true", help="only write README.md from the result files")
    parser.add_argument("--first-prefill", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    size = options.size or ("full" if device.type == "cuda" else "0.5B")
    dtypes = options.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    if options.first_prefill:
        bench = Bench(options.families[0], size, DTYPES[dtypes[0]], device, 1)
        print(json.dumps(first_prefill(bench, options.first_prefill)))
        return
    folder = options.results / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if not options.render:
        measure_all(options, device, size, dtypes, folder)
    write_readme(options.results)


def measure_all(options: argparse.Namespace, device: torch.device, size: str, dtypes: list[str], folder: Path) -> None:
    today, name = datetime.date.today().isoformat(), machine(device)
    short = "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())
    path = folder / f"{short}-{today}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"sections": {}}
    result |= {
        "machine": name,
        "device": device.type,
        "date": today,
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }

    def save() -> None:
        path.write_text(json.dumps(result, indent=1) + "\n")

    if "checked" not in result or options.again:
        result["checked"] = check(device)
        print("checked:", result["checked"], flush=True)
        save()
    for family in options.families:
        for dtype in dtypes:
            bench = Bench(family, size, DTYPES[dtype], device, options.repeats)
            section = result["sections"].setdefault(f"{family} {size} {dtype}", {"rows": {}})
            all_rows = rows_of(bench, options.tokens)
            section["all_rows"] = [name for names in all_rows for name in names]
            for names, measure in all_rows.items():
                wanted = any(name.startswith(tuple(options.rows)) for name in names)
                if not wanted or (section["rows"].keys() >= set(names) and not options.again):
                    continue
                before = ceilings(bench)
                rows = dict(zip(names, measure(), strict=True))
                machine_rates = {"before": before, "after": ceilings(bench)}
                section["parameters"] = sum(p.numel() for p in bench.compiled.thinker.parameters())
                for row_name, row in rows.items():
                    section["rows"][row_name] = {**row, "ceilings": machine_rates}
                    print(f"{family} {dtype}, {row_name}: {json.dumps(short_row(row))}", flush=True)
                save()


def short_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as one line."""
    times = {name: round(ratio["median"], 2) for name, ratio in row.get("times_as_fast", {}).items()}
    seconds = {name: float(f"{value:.3g}") for name, value in row["seconds"].items()}
    targets = [f"{t['what']}: {t['measured']:.2f} of {t['at_least']}" for t in row.get("targets", [])]
    return {"seconds": seconds, "times as fast as": times, "targets": targets}


if __name__ == "__main__":
    main()
