"""Pairs of models with the same numbers, random requests of theirs, and a stand-in for CUDA graphs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import omni
from omni.model import Omni
from omni.processing.prompt import clip_block
from omni.runtime import compiled, graphs
from omni.runtime.compiled import Compiled

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
GOLDEN = ROOT.parent / "shared" / "golden"
IMAGE, VIDEO, AUDIO, VISION_START, VISION_END, AUDIO_START, AUDIO_END = 602, 603, 601, 606, 607, 604, 605

TEXT = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1, 3],
}
SOUND = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "output_dim": 64,
    "n_window": 100,
}

# Qwen3-Omni where it differs. A window of sound is four chunks; layer 1 is dense.
TEXT3 = {
    "head_dim": 24,  # not hidden_size / heads
    "rope_scaling": {"mrope_section": [4, 4, 4], "mrope_interleaved": True, "rope_type": "default"},
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
VISION3 = {
    "depth": 5,
    "num_position_embeddings": 49,
    "deepstack_visual_indexes": [1, 3],
}
SOUND3 = {"n_window": 50, "n_window_infer": 400, "downsample_hidden_size": 12}
FAMILIES = ("qwen2_5", "qwen3")


@dataclass
class Pair:
    """`reference` is transformers' thinker, `model` ours; both hold the same numbers."""

    reference: Any
    model: omni.Omni

    def reference_logits(self, inputs: omni.Inputs) -> Tensor:
        """(V,) of the next token, by transformers."""
        return self.reference(**as_batch(inputs), use_cache=False).logits[0, -1].float()


def as_batch(inputs: omni.Inputs) -> dict[str, Any]:
    batch = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    batch = {name: value for name, value in batch.items() if value is not None}
    return {**batch, "attention_mask": torch.ones_like(inputs.input_ids)}


def text_ids(count: int) -> list[int]:
    return torch.randint(8, 600, (count,)).tolist()


def make_request(pair: Pair, parts: list[tuple], *, seed: int = 0) -> omni.Inputs:
    """A random request. parts, in the order of the prompt: ("text", n), ("image", h, w), ("audio", mel frames)
    or ("video", t, h, w, seconds per grid) and, with sound, its mel frames."""
    torch.manual_seed(seed)
    config = pair.model.config
    ids: list[int] = []
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    seconds: list[float] = []
    sounds: list[int] = []
    for kind, *sizes in parts:
        if kind == "text":
            ids += text_ids(sizes[0])
        elif kind == "audio":
            sounds.append(sizes[0])
            ids += [AUDIO_START, *[AUDIO] * config.audio.token_count(sizes[0]), AUDIO_END]
        else:
            grid = [1, *sizes] if kind == "image" else sizes[:3]
            grids[kind].append(grid)
            pixels[kind].append(torch.randn(grid[0] * grid[1] * grid[2], config.vision.patch_dim))
            if kind == "image":
                block = [IMAGE] * (grid[1] * grid[2] // 4)
            else:
                seconds.append(sizes[3])
                sounds += sizes[4:]
                block = clip_block(grid, sizes[3], config.audio.token_count(sizes[4]) if sizes[4:] else None, config)
            ids += [VISION_START, *block, VISION_END]
    fields: dict[str, Any] = {}
    if grids["image"]:
        fields |= {"pixel_values": torch.cat(pixels["image"]), "image_grid_thw": torch.tensor(grids["image"])}
    if grids["video"]:
        fields |= {
            "pixel_values_videos": torch.cat(pixels["video"]),
            "video_grid_thw": torch.tensor(grids["video"]),
        }
        fields |= {"video_second_per_grid": torch.tensor(seconds)}
    if sounds:
        mask = (torch.arange(max(sounds)) < torch.tensor(sounds)[:, None]).long()
        fields |= {
            "input_features": torch.randn(len(sounds), 128, max(sounds)),
            "feature_attention_mask": mask,
        }
    with_sound = any(part[0] == "video" and len(part) == 6 for part in parts)
    return omni.Inputs(input_ids=torch.tensor([ids]), use_audio_in_video=with_sound, **fields)


class Replayed:
    """In the place of a CUDA graph: runs what was captured."""

    nbytes = 0

    def __init__(self, function: Callable[..., Any], _: tuple[Any, ...] = ()) -> None:
        self.replay = function

    def __call__(self, *tensors: Any) -> Any:
        return self.replay(*tensors)


class NamedStream:
    """Stands in for a CUDA stream: notes in `waits`, a list for all of them, which one waits for which."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self.waits = name, waits

    def wait_stream(self, other: NamedStream) -> None:
        self.waits.append((self.name, other.name))


def captures_without_a_gpu(model: Omni, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The compiled side of a model, which now rounds plans and captures as on a GPU: with a stand-in for graphs."""
    monkeypatch.setattr(graphs, "Captured", Replayed)
    monkeypatch.setattr(compiled, "capture", Replayed)
    monkeypatch.setattr(compiled, "warm_up", lambda run: run())
    side = model.engine.compiled
    assert side is not None
    monkeypatch.setattr(side, "on_gpu", True)
    return side
