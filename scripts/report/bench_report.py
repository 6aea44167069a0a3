"""benchmarks/README.md from the result files of `bench.py`: ratios first, then seconds, then where the time goes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from accuracy_report import accuracy_part

HEAD = """# Benchmarks

Rendered by `scripts/bench/bench.py` from `results/`; do not edit. All sides of a row run in turns on one machine, in
one process, with the same random weights in the same memory. A ratio is the median of those of the rounds, with the
lowest and the highest; seconds are medians. `matrix rate` is a product of two large matrices of the same type, `copy
rate` a large copy, bytes read and written: both run in turn with the row. Each row is of the newest run that measured
it; under `Measured` is which commit that was (`+` and a digest: with changes beyond it).

Repeat with

```sh
.venv/bin/python scripts/bench/bench.py               # what was measured at this commit already is not measured again
.venv/bin/python scripts/bench/bench.py --families qwen3 --dtypes bfloat16 --rows prefill --again
.venv/bin/python scripts/bench/bench.py --minutes 5   # what is least known first, and stops in time
```
"""


def write_readme(folder: Path) -> None:
    """folder/README.md from all result files in it."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    (folder / "README.md").write_text(render(results) + accuracy_part(folder), encoding="utf-8")
    page = folder.parent / "README.md"
    if page.is_file() and BEGIN in (text := page.read_text(encoding="utf-8")):
        before, _, rest = text.partition(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{headline(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


BEGIN, END = "<!-- scripts/bench/bench.py writes from here -->", "<!-- to here -->"
RELEASED = {"qwen2.5 full bfloat16": "Qwen2.5-Omni-7B", "qwen3 full bfloat16": "Qwen3-Omni-30B-A3B"}
PAPER = "the paper's prompt"
PAPER_TIMES = 4.8
"""How many times as fast the paper's prefill is at 10 %, of Qwen2.5-Omni-7B."""


def headline(results: list[dict[str, Any]]) -> str:
    """What README.md says of the released sizes: of each model what one commit measured on one GPU."""
    sentences = []
    for section, model in RELEASED.items():
        found = [
            (row["run"]["measured"], result["machine"], name, row, result["sections"][section]["rows"])
            for result in results
            for name, row in result["sections"].get(section, {"rows": {}})["rows"].items()
            if name in (f"prefill of {PAPER} at 10%", "prefill of 64 s at 10%")
        ]
        if not found:
            continue
        _, machine, name, few, rows = max(found, key=lambda each: (each[0], each[2]))
        clip = name.removeprefix("prefill of ").removesuffix(" at 10%")
        run = few["run"]
        texts = [
            f"{model} on one {machine} (random weights, bfloat16, torch {run['versions']['torch']}, commit "
            f"{run['commit']}), {clip if clip == PAPER else f'a clip of {clip}'}: the prefill at 10 % takes "
            f"{1e3 * few['seconds']['compiled']:.0f} ms, {few['times_as_fast']['every token']['median']:.1f} times as "
            "fast as with every token" + (f", where the paper reports {PAPER_TIMES}" if clip == PAPER else "")
        ]
        every = rows.get(f"prefill of {clip} at 100%")
        if every and every["run"]["commit"] == run["commit"]:
            texts.append(
                f"with every token it takes {1e3 * every['seconds']['compiled']:.0f} ms, "
                f"{every['of_matrix_rate']['median']:.0%} of the rate of a large matrix product"
                + beside_transformers(every)
            )
        sentences.append("; ".join(texts) + ".")
    return textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False)


def beside_transformers(row: dict[str, Any]) -> str:
    theirs = row["times_as_fast"].get("transformers")
    return f" and {theirs['median']:.2f} times as fast as transformers" if theirs else ""


def render(results: list[dict[str, Any]]) -> str:
    newest = sorted(results, key=lambda result: (result["device"] == "cuda", newest_run(result)), reverse=True)
    return "".join([HEAD, *map(machine_part, newest)])


def newest_run(result: dict[str, Any]) -> str:
    sections = result["sections"].values()
    return max((row["run"]["measured"] for section in sections for row in section["rows"].values()), default="")


def other_tokens(found: dict[str, Any]) -> str:
    """Of requests that kept other tokens, of which logits are not compared."""
    others = found.get("requests", 0) - found.get("with_the_same_tokens", 0)
    if not others:
        return ""
    return (
        f" ({others} of {found['requests']} kept up to {1 - found['lowest_share_of_the_same_tokens']:.1%} other tokens)"
    )


def machine_part(result: dict[str, Any]) -> str:
    lines = ["", f"## {result['machine']}", "", *result.get("notes", []), *checked_lines(result.get("checked"))]
    lines += ["", "### Targets", "", *targets_table(result["sections"])]
    for name, section in result["sections"].items():
        lines += ["", f"### {name}", ""]
        listed = section.get("all_rows", [])
        if rows := dict(sorted(section["rows"].items(), key=lambda row: (*listed, row[0]).index(row[0]))):
            for table in (ratio_table, prefill_table, seconds_table, profile_table):
                lines += [*table(rows), ""]
            for other in (agreement_table, throughput_table, plan_lines, start_lines, not_run_lines):
                if found := other(rows):
                    lines += [*found, ""]
            lines += ["Measured:", "", *run_lines(rows)]
        for row, failure in section.get("failed", {}).items():
            lines += ["", f"{row} failed at {failure['run']['commit']}: {failure['error']}"]
        if missing := [row for row in section.get("all_rows", ()) if row not in rows]:
            lines += ["", f"Not measured: {'; '.join(missing)}."]
    return "\n".join(lines).rstrip() + "\n"


def checked_lines(checked: dict[str, Any] | None) -> list[str]:
    if checked is None:
        return []
    lines = []
    for family, found in checked["models"].items():
        worst = ", ".join(
            f"{dtype} {each['largest_relative_difference_of_logits']:.1e}{other_tokens(each)}"
            for dtype, each in found.items()
        )
        lines.append(
            f"Checked at {checked['run']['commit']}, {family}: logits of small models, compiled against eager float32: "
            f"{worst}."
        )
    kernels = checked["kernels"]
    if not isinstance(kernels, str):
        kernels = (
            f"{kernels['shapes']} random shapes: picks {kernels['picks']}, attention weights within "
            f"{kernels['largest_difference_of_weights']:.1e}"
        )
    return [*lines, f"Kernels: {kernels}."]


def run_lines(rows: dict[str, Any]) -> list[str]:
    """Which rows are of which commit, newest first."""
    runs: dict[str, list[str]] = {}
    for name, row in rows.items():
        run = row["run"]
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        size = f", {run['parameters'] / 1e6:,.0f} M parameters" if "parameters" in run else ""
        what = f"{run['measured'][:10]}, commit {run['commit']}, {versions}, {run['threads']} threads{size}"
        runs.setdefault(what, []).append(name)
    return [f"- {what}: {'; '.join(names)}" for what, names in sorted(runs.items(), reverse=True)]


def targets_table(sections: dict[str, Any]) -> list[str]:
    lines = ["| | row | what | measured | target | |", "| --- | --- | --- | --- | --- | --- |"]
    for name, section in sections.items():
        for row_name, row in section["rows"].items():
            for target in row.get("targets", []):
                cells = (name, row_name, target["what"], *judged(target))
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def judged(target: dict[str, Any]) -> tuple[str, str, str]:
    """What was measured, the target, and the verdict."""
    measured = target["measured"]
    if "at_least" in target:
        wanted, missed = f"{target['at_least']:.2f}", 1 - measured / target["at_least"]
    else:
        wanted, missed = f"at most {target['at_most']:.3g}", measured / target["at_most"] - 1
    verdict = "met" if missed <= 0 else f"missed by {missed:.0%}"
    return f"{measured:.2f}" if measured >= 0.01 else f"{measured:.1e}", wanted, verdict


def as_text(target: dict[str, Any]) -> str:
    measured, wanted, verdict = judged(target)
    return f"{target['what']}: {measured} of {wanted}, {verdict}"


def ratio(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})" if found else ""


SIDES = (
    *("compiled", "eager", "transformers", "transformers compiled", "every token"),
    *("one dense product", "reading the weights"),
)


def ratio_table(rows: dict[str, Any]) -> list[str]:
    """How many times as fast."""
    sides = [side for side in SIDES if any(side in row.get("times_as_fast", {}) for row in rows.values())]
    lines = [f"| times as fast as | {' | '.join(sides)} | rounds |", "| --- " * (len(sides) + 2) + "|"]
    for name, row in rows.items():
        if faster := row.get("times_as_fast"):
            cells = [ratio(faster.get(side)) for side in sides]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['rounds']} |")
    return lines


def prefill_table(rows: dict[str, Any]) -> list[str]:
    lines = [
        "| | tokens by segment | multiply-accumulates done, times fewer | by the paper's count | the paper's own "
        "| GFLOP/s | of the matrix rate | selection | peak memory, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        if "segments" in row:
            share = f"{row['selection_share']:.1%}" if "selection_share" in row else ""
            peak = f"{row['peak_gb']:.1f}" if "peak_gb" in row else ""
            cells = (
                *(name, " > ".join(map(str, row["segments"])), f"{row['work_ratio']:.2f}", f"{row['macs_ratio']:.2f}"),
                papers(row),
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
    sides = [side for side in SIDES if any(side in row["seconds"] for row in rows.values())]
    lines = [
        f"| seconds | {' | '.join(sides)} | first call | machine: matrix GFLOP/s, copy GB/s |",
        "| --- " * (len(sides) + 3) + "|",
    ]
    for name, row in rows.items():
        if "first_call_seconds" in row:
            cells = [f"{row['seconds'][side]:.3g}" if side in row["seconds"] else "" for side in sides]
            for side, reason in row.get("not_run", {}).items():
                if side in sides:
                    cells[sides.index(side)] = "out of memory" if reason == "out of memory" else "not run"
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


def papers(row: dict[str, Any]) -> str:
    """What the paper says of a prompt like its own."""
    of_the_paper = row.get("of_the_paper", {})
    texts = []
    if of_the_paper.get("macs_ratio"):
        texts.append(f"{of_the_paper['macs_ratio']:.1f}")
    if of_the_paper.get("times_as_fast"):
        texts.append(f"{of_the_paper['times_as_fast']:.1f} times as fast")
    return "; ".join(texts)


def agreement_table(rows: dict[str, Any]) -> list[str]:
    found = {name: row["apart"] for name, row in rows.items() if "apart" in row}
    if not found:
        return []
    sides = list(dict.fromkeys(side for apart in found.values() for side in apart))
    lines = [
        f"| logits apart from transformers' in float32, of their norm | {' | '.join(sides)} |",
        "| --- " * (len(sides) + 1) + "|",
    ]
    for name, apart in found.items():
        cells = [f"{apart[side]:.1e}" if side in apart else "" for side in sides]
        lines.append(f"| {name}, {rows[name]['tokens']:,} tokens | {' | '.join(cells)} |")
    return lines


def throughput_table(rows: dict[str, Any]) -> list[str]:
    found = {name: row for name, row in rows.items() if "questions" in row}
    if not found:
        return []
    sides = list(next(iter(found.values()))["seconds"])
    lines = [
        f"| questions a second, encoders included | {' | '.join(sides)} | questions | new tokens of each |",
        "| --- " * (len(sides) + 3) + "|",
    ]
    for name, row in found.items():
        cells = [f"{1 / row['seconds'][side]:.3g}" for side in sides]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['questions']} | {row['new_tokens']} |")
    return lines


def plan_lines(rows: dict[str, Any]) -> list[str]:
    if "plans" not in rows:
        return []
    seconds = ", ".join(f"{name} {value:.3g}" for name, value in rows["plans"]["seconds"].items())
    return [
        f"The first prefill at 10 % of {rows['plans']['rounds']} plans never met before, in a process that has met "
        f"one, nothing of them on disk, in seconds: {seconds}."
    ]


def not_run_lines(rows: dict[str, Any]) -> list[str]:
    return [
        f"- {name}: {side} did not run: {reason}"
        for name, row in rows.items()
        for side, reason in row.get("not_run", {}).items()
        if reason != "out of memory"
    ]


def start_lines(rows: dict[str, Any]) -> list[str]:
    if "start" not in rows:
        return []
    seconds = rows["start"]["seconds"]
    return [
        "The first prefill at 10 % in a new process, in seconds: "
        + ", ".join(f"{name} {value:.3g}" for name, value in seconds.items())
        + ". The cache is the compiler's on disk, filled by an earlier process.",
    ]
