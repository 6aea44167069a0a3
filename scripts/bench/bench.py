"""Measures prefill, encoders, decoding and selection: compiled, eager and transformers side by side, in turns.

    python scripts/bench/bench.py                         # both families, 0.5 B parameters on a CPU, full size on a GPU
    python scripts/bench/bench.py --families qwen3 --dtypes bfloat16 --rows prefill decode
    python scripts/bench/bench.py --minutes 5             # what is least known first; stops in time
    python scripts/bench/bench.py --archive compiled.tgz  # what is compiled is kept there for the next run
    python scripts/bench/bench.py --size small --results /tmp/small  # see that all of it runs; measures nothing
    python scripts/bench/bench.py --merge FILE...         # take the rows of other runs' result files
    python scripts/bench/bench.py --render                # benchmarks/README.md from the result files alone

Weights are random, made on the device; both sides read the same memory. A row is written to
benchmarks/results/<machine>.json when it is done, and benchmarks/README.md is rendered from all such files. Rows of
this commit are not measured again, so a run that was stopped goes on (`--again` measures anew). A product of large
matrices and a large copy run in turn with the rows: what the machine can do.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_cache import archived
from bench_check import check
from bench_models import SIZES
from bench_results import ROOT, Clock, Names, commit_of, least_known_first, load, merge, path_of, run_of, save
from bench_rows import measurable, rows_of, without_model
from bench_sides import Bench, ceilings, first_line, machine
from bench_start import first_prefill

from omni.config import DTYPES

sys.path.append(str(ROOT / "scripts/report"))
from bench_report import as_text, write_readme

CHECK_SECONDS, SETUP_SECONDS = 90.0, 30.0
GUESSES = {"beside compiled": 100.0, "10 min": 120.0, "start": 150.0, "plans": 60.0, "experts": 5.0, "": 30.0}
"""Seconds that a row is taken to need which was never measured, by what its name says."""


def guess(name: str) -> float:
    return next(seconds for part, seconds in GUESSES.items() if part in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=SIZES["small"], default=list(SIZES["small"]))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: bfloat16, on a CPU float32 before it")
    parser.add_argument("--size", choices=SIZES, help="default: full on a GPU, else 0.5B")
    parser.add_argument("--rows", nargs="+", default=[""], help="those that begin so, in this order (default: all)")
    parser.add_argument("--tokens", type=int, default=3000, help="of the clip's prompt at 0.5B (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of a row (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start no row that would not end in time, once begun")
    parser.add_argument("--archive", type=Path, help="a .tgz of what the compiler made: read, where there, and written")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--commit", help="what is measured, where git does not know (default: what it says)")
    parser.add_argument("--again", action="store_true", help="measure rows of this commit, too")
    parser.add_argument("--render", action="store_true", help="only write README.md from the result files")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="take rows from other result files")
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
    if options.merge:
        merge_files(options.merge, folder, options.commit)
    elif options.render:
        name_rows(folder, options.tokens)
    else:
        commit = options.commit or commit_of()
        if commit is None:
            parser.error("this is no git checkout: say with --commit what is measured.")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is compiled is kept then, too
        with archived(options.archive) as keep:
            measure_all(options, device, size, dtypes, folder, commit, keep)
    write_readme(options.results)


def merge_files(paths: list[Path], folder: Path, commit: str | None) -> None:
    for path in paths:
        other = json.loads(path.read_text())
        own = path_of(folder, other["machine"])
        result = load(own, other["machine"], other["device"])
        taken = merge(result, other, commit)
        save(own, result)
        print(f"{path}: {len(taken)} rows into {own.name}: {'; '.join(taken)}")


def name_rows(folder: Path, tokens: int) -> None:
    """Puts into result files which rows there are by now, so that the report names those that are not measured."""
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        for name, section in result["sections"].items():
            family, size, dtype = name.split()
            bench = Bench(family, size, DTYPES[dtype], torch.device(result["device"]), 1)
            section["all_rows"] = [row for names in rows_of(bench, tokens) for row in names]
        save(path, result)


def measure_all(
    options: argparse.Namespace,
    device: torch.device,
    size: str,
    dtypes: list[str],
    folder: Path,
    commit: str,
    keep: Callable[[], None],
) -> None:
    name, clock = machine(device), Clock(options.minutes)
    path = path_of(folder, name)
    result = load(path, name, device.type)

    def write() -> None:
        save(path, result)
        keep()

    def check_models() -> None:
        checked = result.get("checked", {"run": {"commit": None}})
        if clock.fits(CHECK_SECONDS) and (options.again or checked["run"]["commit"] != commit):
            result["checked"] = {**check(device), "run": run_of(commit)}
            print("checked:", result["checked"], flush=True)
            write()

    if options.minutes is None:
        check_models()
    models = [(family, dtype) for family in options.families for dtype in dtypes]
    for index, (family, dtype) in enumerate(models):
        clock.share(len(models) - index)
        bench = Bench(family, size, DTYPES[dtype], device, options.repeats)
        section = result["sections"].setdefault(f"{family} {size} {dtype}", {"rows": {}})
        measure_model(bench, rows_of(bench, options.tokens), section, clock, options, commit, write)
        del bench
        free(device)
    if options.minutes is not None:
        check_models()


def free(device: torch.device) -> None:
    """Gives back the memory of a model that is gone: the compiler's records hold some of it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_model(
    bench: Bench,
    rows: dict[Names, Callable[[], list[dict[str, Any]]]],
    section: dict[str, Any],
    clock: Clock,
    options: argparse.Namespace,
    commit: str,
    write: Callable[[], None],
) -> None:
    """Measures the rows of one model, what is least known first, and writes each when it is done."""
    section["all_rows"] = [name for names in rows for name in names]
    rows = {names: measure for names, measure in rows.items() if measurable(names)}
    where = f"{bench.family} {str(bench.dtype).removeprefix('torch.')}"
    for names in least_known_first(rows, section, commit, options.rows, again=options.again):
        expected = max(section["rows"].get(name, {}).get("took_seconds") or guess(name) for name in names)
        setup = 0 if bench.is_made or without_model(names) else section.get("setup_seconds", SETUP_SECONDS)
        if not clock.fits(expected + setup):
            print(f"{where}, {names[0]}: {expected + setup:.0f} s do not fit any more", flush=True)
            continue
        failure = None
        try:
            found = measure_rows(bench, names, rows[names], section, commit)
            for name, row in found.items():
                print(f"{where}, {name}: {json.dumps(short_row(row))}", flush=True)
        except Exception as error:  # the other rows are still to come
            traceback.print_exc()
            failure = first_line(error)
        if failure is not None:  # outside of the handler, which keeps the failed row's tensors
            failures = {name: {"error": failure, "run": run_of(commit)} for name in names}
            section.setdefault("failed", {}).update(failures)
            gc.collect()
            torch.cuda.empty_cache()
        write()


def measure_rows(
    bench: Bench, names: Names, measure: Callable[[], list[dict[str, Any]]], section: dict[str, Any], commit: str
) -> dict[str, Any]:
    """Measures rows, and puts them into the section with what goes with every row."""
    started = time.monotonic()
    if not bench.is_made and not without_model(names):
        bench.make()
        section["setup_seconds"], started = time.monotonic() - started, time.monotonic()
    before = ceilings(bench)
    found = dict(zip(names, measure(), strict=True))
    with_each = {
        "ceilings": {"before": before, "after": ceilings(bench)},
        "took_seconds": time.monotonic() - started,
        "run": run_of(commit),
    }
    if not without_model(names):
        with_each["run"] |= {"parameters": sum(parameter.numel() for parameter in bench.thinker.parameters())}
    for name, row in found.items():
        section["rows"][name] = row | with_each
        section.get("failed", {}).pop(name, None)
    return found


def short_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row as one line."""
    times = {name: round(ratio["median"], 2) for name, ratio in row.get("times_as_fast", {}).items()}
    seconds = {name: float(f"{value:.3g}") for name, value in row["seconds"].items()}
    found = {"seconds": seconds, "times as fast as": times, "targets": list(map(as_text, row.get("targets", [])))}
    found |= {name: row[name] for name in ("apart", "not_run", "selection_share") if name in row}
    return {name: value for name, value in found.items() if value}


if __name__ == "__main__":
    main()
