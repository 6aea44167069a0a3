"""Throws a data set at `omni.batch`: how fast it goes, and what comes of it when it is killed or damaged.

    python scripts/tiny/world.py .world/200 --count 200
    python scripts/stress/data_set.py speed --clips .world/200                 # a plain loop, one worker, two
    python scripts/stress/data_set.py worker run damage --clips .world/200     # kills, and ten rows that have no answer
    python scripts/stress/data_set.py memory --rows 2000                       # of clips of a second to five

The checkpoint `tiny` answers one question about each clip; whatever happens, there must be one answer to each row, and
it must be that of a plain loop in this process. A worker is a process that reads media and a replica of the model, each
with one thread. Fails where an answer differs, is missing or is there twice, and where memory grows by more than
`GROWTH` after the first tenth of the rows.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

from long_clip import make_long_clip
from measure_load import MIB
from tqdm import tqdm

import omni
from seats import preset_for

sys.path.append(str(Path(__file__).parents[1] / "tiny"))
from evaluate import read_questions

SETTINGS = {"retention": 0.35, "max_new_tokens": 8}
GROWTH = 256 * MIB
Row = dict[str, Any]


def read_rows(folders: list[Path]) -> list[Row]:
    """One question about each clip, of its kinds in turn."""
    rows = []
    for folder in folders:
        for number, (media, group) in enumerate(groupby(read_questions(folder), key=lambda each: each["media"])):
            asked = list(group)
            prompt = asked[number % len(asked)]["prompt"]
            rows.append({"id": len(rows), "media": str((folder / media).resolve()), "question": prompt})
    return rows


def loop(rows: list[Row]) -> dict[int, str]:
    """One by one, as a first script would: by id what is answered."""
    model = omni.load("tiny", device="cpu")
    method = preset_for(model.config, SETTINGS["retention"])
    answers = {}
    started = time.perf_counter()
    for row in tqdm(rows, desc="Loop", leave=False):
        content = [{"type": "video", "video": row["media"]}, {"type": "text", "text": row["question"]}]
        inputs = model.prepare([{"role": "user", "content": content}])
        answers[row["id"]] = model.generate(inputs, seats=method, max_new_tokens=int(SETTINGS["max_new_tokens"])).text
    seconds = time.perf_counter() - started
    print(f"loop: {len(rows)} rows in {seconds:.1f} s ({len(rows) / seconds:.2f} a second)", flush=True)
    return answers


class Batch:
    """A run of `omni.batch` in a session of its own."""

    def __init__(self, rows: list[Row], answers: Path, workers: int = 2) -> None:
        self.answers, self.log = answers, answers.with_suffix(".log")
        questions = answers.with_suffix(".questions.jsonl")
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.command = [sys.executable, "-m", "omni.batch", "--model", "tiny", "--device", "cpu"]
        for name, value in {**SETTINGS, "replicas": workers, "decoders": workers, "cores": 1}.items():
            self.command += [f"--{name.replace('_', '-')}", str(value)]
        self.command += [str(questions), str(answers)]
        self.start()

    def start(self) -> None:
        self.started = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stderr=log, start_new_session=True)

    def written(self) -> int:
        return self.answers.read_bytes().count(b"\n") if self.answers.is_file() else 0

    def wait_for(self, rows: int) -> int:
        """Until so many are answered; the most memory in use meanwhile. Raises SystemExit where the run ends before."""
        most = memory_in_use()
        while self.written() < rows:
            if self.process.poll() is not None:
                raise SystemExit(f"omni.batch ended after {self.written()} rows: {self.last_line()}")
            time.sleep(0.2)
            most = max(most, memory_in_use())
        return most

    def last_line(self) -> str:
        self.process.wait()
        return self.log.read_text().strip().splitlines()[-1]

    def finish(self, name: str) -> dict[int, str]:
        """By id the answers, or what was wrong."""
        last = self.last_line()
        seconds = time.perf_counter() - self.started
        print(f"{name}: {last.rpartition(': ')[0]}, {seconds:.1f} s with Ray's start", flush=True)
        if self.process.returncode:
            raise SystemExit(last)
        lines = [json.loads(line) for line in self.answers.read_text(encoding="utf-8").splitlines()]
        found = {line["id"]: line.get("text", f"error: {line.get('error')}") for line in lines}
        if len(found) != len(lines):
            raise SystemExit(f"{name}: {len(lines) - len(found)} answers are there twice.")
        return found


def replicas_running() -> list[int]:
    found = subprocess.run(["pgrep", "-f", "^ray::.*ModelReplica"], capture_output=True, text=True).stdout
    return [int(number) for number in found.split()]


def kill_worker(rows: list[Row], path: Path) -> dict[int, str]:
    batch = Batch(rows, path)
    batch.wait_for(len(rows) // 2)
    running = replicas_running()
    os.kill(running[0], signal.SIGKILL)
    print(f"worker: one of {len(running)} replicas killed after {batch.written()} answers", flush=True)
    return batch.finish("worker")


def kill_run(rows: list[Row], path: Path) -> dict[int, str]:
    batch = Batch(rows, path)
    batch.wait_for(len(rows) // 2)
    os.killpg(batch.process.pid, signal.SIGKILL)
    batch.process.wait()
    print(f"run: killed after {batch.written()} answers, and started again", flush=True)
    batch.start()
    return batch.finish("run")


def damaged(rows: list[Row], folder: Path) -> list[Row]:
    """The rows, the first ten in five ways such that they have no answer."""
    whole = Path(rows[1]["media"]).read_bytes()
    (folder / "cut.mp4").write_bytes(whole[:3000])
    (folder / "empty.mp4").write_bytes(b"")
    ways: list[Row] = [
        {"media": str(folder / "missing.mp4")},
        {"media": str(folder / "cut.mp4")},
        {"media": str(folder / "empty.mp4")},
        {"question": None},
        {"retention": 7},
    ]
    return [{**row, **ways[number % 5]} if number < 10 else row for number, row in enumerate(rows)]


def compare(name: str, found: dict[int, str], expected: dict[int, str]) -> bool:
    differ = [id for id, text in expected.items() if found.get(id) != text]
    right = not differ and found.keys() == expected.keys()
    print(
        f"{name}: {len(found)} answers, {len(differ)} differ from the loop's: {'holds' if right else 'DOES NOT HOLD'}"
    )
    return right


def memory_in_use() -> int:
    """Bytes, of the whole machine: Ray's processes and what they share."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(value.split()[0]) << 10 for name, value in (line.split(":", 1) for line in lines)}
    return sizes["MemTotal"] - sizes["MemAvailable"]


def bounded(count: int, folder: Path) -> bool:
    """Prints the memory that the run takes, tenth by tenth."""
    rows = []
    for number in tqdm(range(count), desc="Clips", leave=False):
        clip = folder / f"{number}.mp4"
        make_long_clip(clip, 1 + number % 5)
        rows.append({"id": number, "media": str(clip), "question": "What happens?"})
    start = memory_in_use()
    batch = Batch(rows, folder / "memory.jsonl")
    peaks = []
    for tenth in range(1, 11):
        peaks.append(batch.wait_for(tenth * count // 10) - start)
        print(f"memory: {tenth * count // 10} answers, {peaks[-1] / MIB:.0f} MiB above the start", flush=True)
    found = batch.finish("memory")
    errors = sum(text.startswith("error: ") for text in found.values())
    holds = len(found) == count and not errors and max(peaks) - peaks[0] <= GROWTH
    print(
        f"memory: {len(found)} answers, {errors} errors, {(max(peaks) - peaks[0]) / MIB:+.0f} MiB after the first "
        f"tenth, bound {GROWTH / MIB:.0f}: {'holds' if holds else 'DOES NOT HOLD'}"
    )
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=("speed", "worker", "run", "damage", "memory"))
    parser.add_argument("--clips", nargs="+", type=Path, default=[Path(".world/test")], help="folders of world.py")
    parser.add_argument("--rows", type=int, default=2000, help="of the step memory (default: %(default)s)")
    options = parser.parse_args()
    holds = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if set(options.steps) != {"memory"}:
            rows = read_rows(options.clips)
            expected = loop(rows)
        for step in options.steps:
            path = folder / f"{step}.jsonl"
            if step == "speed":
                for workers, called in ((1, "one worker"), (2, "two workers")):
                    found = Batch(rows, folder / f"{workers}.jsonl", workers).finish(called)
                    holds &= compare(called, found, expected)
            elif step == "worker":
                holds &= compare(step, kill_worker(rows, path), expected)
            elif step == "run":
                holds &= compare(step, kill_run(rows, path), expected)
            elif step == "damage":
                found = Batch(damaged(rows, folder), path).finish(step)
                errors = [found.pop(row["id"]) for row in rows[:10]]
                holds &= all(error.startswith("error: ") for error in errors)
                print(*(f"  {error}" for error in errors), sep="\n")
                holds &= compare(step, found, {row["id"]: expected[row["id"]] for row in rows[10:]})
            else:
                holds &= bounded(options.rows, folder)
    sys.exit(not holds)


if __name__ == "__main__":
    main()
