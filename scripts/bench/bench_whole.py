"""Rows of the whole model, encoders included: its logits, the first token, a second question, many questions."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_check import apart
from bench_decoder import theirs
from bench_encoders import noise
from bench_media import write_clip
from bench_models import in_float32
from bench_sides import RETENTIONS, Bench, Clip, Seconds, limit, milliseconds
from torch import Tensor

import omni
from omni.processing.frames import Pixels, vision_sizes
from omni.processing.mel import SAMPLE_RATE, log_mel


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
    distances = {name: apart(logits, exact) for name, logits in found.items()}
    assert exact.isfinite().all() and exact.std() > 0.1, "logits too flat to tell a right model from a wrong one"
    row = {"rounds": 1, "seconds": {}, "tokens": inputs.input_ids.shape[1], "apart": distances}
    exactly = "eager" if bench.dtype == torch.float32 else "eager, in float32"
    row["targets"] = [limit("apart from transformers, both in float32", distances[exactly], 1e-3)]
    if bench.dtype != torch.float32:
        times = distances["compiled"] / distances["transformers"]
        row["targets"] += [limit("times as far from float32 as transformers in the same type", times, 1.5)]
    return row


def first_token_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """From decoded frames and samples: patches, log-mel, encoders, prefill at 10 %; transformers keeps every token.
    Preparing alone is all before the encoders."""
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
        "preparing alone": partial(bench.once, prepared),
    }
    row = bench.measure(sides).row({name: name for name in sides})
    if bench.on_gpu:
        row["profile"] = bench.profile(lambda: bench.compiled.prefill(prepared(), seats=config))
    return row | {"targets": milliseconds(bench, "first token", row)}


def first_token_from_file_row(bench: Bench, clip: Clip) -> dict[str, Any]:
    """From a file of 720p with sound, two frames a second: read, log-mel, encoders, prefill at 10 %."""
    from omni.processing.background import BackgroundTask
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
            with BackgroundTask(hear) as heard:
                video = read_video(path, size_for=lambda *_: size)
                return with_media(blank, blank.input_ids, Pixels((video.frames,), sizes, True), heard.wait())

        sides = {
            "compiled": partial(bench.once, lambda: bench.compiled.prefill(prepared(), seats=config)),
            "eager": partial(bench.once, lambda: bench.eager.prefill(prepared(), seats=config)),
            "preparing alone": partial(bench.once, prepared),
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
    if bench.on_gpu:
        row["profile"] = bench.profile(lambda: ask("second", model))
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
