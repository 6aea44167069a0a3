"""Which rows the benchmark has, and what measures each."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench_decoder import PAPERS_CLIP, compiled_prefill_row, decode_row, experts_row, prefill_rows, selection_row
from bench_encoders import audio_row, vision_row
from bench_media import RATE, media_row
from bench_results import ROOT, Names
from bench_sides import RETENTIONS, Bench, Clip
from bench_start import plans_row, start_row
from bench_whole import agreement_row, first_token_from_file_row, first_token_row, second_question_row, throughput_row

sys.path.append(str(ROOT / "scripts/report"))
from bench_report import PAPER


def _media_rows(seconds: int, height: int, rounds: int, **options: int) -> list[dict[str, Any]]:
    return [media_row(seconds, height, rounds, **options)]


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
        grids, new, compared, lengths = 64, 48, Clip(8), (23, 37, 51)
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
        rows[f"media, {seconds} s of {heights[0]}p as many telephones write it",] = partial(
            _media_rows, seconds, heights[0], bench.repeats, gop=RATE, bframes=0
        )
    return rows
