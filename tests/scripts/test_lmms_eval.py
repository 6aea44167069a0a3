"""lmms-eval's own command line on the small world: the answers of `evaluate.py`, question by question."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EVAL = ROOT / ".venv-eval/bin/python"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips, and what `evaluate.py` makes of them."""
    folder = tmp_path_factory.mktemp("lmms")
    run([sys.executable, "tiny/world.py", str(folder / ".world/test"), "--split", "test", "--count", "4"])
    settings = ["--methods", "seats", "--retention", "0.1", "--ablate", "0", "--results", str(folder)]
    run([sys.executable, "tiny/evaluate.py", str(folder / ".world/test"), *settings])
    return folder


def run(command: list[str], cwd: Path = ROOT / "scripts") -> None:
    done = subprocess.run(command, cwd=cwd, env=os.environ | OFFLINE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(not EVAL.is_file(), reason="needs the environment of make eval")
@pytest.mark.parametrize(("retention", "row", "processes"), [(1, "every token", 1), (0.1, "seats 10%", 2)])
def test_answers_are_those_of_evaluate(
    folder: Path, tmp_path: Path, retention: float, row: str, processes: int
) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)] if processes > 1 else []
    run(
        [
            *(str(EVAL), *launch, "-m", "lmms_eval", "--model", "seats_omni", "--batch_size", "4"),
            *("--model_args", f"pretrained=tiny,device=cpu,retention={retention}"),
            *("--include_path", str(ROOT / "scripts/tasks"), "--tasks", "small_world"),
            *("--log_samples", "--output_path", str(tmp_path)),
        ],
        cwd=folder,
    )
    result = json.loads((folder / "accuracy/tiny.json").read_text())
    column = [each["name"] for each in result["rows"]].index(row)
    expected = [answer["texts"][column] for answer in result["answers"]]
    (samples,) = tmp_path.rglob("*samples_small_world.jsonl")
    logged = [json.loads(line) for line in samples.open()]
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in logged}
    assert [found[number] for number in range(len(expected))] == expected
    require_costs(logged, retention)
    (summary,) = tmp_path.rglob("*results.json")
    accuracy = json.loads(summary.read_text())["results"]["small_world"]["accuracy,none"]
    row_of = result["rows"][column]
    groups = [row_of[group] for group in ("choice", "free")]
    right = sum(group["mean"] * group["questions"] for group in groups)
    assert accuracy == pytest.approx(100 * right / sum(group["questions"] for group in groups))


def require_costs(logged: list[dict[str, Any]], retention: float) -> None:
    """Each sample of the log says what its answer cost."""
    for sample in logged:
        (costs,) = sample["token_counts"]
        kept = costs["kept_tokens"]
        if retention == 1:
            assert costs["macs"] == costs["full_macs"] and kept == [costs["input_tokens"]]
        else:
            assert 0 < costs["macs"] < costs["full_macs"] and costs["input_tokens"] > kept[0] > kept[-1] > 0
        assert 1 <= costs["output_tokens"] <= 16
        assert all(costs[f"{step}_seconds"] >= 0 for step in ("encode", "prefill", "decode"))
        assert costs["prefill_seconds"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not EVAL.is_file(), reason="needs the environment of make eval")
def test_the_papers_table_of_a_log(folder: Path, tmp_path: Path) -> None:
    """Under the paper's protocol, with the small world in the place of WorldSense, so that its frames and its system
    message are asked for: what `paper.py` gathers is what the logs have."""
    tasks = tmp_path / "scripts" / "tasks"
    tasks.mkdir(parents=True)
    (tmp_path / "scripts" / "tiny").symlink_to(ROOT / "scripts/tiny")
    (tasks / "utils.py").write_text((ROOT / "scripts/tasks/utils.py").read_text())
    task = (ROOT / "scripts/tasks/small_world.yaml").read_text()
    (tasks / "task.yaml").write_text(task.replace("task: small_world", "task: worldsense_omni"))
    rows = {}
    for retention, kept in ((1, "every-token"), (0.1, "seats-10")):
        out = folder / "benchmarks/paper/paper/qwen2.5" / kept / "worldsense"
        run(
            [
                *(str(EVAL), "-m", "lmms_eval", "--model", "seats_omni", "--batch_size", "1"),
                *("--model_args", f"pretrained=tiny,device=cpu,protocol=paper,retention={retention}"),
                *("--include_path", str(tasks), "--tasks", "worldsense_omni"),
                *("--log_samples", "--output_path", str(out)),
            ],
            cwd=folder,
        )
        (samples,) = out.rglob("*samples_worldsense_omni.jsonl")
        logged = [json.loads(line) for line in samples.open()]
        require_costs(logged, retention)
        costs = [sample["token_counts"][0] for sample in logged]
        (summary,) = out.rglob("*results.json")
        accuracy = json.loads(summary.read_text())["results"]["worldsense_omni"]["accuracy,none"]
        tera = sum(each["macs"] for each in costs) / len(costs) / 1e12
        seconds = statistics.median(each["prefill_seconds"] for each in costs if each["reused_tokens"] == 0)
        rows[retention] = (
            f"| {retention:.0%} | run (1 of 5) | {tera:.1f} | {accuracy:.1f} |  |  |  |  |  |  | {seconds:.2f} |"
        )
    command = [sys.executable, str(ROOT / "scripts/tasks/paper.py"), "--gather", "--families", "qwen2.5"]
    done = subprocess.run(command, cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True, check=True)
    print(done.stdout)
    assert all(row in done.stdout for row in rows.values()), (rows, done.stdout)
