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


@pytest.mark.parametrize(("share", "at_once"), [(1.0, False), (0.4, False), (0.4, True)])
def test_questions_do_not_see_each_other(
    train_tiny: ModuleType, share: float, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of answers in the packed sequence are those of the prompt on its own, through the model's layers.

    at_once: with the attention of a GPU.
    """
    if at_once:
        monkeypatch.setattr(train_tiny, "attention_by_blocks", train_tiny.attention)
    tiny = omni.load("tiny", device="cpu")
    clips = train_tiny.Clips(weights.locate("tiny"), "validation", 8)
    student = train_tiny.Student(tiny.config, train_tiny.words_of(tiny.processor.tokenizer))
    student.thinker.load_state_dict(tiny.thinker.state_dict())
    clip, draw = clips[3], np.random.default_rng(0)
    example = clips.ask(clip.thinned(share, draw), train_tiny.lessons(clip.scene, draw, 10, 0.5))
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


def test_whole_clips_are_what_the_library_prepares(train_tiny: ModuleType) -> None:
    """The packed sequence with one question, through `Omni.prefill`."""
    tiny = omni.load("tiny", device="cpu")
    clips = train_tiny.Clips(weights.locate("tiny"), "validation", 8)
    student = train_tiny.Student(tiny.config, train_tiny.words_of(tiny.processor.tokenizer))
    student.thinker.load_state_dict(tiny.thinker.state_dict())
    clip = clips[5]
    example = clips.ask(clip, train_tiny.lessons(clip.scene, np.random.default_rng(0), 2, 1.0))
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


def test_a_clip_in_memory_is_the_file(train_tiny: ModuleType, tmp_path: Path) -> None:
    """What training makes without a file is what is read from one: the same tokens, nearly the same pixels."""
    import world

    tiny = omni.load("tiny", device="cpu")
    example = train_tiny.Clips(weights.locate("tiny"), "validation", 8)[2]
    world.write_clip(tmp_path / "clip.mp4", world.make_scene("validation", 2))
    content = [{"type": "video", "video": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "?"}]
    inputs = tiny.prepare([{"role": "user", "content": content}])
    assert torch.equal(inputs.input_ids[0, : len(example.ids)], example.ids)
    assert inputs.pixel_values_videos is not None and inputs.pixel_values_videos.shape == example.patches.shape
    assert (inputs.pixel_values_videos - example.patches).abs().mean() < 0.15
    assert inputs.input_features is not None
    assert np.corrcoef(inputs.input_features.flatten(), example.mel.flatten())[0, 1] > 0.8


def test_labels_say_where_things_are(train_tiny: ModuleType) -> None:
    """Every shape and sound of a scene is labelled somewhere, at its time, and nothing else is."""
    import world

    scene = world.make_scene("train", 5)
    seen, (heard, _) = train_tiny.what_is_seen(scene), train_tiny.what_is_heard(scene, 25 * scene.seconds)
    assert set(seen[0]) == {0, *(1 + list(world.COLOURS).index(sight.colour) for sight in scene.sights)}
    assert set(seen[1]) == {0, *(1 + world.SHAPES.index(sight.shape) for sight in scene.sights)}
    assert set(heard) == {0, *(1 + world.SOUNDS.index(sound.name) for sound in scene.sounds)}
    by_second = seen[1].reshape(scene.seconds, -1)
    for sight in scene.sights:
        number = 1 + world.SHAPES.index(sight.shape)
        there = (by_second == number).any(axis=1).nonzero()[0]
        assert sight.start - 1 <= there.min() and there.max() <= sight.end
    for sound in scene.sounds:
        there = (heard == 1 + world.SOUNDS.index(sound.name)).nonzero()[0] / 25
        assert abs(there.min() - sound.start) < 0.05 and abs(there.max() - sound.start - sound.seconds) < 0.1


def test_labels_beside_a_sound_are_of_its_sight(train_tiny: ModuleType) -> None:
    import world

    scene = world.make_scene("train", 5)
    heard, _ = train_tiny.what_is_heard(scene, 25 * scene.seconds)
    beside = train_tiny.what_is_beside(scene, 25 * scene.seconds)
    for sight, sound in zip(scene.sights, scene.sounds, strict=True):
        there = beside[:, heard == 1 + world.SOUNDS.index(sound.name)]
        wanted = [1 + list(world.COLOURS).index(sight.colour), 1 + world.SHAPES.index(sight.shape)]
        for row, number in zip(there, wanted, strict=True):
            assert set(row) <= {0, number} and (row == number).mean() > 0.5


def test_lessons_are_true(train_tiny: ModuleType) -> None:
    """A letter is that of an option of the question; naming lessons say which; the share of options is as asked."""
    import world

    scene, draw = world.make_scene("train", 7), np.random.default_rng(0)
    asked = train_tiny.lessons(scene, draw, 400, 0.5)
    assert len(asked) == 400 and asked[-1].kind == "everything"
    chosen = [lesson for lesson in asked if "Answer with the letter." in lesson.prompt]
    assert 0.3 < len(chosen) / 400 < 0.5  # two of nine kinds have no options
    for lesson in chosen:
        options = dict(line.split(". ", 1) for line in lesson.prompt.split("\n")[1:-1])
        assert lesson.answer in options
        if lesson.kind == "letter":
            assert lesson.prompt.startswith(f"Which letter is {options[lesson.answer]}?")
    assert len({lesson.answer for lesson in chosen}) == 4


def test_learning_rate_rises_where_something_begins_and_falls(train_tiny: ModuleType) -> None:
    course = train_tiny.Course(drills=3000, letters=1000, remembered=100, readings=10_000, clips=1000)
    rates = [train_tiny.learning_rate(done, course) for done in range(0, course.end + 1, 10)]
    assert rates[0] == 0 and max(rates) <= train_tiny.LEARNING_RATE
    for begun in (300, 400):
        assert rates[begun - 1] == train_tiny.LEARNING_RATE and rates[begun + 1] < 0.1 * train_tiny.LEARNING_RATE
    assert rates[-1] < 0.05 * train_tiny.LEARNING_RATE
    # Without a jump between readings and whole clips.
    assert abs(rates[1400] - rates[1401]) < 0.01 * train_tiny.LEARNING_RATE


def test_beeps_are_counted_as_they_are_heard(train_tiny: ModuleType) -> None:
    """From the second beep on, each token of a row says how many there were; tokens of other sounds say nothing."""
    import world

    for number in range(20):
        scene = world.make_scene("train", number)
        _, counted = train_tiny.what_is_heard(scene, 25 * scene.seconds)
        row = next((sound for sound in scene.sounds if sound.beeps), None)
        runs = [int(label) for label in counted[np.flatnonzero(np.diff(counted, prepend=0))] if label]
        assert runs == ([] if row is None else list(range(1, row.beeps)))
        if row is not None:
            first = np.flatnonzero(counted)[0] / 25
            assert abs(first - row.start - world.BEEP) < 0.05


def test_what_is_sought_is_where_the_answer_is(train_tiny: ModuleType) -> None:
    """Every question that the clip answers points at tokens: of that colour, that sound, or that many beeps."""
    import world

    clips = train_tiny.Clips(weights.locate("tiny"), "validation", 8)
    clip = clips[1]
    asked = train_tiny.lessons(clip.scene, np.random.default_rng(0), 60, 0.5)
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
