"""Damages real files and reads them: each must end in a right answer or in one clear error.

    python scripts/stress/fuzz.py media --minutes 10

Inputs are read in a child process under bounds of memory and time. What ends in a crash, a hang, a wrong answer or an
exception that is none of the library's is kept under --findings, and the exit status is 1. To look at one again:

    python scripts/stress/fuzz.py media --again fuzz-findings/media-1/clip.mp4
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fuzz_damage import damaged
from fuzz_targets import TARGETS, Target
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

MEMORY_BYTES = 4 * 2**30
"""What reading one input may take beside the program itself."""
SECONDS = 60
"""The time it may take: a template alone may take 30."""
MAX_MESSAGE = 6000
"""Characters of an error. A checkpoint's may list twenty problems."""


def examine(target: Target, folder: Path, name: str, data: bytes) -> tuple[str, str]:
    """("right", ""), ("error", its type and message) or ("unexpected", the traceback) of one damaged file."""
    path = folder / name
    sound = path.read_bytes()
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder, name)
    except target.errors as error:
        message = str(error)
        if not 10 < len(message) < MAX_MESSAGE:
            return "unexpected", f"{type(error).__name__} of {len(message)} characters: {message[:300]}"
        return "error", f"{type(error).__name__}: {message}"
    except BaseException:
        return "unexpected", traceback.format_exc()
    finally:
        path.write_bytes(sound)
    return "right", ""


def work(name: str, folder: Path, connection: Connection) -> None:
    """The child: (file, content) → what became of it and the most memory so far, in bytes."""
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        file, data = connection.recv()
        found = examine(TARGETS[name], folder, file, data)
        connection.send((*found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Child:
    """A process that reads inputs until one is too much for it; then there is another."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.process: Any = None
        self.peak = 0

    def read(self, file: str, data: bytes) -> tuple[str, str]:
        sound = (self.folder / file).read_bytes()
        if self.process is None:
            self.connection, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            self.process = context.Process(target=work, args=(self.name, self.folder, theirs), daemon=True)
            self.process.start()
            theirs.close()
            self.connection.send((file, sound))  # what is loaded once takes its time
            self.connection.recv()
        self.connection.send((file, data))
        try:
            if self.connection.poll(SECONDS):
                kind, text, peak = self.connection.recv()
                self.peak = max(self.peak, peak)
                return kind, text
            kind, text = "hang", f"no end after {SECONDS} s"
        except EOFError:
            self.process.join()
            kind, text = "crash", f"exit status {self.process.exitcode}"
        self.stop()
        (self.folder / file).write_bytes(sound)
        return kind, text

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


def shape(message: str) -> str:
    """An error's first line, of a list the first entry, without what differs from input to input."""
    lines = message.split("\n")
    line = re.sub(r"/[\w./-]+", "…", lines[1].strip() if lines[0].endswith(":") and lines[1:] else lines[0])
    line = re.sub(r"'([^'\\]|\\.)*'|\"([^\"\\]|\\.)*\"|\([^()]*\)|\[[^\]]*\]|-?\d[\d.e+]*", "…", line)
    return line[:110]


def inputs(files: dict[str, bytes]) -> st.SearchStrategy[tuple[str, bytes]]:
    return st.sampled_from(sorted(files)).flatmap(lambda name: st.tuples(st.just(name), damaged(name, files[name])))


def fuzz(name: str, minutes: float, start: int, findings: Path) -> int:
    """Returns how many findings there were."""
    found: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        names = TARGETS[name].make(Path(folder))
        files = {file: (Path(folder) / file).read_bytes() for file in names}
        child = Child(name, Path(folder))
        for file, data in files.items():
            kind, text = child.read(file, data)
            if kind != "right":
                raise SystemExit(f"{file} is sound, but: {kind}: {text}")
        ends = time.monotonic() + 60 * minutes
        seen: Counter[str] = Counter()

        def one(case: tuple[str, bytes]) -> None:
            file, data = case
            if time.monotonic() > ends:
                return
            kind, text = child.read(file, data)
            found[kind] += 1
            if kind == "error":
                errors[shape(text)] += 1
            elif kind != "right":
                seen[key := shape(f"{kind} {text.strip().splitlines()[-1]}")] += 1
                if seen[key] == 1:
                    place = findings / f"{name}-{len(seen)}"
                    (place / file).parent.mkdir(parents=True, exist_ok=True)
                    (place / file).write_bytes(data)
                    (place / "what.txt").write_text(f"{kind}\n{text}\n", errors="backslashreplace")
                    print(f"{kind}: {place / file}\n{text}\n".encode(errors="replace").decode(), flush=True)

        for number in count(start * 1_000_000):
            rounds = settings(
                max_examples=200,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            seed(number)(rounds(given(inputs(files))(one)))()
            if time.monotonic() > ends:
                break
        child.stop()
    bad = {kind: found[kind] for kind in ("crash", "hang", "unexpected")}
    for message, times in errors.most_common():
        print(f"{times:7} {message}".encode(errors="replace").decode())
    for message, times in seen.most_common():
        print(f"{times:7} FINDING {message}".encode(errors="replace").decode())
    print(
        f"{name}: {sum(found.values())} inputs in {minutes:g} minutes, {found['right']} right answers, "
        f"{found['error']} refused with {len(errors)} different errors, {bad['crash']} crashes, {bad['hang']} hangs, "
        f"{bad['unexpected']} unexpected; at most {child.peak / 2**20:.0f} MiB"
    )
    return sum(bad.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="default: %(default)s")
    parser.add_argument("--again", type=Path, help="a finding to read once more")
    options = parser.parse_args()
    if options.again is None:
        return int(fuzz(options.target, options.minutes, options.seed, options.findings) > 0)
    with tempfile.TemporaryDirectory() as folder:
        names = TARGETS[options.target].make(Path(folder))
        name = next(name for name in names if options.again.as_posix().endswith(name))
        kind, text = examine(TARGETS[options.target], Path(folder), name, options.again.read_bytes())
        print(kind, text)
    return int(kind == "unexpected")


if __name__ == "__main__":
    sys.exit(main())
