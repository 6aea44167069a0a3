"""The released checkpoints as published: their own configuration, tensor names, tokenizer settings and template.

The files are in `shared`, beside the project, and not part of it; where they are not, these tests are skipped.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.config import read_config
from omni.model import tensor_names
from omni.processing.chat_template import apply_chat_template
from omni.processing.processor import Processor
from omni.thinker import Thinker
from tests.omni.pairs import ROOT

RELEASED = ROOT.parent / "shared" / "data" / "checkpoints"
NAMES = ("Qwen2.5-Omni-3B", "Qwen3-Omni-30B-A3B-Instruct")
PARAMETERS = {"Qwen2.5-Omni-7B": 8_931_813_888, "Qwen3-Omni-30B-A3B-Instruct": 31_719_205_488}

pytestmark = pytest.mark.skipif(not RELEASED.is_dir(), reason="needs the released files")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def seven_billion(folder: Path) -> Path:
    """The 7B's config.json: the 3B's with other sizes."""
    config = read_json(RELEASED / "Qwen2.5-Omni-3B" / "config.json")
    thinker = config["thinker_config"]
    thinker["text_config"] |= {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    }
    thinker["vision_config"]["out_hidden_size"] = thinker["audio_config"]["output_dim"] = 3584
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_index_names_what_the_model_takes(name: str) -> None:
    """Protects: the released names, none missing, none left over."""
    index = read_json(RELEASED / name / "model.safetensors.index.json")["weight_map"]
    public = {tensor for tensor in index if tensor.startswith("thinker.")}
    assert tensor_names(read_config(RELEASED / name)).keys() == public


@pytest.mark.parametrize("name", [*NAMES, "Qwen2.5-Omni-7B"])
def test_shapes_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Protects: the released config, read by both, makes the same tensors; and as many parameters as released."""
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.core_model_loading")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder = RELEASED / name if name in NAMES else seven_billion(tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(folder)
    theirs.enable_audio_output = False
    with torch.device("meta"):
        reference = getattr(transformers, f"{type(theirs).__name__.removesuffix('Config')}ForConditionalGeneration")(
            theirs
        )
        thinker = Thinker(read_config(folder))
    public = loading.revert_weight_conversion(reference, reference.state_dict())
    parameters = dict(thinker.named_parameters())
    names = tensor_names(thinker.config)
    assert names.keys() == public.keys()
    filled = {tensor: destination.view(parameters[destination.parameter]) for tensor, destination in names.items()}
    for tensor, values in filled.items():
        assert values.shape == public[tensor].shape, tensor
    if name in PARAMETERS:
        # Of the vision encoder's widths, which are filled up with zeros, the part that a checkpoint has.
        assert sum(values.numel() for values in filled.values()) == PARAMETERS[name]


VOCABULARY = RELEASED.parent / "qwen2_tokenizer"
IMAGE, AUDIO, VIDEO = ({"type": kind, kind: f"some.{kind}"} for kind in ("image", "audio", "video"))


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def turn(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": content[0] if isinstance(content[0], str) else list(content)}


SYSTEM = turn("system", "You are Qwen.")
THOUGHT = "<think>\nIt flies, so\n\nit is a bird.\n</think>\n\nA bird."
CONVERSATIONS = {
    "a question": [turn("user", "What happens?")],
    "a clip and a question": [turn("user", VIDEO, text("What happens?"))],
    "several media": [turn("user", IMAGE, text("a "), AUDIO, VIDEO, VIDEO, text("\n b"), IMAGE)],
    "media alone": [turn("user", AUDIO)],
    "a system message": [SYSTEM, turn("user", VIDEO, text("Who speaks?"))],
    "a system message in parts": [turn("system", text("Be "), text("brief.")), turn("user", text("Hello"))],
    "a system message with a medium": [turn("system", text("Like this:"), AUDIO), turn("user", "Hello")],
    "a late system message": [turn("user", "Hello"), SYSTEM, turn("user", "again")],
    "several turns": [
        turn("user", IMAGE, text("What is it?")),
        turn("assistant", "A bird."),
        turn("user", AUDIO, text("Does it sing so?")),
        turn("assistant", text("It "), text("does.")),
        turn("user", "Why?"),
    ],
    "a thought": [turn("user", IMAGE, text("What is it?")), turn("assistant", THOUGHT), turn("user", "Why?")],
    "a thought, question in parts": [turn("user", "What?"), turn("assistant", THOUGHT), turn("user", text("Why?"))],
    "a thought in parts": [
        turn("user", VIDEO, text("What?")),
        turn("assistant", text("<think>so"), text(" it is</think>"), text("\n\nA bird.")),
        turn("user", "And?"),
    ],
    "several thoughts": [
        SYSTEM,
        *[turn("user", AUDIO, text("One?")), turn("assistant", THOUGHT)],
        *[turn("user", "Two?"), turn("assistant", "</think>\nhalf of one"), turn("user", "Three?")],
    ],
    "an answer at the end": [turn("user", "What?"), turn("assistant", THOUGHT)],
    "thoughts of brackets and white space": [
        turn("user", "5 < 6 && 7 > 3 é \U0001f600 \t"),
        turn("assistant", "<think>\n\n</think>\n\n <b>x</b> \n"),
        turn("user", " \n "),
    ],
}


@pytest.fixture(scope="module", params=NAMES)
def processed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Processor, Any]:
    """Our processor and transformers' tokenizer of a released folder, with the vocabulary beside it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("released")
    for file in [*(RELEASED / request.param).iterdir(), *VOCABULARY.iterdir()]:
        if "index" not in file.name:
            shutil.copy(file, folder / file.name)
    template = read_json(folder / "chat_template.json")["chat_template"]
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    theirs.chat_template = template
    return Processor(folder, read_config(folder)), theirs


@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_transformers(processed: tuple[Processor, Any], name: str, prompted: bool) -> None:
    """Protects: the released template and vocabulary give a conversation the same ids, thoughts of a history left out
    as there."""
    ours, theirs = processed
    expected = theirs.apply_chat_template(CONVERSATIONS[name], add_generation_prompt=prompted, return_dict=False)
    got = apply_chat_template(ours.tokenizer, ours.template, CONVERSATIONS[name], add_generation_prompt=prompted)
    assert got == expected
    assert ours.tokenizer.decode(got, skip_special_tokens=False) == theirs.decode(expected)


def test_thoughts_of_a_history_are_gone(processed: tuple[Processor, Any]) -> None:
    """Protects: that the comparison above compares something, where the family thinks."""
    ours, _ = processed
    prompt = ours.tokenizer.decode(apply_chat_template(ours.tokenizer, ours.template, CONVERSATIONS["a thought"]))
    assert "A bird." in prompt
    assert ("it is a bird" in prompt) == (ours.config.family == "qwen2_5_omni")
