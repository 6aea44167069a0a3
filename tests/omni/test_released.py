"""The released checkpoints as published: their own configuration, tensor names, tokenizer settings and template.

The files are in `shared`, beside the project, and not part of it; where they are not, these tests are skipped.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from omni.config import read_config
from omni.model import tensor_names
from omni.thinker import Thinker

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
    for tensor, destination in names.items():
        assert destination.view(parameters[destination.parameter]).shape == public[tensor].shape, tensor
    if name in PARAMETERS:
        assert sum(parameter.numel() for parameter in parameters.values()) == PARAMETERS[name]
