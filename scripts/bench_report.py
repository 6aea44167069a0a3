"""benchmarks/README.md from the result files of `bench.py`: ratios first, then seconds, then where the time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accuracy_report import accuracy_part

HEAD = """# Benchmarks

Rendered by `scripts/bench.py` from `results/`; do not edit. All sides of a row run in turns on one machine, in one
process, with the same random weights in the same memory. A ratio is the median of those of the rounds, with the lowest
and the highest; seconds are medians. `matrix rate` is a product of two large matrices of the same type, `copy rate` a
large copy, bytes read and written: both run in turn with the row.

Repeat with

```sh
.venv/bin/python scripts/bench.py                  # what is in today's result file already is not measured again
.venv/bin/python scripts/bench.py --families qwen3 --dtypes bfloat16 --rows prefill --again
```
"""


def write_readme(folder: Path) -> None:
    """folder/README.md from all result files in it."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    (folder / "README.md").write_text(render(results) + accuracy_part(folder), encoding="utf-8")


def render(results: list[dict[str, Any]]) -> str:
    newest = sorted(results, key=lambda result: (result["date"], result["machine"]), reverse=True)
    return "".join([HEAD, *map(machine_part, newest)])


def other_tokens(found: dict[str, Any]) -> str:
    """Of requests that kept other tokens, of which logits are not compared."""
    others = found.get("requests", 0) - found.get("with_the_same_tokens", 0)
    if not others:
        return ""
    return (
        f" ({others} of {found['requests']} kept up to {1 - found['lowest_share_of_the_same_tokens']:.1%} other tokens)"
    )


def machine_part(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = ["", f"## {result['machine']}, {result['date']}", "", f"{result['threads']} threads; {versions}."]
    for family, found in result["checked"]["models"].items():
        worst = ", ".join(
            f"{dtype} {each['largest_relative_difference_of_logits']:.1e}{other_tokens(each)}"
            for dtype, each in found.items()
        )
        lines.append(f"Checked first, {family}: logits of small models, compiled against eager float32: {worst}.")
    kernels = result["checked"]["kernels"]
    if not isinstance(kernels, str):
        kernels = (
            f"{kernels['shapes']} random shapes: picks {kernels['picks']}, attention weights within "
            f"{kernels['largest_difference_of_weights']:.1e}"
        )
    lines += [f"Kernels: {kernels}.", *result.get("notes", [])]
    lines += ["", "### Targets", "", *targets_table(result["sections"])]
    for name, section in result["sections"].items():
        lines += ["", f"### {name}", ""]
        if rows := section["rows"]:
            lines += [f"{section['parameters'] / 1e6:,.0f} M parameters.", ""]
            for table in (ratio_table, prefill_table, seconds_table, profile_table):
                lines += [*table(rows), ""]
            lines += start_lines(rows)
        if missing := [row for row in section.get("all_rows", ()) if row not in rows]:
            lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines).rstrip() + "\n"


def targets_table(sections: dict[str, Any]) -> list[str]:
    lines = ["| | row | what | measured | target | |", "| --- | --- | --- | --- | --- | --- |"]
    for name, section in sections.items():
        for row_name, row in section["rows"].items():
            for target in row.get("targets", []):
                measured, at_least = target["measured"], target["at_least"]
                verdict = "met" if measured >= at_least else f"missed by {1 - measured / at_least:.0%}"
                cells = (name, row_name, target["what"], f"{measured:.2f}", f"{at_least:.2f}", verdict)
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def ratio(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})" if found else ""


def ratio_table(rows: dict[str, Any]) -> list[str]:
    """How many times as fast."""
    sides = [
        side
        for side in ("eager", "transformers", "every token", "one dense product")
        if any(side in row.get("times_as_fast", {}) for row in rows.values())
    ]
    lines = [f"| times as fast as | {' | '.join(sides)} | rounds |", "| --- " * (len(sides) + 2) + "|"]
    for name, row in rows.items():
        if faster := row.get("times_as_fast"):
            cells = [ratio(faster.get(side)) for side in sides]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['rounds']} |")
    return lines


def prefill_table(rows: dict[str, Any]) -> list[str]:
    lines = [
        "| | tokens by segment | multiply-accumulates done, times fewer | by the paper's count | GFLOP/s "
        "| of the matrix rate | selection | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "segments" in row:
            share = f"{row['selection_share']:.1%}" if "selection_share" in row else ""
            peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            cells = (
                *(name, " > ".join(map(str, row["segments"])), f"{row['work_ratio']:.2f}", f"{row['macs_ratio']:.2f}"),
                *(f"{row['gflops']:.0f}", ratio(row["of_matrix_rate"]), share, peak),
            )
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| | tokens cached | GB/s | of the copy rate | second token, ms |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        if "cached_tokens" in row:
            rate, second = f"{row['gb_per_second']:.1f}", f"{1e3 * row['second_token_seconds']:.3g}"
            lines.append(
                f"| {name} | {row['cached_tokens']} | {rate} | {ratio(row['of_copy_rate'])} | {second} |",
            )
    return lines


def seconds_table(rows: dict[str, Any]) -> list[str]:
    sides = ("compiled", "eager", "transformers", "every token", "one dense product")
    lines = [
        f"| seconds | {' | '.join(sides)} | first call | machine: matrix GFLOP/s, copy GB/s |",
        "| --- " * (len(sides) + 3) + "|",
    ]
    for name, row in rows.items():
        if "first_call_seconds" in row:
            cells = [f"{row['seconds'][side]:.3g}" if side in row["seconds"] else "" for side in sides]
            for side in row.get("out_of_memory", []):
                cells[sides.index(side)] = "out of memory"
            before, after = row["ceilings"]["before"], row["ceilings"]["after"]
            rates = ", ".join(f"{before[key]:.0f} to {after[key]:.0f}" for key in before)
            lines.append(f"| {name} | {' | '.join(cells)} | {row['first_call_seconds']:.3g} | {rates} |")
    return lines


MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "nvjet", "cutlass", "sm90_xmma")
"""How operators on a CPU and cuBLAS's kernels begin."""


def profile_table(rows: dict[str, Any]) -> list[str]:
    """With what would be left to gain: the ratio to transformers if all but PyTorch's matrix products took no time."""
    lines = [
        "| where the compiled side's time goes | | as fast as transformers, if all but matrix products took no time |",
        "| --- | --- | --- |",
    ]
    for name, row in rows.items():
        if profile := row.get("profile"):
            shares = ", ".join(f"`{key}` {share:.0%}" for key, share in profile.items() if share >= 0.01)
            products = sum(share for key, share in profile.items() if key.startswith(MATRIX_PRODUCTS))
            theirs, limit = row["times_as_fast"].get("transformers"), ""
            if theirs and products and "cached_tokens" not in row:
                limit = f"{theirs['median'] / products:.2f}"
            lines.append(f"| {name} | {shares} | {limit} |")
    return lines


def start_lines(rows: dict[str, Any]) -> list[str]:
    if "start" not in rows:
        return []
    seconds = rows["start"]["seconds"]
    return [
        "The first prefill at 10 % in a new process, in seconds: "
        + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
        + ". The cache is the compiler's on disk, filled by an earlier process.",
    ]
