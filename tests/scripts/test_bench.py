"""The benchmark: both sides hold the same numbers, rows are measured once, what is not measured is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("transformers")


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


def page_in(folder: Path) -> str:
    """The page of the one model that was measured."""
    (page,) = (folder / "pages").glob("*.md")
    return page.read_text()


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
    assert "Not measured: stops." in page_in(tmp_path)
    measured.append("stopped")
    run(rows)
    run(rows)
    assert measured == ["vision", "stopped", "stops"]
    page = page_in(tmp_path)
    assert "| vision | times as fast as eager | 2.00 | 2.50 | missed by 20% |" in page
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
    assert "fails failed at one: ValueError: no such kernel" in page_in(tmp_path)
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
    assert least_known_first(rows, section, "new", ["b", "d", "f", ""])[:2] == [("d", "b"), ("b",)]
    assert least_known_first(rows, section, "new", ["c", ""])[0] == ("c",)


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


@pytest.fixture
def bench_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A small model that says it is compiled and runs eagerly: no row is about machine code here."""
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)
    from bench_sides import Bench

    def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
        bench = Bench(family, "small", dtype, torch.device("cpu"), 1)
        vars(bench)["copy"] = vars(bench)["matrix"] = (1.0, lambda: 1.0)  # in place of a gigabyte
        return bench

    return make


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3"])
def test_agreement_compares_with_float32_of_the_same_weights(bench_of: Callable[..., Any], family: str) -> None:
    """Weights come back as they were; other weights are found out."""
    from bench_sides import Clip
    from bench_whole import agreement_row

    bench, clip = bench_of(family, torch.bfloat16), Clip(1, text=20, rows=2, columns=2)
    before = {name: parameter.data_ptr() for name, parameter in bench.thinker.named_parameters()}
    row = agreement_row(bench, clip)
    exactly, rounded = row["apart"]["eager, in float32"], row["apart"]["eager"]
    assert exactly < 1e-5 < 1e-3 < rounded < 0.1
    assert row["targets"][0]["measured"] == exactly
    assert before == {name: parameter.data_ptr() for name, parameter in bench.thinker.named_parameters()}
    assert {parameter.dtype for parameter in bench.thinker.parameters()} == {torch.bfloat16}
    assert "prefill" not in vars(bench.thinker.layers[0]) and "forward" not in vars(bench.language.layers[0])
    weight = bench.language.layers[3].self_attn.q_proj.weight
    weight.data = weight.data.flip(0)
    assert agreement_row(bench, clip)["apart"]["eager, in float32"] > 1e-3


def test_rows_of_a_small_model(bench_of: Callable[..., Any]) -> None:
    """Throughput counts every question; the layer of experts stands beside what reading it takes; plans are others."""
    from bench_decoder import COMPILED, compiled_prefill_row, decode_row, experts_row
    from bench_sides import Clip
    from bench_start import plans_row
    from bench_whole import throughput_row

    bench, clip = bench_of("qwen3"), Clip(2, text=40, rows=2, columns=2)
    row = throughput_row(bench, clip, 2, 2, sizes=(1, 2))
    assert list(row["seconds"]) == ["batches of 1", "batches of 2"] and row["questions"] == 2
    row = experts_row(bench, 4)
    assert set(row["times_as_fast"]) == {"transformers", "one dense product", "reading the weights"}
    caches = [os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    row = plans_row(bench, clip, (12,))
    assert row["rounds"] == 1 and row["targets"][0]["at_most"] == 5.0
    assert caches == [os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    for row in (decode_row(bench, clip, 0.1, 5, compiled=True), compiled_prefill_row(bench, clip)):
        assert list(row["times_as_fast"]) == [COMPILED]


def test_a_rival_that_does_not_run_is_named(bench_of: Callable[..., Any]) -> None:
    """Where it may fail; ours never may."""
    bench = bench_of("qwen3")

    def refuses() -> float:
        raise RuntimeError("cannot be traced\nlong trace")

    measured = bench.measure({"compiled": lambda: 1.0, "other": refuses}, may_fail=("other",))
    row = measured.row({"compiled": "compiled", "other": "other"})
    assert row["not_run"] == {"other": "RuntimeError: cannot be traced"} and row["times_as_fast"] == {}
    with pytest.raises(RuntimeError, match="compiled: RuntimeError"):
        bench.measure({"compiled": refuses}, may_fail=("compiled",)).row({"compiled": "compiled"})
    with pytest.raises(RuntimeError, match="cannot be traced"):
        bench.measure({"compiled": refuses})


def test_full_size_rows_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU as on a CPU, rows of files also where nothing reads files: they are named as not measured. The paper's
    prompt has the tokens that its counts fit."""
    from bench_decoder import PAPERS_CLIP
    from bench_rows import measurable, rows_of
    from bench_sides import Bench

    from omni.processing.positions import layout

    for family in ("qwen2.5", "qwen3"):
        for size, device in (("full", "cuda"), ("0.5B", "cpu"), ("small", "cpu")):
            bench = Bench(family, size, torch.bfloat16, torch.device(device), 1)
            names = [name for names in rows_of(bench, 3000) for name in names]
            assert len(names) == len(set(names)) > 10
            assert {"agreement", "plans", "vision", "audio"} < set(names)
            with monkeypatch.context() as without:
                without.setattr("importlib.util.find_spec", lambda _: None)
                left = {name for name in names if not measurable((name,))}
            assert any(name.startswith("first token from a file of ") for name in left)
            assert left <= {name for name in names if "file" in name or name.startswith("media, ")}
    bench = Bench("qwen2.5", "full", torch.bfloat16, torch.device("meta"), 1)
    counts = layout(bench.inputs(PAPERS_CLIP), bench.config).counts
    assert (counts["video"], counts["audio"], counts["text"]) == (10200, 1700, 602)


def test_times_on_a_gpu_have_targets_of_their_own() -> None:
    """Of each part and family, each by its own name, so that the report's first table has all that are missed."""
    from bench_sides import milliseconds

    def found(what: str, family: str, on_gpu: bool = True) -> list[dict[str, Any]]:
        return milliseconds(SimpleNamespace(family=family, on_gpu=on_gpu), what, row(0.1))  # type: ignore[arg-type]

    assert found("vision", "qwen3") == [{"what": "milliseconds, vision", "measured": 100.0, "at_most": 85.0}]
    assert found("first token", "qwen2.5")[0]["at_most"] == 170.0
    assert found("", "qwen2.5") == found("vision", "qwen2.5", on_gpu=False) == []


def test_what_is_compiled_is_carried_into_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a run that was interrupted; nothing is written where nothing is new."""
    import bench_cache

    for name in bench_cache.CACHES:
        monkeypatch.setenv(name, "before")
    archive = tmp_path / "kept" / "compiled.tgz"
    with pytest.raises(KeyboardInterrupt), bench_cache.archived(archive) as keep:
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        (folder / "triton").mkdir()
        (folder / "triton" / "kernel").write_text("code")
        keep()
        assert not archive.exists()  # not every few seconds
        raise KeyboardInterrupt
    written = archive.stat().st_mtime_ns
    with bench_cache.archived(archive):
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert (folder / "triton" / "kernel").read_text() == "code"
    assert archive.stat().st_mtime_ns == written and [path.name for path in archive.parent.iterdir()] == [archive.name]
    monkeypatch.setattr(bench_cache, "EVERY", 0.0)
    with bench_cache.archived(archive) as keep:
        (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "more").write_text("code")
        keep()
        assert archive.stat().st_mtime_ns > written


COMPILES = """
import sys
from pathlib import Path
sys.path.insert(0, "scripts/bench")
from bench_cache import archived
with archived(Path(sys.argv[1])):
    import torch
    from torch._dynamo.utils import counters
    torch.compile(lambda x: (x.sin() + 1).relu().sum(-1))(torch.randn(8, 100))
    print("hits", counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_machine_code_comes_from_the_archive(tmp_path: Path) -> None:
    """The compiler finds it, though it lies in another folder."""
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", COMPILES, str(tmp_path / "compiled.tgz")]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("hits")]
        found.append(sum(map(int, line.split()[1:])))
    assert found[0] == 0 < found[1]


def test_what_the_new_rows_found_is_on_the_page() -> None:
    from bench_report import PAPER, render
    from readme_report import headline

    few = measured_at("2026-01-02 10:00", "two", 0.04) | {
        "segments": [2268, 602],
        "work_ratio": 9.0,
        "macs_ratio": 9.32,
        "gflops": 1.0,
        "of_matrix_rate": {"median": 0.6, "lowest": 0.6, "highest": 0.6},
        "of_the_paper": {"macs_ratio": 9.1, "times_as_fast": 4.8},
        "ceilings": {"before": RATES, "after": RATES},
    }
    few["times_as_fast"] = {"every token": {"median": 8.0, "lowest": 7.5, "highest": 8.5}}
    every = few | {"of_the_paper": {}, "of_matrix_rate": {"median": 0.8, "lowest": 0.8, "highest": 0.8}}
    every["times_as_fast"] = {"transformers": {"median": 1.5, "lowest": 1.5, "highest": 1.5}}
    every["seconds"] = few["seconds"] | {"transformers": 0.06}
    plain = {key: few[key] for key in ("run", "rounds")}
    rows = {
        f"prefill of {PAPER} at 10%": few,
        f"prefill of {PAPER} at 100%": every,
        "agreement": plain | {"seconds": {}, "tokens": 1452, "apart": {"eager": 1e-2, "eager, in float32": 2e-6}},
        "throughput of 64 s at 10%": plain | {"seconds": {"batches of 1": 0.5}, "questions": 32, "new_tokens": 16},
        "plans": plain | {"seconds": {"a plan never met": 1.5}},
    }
    rows["plans"]["targets"] = [{"what": "seconds of a plan never met", "measured": 1.5, "at_most": 2.0}]
    rows["agreement"]["targets"] = [{"what": "of the matrix rate", "measured": 0.5, "at_least": 0.6}]
    section = {"rows": rows, "all_rows": [*rows, "start"]}
    result = {"machine": "a GPU", "device": "cuda", "sections": {"qwen2.5 full bfloat16": section}}
    pages = render([result])
    page = pages["pages/a-gpu-qwen2-5-full-bfloat16.md"]
    for text in (
        "| 9.32 | 9.1; 4.8 times as fast |",
        "| agreement, 1,452 tokens | 1.0e-02 | 2.0e-06 |",
        "| throughput of 64 s at 10% | 2 | 32 | 16 |",
        "a plan never met 1.5.",
        "| plans | seconds of a plan never met | 1.50 | at most 2 | met |",
        "Not measured: start.",
    ):
        assert text in page
    assert "| --- | --- |\n\n" not in page, "a table without rows"
    heads = "By the paper's count: `seats.prefill_macs`. Of Qwen3-Omni-30B-A3B the estimator of the paper's authors"
    (other,) = (
        text for name, text in render([{**result, "sections": {"qwen3 full": section}}]).items() if "qwen3" in name
    )
    assert heads not in page and f"{heads} takes hidden_size / heads for the size of a head, 64; ours" in other
    link = "[qwen2.5 full bfloat16](pages/a-gpu-qwen2-5-full-bfloat16.md)"
    missed = f"times as fast as eager | prefill of {PAPER} at 10% | 2.00 | 2.50 | 20% |"
    assert f"| a GPU, {link} | 1 of 4 | {missed}" in pages["README.md"]
    assert "|  |  | of the matrix rate | agreement | 0.50 | 0.60 | 17% |" in pages["README.md"]
    assert "a plan never met" not in pages["README.md"], "met: its page says so"
    said, other = headline([result]).split("| **Qwen3-Omni-30B-A3B** |")
    line = "| prefill of the paper's prompt"
    assert f"{line}, 10 % kept | 40 ms, 8.0× every token |  | 4.8× every token | [a GPU](" in said
    assert f"{line}, every token | 40 ms | 60 ms, 1.5× |  | [a GPU]" in said
    assert "| prefill, 10 % kept | not measured |" in said, "of another prompt"
    assert line not in other
    assert "| prefill, every token | not measured |" in other
    rows["second question of 8 s"] = plain | {"seconds": {"second": 2.0, "first": 18.0, "nothing kept": 19.0}}
    rows["second question of 8 s"]["times_as_fast"] = {"first": {"median": 9.0, "lowest": 8.0, "highest": 9.5}}
    assert "| second question of 8 s | 18 | 2 | 19 | 9.00 (8.00 to 9.50) |" in "".join(render([result]).values())
    result["sections"] = {"qwen2.5 0.5B float32": section}
    said, other = headline([result]).split("| **Qwen3-Omni-30B-A3B** |")
    assert "| prefill, 10 % kept | not measured |" in said, "a small model's"
    assert "| second question | not measured |" in said, "a small model's stands below, under its own name"
    small = "| **A small model in its place: qwen2.5 0.5B float32** | | | | |\n"
    where = "[a GPU](benchmarks/results/a-gpu.json), 2026-01-02"
    assert f"{small}| second question of 8 s | 2 s, 9.0× the first |  |  | {where} |" in other
    rows["first token from a file of 9 s"] = plain | {"seconds": {"compiled": 4.0, "preparing alone": 0.5}}
    assert "| first token from a file of 9 s | 4 s, 500 ms of it reading |" in headline([result])


def test_the_documents_say_what_the_result_files_say() -> None:
    """All pages of benchmarks/ and the figures in README.md are what is rendered from the committed files."""
    from accuracy_report import accuracy_page
    from bench_report import render
    from readme_report import CODE, END, HEADLINE, code_lines, headline, read_results

    results, folder = read_results(ROOT), ROOT / "benchmarks"
    pages = render(results, accuracy_page(folder))
    assert {f"pages/{path.name}" for path in (folder / "pages").iterdir()} | {"README.md"} == pages.keys()
    for name, text in pages.items():
        assert (folder / name).read_text() == text, f"benchmarks/{name}: python scripts/bench/bench.py --render"
    text = (ROOT / "README.md").read_text()
    assert f"{HEADLINE}\n{headline(results)}\n{END}" in text
    said = text.partition(CODE)[2].partition(END)[0]
    for package, lines in code_lines(ROOT).items():
        number = int(re.search(rf"`{package}` ([\d,]+)", said)[1].replace(",", ""))
        assert number == pytest.approx(lines, rel=0.05, abs=100), f"{package}: python scripts/report/readme_report.py"


def test_results_elsewhere_leave_the_readme_alone(tmp_path: Path) -> None:
    """Whoever tries the benchmark with its results beside a README finds nothing of it there."""
    from bench_report import write_readme

    (tmp_path / ".bench").mkdir()
    page = tmp_path / "README.md"
    page.write_bytes((ROOT / "README.md").read_bytes())
    write_readme(tmp_path / ".bench")
    assert (tmp_path / ".bench" / "README.md").is_file()
    assert page.read_bytes() == (ROOT / "README.md").read_bytes()


def test_reading_gives_what_the_plain_way_gives() -> None:
    """The row checks that sides have the same pixels, and has a target for each other side."""
    pytest.importorskip("av")
    from bench_media import media_row

    row = media_row(2, 144, 1)
    assert row["frames"] == 4 and row["rounds"] == 1
    assert len(row["targets"]) == len(row["seconds"]) - 1 >= 1
    assert all(0 < each["calling"] <= each["all"] for each in row["processor_seconds"].values())
    assert set(row["processor_seconds"]) == set(row["seconds"])
