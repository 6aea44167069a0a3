"""The training sees what the model sees: many questions in one sequence give what each gives alone."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import omni
import weights
from omni.inputs import Inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def train_tiny(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_tiny

    return train_tiny


def test_questions_do_not_see_each_other(train_tiny: ModuleType) -> None:
    """Logits of answers in the packed sequence are those of the prompt on its own, through the library."""
    tiny = omni.load("tiny", device="cpu")
    examples = train_tiny.Examples(weights.locate("tiny"), "validation", 8, short=8)
    student = train_tiny.Student(tiny.config, train_tiny.words_of(tiny.processor.tokenizer))
    student.thinker.load_state_dict(tiny.thinker.state_dict())
    example = examples[3]
    with torch.no_grad():
        logits, _ = student(example)
    clip = example.blocks[0]
    for lesson in (0, 5, len(example.kinds) - 1):
        mine = (example.group == lesson + 1).nonzero().flatten()
        first = int((example.lesson == lesson).nonzero()[0])
        asked = int(example.answers[first]) + 1 - int(mine[0])  # tokens up to the first of the answer
        inputs = Inputs(
            torch.cat((example.ids[:clip], example.ids[mine[:asked]]))[None],
            pixel_values_videos=example.patches,
            video_grid_thw=example.grid[None],
            video_second_per_grid=torch.tensor([1.0]),
            input_features=example.mel[None],
            feature_attention_mask=torch.ones(1, example.mel.shape[1], dtype=torch.long),
        )
        torch.testing.assert_close(tiny.prefill(inputs).logits, logits[first], atol=1e-3, rtol=0)


def test_a_clip_in_memory_is_the_file(train_tiny: ModuleType, tmp_path: Path) -> None:
    """What training makes without a file is what is read from one: the same tokens, nearly the same pixels."""
    import world

    tiny = omni.load("tiny", device="cpu")
    example = train_tiny.Examples(weights.locate("tiny"), "validation", 8)[2]
    world.write_clip(tmp_path / "clip.mp4", world.make_scene("validation", 2))
    content = [{"type": "video", "video": str(tmp_path / "clip.mp4")}, {"type": "text", "text": "?"}]
    inputs = tiny.prepare([{"role": "user", "content": content}])
    clip = example.blocks[0]
    assert torch.equal(inputs.input_ids[0, :clip], example.ids[:clip])
    assert inputs.pixel_values_videos is not None and inputs.pixel_values_videos.shape == example.patches.shape
    assert (inputs.pixel_values_videos - example.patches).abs().mean() < 0.15
    assert inputs.input_features is not None
    assert np.corrcoef(inputs.input_features.flatten(), example.mel.flatten())[0, 1] > 0.8


def test_labels_say_where_things_are(train_tiny: ModuleType) -> None:
    """Every shape and sound of a scene is labelled somewhere, at its time, and nothing else is."""
    import world

    scene = world.make_scene("train", 5)
    seen, heard = train_tiny.what_is_seen(scene), train_tiny.what_is_heard(scene, 25 * scene.seconds)
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


def test_learning_rate_rises_twice_and_falls(train_tiny: ModuleType) -> None:
    rates = [train_tiny.learning_rate(done, 3000, 10_000) for done in range(0, 10_001, 10)]
    assert rates[0] == rates[300] * 0 and max(rates) <= train_tiny.LEARNING_RATE
    assert rates[299] == train_tiny.LEARNING_RATE and rates[301] < 0.1 * train_tiny.LEARNING_RATE
    assert rates[-1] < 0.05 * train_tiny.LEARNING_RATE
