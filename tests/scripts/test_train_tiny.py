"""The training sees what the model sees: many questions in one sequence give what each gives alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import omni
import weights
from omni.inputs import Inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_tiny() -> ModuleType:
    import train_tiny

    return train_tiny


@pytest.fixture
def lessons() -> ModuleType:
    import lessons

    return lessons


@pytest.mark.parametrize(("share", "at_once"), [(1.0, False), (0.4, False), (0.4, True)])
def test_questions_do_not_see_each_other(
    train_tiny: ModuleType, lessons: ModuleType, share: float, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of answers in the packed sequence are those of the prompt on its own, through the model's layers.

    at_once: with the attention of a GPU.
    """
    if at_once:
        monkeypatch.setattr(train_tiny, "attention_by_blocks", train_tiny.attention)
    tiny = omni.load("tiny", device="cpu")
    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    student = train_tiny.Student(tiny.config, lessons.words_of(tiny.tokenizer))
    student.thinker.load_state_dict(tiny.thinker.state_dict())
    clip, draw = clips[3], np.random.default_rng(0)
    example = clips.ask(clip.thinned(share, draw), lessons.lessons(clip.scene, draw, 10, 0.5))
    with torch.no_grad():
        media = torch.cat(student.encode(clip))
        logits, _ = student(example, media)
        start = example.blocks[0]
        for lesson in (0, 5, len(example.kinds) - 1):
            mine = (example.group == lesson + 1).nonzero().flatten()
            first = int((example.lesson == lesson).nonzero()[0])
            asked = int(example.answers[first]) + 1 - int(mine[0])  # tokens up to the first of the answer
            alone = torch.cat((torch.arange(start), mine[:asked]))
            x, _ = tiny.thinker.embed(example.ids[None, alone], example.source[None, alone], media[None, None])
            rotary = tiny.thinker.rotary(example.positions[:, None, alone])
            for layer in tiny.thinker.layers:
                x, _, _ = layer.prefill(x, rotary)
            torch.testing.assert_close(tiny.thinker.logits(x[:, -1])[0], logits[first], atol=1e-3, rtol=0)


def test_whole_clips_are_what_the_library_prepares(train_tiny: ModuleType, lessons: ModuleType) -> None:
    """The packed sequence with one question, through `Omni.prefill`."""
    tiny = omni.load("tiny", device="cpu")
    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    student = train_tiny.Student(tiny.config, lessons.words_of(tiny.tokenizer))
    student.thinker.load_state_dict(tiny.thinker.state_dict())
    clip = clips[5]
    example = clips.ask(clip, lessons.lessons(clip.scene, np.random.default_rng(0), 2, 1.0))
    first = int(example.answers[0])
    inputs = Inputs(
        example.ids[None, : first + 1],
        pixel_values_videos=clip.patches,
        video_grid_thw=clip.grid[None],
        video_second_per_grid=torch.tensor([1.0]),
        input_features=clip.mel[None],
        feature_attention_mask=torch.ones(1, clip.mel.shape[1], dtype=torch.long),
    )
    with torch.no_grad():
        logits, _ = student(example, torch.cat(student.encode(clip)))
    torch.testing.assert_close(tiny.prefill(inputs).logits, logits[0], atol=1e-3, rtol=0)


def test_learning_rate_rises_where_something_begins_and_falls(train_tiny: ModuleType) -> None:
    course = train_tiny.Course(drills=3000, letters=1000, remembered=100, readings=10_000, clips=1000)
    rates = [train_tiny.learning_rate(done, course) for done in range(0, course.end + 1, 10)]
    assert rates[0] == 0 and max(rates) <= train_tiny.LEARNING_RATE
    for begun in (300, 400):
        assert rates[begun - 1] == train_tiny.LEARNING_RATE and rates[begun + 1] < 0.1 * train_tiny.LEARNING_RATE
    assert rates[-1] < 0.05 * train_tiny.LEARNING_RATE
    # Without a jump between readings and whole clips.
    assert abs(rates[1400] - rates[1401]) < 0.01 * train_tiny.LEARNING_RATE


def test_what_is_sought_is_where_the_answer_is(train_tiny: ModuleType, lessons: ModuleType) -> None:
    """Every question that the clip answers points at tokens: of that colour, that sound, or that many beeps."""
    import world

    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    clip = clips[1]
    asked = lessons.lessons(clip.scene, np.random.default_rng(0), 60, 0.5)
    example = clips.ask(clip, asked)
    sought = train_tiny.sought_of(example)
    pointing = [lesson for lesson in asked if lesson.sought is not None]
    assert len(pointing) == len(sought) and {lesson.sought[0] for lesson in pointing} == {0, 1, 2}
    videos = clip.seen.shape[1]
    for lesson, there in zip(pointing, sought, strict=True):
        source = example.source[there]
        assert len(source) and (source >= 0).all()
        where, number = lesson.sought
        if where == 0:
            assert (source < videos).all() and (clip.seen[0, source] == number).all()
        else:
            assert (source >= videos).all() and (clip.heard[where - 1, source - videos] == number).all()
        if where == 2:
            assert world.SOUNDS[int(clip.heard[0, source[0] - videos]) - 1] == "a row of beeps"


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
