"""benchmarks/pages/accuracy.md, and its figures, from the results of `evaluate.py` and
`analyze_layers.py`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

from seats.methods import METHODS, names

HEAD = """# Accuracy

Rendered from `../accuracy/`; do not edit. Accuracy with its 95 % interval, from clips drawn anew. Repeat with

```sh
.venv/bin/python scripts/tiny/world.py .world/test --split test --count 137
.venv/bin/python scripts/tiny/evaluate.py .world/test --methods all
.venv/bin/python scripts/tiny/world.py .world/validation --split validation --count 40
.venv/bin/python scripts/tiny/analyze_layers.py .world/validation
```
"""


SHARED = ("seats.budget", "seats.diversity", "seats.methods.ranking", "seats.schedule", "seats.selection")
"""What methods are made from, beside their own files."""


@cache
def code_of(method: str) -> str:
    """A name for what a method's code does now: another where its file changes, or one that it is made from, those of
    other methods that it imports among them, apart from comments and docstrings. Of what is no method, every token and
    ablations, that of SEATS."""
    made = METHODS.get(method)
    classes = type(made(video_ratio=0.5, audio_ratio=0.5)).__mro__ if made else ()
    modules = {each.__module__ for each in classes} - {"builtins"} or {"seats.config"}
    imported = {
        node.module
        for name in modules
        for node in _tree(name).body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("seats.methods.")
    }
    digest = hashlib.sha256()
    for name in sorted({*modules, *imported, *SHARED}):
        tree = _tree(name)
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [line for line in body if not (isinstance(line, ast.Expr) and _is_text(line.value))]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def _tree(module: str) -> ast.Module:
    """Empty where there is no source: of what was registered in a notebook."""
    try:
        return ast.parse(inspect.getsource(importlib.import_module(module)))
    except (ImportError, OSError, TypeError):
        return ast.Module([], [])


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def accuracy_page(folder: Path) -> str:
    """Of every model evaluated; empty where there is none."""
    found = [json.loads(path.read_text()) for path in sorted((folder / "accuracy").glob("*.json"))]
    evaluated = [each for each in found if "rows" in each]
    layers = {each["model"]: each for each in found if "removed" in each}
    if not evaluated:
        return ""
    return "".join([HEAD, *(model_part(each, layers.get(each["model"])) for each in evaluated)])


def model_part(result: dict[str, Any], layers: dict[str, Any] | None) -> str:
    name, rows = result["model"], result["rows"]
    full = rows[0]
    lines = [
        "",
        f"## {name}, {result['date']}",
        "",
        f"{result['questions']} questions about {result['clips']} clips; {result['machine']}, "
        f"torch {result['versions']['torch']}. Of four answers, 25 % is chance.",
        "",
        f"![Accuracy against prefill time](../figures/{name}-accuracy.svg)",
        "",
        "R is the retention asked for, of which video and sound keep their shares on average over all layers; every "
        "method gets the same two. A layer's cache keeps what that layer saw, and where a row says pruned, what the "
        "last one saw. Prefill: the median of single requests, selection included, encoders not.",
        "",
        "| | R | video | sound | multiply-accumulates, times fewer | prefill, ms | four answers | of every token's "
        "| above random | free answers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    able = [row for row in rows if "error" not in row]
    if {"divprune", "omnizip"} & {row["method"] for row in able}:
        lines[-2:-2] = [
            "fastv, visionzip, divprune, dycoke, fastvid, evs, vidcom2 and pyramiddrop keep all sound and take the "
            "whole budget from video. Where sound alone is more than the budget, some of it goes and hardly any video "
            "stays: so it is in the small world, of which a second has 16 tokens of video and 25 of sound. How much "
            "omnizip and dash keep depends on the data: their prefill has room for the most that they may keep, at low "
            "ratios twice as much as they do keep.",
            "",
        ]
    for row in able:
        ratios = [f"{ratio:.0%}" for ratio in row["ratios"] or ()] or ["", ""]
        cells = [
            f"{row['method']}{', pruned' if row['kv'] == 'pruned' else ''}",
            f"{row['retention']:.0%}",
            *ratios,
            f"{row['full_macs'] / row['macs']:.1f}",
            f"{1000 * row['prefill_seconds']:.0f}" if "prefill_seconds" in row else "",
            share(row["choice"]),
            f"{row['choice']['mean'] / full['choice']['mean']:.1%}",
            share(row.get("above_random"), sign="+"),
            share(row["free"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    standings = [standing(able, retention) for retention in dict.fromkeys(row["retention"] for row in able)]
    lines += ["", *filter(None, standings)] if any(standings) else []
    failed = [f"- {row['name']}: {row['error']}" for row in rows if "error" in row]
    lines += ["", "Not run:", "", *failed] if failed else []
    # Results from before rows were named so say nothing of it.
    stale = [row["name"] for row in able if "code" in row and row["code"] != code_of(row["method"])]
    lines += ["", f"Measured before the code of their methods changed: {', '.join(stale)}."] if stale else []
    runs: dict[str, list[str]] = {}
    for row in able:
        if run := row.get("run"):
            said = f"{run['date']}, {run['machine']}, torch {run['versions']['torch']}"
            runs.setdefault(said, []).append(row["name"])
    for said, found in runs.items():
        lines += ["", f"Of another run, whose prefill times are not beside these ({said}): {', '.join(found)}."]
    kinds = list(full["kinds"])
    lines += ["", f"| by kind | {' | '.join(kinds)} |", f"| --- |{' --- |' * len(kinds)}"]
    for row in able:
        shares = (row["kinds"][kind]["mean"] for kind in kinds)
        lines.append(f"| {row['name']} | {' | '.join(f'{each:.1%}' for each in shares)} |")
    if layers is not None:
        lines += [
            "",
            f"![Accuracy by the layer after which media are removed](../figures/{name}-layers.svg)",
            "",
            f"Video, sound or both removed after layer n, {layers['questions']} validation questions about "
            f"{layers['clips']} clips. Layers up to {layers['shallow']} are shallow, those from {layers['late']} on",
            f"late; suggested: drop_layers {tuple(layers['drop_layers'])}, late_layer {layers['late_layer']}.",
        ]
    return "\n".join(lines) + "\n"


def standing(rows: list[dict[str, Any]], retention: float) -> str:
    """Which method is first at a retention, and where SEATS is; empty where only SEATS and random were run."""
    found = {
        row["method"]: row["choice"]
        for row in rows
        if row["retention"] == retention and row["method"] in names() and row["kv"] == "layerwise"
    }
    if len(found) < 3 or "seats" not in found:
        return ""
    first = max(found, key=lambda method: found[method]["mean"])
    said = f"At {retention:.0%} {first} is first"
    if first == "seats":
        return f"- {said}."
    within = "within" if found["seats"]["mean"] >= found[first]["low"] else "below"
    return f"- {said}, {share(found[first])}; seats, {found['seats']['mean']:.1%}, is {within} its interval."


def share(found: dict[str, Any] | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found['mean']:{sign}.1%} ({found['low']:{sign}.1%} to {found['high']:{sign}.1%})"


def draw(folder: Path) -> None:
    """PNG and SVG of every model's figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}
    (folder / "figures").mkdir(exist_ok=True)
    for path in sorted((folder / "accuracy").glob("*.json")):
        result = json.loads(path.read_text())
        figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
        name = f"{result['model']}-layers" if "removed" in result else f"{result['model']}-accuracy"
        (draw_layers if "removed" in result else draw_accuracy)(axes, result)
        figure.savefig(folder / "figures" / f"{name}.png", dpi=150)
        figure.savefig(folder / "figures" / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)


def draw_accuracy(axes: Any, result: dict[str, Any]) -> None:
    """One line for each method, not for ablations."""
    able = [row for row in result["rows"] if "error" not in row and row["kv"] == "layerwise"]
    full = able[0]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in able:
        if row["method"] in names() and "prefill_seconds" in row:
            lines.setdefault(row["method"], []).append(row)
    marks = iter("os^vD<>Pp*hX" * 2)
    for method, found in lines.items():
        rows = sorted([full, *found], key=lambda row: row["prefill_seconds"])
        x = [1000 * row["prefill_seconds"] for row in rows]
        y = [100 * row["choice"]["mean"] for row in rows]
        wide = {"linewidth": 2.5, "zorder": 3} if method == "seats" else {"linewidth": 1, "alpha": 0.8}
        axes.plot(x, y, f"{next(marks)}-", label=method, markersize=5, **wide)
        if method == "seats":
            bars = [[100 * abs(row["choice"][end] - row["choice"]["mean"]) for row in rows] for end in ("low", "high")]
            axes.errorbar(x, y, yerr=bars, fmt="none", capsize=3, ecolor=axes.lines[-1].get_color())
            for row, at, height in zip(rows, x, y, strict=True):
                text = f"{row['retention']:.0%}"
                axes.annotate(text, (at, height), xytext=(4, 8), textcoords="offset points")
    axes.axhline(25, color="grey", linewidth=1, linestyle=":", label="chance")
    title = f"{result['model']}: tokens kept, of video and sound"
    axes.set(xlabel="selection and prefill, ms (median)", ylabel="right of four answers, %", title=title)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_layers(axes: Any, result: dict[str, Any]) -> None:
    for (removed, found), style in zip(result["removed"].items(), ("o-", "s--", "^-."), strict=True):
        mean, low, high = ([100 * each[name] for each in found] for name in ("mean", "low", "high"))
        axes.plot(range(len(mean)), mean, style, label=f"{removed} removed")
        axes.fill_between(range(len(mean)), low, high, alpha=0.15)
    layers = len(result["removed"]["both"]) - 1
    for end, name in ((result["shallow"], "shallow"), (result["late"] - 1, "middle"), (layers, "late")):
        start = {"shallow": 0, "middle": result["shallow"], "late": result["late"] - 1}[name]
        if end > start:
            axes.text((start + end) / 2, 103, name, ha="center")
            axes.axvline(end, color="grey", linewidth=0.8)
    axes.set(xlabel="removed after layer", ylabel="right of four answers, %", xticks=range(layers + 1), ylim=(0, 110))
    axes.legend(loc="lower right")
