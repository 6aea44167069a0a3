"""Pairs of models with the same random weights: transformers' and ours, loaded from the same files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import omni
from omni.processing import chat_template, sandbox
from tests.omni.pairs import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    SOUND,
    SOUND3,
    TEXT,
    TEXT3,
    VIDEO,
    VISION,
    VISION3,
    VISION_START,
    Pair,
)
from tests.processes import python


@pytest.fixture(scope="session")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    transformers = pytest.importorskip("transformers")
    logging.getLogger("transformers").setLevel(logging.ERROR)

    made: dict[str, tuple[Any, Path]] = {}

    def make(
        family: str = "qwen2_5",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        sound: dict[str, Any] | None = None,
        adjust: Callable[[Any], None] | None = None,
    ) -> Pair:
        """The reference is made once for the same arguments, the model loaded anew."""
        key = repr((family, seed, dtype, text, vision, sound, adjust))
        if adjust is not None or key not in made:
            made[key] = reference(family, seed, dtype, text, vision, sound, adjust)
        whole, folder = made[key]
        # What it answered before plays no part: tests of that (`test_prefix`) make models that keep something.
        return Pair(whole.thinker, omni.load(folder, device="cpu", dtype=dtype, reuse=0))

    def reference(
        family: str,
        seed: int,
        dtype: torch.dtype,
        text: dict[str, Any] | None,
        vision: dict[str, Any] | None,
        sound: dict[str, Any] | None,
        adjust: Callable[[Any], None] | None,
    ) -> tuple[Any, Path]:
        torch.manual_seed(seed)
        tied = (text or {}).get("tie_word_embeddings", False)
        later = family == "qwen3"
        vision_base = {name: size for name, size in VISION.items() if not (later and name == "fullatt_block_indexes")}
        thinker = {
            "text_config": {**TEXT, **(TEXT3 if later else {}), **(text or {})},
            "vision_config": {**vision_base, **(VISION3 if later else {}), **(vision or {})},
            "audio_config": {**SOUND, **(SOUND3 if later else {}), **(sound or {})},
            "vision_start_token_id": VISION_START,
            "audio_start_token_id": AUDIO_START,
            "audio_end_token_id": AUDIO_END,
            "position_id_per_seconds": 13 if later else 25,
            "seconds_per_chunk": 2,
            "pad_token_id": 0,
            "tie_word_embeddings": tied,
        }
        for name, token in (("audio", AUDIO), ("image", IMAGE), ("video", VIDEO)):
            thinker[f"{name}_token_{'id' if later else 'index'}"] = token
        config_type = transformers.Qwen3OmniMoeConfig if later else transformers.Qwen2_5OmniConfig
        config = config_type(thinker_config=thinker, enable_audio_output=False)
        config._attn_implementation = "sdpa"
        if later:
            whole = transformers.Qwen3OmniMoeForConditionalGeneration(config).eval()
        else:
            whole = transformers.Qwen2_5OmniForConditionalGeneration(config).eval()
        for parameter in whole.parameters():  # large enough that a wrong bit shows in the logits
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if adjust is not None:
            adjust(whole)
        whole = whole.to(dtype)
        folder = tmp_path_factory.mktemp("checkpoint")
        whole.save_pretrained(folder)
        return whole, folder

    return make


@pytest.fixture(scope="session")
def write_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random checkpoint of a family with tokenizer and template, written by the demo's own script."""

    @cache
    def write(family: str) -> Path:
        folder = tmp_path_factory.mktemp("random") / "checkpoint"
        python("scripts/make_checkpoint.py", folder, "--family", family, check=True)
        return folder

    return write


@pytest.fixture(scope="session")
def checkpoint(write_checkpoint: Callable[[str], Path]) -> Path:
    return write_checkpoint("qwen2.5")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> omni.Omni:
    return omni.load(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four seconds of moving shapes and tones, by the demo's own script."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    python("scripts/make_clip.py", path, "--seconds", "4", check=True)
    return path


@pytest.fixture(autouse=True)
def templates_are_rendered_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each takes longer than most tests; it is for test_chat_template and tests with processes."""
    if request.path.name != "test_chat_template.py":
        monkeypatch.setattr(chat_template, "render", rendered)


def rendered(*request: Any) -> str:
    try:
        return sandbox.render(*request)
    except Exception as error:
        raise chat_template.ChatTemplateError(f"the chat template failed: {str(error).rstrip('.')}.") from error
