"""benchmarks/ from the result files of `bench.py`: targets of all machines first, then a page to each model on each
machine, with ratios, seconds, and where the time goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accuracy_report import accuracy_page
from readme_report import ROOT, slug, write_figures

HEAD = """# Benchmarks

Rendered by `python scripts/bench/bench.py --render` from `results/` and `accuracy/`; do not edit.
[docs/benchmarks.md](../docs/benchmarks.md) says what is measured and how to repeat it.

## Targets

"""
PAGE_HEAD = """
All sides of a row run in turns on one machine, in one process, with the same random weights in the same memory. A
ratio is the median of those of the rounds, with the lowest and the highest; seconds are medians. `matrix rate` is a
product of two large matrices of the same type, `copy rate` a large copy, bytes read and written: both run in turn
with the row. Each row is of the newest run that measured it; under `Measured` is which commit that was (`+` and a
digest: with changes beyond it)."""
PAPER = "the paper's prompt"
HEADS = (
    "By the paper's count: `seats.prefill_macs`. Of Qwen3-Omni-30B-A3B the estimator of the paper's authors takes "
    "hidden_size / heads for the size of a head, 64; ours takes the true 128."
)


def write_readme(folder: Path) -> None:
    """README.md and pages/ in a folder of results; of the project's own, benchmarks/, also what its README.md says."""
    results = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    pages = render(results, accuracy_page(folder))
    (folder / "pages").mkdir(exist_ok=True)
    for path in (folder / "pages").glob("*.md"):
        if f"pages/{path.name}" not in pages:
            path.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    if folder.resolve() == ROOT / "benchmarks":
        write_figures(ROOT, results)


def render(results: list[dict[str, Any]], accuracy: str = "") -> dict[str, str]:
    """What is in each file, by its name under benchmarks/."""
    newest = sorted(results, key=lambda result: (result["device"] == "cuda", newest_run(result)), reverse=True)
    pages, targets, links = {}, [], []
    for result in newest:
        found = []
        for name, section in result["sections"].items():
            path = f"pages/{slug(result['machine'])}-{slug(name)}.md"
            pages[path] = page(result, name, section)
            for number, cells in enumerate(targets_met(section)):
                targets.append(("" if number else f"{result['machine']}, [{name}]({path})", *cells))
            found.append(f"[{name}]({path}), {len(section['rows'])} rows")
        links.append(f"- {result['machine']}: {'; '.join(found)}")
    heads = ("machine, model", "targets met", "missed", "furthest in", "measured", "target", "by")
    lines = [*table(heads, targets), "", "## Pages", "", *links]
    if accuracy:
        pages["pages/accuracy.md"] = accuracy
        lines.append("- What token selection costs in accuracy: [accuracy](pages/accuracy.md)")
    return {"README.md": HEAD + "\n".join(lines) + "\n", **pages}


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of Markdown, none for no rows; columns without a word in any row are left out."""
    columns = [column for column in zip(heads, *rows, strict=True) if any(column[1:])]
    if not columns:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]
    return [lines[0], "| --- " * len(columns) + "|", *lines[1:]]


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


def page(result: dict[str, Any], name: str, section: dict[str, Any]) -> str:
    """One model on one machine."""
    notes = [*result.get("notes", []), *checked_lines(result.get("checked"))]
    lines = [f"# {name} on {result['machine']}", PAGE_HEAD]
    listed = section.get("all_rows", [])
    rows = dict(sorted(section["rows"].items(), key=lambda row: (*listed, row[0]).index(row[0])))
    parts = {
        "Targets": (targets_table,),
        "Ratios": (
            *(ratio_table, prefill_table, *([head_lines] if name.startswith("qwen3") else [])),
            *(cache_table, agreement_table, throughput_table, asked_again_table),
        ),
        "Seconds": (seconds_table, plan_lines, start_lines, not_run_lines),
        "Where the time goes": (profile_table, reading_table),
        "Measured": (run_lines, lambda _: notes),
    }
    for title, tables in parts.items():
        found = [line for each in tables if (part := each(rows)) for line in ("", *part)]
        if found:
            lines += ["", f"## {title}", *found]
    for row, failure in section.get("failed", {}).items():
        lines += ["", f"{row} failed at {failure['run']['commit']}: {failure['error']}"]
    if missing := [row for row in listed if row not in rows]:
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


def targets_met(section: dict[str, Any]) -> list[tuple[str, ...]]:
    """How many targets are met; then of each kind that a row misses, the row that is furthest from it."""
    worst: dict[str, tuple[float, str, dict[str, Any]]] = {}
    met = count = 0
    for name, row in section["rows"].items():
        for target in row.get("targets", []):
            by = missed(target)
            met, count = met + (by <= 0), count + 1
            if by > max(0.0, worst.get(target["what"], (0.0,))[0]):
                worst[target["what"]] = by, name, target
    if not count:
        return []
    lines = [(what, name, *judged(target)[:2], f"{by:.0%}") for what, (by, name, target) in worst.items()]
    first, *rest = lines or [("",) * 5]
    return [(f"{met} of {count}", *first), *(("", *line) for line in rest)]


def targets_table(rows: dict[str, Any]) -> list[str]:
    found = [(name, each["what"], *judged(each)) for name, row in rows.items() for each in row.get("targets", [])]
    return table(("row", "what", "measured", "target", ""), found)


def missed(target: dict[str, Any]) -> float:
    """By which share; 0 or less where it is met."""
    if "at_least" in target:
        return 1 - target["measured"] / target["at_least"]
    return target["measured"] / target["at_most"] - 1


def judged(target: dict[str, Any]) -> tuple[str, str, str]:
    """What was measured, the target, and the verdict."""
    measured = target["measured"]
    wanted = f"{target['at_least']:.2f}" if "at_least" in target else f"at most {target['at_most']:.3g}"
    verdict = "met" if missed(target) <= 0 else f"missed by {missed(target):.0%}"
    return f"{measured:.2f}" if measured >= 0.01 else f"{measured:.1e}", wanted, verdict


def as_text(target: dict[str, Any]) -> str:
    measured, wanted, verdict = judged(target)
    return f"{target['what']}: {measured} of {wanted}, {verdict}"


def ratio(found: dict[str, float] | None) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})" if found else ""


SIDES = (
    *("compiled", "eager", "transformers", "transformers compiled", "every token"),
    *("one dense product", "reading the weights"),
    *("ours", "decoding all, scaling in turn", "decord, torch's bicubic", "preparing alone"),
)


def ratio_table(rows: dict[str, Any]) -> list[str]:
    """How many times as fast."""
    found = [
        (name, *(ratio(faster.get(side)) for side in SIDES), str(row["rounds"]))
        for name, row in rows.items()
        if (faster := row.get("times_as_fast")) and not faster.keys().isdisjoint(SIDES)
    ]
    return table(("times as fast as", *SIDES, "rounds"), found)


def prefill_table(rows: dict[str, Any]) -> list[str]:
    heads = (
        *("", "tokens by segment", "multiply-accumulates done, times fewer", "by the paper's count"),
        *("the paper's own", "GFLOP/s", "of the matrix rate", "selection", "peak memory, GB"),
    )
    found = [
        (
            *(name, " > ".join(map(str, row["segments"])), f"{row['work_ratio']:.2f}", f"{row['macs_ratio']:.2f}"),
            *(papers(row), f"{row['gflops']:.0f}", ratio(row["of_matrix_rate"])),
            f"{row['selection_share']:.1%}" if "selection_share" in row else "",
            f"{row['peak_gb']:.1f}" if "peak_gb" in row else "",
        )
        for name, row in rows.items()
        if "segments" in row
    ]
    return table(heads, found)


def head_lines(rows: dict[str, Any]) -> list[str]:
    """Beside `prefill_table`, of Qwen3-Omni."""
    return [HEADS] if prefill_table(rows) else []


def cache_table(rows: dict[str, Any]) -> list[str]:
    found = [
        (
            *(name, str(row["cached_tokens"]), f"{row['gb_per_second']:.1f}", ratio(row["of_copy_rate"])),
            f"{1e3 * row['second_token_seconds']:.3g}",
        )
        for name, row in rows.items()
        if "cached_tokens" in row
    ]
    return table(("", "tokens cached", "GB/s", "of the copy rate", "second token, ms"), found)


def seconds_table(rows: dict[str, Any]) -> list[str]:
    found = []
    for name, row in rows.items():
        if "first_call_seconds" in row:
            cells = {side: f"{row['seconds'][side]:.3g}" for side in SIDES if side in row["seconds"]}
            for side, reason in row.get("not_run", {}).items():
                cells[side] = "out of memory" if reason == "out of memory" else "not run"
            before, after = row["ceilings"]["before"], row["ceilings"]["after"]
            rates = ", ".join(f"{before[key]:.0f} to {after[key]:.0f}" for key in before)
            found.append((name, *(cells.get(side, "") for side in SIDES), f"{row['first_call_seconds']:.3g}", rates))
    return table(("seconds", *SIDES, "first call", "machine: matrix GFLOP/s, copy GB/s"), found)


MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_convolution", "nvjet", "cutlass", "sm90_xmma")
"""How operators on a CPU and cuBLAS's kernels begin."""


def profile_table(rows: dict[str, Any]) -> list[str]:
    """With what would be left to gain: the ratio to transformers if all but PyTorch's matrix products took no time."""
    found = []
    for name, row in rows.items():
        if profile := row.get("profile"):
            shares = ", ".join(f"`{key}` {share:.0%}" for key, share in profile.items() if share >= 0.01)
            products = sum(share for key, share in profile.items() if key.startswith(MATRIX_PRODUCTS))
            theirs, limit = row["times_as_fast"].get("transformers"), ""
            if theirs and products and "cached_tokens" not in row:
                limit = f"{theirs['median'] / products:.2f}"
            found.append((name, shares, limit))
    return table(
        ("row", "of the compiled side", "as fast as transformers, if all but matrix products took no time"), found
    )


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
    apart = {name: row["apart"] for name, row in rows.items() if "apart" in row}
    sides = list(dict.fromkeys(side for each in apart.values() for side in each))
    found = [
        (f"{name}, {rows[name]['tokens']:,} tokens", *(f"{each[side]:.1e}" if side in each else "" for side in sides))
        for name, each in apart.items()
    ]
    return table(("logits apart from transformers' in float32, of their norm", *sides), found)


def throughput_table(rows: dict[str, Any]) -> list[str]:
    asked = {name: row for name, row in rows.items() if "questions" in row}
    sides = list(dict.fromkeys(side for row in asked.values() for side in row["seconds"]))
    found = [
        (
            name,
            *(f"{1 / row['seconds'][side]:.3g}" if side in row["seconds"] else "" for side in sides),
            *(str(row["questions"]), str(row["new_tokens"])),
        )
        for name, row in asked.items()
    ]
    return table(("questions a second, encoders included", *sides, "questions", "new tokens of each"), found)


def asked_again_table(rows: dict[str, Any]) -> list[str]:
    """Of questions about a clip that was asked about before: the time to the first token, and of it the prefill."""
    sides = ("first", "second", "nothing kept")
    found = []
    for name, row in rows.items():
        if "second" not in row["seconds"]:
            continue
        cells = [f"{row['seconds'][side]:.3g}" for side in sides]
        cells += [ratio(row["times_as_fast"].get(side)) for side in ("first", "nothing kept")]
        if "prefill_seconds" in row:
            cells += [f"{row['prefill_seconds'][side]:.3g}" for side in sides[:2]]
            cells += [f"{row['reused_tokens']} of {row['tokens']}", f"{row['kept_bytes'] / 1e6:.0f}"]
        found.append((name, *cells, *[""] * (9 - len(cells))))
    heads = (
        *("seconds to the first token", "first question", "second", "nothing kept"),
        *("second, times as fast as the first", "as with nothing kept", "prefill of the first", "of the second"),
        *("tokens reused", "kept, MB"),
    )
    return table(heads, found)


def reading_table(rows: dict[str, Any]) -> list[str]:
    """What bounds reading on more cores: no side is faster than its calling thread, or than all of its threads' seconds
    shared among the cores."""
    busy = {name: row["processor_seconds"] for name, row in rows.items() if "processor_seconds" in row}
    sides = list(dict.fromkeys(side for each in busy.values() for side in each))
    found = [
        (name, *(f"{each[side]['all']:.3g}, {each[side]['calling']:.2g}" if side in each else "" for side in sides))
        for name, each in busy.items()
    ]
    return table(("processor seconds of all threads, and of the one that calls", *sides), found)


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
