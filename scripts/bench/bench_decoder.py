"""Rows of the decoder, from what the encoders made: prefill, selecting in it, decoding, a layer of experts."""

from __future__ import annotations

import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_models import their_decode, their_prefill
from bench_sides import (
    RETENTIONS,
    Bench,
    Clip,
    Measured,
    Seconds,
    encoded,
    limit,
    milliseconds,
    spread,
    target,
    without_layers,
)

import omni
import seats
from omni.runtime.graphs import capture, warm_up

COMPILED = "transformers compiled"
PAPERS_CLIP = Clip(68, text=600, rows=10, columns=15)
"""Of Qwen2.5-Omni 10,200 tokens of video, 1,700 of sound: what the paper's own counts of multiply-accumulates fit."""
PAPERS_MACS = {0.35: 3.0, 0.25: 4.2, 0.15: 6.4, 0.10: 9.1}
"""How many times fewer of them the paper counts (Qwen2.5-Omni-7B)."""
PAPERS_TIMES = {0.10: 4.8}
"""How many times as fast its prefill is."""


def active_weights(model: omni.Omni) -> float:
    """Weights of the decoder's layers that one token meets: of experts, its share."""
    decoder, total = model.config.decoder, 0.0
    for index, layer in enumerate(model.thinker.layers):
        total += sum(parameter.numel() for parameter in layer.parameters())
        if decoder.is_sparse(index):
            total -= expert_weights(model) * (1 - decoder.num_experts_per_tok / decoder.num_experts)
    return total


def expert_weights(model: omni.Omni) -> int:
    """Of one layer."""
    decoder = model.config.decoder
    return 3 * decoder.num_experts * decoder.moe_intermediate_size * decoder.hidden_size


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


def prefill_rows(bench: Bench, clip: Clip, retentions: tuple[float, ...]) -> list[dict[str, Any]]:
    """From what the encoders made to the logits of the next token, cache written, all stages included."""
    inputs = bench.inputs(clip)
    with encoded(bench, inputs):

        def side(model: omni.Omni, retention: float) -> float:
            return model.prefill(inputs, seats=bench.preset(retention)).prefill_seconds

        sides: dict[str, Seconds] = {}
        for retention in dict.fromkeys((1.0, *retentions)):
            sides[f"compiled {retention}"] = partial(side, bench.compiled, retention)
            if retention in retentions:
                sides[f"eager {retention}"] = partial(side, bench.eager, retention)
        sides["transformers"] = theirs(bench, inputs)
        measured = bench.measure({**sides, "matrix": bench.matrix[1]})
        return [prefill_row(bench, inputs, clip, retention, measured) for retention in retentions]


def theirs(bench: Bench, inputs: omni.Inputs, *, compiled: bool = False) -> Seconds:
    """transformers' prefill of as many tokens."""
    tokens = inputs.input_ids.shape[1]
    return bench.timed(their_prefill(bench.language, bench.reference.lm_head, tokens, compiled=compiled))


def prefill_row(bench: Bench, inputs: omni.Inputs, clip: Clip, retention: float, measured: Measured) -> dict[str, Any]:
    config, ours = bench.preset(retention), f"compiled {retention}"
    sides = {"compiled": ours, "eager": f"eager {retention}", "transformers": "transformers"}
    row = measured.row(sides if config is None else {**sides, "every token": "compiled 1.0"})
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
    if clip == PAPERS_CLIP:
        row["of_the_paper"] = {"macs_ratio": PAPERS_MACS.get(retention), "times_as_fast": PAPERS_TIMES.get(retention)}
    faster = {name: ratio["median"] for name, ratio in row["times_as_fast"].items()}
    row["targets"] = []
    if config is None:
        of_rate = 0.6 if bench.on_gpu else 0.95
        row["targets"] += [target("of the matrix rate", row["of_matrix_rate"]["median"], of_rate)]
        if "transformers" in faster and not bench.on_gpu:
            row["targets"] += [target("times as fast as transformers", faster["transformers"], 1.0)]
    elif "every token" not in faster:
        pass
    elif bench.on_gpu and retention == RETENTIONS[-1] and bench.family == "qwen3":
        row["targets"] += milliseconds(bench, "prefill at 10%", row)
    elif bench.on_gpu and retention == RETENTIONS[-1]:
        row["targets"] += [target("times as fast as with every token", faster["every token"], 8.0)]
    elif not bench.on_gpu:
        of_work, of_macs = (faster["every token"] / row[ratio] for ratio in ("work_ratio", "macs_ratio"))
        row["targets"] += [
            target("speed-up over every token / ratio of multiply-accumulates done", of_work, 0.9),
            target("speed-up over every token / ratio by the paper's count", of_macs, 0.9),
        ]
    return row


def compiled_prefill_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """Every token, beside transformers' decoder compiled whole."""
    inputs = bench.inputs(clip)
    with encoded(bench, inputs):
        sides = {
            "compiled": lambda: bench.compiled.prefill(inputs).prefill_seconds,
            COMPILED: theirs(bench, inputs, compiled=True),
        }
        return bench.measure(sides, may_fail=(COMPILED,)).row({name: name for name in sides})


def selection_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """What a prefill without its layers takes longer for selecting, beside the whole.

    Compiled on a GPU, where launches would decide.
    """
    inputs, config = bench.inputs(clip), bench.preset(RETENTIONS[-1])
    with encoded(bench, inputs):

        def side(model: omni.Omni, config: seats.SeatsConfig | None) -> float:
            return model.prefill(inputs, seats=config).prefill_seconds

        whole = bench.measure({"whole": partial(side, bench.compiled, config)}, repeats=5)
        with without_layers():
            model = omni.Omni(bench.thinker, Path(os.devnull), compile=bench.on_gpu, reuse=0)
            sides = {"selecting": partial(side, model, config), "not": partial(side, model, None)}
            measured = bench.measure(sides, repeats=5)
    selecting = max(0.0, measured.median("selecting") - measured.median("not"))
    share = selecting / whole.median("whole")
    return {
        "rounds": 5,
        "seconds": {"prefill": whole.median("whole"), "selection": selecting},
        "selection_share": share,
        "targets": [limit("of the prefill is selection", share, 0.05)],
    }


def experts_row(bench: Bench, tokens: int) -> dict[str, Any]:
    """One layer of experts, beside transformers', one dense product of as many multiplications, and reading the weights
    of those experts that so many tokens meet."""
    decoder = bench.config.decoder
    x = torch.randn(1, tokens, decoder.hidden_size, device=bench.device).to(bench.dtype)
    width = 3 * decoder.num_experts_per_tok * decoder.moe_intermediate_size
    dense = torch.randn(width, decoder.hidden_size, device=bench.device).to(bench.dtype)
    met = 1 - (1 - decoder.num_experts_per_tok / decoder.num_experts) ** tokens
    read = met * expert_weights(bench.compiled) * bench.dtype.itemsize
    copied, copy = bench.copy
    ours, other = bench.eager.thinker.layers[0].mlp, bench.language.layers[0].mlp
    with torch.inference_mode():
        sides: dict[str, Seconds] = {
            "eager": bench.timed(lambda: ours(x)),
            "transformers": bench.timed(lambda: other(x)),
            "one dense product": bench.timed(lambda: x @ dense.T),
            "reading the weights": lambda: copy() * read / copied,
        }
        if bench.on_gpu:  # launched one by one, kernels of a few tokens would wait for Python
            run = partial(ours, x)
            warm_up(run)
            sides["compiled"] = bench.timed(capture(run).replay)
        return bench.measure(sides, repeats=3 * bench.repeats).row({name: name for name in sides})


def decode_row(bench: Bench, clip: Clip, retention: float, new: int, *, compiled: bool = False) -> dict[str, Any]:
    """Seconds per token, greedy, after a clip and its question; every side feeds on its own picks.

    compiled: beside transformers' static cache and compiled step alone.
    """
    inputs, config = bench.inputs(clip), bench.preset(retention)
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

        prompt = bench.compiled.prefill(inputs, seats=config).cache.lengths[:, 0].tolist()

        def other(compiled: bool) -> Seconds:
            head = bench.reference.lm_head
            return their_decode(bench.language, head, max(prompt), new, compiled=compiled, wait=bench.wait)

        sides: dict[str, Seconds] = {"compiled": partial(ours, bench.compiled)}
        if compiled:
            sides[COMPILED] = other(compiled=True)
        else:
            sides |= {"eager": partial(ours, bench.eager), "transformers": other(compiled=False)}
        # After a long clip a round is all prefill, and a step as steady as any.
        repeats = 1 if clip.seconds > 100 else None
        measured = bench.measure({**sides, "copy": bench.copy[1]}, repeats=repeats, may_fail=(COMPILED,))
        row = measured.row({name: name for name in sides})
        if not compiled:
            steps = bench.compiled._tokens([inputs], max_new_tokens=new, stop_token_ids=[], seats=config)
            for _ in range(2):  # the prefill, and what a first step makes
                next(steps)
            row["profile"] = bench.profile(lambda: list(steps))
    decoder, size = bench.config.decoder, bench.dtype.itemsize
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
        of_rate = 0.6 if bench.family == "qwen3" else 0.8
        row["targets"] = [target("of the copy rate", row["of_copy_rate"]["median"], of_rate)]
    elif "transformers" in row["times_as_fast"]:
        against = row["times_as_fast"]["transformers"]["median"]
        row["targets"] = [target("times as fast as transformers", against, 2.0)]
    return row
