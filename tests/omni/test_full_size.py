"""The released sizes, built on `meta`: nothing about them may wait for a machine with 20 GB to show."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from omni.config import OmniConfig, read_config
from omni.model import tensor_names
from omni.thinker import Thinker

ROPE = {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}
SMALLER = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "7B": ({}, 3584),
    "3B": ({**SMALLER, "num_key_value_heads": 2, "vocab_size": 151936}, 2048),
    "3B tied": (
        {**SMALLER, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
        2048,
    ),
}


@pytest.fixture(params=SIZES)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[OmniConfig, dict[str, torch.Size], int]:
    """Our configuration, and transformers' tensors of the same config.json under their public names."""
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.core_model_loading")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    text, width = SIZES[request.param]
    tied = text.get("tie_word_embeddings", False)
    thinker = {
        "text_config": {**ROPE, **text},
        "vision_config": {"out_hidden_size": width},
        "audio_config": {"output_dim": width},
    }
    thinker |= {"vision_start_token_id": 151652, "tie_word_embeddings": tied}
    config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with torch.device("meta"):
        model = transformers.Qwen2_5OmniForConditionalGeneration(config)
    public = loading.revert_weight_conversion(model, model.state_dict())
    if tied:  # one tensor under two names; files hold the first
        del public["thinker.lm_head.weight"]
    count = sum(parameter.numel() for parameter in model.thinker.parameters())
    return read_config(tmp_path), {name: tensor.shape for name, tensor in public.items()}, count


def test_names_shapes_and_counts_equal_the_public_checkpoints(built) -> None:
    """Every tensor of the released files has one destination of its shape, and nothing else is expected."""
    config, public, count = built
    with torch.device("meta"):
        thinker = Thinker(config)
    parameters = dict(thinker.named_parameters())
    names = tensor_names(config)
    assert names.keys() == public.keys()
    for name, destination in names.items():
        rows = parameters[destination.parameter]
        assert (rows if destination.rows is None else rows[destination.rows]).shape == public[name], name
    assert sum(parameter.numel() for parameter in parameters.values()) == count
    assert {destination.parameter for destination in names.values()} == parameters.keys()


def test_prefill_runs_at_full_size(built) -> None:
    """Shapes of the whole path hold together at the released sizes: a second of video with sound, on meta."""
    config, _, _ = built
    with torch.device("meta"):
        thinker = Thinker(config)
        hidden = config.decoder.hidden_size
        from omni.cache import Cache

        cache = Cache(config.decoder, 200, device=torch.device("meta"), dtype=torch.float32)
        logits = thinker(torch.empty(1, 200, hidden), torch.zeros(3, 1, 200, dtype=torch.long), cache)
        sound = thinker.audio.encode_batch(torch.empty(128, thinker.audio.batch_frames), torch.tensor(1000))
    assert logits.shape == (1, config.decoder.vocab_size)
    assert sound.shape == (750, hidden)
    assert cache.length == 200
