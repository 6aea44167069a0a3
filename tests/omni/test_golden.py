"""The recorded requests of `shared/golden`: a whole model, its logits and its answers."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import omni
from seats.methods import METHODS
from tests.omni.pairs import FAMILIES, GOLDEN

pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no golden data beside this checkout")
REQUESTS = sorted(path for family in FAMILIES for path in (GOLDEN / family).glob("*_*.safetensors"))
STOP = 699


@cache
def load(folder: Path) -> omni.Omni:
    return omni.load(folder, device="cpu", dtype=torch.float32)


def read_request(path: Path) -> tuple[omni.Inputs, dict[str, torch.Tensor]]:
    tensors = load_file(path)
    names = {field.name for field in fields(omni.Inputs)} & tensors.keys()
    floats = (torch.float16, torch.float32)
    return omni.Inputs(**{n: tensors[n].float() if tensors[n].dtype in floats else tensors[n] for n in names}), tensors


@pytest.mark.parametrize("path", REQUESTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_full_tokens(path: Path) -> None:
    """Every recorded request with every token kept: logits within 1e-3, generated tokens equal."""
    model = load(path.parent)
    inputs, expected = read_request(path)
    torch.testing.assert_close(model.prefill(inputs).logits, expected["logits_full"], atol=1e-3, rtol=0)
    generated = expected["generated_full"].tolist()
    answer = model.generate(inputs, max_new_tokens=len(generated), stop_token_ids=[STOP])
    assert answer.tokens == generated


CASES = [path for path in REQUESTS if path.stem.startswith("case")]


@pytest.mark.parametrize("name", ["fastv-om", "visionzip-om"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_other_methods(path: Path, name: str) -> None:
    """FastV-om and VisionZip-om as recorded: logits within 1e-3, the tokens of the last layer counted, generated tokens
    equal."""
    model = load(path.parent)
    inputs, expected = read_request(path)
    recorded = json.loads((path.parent / "methods.json").read_text())
    method = METHODS[name](video_ratio=recorded["video_ratio"], audio_ratio=recorded["audio_ratio"])
    key = name.replace("-om", "_omni")
    prefill = model.prefill(inputs, seats=method, kv="pruned")
    assert prefill.segments[-1] == recorded["methods"][key]["kept"][path.stem]
    torch.testing.assert_close(prefill.logits, expected[f"logits_{key}"], atol=1e-3, rtol=0)
    generated = expected[f"generated_{key}"].tolist()
    answer = model.generate(inputs, seats=method, kv="pruned", max_new_tokens=len(generated), stop_token_ids=[STOP])
    assert answer.tokens == generated
