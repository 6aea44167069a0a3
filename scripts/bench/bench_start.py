"""Rows of first times: a plan of sizes that was never met, and a new process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_cache import CACHES, caches_in
from bench_sides import RETENTIONS, Bench, Clip, encoded, limit

from seats.plan import StagePlan


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
