"""The rows of the benchmark: what each measures, and which there are."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_cache import CACHES, caches_in
from bench_media import media_row, write_clip
from bench_models import in_float32, their_decode, their_prefill
from bench_results import ROOT, Names
from bench_sides import Bench, Clip, Measured, Seconds, encoded, limit, spread, target, without_layers
from torch import Tensor

import omni
import seats
from omni.processing.frames import Pixels, vision_sizes
from omni.processing.mel import SAMPLE_RATE, log_mel
from omni.runtime.graphs import capture, warm_up
from seats.plan import StagePlan

sys.path.append(str(ROOT / "scripts/report"))
from bench_report import PAPER

RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)
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
            total -= expert_weights(model) * (1 - decoder.experts_per_token / decoder.num_experts)
    return total


def expert_weights(model: omni.Omni) -> int:
    """Of one layer."""
    decoder = model.config.decoder
    return 3 * decoder.num_experts * decoder.expert_size * decoder.hidden_size


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
        row["targets"] += [limit("milliseconds", 1e3 * row["seconds"]["compiled"], 26.0)]
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


def agreement_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """The next token's logits after a clip of noise, encoders included: how far apart, relative to their norm.

    The yardstick is transformers computing in float32 with the same weights; in it, so do we.
    """
    inputs = bench.inputs(clip)
    reference, thinker, language = bench.reference, bench.thinker, bench.language
    batch = inputs.tensors() | {"attention_mask": torch.ones_like(inputs.input_ids)}

    @torch.no_grad()
    def their_logits() -> Tensor:
        dtype = reference.lm_head.weight.dtype
        given = {
            name: value.to(bench.device, dtype if value.is_floating_point() and "second" not in name else None)
            for name, value in batch.items()
        }
        return reference(**given, use_audio_in_video=True, use_cache=False).logits[0, -1].float()

    def our_logits(model: omni.Omni) -> Tensor:
        return model.prefill(inputs).logits

    found = {"compiled": our_logits(bench.compiled), "eager": our_logits(bench.eager), "transformers": their_logits()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with in_float32(reference, language.layers, "forward"):
            exact = their_logits()
        if bench.dtype != torch.float32:
            with in_float32(thinker, thinker.layers, "prefill"):
                found["eager, in float32"] = our_logits(omni.Omni(thinker, Path(os.devnull), reuse=0))
    apart = {name: ((logits - exact).norm() / exact.norm()).item() for name, logits in found.items()}
    assert exact.isfinite().all() and exact.std() > 0.1, "logits too flat to tell a right model from a wrong one"
    row = {"rounds": 1, "seconds": {}, "tokens": inputs.input_ids.shape[1], "apart": apart}
    exactly = "eager" if bench.dtype == torch.float32 else "eager, in float32"
    row["targets"] = [limit("apart from transformers, both in float32", apart[exactly], 1e-3)]
    if bench.dtype != torch.float32:
        times = apart["compiled"] / apart["transformers"]
        row["targets"] += [limit("times as far from float32 as transformers in the same type", times, 1.5)]
    return row


def vision_row(bench: Bench, grids: int, side: int) -> dict[str, Any]:
    """So many temporal grids of side × side patches: ours from bytes in the host's memory, as a request holds them,
    transformers from patches on the device."""
    pixels, grid = noise(bench, 2 * grids, side * bench.config.vision.patch_size), torch.tensor([[grids, side, side]])
    patches, device_grid = pixels.patches().to(bench.device, bench.dtype), grid.to(bench.device)
    return encoder_row(
        bench,
        lambda model, call: model.thinker.vision(pixels, grid, **call),
        lambda: bench.encoder("visual")(patches, grid_thw=device_grid),
    )


def noise(bench: Bench, frames: int, height: int, width: int | None = None) -> Pixels:
    """Of so many frames."""
    sizes = vision_sizes(Path(os.devnull), bench.config)
    shown = torch.randint(256, (frames, 3, height, width or height), dtype=torch.uint8)
    return Pixels((shown,), sizes, of_clip=True)


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
    """One layer of experts, beside transformers', one dense product of as many multiplications, and reading the weights
    of those experts that so many tokens meet."""
    decoder = bench.config.decoder
    x = torch.randn(1, tokens, decoder.hidden_size, device=bench.device).to(bench.dtype)
    width = 3 * decoder.experts_per_token * decoder.expert_size
    dense = torch.randn(width, decoder.hidden_size, device=bench.device).to(bench.dtype)
    met = 1 - (1 - decoder.experts_per_token / decoder.num_experts) ** tokens
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


def first_token_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """From decoded frames and samples: patches, log-mel, encoders, prefill at 10 %; transformers keeps every token."""
    blank, config = bench.inputs(clip), bench.preset(RETENTIONS[-1])
    seconds, side = int(clip.seconds), bench.config.vision.patch_size * bench.config.vision.spatial_merge_size
    pixels = noise(bench, 2 * seconds, clip.rows * side, clip.columns * side)
    sound = torch.randn(seconds * SAMPLE_RATE) / 10

    def prepared() -> omni.Inputs:
        return with_media(blank, blank.input_ids, pixels, log_mel(sound)[None])

    language = theirs(bench, blank)
    grid, length = blank.video_grid_thw, blank.mel_lengths
    assert grid is not None

    @torch.inference_mode()
    def other() -> None:
        patches, mel = pixels.patches(), log_mel(sound)
        bench.encoder("visual")(patches.to(bench.device, bench.dtype), grid_thw=grid.to(bench.device))
        bench.encoder("audio_tower")(mel.to(bench.device, bench.dtype), feature_lens=length.to(bench.device))
        language()

    sides = {
        "compiled": partial(bench.once, lambda: bench.compiled.prefill(prepared(), seats=config)),
        "eager": partial(bench.once, lambda: bench.eager.prefill(prepared(), seats=config)),
        "transformers": partial(bench.once, other),
    }
    return bench.measure(sides).row({name: name for name in sides})


def first_token_from_file_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """From a file of 720p with sound, two frames a second: read, log-mel, encoders, prefill at 10 %."""
    from omni.processing.beside import Beside
    from omni.processing.media import read_audio, read_video

    blank, config, seconds = bench.inputs(clip), bench.preset(RETENTIONS[-1]), int(clip.seconds)
    side = bench.config.vision.patch_size * bench.config.vision.spatial_merge_size
    sizes, size = vision_sizes(Path(os.devnull), bench.config), (clip.rows * side, clip.columns * side)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, seconds, 720, sound=torch.randn(seconds * SAMPLE_RATE) / 10)

        def hear(stopped: Callable[[], bool]) -> Tensor:
            sound = read_audio(path, end=seconds, stopped=stopped)
            assert sound is not None
            return log_mel(sound)[None]

        def prepared() -> omni.Inputs:
            with Beside(hear) as beside:
                video = read_video(path, size_for=lambda *_: size)
                return with_media(blank, blank.input_ids, Pixels((video.frames,), sizes, True), beside.wait())

        sides = {
            "compiled": partial(bench.once, lambda: bench.compiled.prefill(prepared(), seats=config)),
            "eager": partial(bench.once, lambda: bench.eager.prefill(prepared(), seats=config)),
            "reading alone": partial(bench.once, prepared),
        }
        return bench.measure(sides).row({name: name for name in sides})


def with_media(inputs: omni.Inputs, ids: Tensor, pixels: Pixels, mel: Tensor) -> omni.Inputs:
    """A request with another question, clip and sound; the latter two of the same size."""
    return omni.Inputs(
        ids,
        pixel_values_videos=pixels,
        video_grid_thw=inputs.video_grid_thw,
        video_second_per_grid=inputs.video_second_per_grid,
        input_features=mel,
        feature_attention_mask=inputs.feature_attention_mask,
    )


def second_question_row(bench: Bench, clip: Clip, retention: float) -> dict[str, Any]:
    """From pixels and log-mel in memory to the first token: of a clip that is new, of one that was asked about before,
    each time with other words, and of that where nothing is kept."""
    blank, config = bench.inputs(clip), bench.preset(retention)
    model = omni.Omni(bench.compiled.thinker, Path(os.devnull), compile=True)
    after, asked = clip.text - clip.text // 4 - 1, 0
    prefills: dict[str, list[float]] = {}
    reused = 0

    def ask(side: str, model: omni.Omni) -> float:
        nonlocal asked
        asked += 1
        ids = blank.input_ids.clone()
        ids[0, -after:] = torch.arange(after) * asked % 1000 + 8
        inputs = with_media(blank, ids, blank.held("pixel_values_videos"), blank.input_features)
        return bench.once(lambda: prefills.setdefault(side, []).append(prefilled(model, inputs)))

    def prefilled(model: omni.Omni, inputs: omni.Inputs) -> float:
        nonlocal reused
        prefill = model.prefill(inputs, seats=config)
        reused = max(reused, prefill.reused_tokens)
        return prefill.prefill_seconds

    def first() -> float:
        model.forget()
        return ask("first", model)

    sides: dict[str, Seconds] = {
        "first": first,
        "second": lambda: ask("second", model),
        "nothing kept": lambda: ask("nothing kept", bench.compiled),
    }
    measured = bench.measure(sides)  # in this order: the second is about what the first made known
    row = measured.row({name: name for name in ("second", "first", "nothing kept")})
    rounds = len(measured.times["first"])
    prefill = {side: statistics.median(times[-rounds:]) for side, times in prefills.items()}
    row |= {
        "prefill_seconds": prefill,
        "tokens": blank.input_ids.shape[1],
        "reused_tokens": reused,
        "kept_bytes": model.engine.kept.nbytes,
    }
    if retention == RETENTIONS[-1]:
        row["targets"] = [
            limit(
                "of the first question's time to the first token",
                measured.median("second") / measured.median("first"),
                1 / 8,
            ),
            limit("of the first question's prefill", prefill["second"] / prefill["first"], 0.35),
        ]
    return row


def throughput_row(
    bench: Bench, clip: Clip, questions: int, new: int, sizes: tuple[int, ...] = (1, 4, 8)
) -> dict[str, Any]:
    """Different questions about different clips of one length at 10 %, from pixels and log-mel in memory to the last of
    so many tokens, in batches. What is compiled for a batch is before that."""
    blank, config = bench.inputs(clip), bench.preset(RETENTIONS[-1])
    mel, pixels = blank.input_features, blank.held("pixel_values_videos")
    before, after, asked = clip.text // 4, clip.text - clip.text // 4 - 1, []
    for seed in range(questions):
        ids = blank.input_ids.clone()
        ids[0, :before], ids[0, -after:] = (torch.randint(1000, (count,)) for count in (before, after))
        ids = ids[:, min(before, seed % 4 * 8) :]  # of several lengths
        shown = replace(pixels, frames=tuple(frames.roll(seed, 0) for frames in pixels.frames))
        asked.append(with_media(blank, ids, shown, mel.roll(seed, -1)))

    def answer(requests: list[omni.Inputs]) -> None:
        bench.compiled.generate(requests, seats=config, max_new_tokens=new, stop_token_ids=[])

    row: dict[str, Any] = {"rounds": 1, "seconds": {}, "questions": questions, "new_tokens": new, "first_seconds": {}}
    for size in sizes:
        batches = [asked[start : start + size] for start in range(0, questions, size)]
        row["first_seconds"][f"batches of {size}"] = bench.once(partial(answer, batches[0]))
        seconds = bench.once(lambda batches=batches: [answer(batch) for batch in batches])
        row["seconds"][f"batches of {size}"] = seconds / questions
    return row


def plans_row(bench: Bench, clip: Clip, lengths: tuple[float, ...]) -> dict[str, Any]:
    """The first prefill at 10 % of plans never met before, in a process that has met one, nothing of them on disk."""
    config = bench.preset(RETENTIONS[-1])

    def prefill(clip: Clip, times: int) -> list[float]:
        inputs = bench.inputs(clip)
        with encoded(bench, inputs):
            return [bench.compiled.prefill(inputs, seats=config).prefill_seconds for _ in range(times)]

    def plan(clip: Clip) -> StagePlan:
        return bench.compiled.engine.plan(bench.inputs(clip), config)

    prefill(clip, 1)
    plans = {plan(each): each for each in (clip, *(replace(clip, seconds=seconds) for seconds in lengths))}
    assert len(plans) > 1, "all clips share a plan"
    with empty_cache():
        found = [prefill(each, 3) for each in list(plans.values())[1:]]
    first = [times[0] for times in found]
    return {
        "rounds": len(found),
        "seconds": {
            "a plan never met": statistics.median(first),
            "the slowest of them": max(first),
            "again": statistics.median(times[-1] for times in found),
        },
        "targets": [limit("seconds of a plan never met", statistics.median(first), 2.0 if bench.on_gpu else 5.0)],
    }


@contextmanager
def empty_cache() -> Iterator[None]:
    """Inside, the compiler finds nothing on disk."""
    before = {name: os.environ.get(name) for name in CACHES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(caches_in(Path(folder)))
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def start_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """The first prefill at 10 % in a new process, with an empty compiler's cache on disk and with a full one."""
    command = [sys.executable, str(Path(__file__).with_name("bench.py")), "--first-prefill", str(clip.seconds)]
    command += ["--families", bench.family, "--size", bench.size, "--device", str(bench.device)]
    command += ["--dtypes", str(bench.dtype).removeprefix("torch.")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        environment = {**os.environ, **caches_in(Path(cache))}
        runs = [
            json.loads(
                subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                .stdout.strip()
                .splitlines()[-1]
            )
            for _ in range(2)
        ]
    seconds = {
        "empty cache": runs[0]["first"],
        "empty cache, a later plan": runs[0]["first_of_a_later_plan"],
        "full cache": runs[1]["first"],
        "again": runs[1]["again"],
    }
    return {
        "rounds": 1,
        "seconds": seconds,
        "targets": [
            limit("seconds of the first plan of a process", seconds["empty cache"], 60.0),
            limit("seconds of it with a cache on disk", seconds["full cache"], 15.0),
        ],
    }


def first_prefill(bench: Bench, seconds: float) -> dict[str, float]:
    inputs, config = bench.inputs(Clip(seconds)), bench.preset(RETENTIONS[-1])
    with encoded(bench, inputs):
        first, second = (bench.once(lambda: bench.compiled.prefill(inputs, seats=config)) for _ in range(2))
        other = bench.once(lambda: bench.compiled.prefill(inputs, seats=bench.preset(RETENTIONS[-2])))
    return {"first": first, "again": second, "first_of_a_later_plan": other}


def _media_rows(seconds: int, height: int, rounds: int) -> list[dict[str, Any]]:
    return [media_row(seconds, height, rounds)]


def without_model(names: Names) -> bool:
    """Whether rows measure no model, so that none is made for them."""
    return names[0].startswith("media")


OF_FILES = ("media", "first token from a file")


def measurable(names: Names) -> bool:
    """Whether this machine has what rows need. The report says of others that they are not measured."""
    return not names[0].startswith(OF_FILES) or importlib.util.find_spec("av") is not None


def rows_of(bench: Bench, tokens: int) -> dict[Names, Callable[[], list[dict[str, Any]]]]:
    """Names of rows that are measured together → what measures them, the most wanted first. Those of files need PyAV
    (`measurable`)."""
    few = RETENTIONS[-1]
    if bench.size == "full":
        clips = {"64 s": (Clip(64), RETENTIONS)}
        if bench.family == "qwen2.5":
            clips[PAPER] = (PAPERS_CLIP, RETENTIONS)
        clips["10 min"] = (Clip(600), (1.0, few))
        grids, new, compared, lengths = 64, 128, Clip(8), (23, 37, 51)
        asked, answer, routed = 32, 16, (102, 441, 1530, 3000, 10150)
    elif bench.size == "small":
        clips = {"4 s": (Clip(4), (1.0, few)), "9 s": (Clip(9), (1.0, few))}
        grids, new, compared, lengths = 8, 17, Clip(2), (6, 12)
        asked, answer, routed = 8, 3, (16, 300)
    else:
        seconds = max(1, (tokens - 100) // (144 + (25 if bench.family == "qwen2.5" else 13)))
        clips = {f"{seconds} s": (Clip(seconds), RETENTIONS)}
        grids, new, compared, lengths = 8, 17, Clip(2), (3, 5, 9)
        asked, answer, routed = 8, 8, (102, tokens)
    label, (clip, _) = next(iter(clips.items()))
    decoded, after = (label, clip) if bench.on_gpu else ("1 s", Clip(1))
    rows: dict[Names, Callable[[], list[dict[str, Any]]]] = {}

    def add(name: str, measure: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> None:
        rows[(name,)] = lambda: [measure(bench, *arguments, **options)]

    def add_prefills(label: str) -> None:
        clip, retentions = clips[label]
        # On a CPU, whose speed changes by the minute, in the same rounds; on a GPU each for itself.
        parts = [(retention,) for retention in (1.0, *reversed(retentions[1:]))] if bench.on_gpu else [retentions]
        for part in parts:
            names = tuple(f"prefill of {label} at {retention:.0%}" for retention in part)
            rows[names] = partial(prefill_rows, bench, clip, part)

    add_prefills(label)
    add(f"decode after {decoded} at 10%", decode_row, after, few, new)
    add("agreement", agreement_row, compared)
    if bench.family == "qwen3":
        for count in routed:
            add(f"experts, {count} tokens", experts_row, count)
    add("plans", plans_row, clip, lengths)
    if PAPER in clips:
        add_prefills(PAPER)
    add("vision", vision_row, grids, 24)
    if bench.family == "qwen2.5":
        add("vision, windows not full", vision_row, grids, 20)
    add("audio", audio_row, 64 if bench.on_gpu else 30)
    add(f"first token of {label}", first_token_row, clip)
    add(f"first token from a file of {label}", first_token_from_file_row, clip)
    # As long as clips are that people ask about, and a question of some thirty words.
    known = replace(clip, seconds=40 if bench.size == "0.5B" else clip.seconds, text=60)
    for retention in (few, 1.0):
        name = f"second question after {known.seconds:g} s at {retention:.0%}"
        add(name, second_question_row, known, retention)
    add(f"throughput of {label} at 10%", throughput_row, clip, asked, answer)
    add(f"decode beside compiled after {decoded} at 10%", decode_row, after, few, new, compiled=True)
    add(f"prefill beside compiled of {label}", compiled_prefill_row, clip)
    add(f"selection of {label} at 10%", selection_row, clip)
    if bench.family == "qwen2.5" or not bench.on_gpu:  # of the other, a second process has no room beside this one
        add("start", start_row, clip)
    add(f"decode after {decoded}", decode_row, after, 1.0, new)
    for label in list(clips)[1:]:
        if label != PAPER:
            add_prefills(label)
            if bench.on_gpu:
                add(f"decode after {label}", decode_row, clips[label][0], 1.0, new)
    if bench.family == "qwen2.5" and bench.dtype == (torch.bfloat16 if bench.on_gpu else torch.float32):
        seconds, heights = (2, (144,)) if bench.size == "small" else (64 if bench.on_gpu else 16, (1080, 720))
        for height in heights:
            rows[f"media, {seconds} s of {height}p",] = partial(_media_rows, seconds, height, bench.repeats)
    return rows
