"""What learns sees what the model sees: many questions in one sequence give what each gives alone."""

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
def student() -> ModuleType:
    import student

    return student


@pytest.fixture
def lessons() -> ModuleType:
    import lessons

    return lessons


@pytest.mark.parametrize(("share", "at_once"), [(1.0, False), (0.4, False), (0.4, True)])
def test_questions_do_not_see_each_other(
    student: ModuleType, lessons: ModuleType, share: float, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of answers in the packed sequence are those of the prompt on its own, through the model's layers.

    at_once: with the attention of a GPU.
    """
    if at_once:
        monkeypatch.setattr(student, "attention_by_blocks", student.attention)
    tiny = omni.load("tiny", device="cpu")
    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    learning = student.Student(tiny.config, lessons.words_of(tiny.tokenizer))
    learning.thinker.load_state_dict(tiny.thinker.state_dict())
    clip, draw = clips[3], np.random.default_rng(0)
    example = clips.ask(clip.thinned(share, draw), lessons.lessons(clip.scene, draw, 10, 0.5))
    with torch.no_grad():
        media = torch.cat(learning.encode(clip))
        logits, _ = learning(example, media)
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


def test_whole_clips_are_what_the_library_prepares(student: ModuleType, lessons: ModuleType) -> None:
    """The packed sequence with one question, through `Omni.prefill`."""
    tiny = omni.load("tiny", device="cpu")
    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    learning = student.Student(tiny.config, lessons.words_of(tiny.tokenizer))
    learning.thinker.load_state_dict(tiny.thinker.state_dict())
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
        logits, _ = learning(example, torch.cat(learning.encode(clip)))
    torch.testing.assert_close(tiny.prefill(inputs).logits, logits[0], atol=1e-3, rtol=0)


def test_what_is_sought_is_where_the_answer_is(student: ModuleType, lessons: ModuleType) -> None:
    """Every question that the clip answers points at tokens: of that colour, that sound, or that many beeps."""
    import world

    clips = lessons.Clips(weights.locate("tiny"), "validation", 8)
    clip = clips[1]
    asked = lessons.lessons(clip.scene, np.random.default_rng(0), 60, 0.5)
    example = clips.ask(clip, asked)
    sought = student.sought_of(example)
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
