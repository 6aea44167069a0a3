"""The paper's tables beside what was run, and the WorldSense task."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

TASKS = Path(__file__).parents[2] / "scripts" / "tasks"


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TASKS))
    import paper

    monkeypatch.setattr(paper, "OUT", tmp_path)
    yield paper
    sys.modules.pop("paper")


def test_published_stands_beside_what_was_run(paper: ModuleType) -> None:
    """Scores, mean, share of every token's, and costs from the logs of a family that was run; the paper's of both. A
    second question about a clip does not count in the seconds: it was not prefilled whole."""
    for retention, score, macs in ((1.0, 50.0, 111e12), (0.10, 46.0, 12e12)):
        for number, task in enumerate(paper.TASKS):
            run = paper.Run("qwen2.5", task, "seats", retention)
            folder = run.folder / "somewhere"
            folder.mkdir(parents=True)
            name = paper.TASKS[task][1]
            result = {"results": {name: {"accuracy,none": score + number, "accuracy_stderr,none": 1.0}}}
            (folder / "1_results.json").write_text(json.dumps(result))
            lines = [
                {"token_counts": [{"macs": macs, "prefill_seconds": 0.25, "reused_tokens": 0}]},
                *[{"token_counts": [{"macs": macs, "prefill_seconds": 0.01, "reused_tokens": 99}]}] * 2,
                {"token_counts": [{"error": "MemoryError: too little"}]},
            ]
            (folder / f"1_samples_{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table = paper.table(["qwen2.5", "qwen3"], "seats")
    assert "| 100% | run (5 of 5) | 111.0 | 50.0 | 51.0 | 52.0 | 53.0 | 54.0 | 52.0 | 100.0 | 0.25 |" in table
    assert "| | paper | 111.0 | 46.7 | 64.0 | 34.1 | 65.3 | 33.3 | 48.7 | 100.0 | |" in table
    assert "| 10% | run (5 of 5) | 12.0 | 46.0 | 47.0 | 48.0 | 49.0 | 50.0 | 48.0 | 92.3 | 0.25 |" in table
    assert "| | paper | 12.2 | 43.5 | 57.8 | 33.6 | 64.6 | 35.1 | 46.9 | 96.3 | |" in table
    assert "| | paper | 3.9 | 51.5 | 68.1 | 40.1 | 69.7 | 35.7 | 53.0 | 95.5 | |" in table
    assert table.count("run (0 of 5)") == 8
    for row in paper.PUBLISHED.values():  # as printed: a mean of rounded figures may be off by half a tenth and a bit
        assert row[-1] == pytest.approx(sum(row[1:-1]) / 5, abs=0.11)
    assert "|  |  |  |  |  |  | 45.6 | 93.6 | |" in paper.table(["qwen2.5"], "divprune-om")


def test_other_methods_means_stand_under_the_table(paper: ModuleType) -> None:
    """Whatever method is asked for: all that are at hand, of each family under its own."""
    of_qwen2_5, of_qwen3 = paper.table(["qwen2.5", "qwen3"], "seats").split("## Qwen/")[1:]
    assert (
        "The paper's means of other methods: at 35% fastv-om 47.2, divprune-om 48.3, visionzip-om 48.3, omnizip 48.2; "
        "at 10% random 43.2, visionzip-om 44.6, divprune-om 45.6.\n"
    ) in of_qwen2_5
    assert "The paper's means of other methods: at 10% random 49.1, visionzip-om 49.8, divprune-om 50.9.\n" in of_qwen3


@pytest.mark.parametrize("protocol", ["paper", "ours"])
def test_commands_and_what_is_left_out(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], protocol: str
) -> None:
    """By the settings and by what of a clip stays at least, under either protocol."""

    def said(*words: str) -> list[str]:
        arguments = ["paper.py", "--tasks", "worldsense", "--protocol", protocol, *words]
        monkeypatch.setattr(sys, "argv", arguments)
        paper.main()
        return capsys.readouterr().out.splitlines()

    first, *rest = said("--method", "fastv-om")
    assert first.startswith("left out: qwen2.5, worldsense, fastv-om at 10%: FastV cannot keep 6% of video on average")
    commands = [line for line in rest if "lmms_eval" in line]
    assert len(commands) == 9 and all(f",protocol={protocol}" in line for line in commands)
    assert all("--tasks worldsense_omni" in line for line in commands)
    refused = [line for line in said("--method", "dycoke") if "left out" in line]
    assert len(refused) == 4 and all("DyCoke keeps 25% of video at least" in line for line in refused)
    if protocol == "ours":
        assert len(said("--method", "omnizip", "--retention", "0.35", "0.3")) == 4
        return
    first, *rest = said("--method", "omnizip", "--retention", "0.35", "0.3")
    assert "the paper's tables are at 100%, 35%, 25%, 15%, 10% alone, not at 0.3; protocol=ours takes any." in first
    assert len(rest) == 3
    with pytest.raises(SystemExit, match="nothing of what was asked can be run"):
        said("--method", "omnizip", "--retention", "0.1")


def test_a_method_that_is_none_is_refused(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where every token is kept, and where nothing is run."""
    for words in (["--retention", "1"], ["--gather"]):
        monkeypatch.setattr(sys, "argv", ["paper.py", "--method", "best", *words])
        with pytest.raises(SystemExit):
            paper.main()
        assert "argument --method: invalid choice: 'best'" in capsys.readouterr().err
    assert "No method 'best'" in paper.Run("qwen2.5", "worldsense", "best", 1.0).refusal()


@pytest.mark.parametrize("status", [3, 0])
def test_a_run_that_fails_is_said_in_a_sentence(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """lmms-eval ends with 0 whatever went wrong."""
    monkeypatch.setattr(sys, "argv", ["paper.py", "--run", "--tasks", "worldsense", "--retention", "0.35"])
    monkeypatch.setattr(paper.Run, "command", lambda *_: [sys.executable, "-c", f"raise SystemExit({status})"])
    said = rf"qwen2\.5, worldsense, seats at 35% has left no result \(status {status}\).*the same command"
    with pytest.raises(SystemExit, match=said):
        paper.main()


def test_a_run_of_some_questions_is_not_the_benchmark(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects: what has a score for its first questions is run all the same, and neither table shows the other's."""
    asked: list[list[str]] = []

    def run(command: list[str]) -> SimpleNamespace:
        asked.append(command)
        folder = Path(command[command.index("--output_path") + 1])
        folder.mkdir(parents=True)
        score = 80.0 if "--limit" in command else 46.7
        (folder / "1_results.json").write_text(json.dumps({"results": {"worldsense_omni": {"accuracy,none": score}}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(paper.subprocess, "run", run)
    words = ["--families", "qwen2.5", "--tasks", "worldsense", "--retention", "1", "--run"]
    for limit, score, other in ((["--limit", "2"], "80.0", "46.7"), ([], "46.7", "80.0")):
        for _ in range(2):  # the second time there is a result
            monkeypatch.setattr(sys, "argv", ["paper.py", *words, *limit])
            paper.main()
            said = capsys.readouterr().out
            assert f"| run (1 of 5) |  | {score} |" in said and f"| run (1 of 5) |  | {other} |" not in said
            assert ("protocol paper, first 2 questions of each\n" in said) == bool(limit)
    assert ["--limit" in command for command in asked] == [True, False]


def test_world_sense(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prompt and what counts, as described."""
    monkeypatch.syspath_prepend(str(TASKS))
    import utils

    row = {"question": "Why?", "candidates": "['A. one' 'B. two']", "answer": "B", "video_path": "videos/x.mp4"}
    expected = "Why?\nOptions:\nA. one\nB. two\nAnswer with the option's letter from the given choices directly."
    assert utils.world_sense_prompt(row) == expected
    answers = (" b. two", "B", "The answer is B", "", "A or B")
    assert [utils.world_sense_result(row, [answer])["accuracy"] for answer in answers] == [1, 1, 0, 0, 0]
    monkeypatch.setattr(utils, "HUB", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"WorldSense/videos/x\.mp4 is not there"):
        utils.world_sense_clip(row)
    sys.modules.pop("utils")
    task = (TASKS / "worldsense.yaml").read_text()
    assert "task: worldsense_omni" in task and "lmms-lab/WorldSense" in task
