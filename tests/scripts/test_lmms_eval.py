"""lmms-eval's own command line on the small world: the answers of `evaluate.py`, question by question."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
    found = {sample["doc_id"]: sample["filtered_resps"] for sample in map(json.loads, samples.open())}
    assert [found[number] for number in range(len(expected))] == expected
    (summary,) = tmp_path.rglob("*results.json")
    accuracy = json.loads(summary.read_text())["results"]["small_world"]["accuracy,none"]
    row_of = result["rows"][column]
    groups = [row_of[group] for group in ("choice", "free")]
    right = sum(group["mean"] * group["questions"] for group in groups)
    assert accuracy == pytest.approx(100 * right / sum(group["questions"] for group in groups))
