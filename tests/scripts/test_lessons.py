"""What `tiny` learns from is true: clips are those of files, labels and lessons say what is there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import omni
import weights


@pytest.fixture
def lessons() -> ModuleType:
    import lessons

    return lessons


def test_a_clip_in_memory_is_the_file(lessons: ModuleType, tmp_path: Path) -> None:
    """What training makes without a file is what is read from one: the same tokens, nearly the same pixels."""
    import world

    tiny = omni.load("tiny", device="cpu")
    example = lessons.Clips(weights.locate("tiny"), "validation", 8)[2]
    world.write_clip(tmp_path / "clip.mp4", world.make_scene("validation", 2))
    content = [{"type": "video", "video": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "?"}]
    inputs = tiny.prepare([{"role": "user", "content": content}])
    assert torch.equal(inputs.input_ids[0, : len(example.ids)], example.ids)
    assert inputs.pixel_values_videos is not None and inputs.pixel_values_videos.shape == example.patches.shape
    assert (inputs.pixel_values_videos - example.patches).abs().mean() < 0.15
    assert inputs.input_features is not None
    assert np.corrcoef(inputs.input_features.flatten(), example.mel.flatten())[0, 1] > 0.8


def test_labels_say_where_things_are(lessons: ModuleType) -> None:
    """Every shape and sound of a scene is labelled somewhere, at its time, and nothing else is."""
    import world

    scene = world.make_scene("train", 5)
    seen, (heard, _) = lessons.what_is_seen(scene), lessons.what_is_heard(scene, 25 * scene.seconds)
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


def test_labels_beside_a_sound_are_of_its_sight(lessons: ModuleType) -> None:
    import world

    scene = world.make_scene("train", 5)
    heard, _ = lessons.what_is_heard(scene, 25 * scene.seconds)
    beside = lessons.what_is_beside(scene, 25 * scene.seconds)
    for sight, sound in zip(scene.sights, scene.sounds, strict=True):
        there = beside[:, heard == 1 + world.SOUNDS.index(sound.name)]
        wanted = [1 + list(world.COLOURS).index(sight.colour), 1 + world.SHAPES.index(sight.shape)]
        for row, number in zip(there, wanted, strict=True):
            assert set(row) <= {0, number} and (row == number).mean() > 0.5


def test_lessons_are_true(lessons: ModuleType) -> None:
    """A letter is that of an option of the question; naming lessons say which; the share of options is as asked."""
    import world

    scene, draw = world.make_scene("train", 7), np.random.default_rng(0)
    asked = lessons.lessons(scene, draw, 400, 0.5)
    assert len(asked) == 400 and asked[-1].kind == "everything"
    chosen = [lesson for lesson in asked if "Answer with the letter." in lesson.prompt]
    assert 0.3 < len(chosen) / 400 < 0.5  # two of nine kinds have no options
    for lesson in chosen:
        options = dict(line.split(". ", 1) for line in lesson.prompt.split("\n")[1:-1])
        assert lesson.answer in options
        if lesson.kind == "letter":
            assert lesson.prompt.startswith(f"Which letter is {options[lesson.answer]}?")
    assert len({lesson.answer for lesson in chosen}) == 4


def test_beeps_are_counted_as_they_are_heard(lessons: ModuleType) -> None:
    """From the second beep on, each token of a row says how many there were; tokens of other sounds say nothing."""
    import world

    for number in range(20):
        scene = world.make_scene("train", number)
        _, counted = lessons.what_is_heard(scene, 25 * scene.seconds)
        row = next((sound for sound in scene.sounds if sound.beeps), None)
        runs = [int(label) for label in counted[np.flatnonzero(np.diff(counted, prepend=0))] if label]
        assert runs == ([] if row is None else list(range(1, row.beeps)))
        if row is not None:
            first = np.flatnonzero(counted)[0] / 25
            assert abs(first - row.start - world.BEEP) < 0.05
