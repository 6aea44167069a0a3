"""The shipped checkpoint: its size, transformers' view of it, and that it answers right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import omni
import weights
from omni.arguments import CLIP, QUESTION
from omni.generate import main
from seats import preset_for
from tests.omni.pairs import as_batch

ROOT = Path(__file__).parents[2]
CLIPS = 10


@pytest.fixture(scope="module")
def tiny() -> omni.Omni:
    return omni.load("tiny", device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, str, str]]:
    """Clips of the test split with one question each: (file, prompt, letter)."""
    folder = tmp_path_factory.mktemp("world")
    sys.path.insert(0, str(ROOT / "scripts/tiny"))
    try:
        import world
    finally:
        sys.path.pop(0)
    found = []
    for number in range(CLIPS):
        scene = world.make_scene("test", 10_000 + number)
        world.write_clip(folder / f"{number}.mp4", scene)
        question = world.questions(scene, "test", 10_000 + number)[number % 6]
        found.append((folder / f"{number}.mp4", question.prompt, question.letter))
    return found


def messages(clip: Path, text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "video", "video": str(clip)}, {"type": "text", "text": text}]}]


def test_fits_in_a_wheel() -> None:
    folder = weights.locate("tiny")
    assert folder.parent == Path(weights.__file__).parent
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 12e6


def test_the_name_takes_no_revision() -> None:
    with pytest.raises(weights.CheckpointError, match="has no revision"):
        weights.locate("tiny", revision="main")


def test_transformers_agrees(tiny: omni.Omni, asked: list[tuple[Path, str, str]]) -> None:
    """The same folder, the same tensors: logits within 1e-3, and far from flat."""
    transformers = pytest.importorskip("transformers")
    # The thinker alone: the class of the whole asks for the voices of a talker, which is a pickle.
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tiny.folder, dtype=torch.float32)
    for clip, prompt, _ in asked:
        inputs = tiny.prepare(messages(clip, prompt))
        with torch.inference_mode():
            expected = thinker(**as_batch(inputs), use_cache=False).logits[0, -1]
        assert expected.std() > 1
        torch.testing.assert_close(tiny.prefill(inputs).logits, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("retention", [1.0, 0.35])
def test_answers_about_clips_it_has_not_seen(
    tiny: omni.Omni, asked: list[tuple[Path, str, str]], retention: float
) -> None:
    """Chance is 25 %; the figures are those of scripts/tiny/evaluate.py."""
    right = 0
    for clip, prompt, letter in asked:
        seats = None if retention == 1 else preset_for(tiny.config, retention)
        right += tiny.generate(tiny.prepare(messages(clip, prompt)), seats=seats, max_new_tokens=4).text == letter
    assert right >= 8


def test_bare_command_answers_right(capsys: pytest.CaptureFixture[str]) -> None:
    """The demonstration: a line for each retention, the right letter on all of them."""
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert str(CLIP) in shown and QUESTION in shown
    rows = [line.split() for line in shown.splitlines() if "%" in line]
    assert [row[:2] for row in rows] == [["100%", "D"], ["35%", "D"], ["10%", "D"]]
