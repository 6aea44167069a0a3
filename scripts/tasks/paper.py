"""The tables of arXiv 2605.20035 with lmms-eval: prints the commands, runs them, and what they gave beside the paper's.

    python scripts/tasks/paper.py                                     # prints every command and runs nothing
    python scripts/tasks/paper.py --run --families qwen2.5 --tasks worldsense --processes 8
    python scripts/tasks/paper.py --gather                            # the table of what has been run

Needs the environment of `make eval`, real weights and the benchmarks' clips. Runs that have left a result are not run
again; those of the first questions alone (--limit) have folders and tables of their own. Everything is asked as the
paper asks it (protocol=paper of `omni.lmms`); --protocol ours has true times, whole sound and prompts within the
context. What a protocol cannot run is said first, and left out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omni.config import QWEN2_5, QWEN3
from omni.protocol import PROTOCOLS, RETENTIONS, most_frames, pixel_bounds, require_row
from seats.methods import names

OUT = Path("benchmarks/paper")
TASKS_FOLDER = Path(__file__).parent
FAMILIES = {"qwen2.5": "Qwen/Qwen2.5-Omni-7B", "qwen3": "Qwen/Qwen3-Omni-30B-A3B-Instruct"}
CONFIGS = {
    "qwen2.5": SimpleNamespace(family=QWEN2_5, decoder=SimpleNamespace(num_layers=28, hidden_size=3584)),
    "qwen3": SimpleNamespace(family=QWEN3, decoder=SimpleNamespace(num_layers=48, hidden_size=2048)),
}
"""What a protocol asks of their configurations, before they are there."""
TASKS = {
    "worldsense": ("WorldSense", "worldsense_omni"),
    "dailyomni": ("Daily-Omni", "dailyomni"),
    "omnivideobench": ("OmniVideoBench", "omnivideobench"),
    "videomme": ("Video-MME", "videomme"),
    "lvomnibench": ("LVOmniBench", "lvomnibench"),
}
"""Name here → in the table, and to lmms-eval; in the paper's order."""
PUBLISHED: dict[tuple[str, float], tuple[float, ...]] = {
    ("qwen2.5", 1.0): (111.0, 46.7, 64.0, 34.1, 65.3, 33.3, 48.7),
    ("qwen2.5", 0.35): (36.7, 46.2, 62.1, 35.0, 66.8, 36.2, 49.3),
    ("qwen2.5", 0.25): (26.5, 45.3, 60.9, 34.7, 66.5, 35.7, 48.6),
    ("qwen2.5", 0.15): (17.3, 44.1, 58.7, 33.7, 66.0, 34.6, 47.4),
    ("qwen2.5", 0.10): (12.2, 43.5, 57.8, 33.6, 64.6, 35.1, 46.9),
    ("qwen3", 1.0): (47.2, 54.3, 71.8, 40.3, 73.1, 38.0, 55.5),
    ("qwen3", 0.35): (13.3, 54.1, 71.9, 39.8, 72.7, 38.5, 55.4),
    ("qwen3", 0.25): (9.0, 53.6, 71.2, 39.9, 71.8, 37.0, 54.7),
    ("qwen3", 0.15): (5.5, 51.9, 70.1, 39.9, 71.2, 36.0, 53.8),
    ("qwen3", 0.10): (3.9, 51.5, 68.1, 40.1, 69.7, 35.7, 53.0),
}
"""With SEATS: TFLOPs, accuracy of each task in its order, their mean. From the pictures of the method's public page."""
PUBLISHED_MEANS = {
    ("qwen2.5", "fastv-om", 0.35): 47.2,
    ("qwen2.5", "divprune-om", 0.35): 48.3,
    ("qwen2.5", "visionzip-om", 0.35): 48.3,
    ("qwen2.5", "omnizip", 0.35): 48.2,
    ("qwen2.5", "random", 0.10): 43.2,
    ("qwen2.5", "visionzip-om", 0.10): 44.6,
    ("qwen2.5", "divprune-om", 0.10): 45.6,
    ("qwen3", "random", 0.10): 49.1,
    ("qwen3", "visionzip-om", 0.10): 49.8,
    ("qwen3", "divprune-om", 0.10): 50.9,
}
"""The means of other methods, as far as they are at hand here."""
NOTE = (
    "The paper's rows are its own figures. Its abstract's 96.3 % of every token's accuracy, 9.3 times fewer FLOPs and "
    "4.8 times the speed at 10 % are Qwen2.5-Omni-7B's; Qwen3-Omni-30B-A3B keeps 95.5 % there. Its TFLOPs of "
    "Qwen3-Omni count heads of 64, ours of the true 128."
)


@dataclass(frozen=True)
class Run:
    family: str
    task: str
    method: str
    retention: float
    protocol: str = "paper"
    limit: int | None = None

    @property
    def folder(self) -> Path:
        kept = "every-token" if self.retention == 1 else f"{self.method}-{round(100 * self.retention)}"
        asked = self.task if self.limit is None else f"{self.task}-first-{self.limit}"
        return OUT / self.protocol / self.family / kept / asked

    def refusal(self) -> str | None:
        """Why the protocol cannot run this row, None where it can: no such row, or too few tokens for the method."""
        config = CONFIGS[self.family]
        frames = most_frames(TASKS[self.task][1], config)
        try:
            require_row(self.method, config, self.retention, frames, self.protocol)
        except ValueError as error:
            return str(error)
        return None

    def command(self, processes: int, batch: int) -> list[str]:
        settings = {
            "pretrained": FAMILIES[self.family],
            "dtype": "bfloat16",
            "method": self.method,
            "retention": self.retention,
            "protocol": self.protocol,
        }
        if self.protocol == "ours":  # as many frames of as many pixels as the paper takes
            settings |= {"max_frames": most_frames(TASKS[self.task][1], CONFIGS[self.family])}
            settings |= pixel_bounds(28 if self.family == "qwen2.5" else 32)
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        return [
            *(launch if processes > 1 else [sys.executable]),
            *("-m", "lmms_eval", "--model", "seats_omni"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--include_path", str(TASKS_FOLDER), "--tasks", TASKS[self.task][1], "--batch_size", str(batch)),
            *("--log_samples", "--output_path", str(self.folder)),
            *([] if self.limit is None else ["--limit", str(self.limit)]),
        ]

    def score(self) -> float | None:
        """In percent, from the newest result that lmms-eval wrote; None where there is none."""
        found = newest(self.folder, "*results.json")
        if found is None:
            return None
        metrics: dict[str, Any] = json.loads(found.read_text())["results"][TASKS[self.task][1]]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and ("accuracy" in name or "score" in name) and "stderr" not in name:
                return float(value)
        raise SystemExit(f"{found} has no accuracy for {self.task}.")

    def costs(self) -> list[dict[str, Any]]:
        """What each answer cost, from the log of the newest run; those that failed are left out."""
        found = newest(self.folder, "*samples_*.jsonl")
        lines = found.read_text(encoding="utf-8").splitlines() if found is not None else []
        counts = [counted for line in lines for counted in json.loads(line).get("token_counts") or []]
        return [each for each in counts if each and "macs" in each]


def newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.rglob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def mean(values: Sequence[float | None]) -> float | None:
    """None where one is missing."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there and len(there) == len(values) else None


def cells(values: Iterable[float | None]) -> str:
    return " | ".join("" if value is None else f"{value:.1f}" for value in values)


def table(families: list[str], method: str, protocol: str = "paper", limit: int | None = None) -> str:
    """What was run beside what was published: two rows for each retention. TFLOPs are means over answers, tera
    multiply-accumulates as in the paper; accuracy in percent; the mean is over all five tasks. For what was run the
    last column is the median of the seconds to the first token, of those answers whose whole prompt ran: after an
    earlier one about the same clip only what differs does. limit: of runs of so many questions."""
    lines = []
    of = "" if limit is None else f", first {limit} questions of each"
    for family in families:
        names = " | ".join(name for name, _ in TASKS.values())
        lines += [f"## {FAMILIES[family]}, {method}, protocol {protocol}{of}", ""]
        lines += [f"| R | | TFLOPs | {names} | mean | of every token's | prefill s |"]
        lines += ["|" + " --- |" * (len(TASKS) + 6)]
        full: float | None = None
        for retention in RETENTIONS:
            runs = [Run(family, task, method, retention, protocol, limit) for task in TASKS]
            scores = [run.score() for run in runs]
            costs = [cost for run in runs for cost in run.costs()]
            average = mean(scores)
            full = average if retention == 1 else full
            share = None if average is None or not full else 100 * average / full
            flops = mean([cost["macs"] / 1e12 for cost in costs])
            whole = [cost["prefill_seconds"] for cost in costs if cost["reused_tokens"] == 0]
            seconds = statistics.median(whole) if whole else None
            done = f"run ({sum(score is not None for score in scores)} of {len(TASKS)})"
            prefill = "" if seconds is None else f"{seconds:.2f}"
            lines += [f"| {retention:.0%} | {done} | {cells([flops, *scores, average, share])} | {prefill} |"]
            lines += [f"| | paper | {published(family, method, retention)} | |"]
        lines += ["", f"The paper's means of other methods: {published_means(family)}.", ""]
    return "\n".join([*lines, NOTE])


def published(family: str, method: str, retention: float) -> str:
    """The paper's TFLOPs, accuracies, mean, and that as a share of every token's."""
    every = PUBLISHED[family, 1.0][-1]
    if method == "seats" or retention == 1:
        row = PUBLISHED[family, retention]
        return cells([*row, 100 * row[-1] / every])
    average = PUBLISHED_MEANS.get((family, method, retention))
    share = None if average is None else 100 * average / every
    return cells([None, *[None] * len(TASKS), average, share])


def published_means(family: str) -> str:
    """Of other methods than SEATS, by retention."""
    found: dict[float, list[str]] = {}
    for (of, method, retention), average in PUBLISHED_MEANS.items():
        if of == family:
            found.setdefault(retention, []).append(f"{method} {average:.1f}")
    return "; ".join(f"at {retention:.0%} {', '.join(means)}" for retention, means in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables with lmms-eval.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--retention", nargs="+", type=float, default=list(RETENTIONS), help="1 is every token")
    parser.add_argument(
        "--method", choices=names(), default="seats", metavar="NAME", help="of seats.methods (default: %(default)s)"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="how to ask (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="GPUs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="questions together (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="the first questions of each task alone")
    parser.add_argument("--run", action="store_true", help="run what has no result yet")
    parser.add_argument("--gather", action="store_true", help="print the table alone")
    options = parser.parse_args()
    if not options.gather:
        runs = [
            Run(family, task, options.method, retention, options.protocol, options.limit)
            for family in options.families
            for task in options.tasks
            for retention in options.retention
        ]
        able = []
        for run in runs:
            if (why := run.refusal()) is None:
                able.append(run)
            else:
                print(f"left out: {run.family}, {run.task}, {run.method} at {run.retention:.0%}: {why}", flush=True)
        for run in able:
            command = run.command(options.processes, options.batch)
            print(shlex.join(command), flush=True)
            if options.run and run.score() is None:
                status = subprocess.run(command).returncode
                if status or run.score() is None:  # lmms-eval says what went wrong and ends with 0
                    raise SystemExit(
                        f"{run.family}, {run.task}, {run.method} at {run.retention:.0%} has left no result (status "
                        f"{status}): lmms-eval says why above. What has one is not run again: mend it and give the "
                        "same command."
                    )
        if not able:
            raise SystemExit("nothing of what was asked can be run.")
    if options.gather or options.run:
        print(table(options.families, options.method, options.protocol, options.limit))


if __name__ == "__main__":
    main()
