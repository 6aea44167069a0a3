"""The rows of the benchmark: what each measures, and which there are."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_sides import Bench, Measured, Seconds, encoded, spread, target, without_layers
from torch import Tensor

import omni
import seats
from omni.processing.frames import patchify, vision_sizes
from omni.processing.mel import SAMPLE_RATE, log_mel

RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)


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
