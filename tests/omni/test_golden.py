"""The recorded requests of `shared/golden`: a whole model, its logits and its answers."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, GOLDEN
from safetensors.torch import load_file

import omni

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
