"""What the accuracy figures rest on: what counts as right, intervals, ablations that do what they say, blocks."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
import seats
from omni.arguments import CLIP, QUESTION
from seats.method import Step
from seats.methods.random import Random
from seats.selection import AUDIO, TEXT, VIDEO, select

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Aside(Random):
    """A method from outside."""


OPTIONS = ["red", "green", "blue", "pink"]


@pytest.mark.parametrize(
    ("text", "right"),
    [("B", True), ("B. green", True), ("The answer is B.", True), ("A", False), ("green", False), ("", False)],
)
def test_the_first_letter_counts(text: str, right: bool) -> None:
    import evaluate

    assert evaluate.is_right(text, {"options": OPTIONS, "answer": "green"}) == right


@pytest.mark.parametrize(
    ("text", "right"), [("a red ring", True), ("A red ring.", True), ("a red", False), ("a red ring!", True)]
)
def test_free_answers_are_compared_by_words(text: str, right: bool) -> None:
    import evaluate

    assert evaluate.is_right(text, {"options": [], "answer": "a red ring"}) == right


def test_the_interval_is_that_of_clips() -> None:
    """Ten questions on each of 100 clips that are all right or all wrong are worth 100, not 1,000."""
    import evaluate

    low, high = evaluate.interval([[True] * 10] * 50 + [[False] * 10] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)


def test_without_windows_the_most_relevant_of_all_stay() -> None:
    """One window is the method's own case of it; with many, nobody is kept for the window's sake."""
    from settings import ABLATIONS

    torch.manual_seed(0)
    kind = torch.tensor([[TEXT] * 2 + ([VIDEO] * 6 + [AUDIO] * 4) * 3 + [TEXT] * 3], dtype=torch.uint8)
    scores = torch.rand(kind.shape)
    config = ABLATIONS["no windows"](seats.preset("qwen2.5-omni-7b"))
    keep = config.after(scores, kind, Step(1, 0.3, 0.5), 3)
    for medium, count in ((VIDEO, round(0.3 * 18)), (AUDIO, round(0.5 * 12)), (TEXT, 5)):
        there = (kind == medium)[0].nonzero().flatten()
        best = scores[0, there].topk(count).indices if medium != TEXT else torch.arange(5)
        assert keep[0, there].nonzero().flatten().tolist() == sorted(best.tolist())
    one = torch.tensor([[TEXT] * 2 + [VIDEO] * 6 + [AUDIO] * 4 + [TEXT] * 3], dtype=torch.uint8)
    scores = torch.rand(one.shape)
    assert torch.equal(config.after(scores, one, Step(1, 0.3, 0.5), 1), select(scores, one, 0.3, 0.5, 0.1, 1))


def test_layers_follow_from_accuracy() -> None:
    import analyze_layers

    # 8 layers: nothing is known up to layer 3, all from layer 6 on.
    assert analyze_layers.blocks([0.25, 0.25, 0.26, 0.3, 0.6, 0.8, 0.95, 0.95, 0.95]) == (3, 7)
    assert analyze_layers.suggested(3, 7, 8) == ([3, 4, 5], 7)
    # Every layer needs them: no late layer.
    assert analyze_layers.blocks([0.25] * 8 + [0.95]) == (7, 9)
    assert analyze_layers.suggested(7, 9, 8) == ([7], None)
    # A deep model: three selections spread over the middle.
    assert analyze_layers.suggested(15, 24, 28) == ([15, 18, 22], 24)


def test_removed_media_leave_what_text_alone_gives() -> None:
    """Removed after the last layer nothing changes; after layer n it is what late removal there does."""
    import analyze_layers

    model = omni.load("tiny", device="cpu")
    content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": QUESTION}]
    clip_inputs = model.prepare([{"role": "user", "content": content}])
    letters = torch.arange(10, 14)
    picked = analyze_layers.letters_when_removed(model, clip_inputs, letters)
    layers = model.config.decoder.num_layers
    assert picked.shape == (3, layers + 1)
    full = model.prefill(clip_inputs).logits[letters].argmax()
    assert (picked[:, layers] == full).all()
    for after in (1, 4, layers - 1):
        config = seats.SeatsConfig(
            video_ratio=0.5,
            audio_ratio=0.5,
            encoder_ratio_scale=2,
            drop_layers=(),
            late_layer=after + 1,
            window_temperature=0.1,
        )
        late = model.prefill(clip_inputs, seats=config).logits[letters].argmax()
        assert picked[2, after] == late


def test_every_setting_is_what_it_says() -> None:
    """Methods at their retention, what cannot run said and not raised, ablations apart from the method itself."""
    from settings import Setting, method_of, settings

    found = settings(["seats", "random"], [0.35, 0.1], 0.1)
    assert [setting.name for setting in found[:6]] == [
        "every token",
        "every token, no video",
        "every token, no sound",
        "seats 35%",
        "seats 35%, pruned",
        "random 35%",
    ]
    model = omni.load("tiny", device="cpu")
    methods = [method_of(setting, model) for setting in found]
    assert methods[:3] == [None, None, None]
    assert len(set(methods[3:])) == len(methods[3:]) - 6  # of the pruned cache, which is no method of its own
    with pytest.raises(ValueError, match="FastV cannot keep"):
        method_of(Setting("fastv", 0.1), model)


def test_rows_of_another_run_about_the_same_questions_are_taken() -> None:
    """In their place, compared with the random rows that are there, without their times."""
    import evaluate

    questions = [
        {"media": f"{number // 2}.mp4", "kind": "colour", "prompt": "?", "answer": "A", "options": ["A", "B", "C", "D"]}
        for number in range(4)
    ]
    settings = evaluate.settings(["seats", "random"], [0.35, 0.1], 0.1)

    def result(wanted: list[evaluate.Setting], text: str) -> dict[str, Any]:
        said = {"text": text, "right": text == "A", "macs": 1, "full_macs": 2, "seconds": 1.0, "ratios": (0.1, 0.1)}
        found = [[said] * len(wanted)] * len(questions)
        return {
            "model": "tiny",
            "date": "2026-01-01",
            "machine": "a CPU",
            "versions": {"torch": "2.13.0"},
            "rows": evaluate.summarise(questions, found, wanted),
            "answers": [{**question, "texts": [text] * len(wanted)} for question in questions],
        }

    own, other = result(settings, "B"), result([*settings[:3], evaluate.Setting("evs", 0.35), settings[3]], "A")
    assert evaluate.merge(own, other, questions) == ["evs 35%", "seats 35%"]
    names = [row["name"] for row in own["rows"]]
    order = ["seats 35%", "seats 35%, pruned", "random 35%", "evs 35%", "seats 10%"]
    assert [names.index(name) for name in order] == [3, 4, 5, 6, 7] and len(names) == len(settings) + 1
    for name, row in zip(names, own["rows"], strict=True):
        is_taken = name in ("evs 35%", "seats 35%")
        assert ("prefill_seconds" in row) != is_taken and ("run" in row) == is_taken
        assert row["choice"]["mean"] == is_taken
        assert {each["texts"][names.index(name)] for each in own["answers"]} == {"A" if is_taken else "B"}
        if is_taken:
            assert row["above_random"]["mean"] == 1
    with pytest.raises(SystemExit, match="other models or other questions"):
        evaluate.merge(own, other, questions[:2])
    other["rows"][3] |= {"method": "theirs", "name": "theirs 35%"}  # registered where that was run
    assert "theirs 35%" in evaluate.merge(own, other, questions)
    assert [row["name"] for row in own["rows"]].index("theirs 35%") == 7


def test_a_registered_method_is_asked_and_drawn_like_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name on the command line, among all, and in what is said of who is first."""
    import accuracy_report
    import evaluate

    monkeypatch.setitem(seats.METHODS, "aside", object)  # what was there before is restored
    monkeypatch.delitem(seats.METHODS, "aside")
    seats.register("aside", Aside)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path), "--methods", "all", "aside", "--help"])
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 0 and "aside" in capsys.readouterr().out
    row = {"retention": 0.35, "kv": "layerwise"}
    rows = [
        {**row, "method": name, "choice": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
        for name, mean in (("seats", 0.5), ("random", 0.4), ("aside", 0.7))
    ]
    assert accuracy_report.standing(rows, 0.35).startswith("- At 35% aside is first")
    assert accuracy_report.code_of("aside") not in (accuracy_report.code_of("random"), accuracy_report.code_of("seats"))


def test_answers_of_code_that_has_changed_are_not_gone_on_with(tmp_path: Path) -> None:
    """Protects: rows of a method that was mended beside rows of what it was before."""
    import evaluate
    from accuracy_report import code_of

    wanted = [evaluate.Setting("fastvid", 0.35), evaluate.Setting("dycoke", 0.35)]
    line = {"settings": ["fastvid 35%", "dycoke 35%"], "media": "0.mp4", "answers": []}
    path = tmp_path / "tiny.partial.jsonl"
    path.write_text(json.dumps({**line, "code": evaluate.codes_of(wanted)}) + "\n")
    assert evaluate.read_partial(path, wanted) == {"0.mp4": []}
    for code, stale in (
        ({"dycoke 35%": "older", "fastvid 35%": code_of("fastvid")}, "dycoke 35%"),
        ({}, "dycoke 35%, f"),
    ):
        path.write_text(json.dumps({**line, "code": code}) + "\n")
        with pytest.raises(SystemExit, match=f"whose code has changed since, {stale}"):
            evaluate.read_partial(path, wanted)
    assert len({code_of(name) for name in ("seats", "fastvid", "dycoke", "omnizip", "random", "fastv")}) == 6
    assert code_of("fastv") == code_of("fastv-om")


def test_code_of_a_method_is_that_of_methods_it_borrows_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """DASH is made from OmniZip, its parent, and from parts of VidCom2: a change in either is one in it."""
    import accuracy_report
    from accuracy_report import code_of

    true = accuracy_report._tree
    before = {name: code_of.__wrapped__(name) for name in ("dash", "omnizip", "vidcom2", "evs")}
    assert before == {name: code_of(name) for name in before}
    for changed in ("omnizip", "vidcom2"):

        def tree(module: str, changed: str = changed) -> ast.Module:
            return ast.parse("1 + 1") if module == f"seats.methods.{changed}" else true(module)

        monkeypatch.setattr(accuracy_report, "_tree", tree)
        assert {name for name in before if code_of.__wrapped__(name) != before[name]} == {"dash", changed}
