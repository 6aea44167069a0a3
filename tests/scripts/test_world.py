"""The small world: the same from a seed, disjoint splits, answers that only the clip gives away."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def test_a_scene_is_what_its_number_says() -> None:
    import world

    assert world.make_scene("train", 7) == world.make_scene("train", 7) != world.make_scene("train", 8)
    scene = world.make_scene("test", 3)
    assert np.array_equal(world.frames(scene), world.frames(scene))
    assert np.array_equal(world.waveform(scene), world.waveform(scene))
    assert world.frames(scene).shape == (scene.seconds * world.FPS, world.SIDE, world.SIDE, 3)
    assert world.waveform(scene).shape == (scene.seconds * world.RATE,)


def test_splits_share_no_combination() -> None:
    """Of colour, shape and sound; any two of them come together in every split."""
    import world

    names = (list(world.COLOURS), list(world.SHAPES), list(world.SOUNDS))
    by_split = {split: {three for three in product(*names) if world.belongs(split, *three)} for split in world.SPLITS}
    for one, other in combinations(world.SPLITS, 2):
        assert not by_split[one] & by_split[other]
    assert sum(map(len, by_split.values())) == len(list(product(*names)))
    for threes in by_split.values():
        assert {three[1:] for three in threes} == set(product(*names[1:]))
    assert {three[:2] for three in by_split["train"]} == set(product(*names[:2]))


def test_scenes_hold_what_questions_rely_on() -> None:
    """Four shapes, no two alike in colour or form, one at a time; each with one sound inside of its stay."""
    import world

    seen = set()
    for split in world.SPLITS:
        for number in range(60):
            scene = world.make_scene(split, number)
            seen.add(scene.seconds)
            assert len({sight.colour for sight in scene.sights}) == len({sight.shape for sight in scene.sights}) == 4
            assert len({sound.name for sound in scene.sounds}) == 4
            edges = [edge for sight in scene.sights for edge in (sight.start, sight.end)]
            assert edges == sorted(edges) and edges[0] >= 0 and edges[-1] <= scene.seconds + 1e-6
            for sight, sound in zip(scene.sights, scene.sounds, strict=True):
                assert sight.start <= sound.start and sound.start + sound.seconds <= sight.end
                assert world.belongs(split, sight.colour, sight.shape, sound.name)
    assert min(seen) == world.SHORTEST and max(seen) == world.LONGEST


def test_answers_are_spread_evenly() -> None:
    """Neither a letter nor the words of a question give the answer away; all options are in the clip."""
    import world

    letters: dict[str, Counter[str]] = {}
    for number in range(600):
        scene = world.make_scene("train", number)
        there = {*(sight.colour for sight in scene.sights), *(sight.shape for sight in scene.sights)}
        there |= {sight.with_article for sight in scene.sights} | {sound.name for sound in scene.sounds}
        for question in world.questions(scene, "train", number):
            if question.options:
                letters.setdefault(question.kind, Counter())[question.letter] += 1
                assert len(set(question.options)) == 4
                assert question.kind == "beeps" or set(question.options) <= there
    assert len(letters) == 7
    for kind, counts in letters.items():
        total = counts.total()
        assert all(abs(count / total - 0.25) < 0.08 for count in counts.values()), (kind, counts)


def test_writes_clips_that_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files with sound, and a question file that names them."""
    import world

    from omni.processing.media import read_audio, read_video

    monkeypatch.setattr(sys, "argv", ["world.py", str(tmp_path), "--count", "2"])
    world.main()
    lines = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert {line["media"] for line in lines} == {"test-00000.mp4", "test-00001.mp4"}
    for number in range(2):
        scene, path = world.make_scene("test", number), tmp_path / f"test-0000{number}.mp4"
        sound = read_audio(path)
        assert sound is not None
        assert abs(len(sound) / 16_000 - scene.seconds) < 0.2
        video = read_video(path)
        assert abs(video.duration - scene.seconds) < 0.3
        assert video.frames.shape[1:] == (3, world.SIDE, world.SIDE)
