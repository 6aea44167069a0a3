"""What README.md says in figures: the headline table from the benchmark's result files, and lines of code by package.

    python scripts/report/readme_report.py         # writes both into README.md

Nothing is said that no result file has: where the released size was not measured, the cell says so.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
MODELS = {"Qwen2.5-Omni-7B": "qwen2.5", "Qwen3-Omni-30B-A3B": "qwen3"}
"""Released models, and how sections of their sizes and of small ones of the family begin."""
RELEASED = " full bfloat16"
PAPER_TIMES = {("Qwen2.5-Omni-7B", "prefill of the paper's prompt, 10 % kept"): "4.8× every token"}
"""Of arXiv 2605.20035, on its GPU."""
NOT_MEASURED = "not measured"


class Line(NamedTuple):
    """A line of the table. rows: how the names of rows begin that may fill it: the newest does.

    anywhere: where the released size was not measured, a small model's row stands below, under its own name. of: the
    family that it is measured of, None for all.
    """

    what: str
    rows: str
    anywhere: bool = False
    of: str | None = None


LINES = (
    Line("prefill, every token", "prefill of 64 s at 100%"),
    Line("prefill, 10 % kept", "prefill of 64 s at 10%"),
    Line("prefill of the paper's prompt, every token", "prefill of the paper's prompt at 100%", of="qwen2.5"),
    Line("prefill of the paper's prompt, 10 % kept", "prefill of the paper's prompt at 10%", of="qwen2.5"),
    Line("a token of the answer", "decode after 64 s at 10%"),
    Line("first token, from memory", "first token of 64 s"),
    Line("first token, from a file", "first token from a file of", anywhere=True),
    Line("second question", "second question", anywhere=True),
)
HEADLINE = "<!-- headline, by scripts/report/readme_report.py -->"
CODE = "<!-- lines of code, by scripts/report/readme_report.py -->"
END = "<!-- to here -->"


class Found(NamedTuple):
    measured: str
    machine: str
    section: str
    name: str
    row: dict[str, Any]


def headline(results: list[dict[str, Any]]) -> str:
    """The table: one line for each model and what was measured of it; then those of small models that stand in."""
    lines = ["| | here | transformers | the paper | measured |", "| --- | --- | --- | --- | --- |"]
    small: dict[str, list[str]] = {}
    for model, family in MODELS.items():
        lines.append(f"| **{model}** | | | | |")
        for line in LINES:
            if line.of not in (None, family):
                continue
            found = [each for each in rows_of(results, family) if each.name.startswith(line.rows)]
            released = [each for each in found if each.section == family + RELEASED]
            paper = PAPER_TIMES.get((model, line.what), "")
            lines.append(f"| {line.what} | {' | '.join(cells(newest(released), paper))} |")
            if line.anywhere and not released and (other := newest(found)):
                small.setdefault(other.section, []).append(f"| {other.name} | {' | '.join(cells(other, ''))} |")
    for section, others in small.items():
        lines += [f"| **A small model in its place: {section}** | | | | |", *others]
    return "\n".join(lines)


def rows_of(results: list[dict[str, Any]], family: str) -> Iterator[Found]:
    for result in results:
        for section, content in result["sections"].items():
            if section.split()[0] == family:
                for name, row in content["rows"].items():
                    yield Found(row["run"]["measured"], result["machine"], section, name, row)


def newest(found: list[Found]) -> Found | None:
    return max(found, default=None, key=lambda each: each.measured)


def cells(found: Found | None, paper: str) -> tuple[str, ...]:
    if found is None:
        return NOT_MEASURED, "", paper, ""
    seconds, faster = found.row["seconds"], found.row.get("times_as_fast", {})
    ours = next(seconds[side] for side in ("compiled", "second", "eager") if side in seconds)
    theirs, than = faster.get("transformers"), {"every token": "every token", "first": "the first"}
    others = [f", {faster[side]['median']:.1f}× {name}" for side, name in than.items() if side in faster]
    said = time(ours) + "".join(others)
    if found.name.startswith("first token from a file") and "preparing alone" in seconds:
        said += f", {time(seconds['preparing alone'])} of it reading"
    return (
        said,
        f"{time(seconds['transformers'])}, {theirs['median']:.1f}×" if theirs and "transformers" in seconds else "",
        paper,
        f"[{found.machine}](benchmarks/results/{slug(found.machine)}.json), {found.measured[:10]}",
    )


def time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def slug(name: str) -> str:
    """As result files are named."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


def code_lines(root: Path = ROOT) -> dict[str, int]:
    """Lines of Python by package, without blank lines, comments and docstrings."""
    packages = ("omni", "seats", "weights", "scripts", "tests")
    return {name: sum(map(lines_of, sorted((root / name).rglob("*.py")))) for name in packages}


def lines_of(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            numbers.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # docstrings, those below an attribute too
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            numbers.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(numbers)


def code_said(counts: dict[str, int]) -> str:
    """To the nearest hundred: a line more or less changes no document."""
    each = [f"`{name}` {round(count, -2):,}" for name, count in counts.items()]
    return f"Lines of code, without blank lines, comments and docstrings:\n{', '.join(each)}."


def write_figures(root: Path, results: list[dict[str, Any]]) -> None:
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    for begin, part in ((HEADLINE, headline(results)), (CODE, code_said(code_lines(root)))):
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{part}\n{END}{rest.partition(END)[2]}"
    page.write_text(text, encoding="utf-8")


def read_results(root: Path = ROOT) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((root / "benchmarks" / "results").glob("*.json"))]


if __name__ == "__main__":
    write_figures(ROOT, read_results())
