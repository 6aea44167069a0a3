"""Runs the commands of README.md, CONTRIBUTING.md and docs/ in a fresh clone, and compares what they print.

    python scripts/check_documents.py                  # what is committed; prints each command and what became of it
    python scripts/check_documents.py --list           # says what would be run and what is skipped, and why
    python scripts/check_documents.py docs/using.md

Commands are those of blocks of sh and python. What follows a line `# needs …` to the end of its block is skipped, and
so is what installs (`SKIPPED`); with --install `make demo` makes the clone an environment of its own first, and the
rest runs in it. A block of text after one of commands is what they print, in this order; "…" stands for anything.
Commands named in running text (`pytest …`, `python scripts/…`) are not run: their tests are collected, their options
are looked up in --help.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPPED = {
    "make demo": "installs: --install",
    "make test": "installs, and runs every test",
    "make check": "installs: --install",
    ". .venv/bin/activate": "wants what `make demo` makes",
}
LIMIT = 600
"""Seconds that a command may take."""


@dataclass
class Block:
    """A fenced block. expected: the lines of the ```text block below it."""

    document: str
    language: str
    text: str
    expected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """skipped: why, empty where it runs."""

    text: str
    skipped: str = ""


def documents(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))]


def blocks_of(path: Path) -> list[Block]:
    blocks: list[Block] = []
    for language, text in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8")):
        if language == "text" and blocks:
            blocks[-1].expected = text.splitlines()
        elif language in ("sh", "python"):
            blocks.append(Block(path.name, language, text))
    return blocks


def commands_of(block: Block) -> list[Command]:
    """One of a python block; of shell those of its lines, with their continuations and here-documents."""
    if block.language == "python":
        needs = re.search(r"(?m)^# (needs .*)", block.text)
        return [Command(block.text, needs[1] if needs else "")]
    found, lines, why = [], iter(block.text.splitlines()), ""
    for line in lines:
        if line.startswith("#"):
            why = line[2:] if line.startswith("# needs") else why
        elif line.strip():
            text = line
            while text.endswith("\\"):
                text += "\n" + next(lines)
            if end := re.search(r"<<'?(\w+)'?$", text):
                text += "\n"
                while not text.endswith(f"\n{end[1]}\n"):
                    text += next(lines) + "\n"
            bare = text.partition("  #")[0].strip()
            found.append(Command(text, why or SKIPPED.get(bare, "")))
    return found


def named_in(path: Path) -> list[str]:
    """Commands in running text, those of tables among them."""
    text = re.sub(r"(?ms)^```.*?^```$", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"`((?:pytest|python scripts/|python -m omni|omni-generate )[^`…]*)`", text)
    return list(dict.fromkeys(" ".join(each.split()) for each in found))


def missing(expected: list[str], printed: str) -> str:
    """The first line that is not printed, after those before it; empty where all are."""
    lines = iter([line.rstrip() for line in printed.splitlines()])
    for line in expected:
        if line.strip() != "…" and not any(_like(line.rstrip(), each) for each in lines):
            return line
    return ""


def _like(expected: str, line: str) -> bool:
    return re.fullmatch(".*".join(map(re.escape, expected.split("…"))), line) is not None


def check(command: Command, block: Block, clone: Path, environment: dict[str, str]) -> str:
    """What went wrong; empty where nothing did."""
    run = ["bash", "-c", command.text] if block.language == "sh" else [sys.executable, "-c", command.text]
    try:
        done = subprocess.run(
            run, cwd=clone, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT} seconds"
    if done.returncode:
        return f"exit status {done.returncode}: {done.stderr.strip()[-400:]}"
    printed = done.stdout + done.stderr
    lost = missing(block.expected, printed) if block.expected and command == commands_of(block)[-1] else ""
    return f"does not print {lost!r} where it is expected, but\n{printed}" if lost else ""


def check_named(text: str, clone: Path, environment: dict[str, str]) -> str:
    """Whether a command would start: its tests are there, its options are known."""

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=LIMIT)
        return (
            f"exit status {done.returncode}: {(done.stderr or done.stdout)[-300:]}" if done.returncode else done.stdout
        )

    words = shlex.split(text)
    if words[0] == "pytest":
        arguments = [word for word in words[1:] if word not in ("-s", "-n", "0", "2", "4")]
        said = run(sys.executable, "-m", "pytest", "-n", "0", "--collect-only", "-q", *arguments)
        return said if said.startswith("exit status") else ""
    at = 3 if words[1:2] == ["-m"] else 2 if words[0] == "python" else 1
    start = [sys.executable, *words[1:at]] if words[0] == "python" else [sys.executable, "-m", "omni.generate"]
    said = run(*start, "--help")
    unknown = [word for word in words[at:] if word.startswith("--") and word.split("=")[0] not in said]
    return said if said.startswith("exit status") else f"{unknown[0]} is no option of it" if unknown else ""


def environment_in(clone: Path, install: bool) -> dict[str, str]:
    """Its own interpreter's, or this one's with the clone's packages first."""
    folder = clone / ".clone-bin"
    folder.mkdir()
    python = clone / ".venv/bin/python" if install else Path(sys.executable)
    for name, module in (("omni-generate", "omni.generate"), ("omni-batch", "omni.batch"), ("pytest", "pytest")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{python}" -m {module} "$@"\n')
        (folder / name).chmod(0o755)
    paths = [str(folder), str(python.parent), os.environ.get("PATH", "")]
    return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1"}


def all_checks(paths: list[Path], clone: Path, install: bool) -> Iterator[tuple[str, str, str]]:
    """Document, command, and what became of it."""
    if install:
        subprocess.run(["make", "demo"], cwd=clone, check=True)
    environment = environment_in(clone, install)
    for path in paths:
        for block in blocks_of(path):
            for command in commands_of(block):
                begun = time.perf_counter()
                said = f"skipped, {command.skipped}" if command.skipped else check(command, block, clone, environment)
                took = f"ran, {time.perf_counter() - begun:.0f} s" + (", printed as said" if block.expected else "")
                yield path.name, command.text, said or took
        for text in named_in(path):
            yield path.name, text, check_named(text, clone, environment) or "would start"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="*", type=Path, help="default: README.md, CONTRIBUTING.md, docs/*.md")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--install", action="store_true", help="make demo in the clone first, and use its environment")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.documents] or documents()
    if options.list:
        for path in paths:
            for block in blocks_of(path):
                for command in commands_of(block):
                    what = f"skipped, {command.skipped}" if command.skipped else "run"
                    print(f"{path.name}: {what}: {command.text}")
            for text in named_in(path):
                print(f"{path.name}: named: {text}")
        return
    counts = {"ran": 0, "would start": 0, "skipped": 0, "failed": 0}
    with tempfile.TemporaryDirectory() as name:
        clone = Path(name) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        paths = [clone / path.relative_to(ROOT) for path in paths]
        for document, text, said in all_checks(paths, clone, options.install):
            kind = next((kind for kind in counts if said.startswith(kind)), "failed")
            counts[kind] += 1
            shown = text.strip().splitlines()[0] if kind != "failed" else text.strip()
            print(f"{document}: {shown}\n    {said if kind != 'failed' else 'FAILED, ' + said}", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    sys.exit(counts["failed"] > 0)


if __name__ == "__main__":
    main()
