"""The training ends where it should, and goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import omni

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_tiny() -> ModuleType:
    import train_tiny

    return train_tiny


def test_learning_rate_rises_where_something_begins_and_falls(train_tiny: ModuleType) -> None:
    course = train_tiny.Course(drills=3000, letters=1000, remembered=100, readings=10_000, clips=1000)
    rates = [train_tiny.learning_rate(done, course) for done in range(0, course.end + 1, 10)]
    assert rates[0] == 0 and max(rates) <= train_tiny.LEARNING_RATE
    for begun in (300, 400):
        assert rates[begun - 1] == train_tiny.LEARNING_RATE and rates[begun + 1] < 0.1 * train_tiny.LEARNING_RATE
    assert rates[-1] < 0.05 * train_tiny.LEARNING_RATE
    # Without a jump between readings and whole clips.
    assert abs(rates[1400] - rates[1401]) < 0.01 * train_tiny.LEARNING_RATE


def test_training_goes_on_where_it_was_stopped(
    train_tiny: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of the course, to a checkpoint that loads; the same one where the run was stopped on the way."""

    def train(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        train_tiny.train(folder, train_tiny.Course(2, 2, 2, 4, 2), torch.device("cpu"), workers=0, validated=1)

    monkeypatch.setattr(train_tiny, "SAVED_EVERY", -1)
    train(tmp_path / "whole")
    rate = train_tiny.learning_rate
    stops = [10, 6, 2]  # the very last, within readings, the last of drills

    def stopping(done: int, course: Any) -> float:
        if stops and done == stops[-1]:
            raise KeyboardInterrupt(stops.pop())
        return float(rate(done, course))

    monkeypatch.setattr(train_tiny, "learning_rate", stopping)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts")
    train(tmp_path / "parts")

    whole, parts = (omni.load(str(tmp_path / name / "checkpoint")).thinker.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (line,) = (json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines())
    assert line["clips"] == 10 and line["seconds"] > 0 and 0 <= line["accuracy"]["everything"] <= 1
    assert (tmp_path / "whole/training.png").stat().st_size > 10_000
