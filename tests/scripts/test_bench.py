"""The benchmark: both sides hold the same numbers, rows are measured once, what is not measured is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_both_sides_hold_the_same_weights(family: str) -> None:
    """In the same memory, and they compute the same."""
    from bench import Bench

    bench = Bench(family, "small", torch.float32, torch.device("cpu"), 1)
    ids = torch.randint(0, 1000, (1, 30))
    with torch.inference_mode():
        hidden = bench.language(input_ids=ids).last_hidden_state[:, -1]
        expected = bench.reference.lm_head(hidden)[0]
    import omni

    model = omni.Omni(bench.compiled.thinker, bench.compiled.folder)
    torch.testing.assert_close(model.prefill(omni.Inputs(ids)).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bench.eager.prefill(omni.Inputs(ids)).logits, expected, atol=1e-4, rtol=1e-4)
    ours = {parameter.untyped_storage().data_ptr() for parameter in bench.compiled.thinker.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in bench.reference.parameters()} <= ours


def row(seconds: float) -> dict[str, Any]:
    return {
        "rounds": 1,
        "seconds": {"compiled": seconds, "eager": 2 * seconds},
        "first_call_seconds": 9.0,
        "times_as_fast": {"eager": {"median": 2.0, "lowest": 1.5, "highest": 2.5}},
        "targets": [{"what": "times as fast as eager", "measured": 2.0, "at_least": 2.5}],
        "profile": {"aten::mm": 0.9},
    }


RATES = {"matrix_gflops": 100.0, "copy_gb_per_second": 10.0}
COMMAND = ["bench.py", "--size", "small", "--families", "qwen3", "--dtypes", "bfloat16", "--device", "cpu"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark with rows of its own in place of all; returns the section of the result file."""
    import bench

    monkeypatch.setattr(bench, "check", lambda device: {"models": {}, "kernels": "not tried"})
    monkeypatch.setattr(bench, "ceilings", lambda bench: RATES)

    def run(rows: dict[str, Callable[[], dict[str, Any]]], *options: str, commit: str = "one") -> dict[str, Any]:
        measures = {(name,): lambda measure=measure: [measure()] for name, measure in rows.items()}
        monkeypatch.setattr(bench, "rows_of", lambda bench, tokens: measures)
        monkeypatch.setattr(sys, "argv", [*COMMAND, "--results", str(tmp_path), "--commit", commit, *options])
        try:
            bench.main()
        finally:
            (path,) = (tmp_path / "results").glob("*")
            section = json.loads(path.read_text())["sections"]["qwen3 small bfloat16"]
        return section

    return run


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, run: Callable[..., dict[str, Any]]) -> None:
    """Rows are written one by one; those of this commit are not measured again; the page shows what was missed."""
    measured: list[str] = []

    def vision() -> dict[str, Any]:
        measured.append("vision")
        return row(0.5)

    def stops() -> dict[str, Any]:
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append("stops")
        return row(0.5)

    rows = {"vision": vision, "stops": stops}
    with pytest.raises(KeyboardInterrupt):
        run(rows)
    section = run(rows, "--render")
    assert list(section["rows"]) == ["vision"]
    assert "Not measured: stops." in (tmp_path / "README.md").read_text()
    measured.append("stopped")
    run(rows)
    run(rows)
    assert measured == ["vision", "stopped", "stops"]
    page = (tmp_path / "README.md").read_text()
    assert "| qwen3 small bfloat16 | vision | times as fast as eager | 2.00 | 2.50 | missed by 20% |" in page
    assert "| vision | 2.00 (1.50 to 2.50) | 1 |" in page
    assert "Not measured" not in page
    assert "commit one" in page


def test_a_row_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, run: Callable[..., dict[str, Any]]
) -> None:
    """It comes last when asked again at the same commit, first at another; and goes once it has a result."""

    def fails() -> dict[str, Any]:
        raise ValueError("no such kernel\nlong trace")

    section = run({"fails": fails, "vision": lambda: row(0.5)})
    assert list(section["rows"]) == ["vision"]
    assert section["failed"]["fails"]["error"] == "ValueError: no such kernel"
    assert "fails failed at one: ValueError: no such kernel" in (tmp_path / "README.md").read_text()
    section = run({"fails": lambda: row(0.5), "vision": lambda: row(0.5)}, commit="two")
    assert section["failed"] == {}
    assert {row["run"]["commit"] for row in section["rows"].values()} == {"two"}


def test_nothing_is_started_that_would_not_end_in_time(run: Callable[..., dict[str, Any]]) -> None:
    """By how long a row took the last time; a later row that fits is measured still."""
    section = run({"long": lambda: row(0.5), "short": lambda: row(0.5)})
    path, took = section["rows"], {"long": 600.0, "short": 1.0}
    from bench_results import Clock, least_known_first

    clock = Clock(minutes=5)
    assert [clock.fits(took[name]) for (name,) in least_known_first([("long",), ("short",)], section, "two")] == [
        False,
        True,
    ]
    clock.share(100)
    assert not clock.fits(10)
    assert path["long"]["took_seconds"] < 60
    section = run({"long": lambda: row(0.5), "short": lambda: row(0.25)}, "--minutes", "0", commit="two")
    assert {row["run"]["commit"] for row in section["rows"].values()} == {"one"}


def measured_at(when: str, commit: str, seconds: float = 0.5) -> dict[str, Any]:
    versions = {"torch": "2.13.0", "transformers": "5.23.0"}
    return row(seconds) | {"run": {"commit": commit, "measured": when, "threads": 2, "versions": versions}}


def test_what_is_least_known_comes_first() -> None:
    from bench_results import least_known_first

    section = {
        "rows": {
            "a": measured_at("2026-01-03 10:00", "new"),
            "b": measured_at("2026-01-02 10:00", "old"),
            "c": measured_at("2026-01-01", "older"),
        },
        "failed": {"f": {"error": "x", "run": {"commit": "new"}}, "g": {"error": "x", "run": {"commit": "old"}}},
    }
    rows = [("a",), ("b",), ("f",), ("c",), ("d", "b"), ("g",)]
    assert least_known_first(rows, section, "new") == [("d", "b"), ("g",), ("c",), ("b",), ("f",)]
    assert least_known_first(rows, section, "new", again=True)[-2:] == [("a",), ("f",)]
    assert least_known_first(rows, section, "new", ["c", "a"]) == [("c",)]


def test_runs_merge_by_row(tmp_path: Path) -> None:
    """The newer of two, whichever comes first; a file of another machine, or without a commit, is refused."""
    from bench_results import load, merge, save

    def result(rows: dict[str, Any]) -> dict[str, Any]:
        section = {"rows": rows, "all_rows": list(rows)}
        return {"machine": "a GPU", "device": "cuda", "sections": {"qwen3 full bfloat16": section}}

    first = result({"a": measured_at("2026-01-01 10:00", "one"), "b": measured_at("2026-01-03 10:00", "three")})
    second = result({"b": measured_at("2026-01-02 10:00", "two"), "c": measured_at("2026-01-02 10:00", "two")})
    for files in ((first, second), (second, first)):
        merged = result({})
        for each in files:
            merge(merged, each)
        rows = merged["sections"]["qwen3 full bfloat16"]["rows"]
        assert {name: row["run"]["commit"] for name, row in rows.items()} == {"a": "one", "b": "three", "c": "two"}
    with pytest.raises(ValueError, match="another"):
        merge(result({}) | {"machine": "another"}, first)
    old = result({"a": row(0.5)}) | {"date": "2026-01-01", "threads": 2, "versions": {"torch": "2.11.0"}}
    with pytest.raises(ValueError, match="--commit"):
        merge(result({}), old)
    merged = result({})
    merge(merged, old, "zero")
    assert merged["sections"]["qwen3 full bfloat16"]["rows"]["a"]["run"]["commit"] == "zero"
    save(tmp_path / "results" / "a.json", merged)
    assert load(tmp_path / "results" / "a.json", "a GPU", "cuda") == merged
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.json"]


def test_the_readme_says_what_the_result_files_say() -> None:
    """Both pages are what is rendered from the committed files."""
    from bench_report import BEGIN, END, headline, render

    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    assert (ROOT / "benchmarks" / "README.md").read_text().startswith(render(results))
    text = (ROOT / "README.md").read_text()
    assert f"{BEGIN}\n{headline(results)}\n{END}" in text
