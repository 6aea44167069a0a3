"""The tables of arXiv 2605.20035 with lmms-eval: prints the commands, runs them, gathers what they wrote.

    python scripts/tasks/paper.py                                     # prints every command and runs nothing
    python scripts/tasks/paper.py --run --families qwen2.5 --tasks worldsense --processes 8
    python scripts/tasks/paper.py --gather                            # the table of what has been run

Needs the environment of `make eval`, real weights and the benchmarks' clips. Runs that have left a result are not run
again. Frames: two a second, 128 to 144 tokens' worth of pixels each, at most as many as the paper takes of a task.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path("benchmarks/paper")
TASKS_FOLDER = Path(__file__).parent
FAMILIES = {"qwen2.5": ("Qwen/Qwen2.5-Omni-7B", 28), "qwen3": ("Qwen/Qwen3-Omni-30B-A3B-Instruct", 32)}
"""Checkpoint, and pixels along the side of a token."""
TASKS = {
    "dailyomni": ("Daily-Omni", 128, 128),
    "worldsense": ("WorldSense", 128, 128),
    "omnivideobench": ("OmniVideoBench", 256, 196),
    "videomme": ("Video-MME", 768, 196),
    "lvomnibench": ("LVOmniBench", 768, 196),
}
"""Task of lmms-eval → name, and the most frames of a clip with Qwen2.5-Omni and with Qwen3-Omni."""
RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)
PAPER = {0.10: "96.3 % of every token's, 9.3 times fewer FLOPs, prefill 4.8 times as fast"}
"""By retention, what its abstract says, of both families together. Its tables are not at hand here."""


@dataclass(frozen=True)
class Run:
    family: str
    task: str
    method: str
    retention: float

    @property
    def folder(self) -> Path:
        kept = "every-token" if self.retention == 1 else f"{self.method}-{round(100 * self.retention)}"
        return OUT / self.family / kept / self.task

    def command(self, processes: int, batch: int, limit: int | None) -> list[str]:
        pretrained, side = FAMILIES[self.family]
        frames = TASKS[self.task][1 if self.family == "qwen2.5" else 2]
        settings = {
            "pretrained": pretrained,
            "dtype": "bfloat16",
            "method": self.method,
            "retention": self.retention,
            "fps": 2,
            "max_frames": frames,
            "min_pixels": 128 * side**2,
            "max_pixels": 144 * side**2,
        }
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        return [
            *(launch if processes > 1 else [sys.executable]),
            *("-m", "lmms_eval", "--model", "seats_omni"),
            *("--model_args", ",".join(f"{name}={value}" for name, value in settings.items())),
            *("--include_path", str(TASKS_FOLDER), "--tasks", self.task, "--batch_size", str(batch)),
            *("--log_samples", "--output_path", str(self.folder)),
            *([] if limit is None else ["--limit", str(limit)]),
        ]

    def score(self) -> float | None:
        """In percent, from the newest result that lmms-eval wrote; None where there is none."""
        found = sorted(self.folder.rglob("*results.json"), key=lambda path: path.stat().st_mtime)
        if not found:
            return None
        metrics: dict[str, Any] = json.loads(found[-1].read_text())["results"][self.task]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and ("accuracy" in name or "score" in name) and "stderr" not in name:
                return float(value)
        raise SystemExit(f"{found[-1]} has no accuracy for {self.task}.")


def table(families: list[str], method: str) -> str:
    """Accuracy in percent: a row for each retention, the mean over the tasks that every row has, as the paper's."""
    lines = []
    for family in families:
        lines += [f"## {FAMILIES[family][0]}, {method}", ""]
        lines += [f"| R | {' | '.join(name for name, *_ in TASKS.values())} | mean | of every token's | the paper |"]
        lines += ["| --- |" + " --- |" * (len(TASKS) + 3)]
        full: float | None = None
        for retention in RETENTIONS:
            scores = [Run(family, task, method, retention).score() for task in TASKS]
            whole = [score for score in scores if score is not None]
            mean = sum(whole) / len(whole) if len(whole) == len(TASKS) else None
            full = mean if retention == 1 else full
            kept = f"{100 * mean / full:.1f} %" if mean is not None and full else ""
            cells = [f"{score:.1f}" if score is not None else "not run" for score in scores]
            paper = PAPER.get(retention, "")
            mean_cell = "" if mean is None else f"{mean:.1f}"
            lines.append(f"| {retention:.0%} | {' | '.join(cells)} | {mean_cell} | {kept} | {paper} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's tables with lmms-eval.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--retention", nargs="+", type=float, default=list(RETENTIONS), help="1 is every token")
    parser.add_argument("--method", default="seats", help="of seats.methods (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="GPUs (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="questions together (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--run", action="store_true", help="run what has no result yet")
    parser.add_argument("--gather", action="store_true", help="print the table alone")
    options = parser.parse_args()
    if not options.gather:
        for family in options.families:
            for task in options.tasks:
                for retention in options.retention:
                    run = Run(family, task, options.method, retention)
                    command = run.command(options.processes, options.batch, options.limit)
                    print(shlex.join(command), flush=True)
                    if options.run and run.score() is None:
                        subprocess.run(command, check=True)
    if options.gather or options.run:
        print(table(options.families, options.method))


if __name__ == "__main__":
    main()
