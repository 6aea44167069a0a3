"""Result files of `bench.py`: one for each machine, merged row by row, each row with its commit, written whole or not
at all."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
Names = tuple[str, ...]


def commit_of(root: Path = ROOT) -> str | None:
    """The commit of the tree; with `+` and a digest where the tree has more than it. None where there is no git.

    Result files do not count: they change while measuring.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    try:
        commit = git("rev-parse", "--short", "HEAD").strip()
        changes = git("diff", "HEAD", "--", ".", ":!benchmarks", ":!*.md")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+{hashlib.sha256(changes.encode()).hexdigest()[:6]}" if changes else commit


def run_of(commit: str) -> dict[str, Any]:
    """What every row says of the run that measured it."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "commit": commit,
        "measured": now.strftime("%Y-%m-%d %H:%M"),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }


def path_of(folder: Path, machine: str) -> Path:
    return folder / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in machine).lower().split())}.json"


def load(path: Path, machine: str, device: str) -> dict[str, Any]:
    if path.is_file():
        return json.loads(path.read_text())
    return {"machine": machine, "device": device, "sections": {}}


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".part")
    written.write_text(json.dumps(result, indent=1) + "\n")
    written.replace(path)


def merge(result: dict[str, Any], other: dict[str, Any], commit: str | None = None) -> list[str]:
    """Takes from `other` every row that is newer than `result`'s or absent there; returns their names.

    commit: of rows that do not say so themselves. Raises ValueError where such a row comes without one, and for a file
    of another machine.
    """
    if other["machine"] != result["machine"]:
        raise ValueError(f"rows of {other['machine']} do not belong to {result['machine']}.")
    taken = []
    for name, section in other["sections"].items():
        own = result["sections"].setdefault(name, {"rows": {}})
        before = len(taken)
        for row_name, row in section["rows"].items():
            row = {**row, "run": run_in(row, section, other, commit)}
            if row_name in own["rows"] and own["rows"][row_name]["run"]["measured"] > row["run"]["measured"]:
                continue
            own["rows"][row_name] = row
            own.get("failed", {}).pop(row_name, None)
            taken.append(f"{name}, {row_name}")
        for row_name, failure in section.get("failed", {}).items():
            if row_name not in own["rows"] or own["rows"][row_name]["run"]["measured"] < failure["run"]["measured"]:
                own.setdefault("failed", {})[row_name] = failure
        if len(taken) > before:
            own |= {key: section[key] for key in ("setup_seconds", "all_rows") if key in section}
    checked = other.get("checked", {})
    if checked.get("models"):
        checked = {**checked, "run": run_in(checked, {}, other, commit)}
        if "checked" not in result or result["checked"]["run"]["measured"] <= checked["run"]["measured"]:
            result["checked"] = checked
    return taken


def run_in(row: dict[str, Any], section: dict[str, Any], result: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """A row's own run, or, where it has none, one made of what is said of its whole file."""
    if "run" in row:
        return row["run"]
    if commit is None:
        raise ValueError("rows without a commit of their own need one: say --commit.")
    run = {"commit": commit, "measured": result["date"], "threads": result["threads"], "versions": result["versions"]}
    return run | ({"parameters": section["parameters"]} if "parameters" in section else {})


def least_known_first(
    rows: Collection[Names], section: dict[str, Any], commit: str, wanted: Sequence[str] = ("",), *, again: bool = False
) -> list[Names]:
    """Rows in the order to measure them: what has no result first, then the oldest; as given among equals.

    Those of this commit are left out, unless `again`; what failed at it comes last. wanted: how names begin, those of
    the first before those of the next.
    """
    known, failed = section["rows"], section.get("failed", {})

    def place(names: Names) -> int | None:
        return next((i for i, begin in enumerate(wanted) if any(name.startswith(begin) for name in names)), None)

    def key(names: Names) -> tuple[Any, ...]:
        fails = any(name in failed and failed[name]["run"]["commit"] == commit for name in names)
        return fails, place(names), min(known[name]["run"]["measured"] if name in known else "" for name in names)

    left = [
        names
        for names in rows
        if place(names) is not None
        and (again or any(name not in known or known[name]["run"]["commit"] != commit for name in names))
    ]
    return sorted(left, key=key)


@dataclass
class Clock:
    """Minutes that may pass, shared evenly between the models that are still to come; None: any."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    _until: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds of the whole."""
        return float("inf") if self.minutes is None else self.started + 60 * self.minutes - time.monotonic()

    def share(self, parts: int) -> None:
        """From now on as long as one of so many equal parts of what is left."""
        self._until = time.monotonic() + self.left / parts

    def fits(self, expected: float) -> bool:
        """Whether something of so many seconds ends in time."""
        return self.minutes is None or time.monotonic() + expected <= min(self._until, time.monotonic() + self.left)
