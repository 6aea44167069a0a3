"""The benchmark: both sides hold the same numbers, rows are measured once, what is not measured is said."""

from __future__ import annotations

import json
import sys
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


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written one by one; those that are there are not measured again; the page shows what was missed."""
    import bench

    measured: list[str] = []

    def rows_of(bench: object, tokens: int) -> dict[str, Any]:
        def one(name: str) -> list[dict[str, Any]]:
            if name == "stops" and len(measured) == 1:
                raise KeyboardInterrupt
            measured.append(name)
            return [row(0.5)]

        return {(name,): lambda name=name: one(name) for name in ("vision", "stops")}

    rates = {"matrix_gflops": 100.0, "copy_gb_per_second": 10.0}
    monkeypatch.setattr(bench, "rows_of", rows_of)
    monkeypatch.setattr(bench, "check", lambda device: {"models": {}, "kernels": "not tried"})
    monkeypatch.setattr(bench, "ceilings", lambda bench: rates)
    command = ["bench.py", "--size", "small", "--families", "qwen3", "--dtypes", "bfloat16", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    (path,) = (tmp_path / "results").glob("*.json")
    assert list(json.loads(path.read_text())["sections"]["qwen3 small bfloat16"]["rows"]) == ["vision"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--render"])
    bench.main()
    assert "Not measured: stops." in (tmp_path / "README.md").read_text()
    sys.argv.remove("--render")
    measured.append("stopped")
    bench.main()
    bench.main()
    assert measured == ["vision", "stopped", "stops"]
    page = (tmp_path / "README.md").read_text()
    assert "| qwen3 small bfloat16 | vision | times as fast as eager | 2.00 | 2.50 | missed by 20% |" in page
    assert "| vision | 2.00 (1.50 to 2.50) | 1 |" in page
    assert "Not measured" not in page
