"""Whether what `bench.py` is about to measure computes the right thing."""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_models import make_config, random_thinker
from torch import Tensor

import omni
import seats
from omni.encoders.received import received_attention
from omni.runtime.blank import blank_clip
from omni.runtime.graphs import capture, warm_up
from seats.budget import keep_counts
from seats.diversity import begin, pick

SHAPES, REQUESTS, STEPS = 100, 3, 6
LEAST_SAME = 0.98
"""Share of kept tokens that are the same on both sides, the least: tokens whose scores nearly tie, rounding decides."""


def check(device: torch.device) -> dict[str, Any]:
    """Small models compiled (and captured) against eager float32; kernels against PyTorch on random shapes.

    Raises AssertionError where something differs.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # convolutions, by default not in float32
        models = {family: _model(family, device) for family in ("qwen2.5", "qwen3")}
    return {"models": models, "kernels": _kernels(device)}


def _model(family: str, device: torch.device) -> dict[str, Any]:
    _, config = make_config(family, "small")
    nowhere, selecting = Path(os.devnull), seats.preset_for(config, 0.35)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        exactly = dtype == torch.float32
        # In float32 with selection, with weights so large that attention is far from even and nothing hangs on the last
        # bit; in bfloat16 it would all the same, so every token is kept.
        settings = selecting if exactly else None
        exact = random_thinker(config, device, torch.float32, std=0.1 if exactly else 0.02)
        thinker = exact
        if not exactly:
            thinker = random_thinker(config, device, dtype)
            thinker.load_state_dict(exact.state_dict())
        model, eager = omni.Omni(thinker, nowhere, compile=True, reuse=0), omni.Omni(exact, nowhere, reuse=0)
        worst, limit, same, alike = 0.0, 1e-4 if exactly else 5e-2, 1.0, 0
        # In bfloat16 a token may meet another expert; a number read before it is there is off by more.
        worst_step, limit_of_step = 0.0, 1e-4 if exactly else 0.25
        for seed in range(REQUESTS):
            inputs = blank_clip(config, 3.0)
            assert inputs.pixel_values_videos is not None and inputs.input_features is not None
            torch.manual_seed(seed)
            inputs.pixel_values_videos.normal_()
            inputs.input_features.normal_()
            ours, expected = (side.prefill(inputs, seats=settings) for side in (model, eager))
            shares = [
                int(torch.isin(kept, wanted).sum()) / max(len(kept), len(wanted))
                for kept, wanted in zip(ours.kept, expected.kept, strict=True)
            ]
            same = min([same, *shares])
            assert same >= LEAST_SAME, f"{family}: other tokens are kept when compiled, {shares} are the same"
            if any(share < 1 for share in shares):
                continue
            alike += 1
            worst = max(worst, apart(ours.logits, expected.logits))
            if device.type == "cuda":  # by kernels of their own; of one sequence others than of several
                steps = zip(*(logits_of_steps(side, inputs, 1 + seed % 2) for side in (model, eager)), strict=True)
                worst_step = max([worst_step, *(apart(*both) for both in steps)])
            if exactly:
                answers = [
                    side.generate(inputs, seats=selecting, max_new_tokens=9, stop_token_ids=[]).tokens
                    for side in (model, eager)
                ]
                assert answers[0] == answers[1], f"{family}: another answer when compiled"
        assert alike, f"{family} in {dtype}: no request kept the same tokens when compiled"
        assert worst < limit, f"{family} in {dtype}: logits differ by {worst:.1e} of their norm"
        assert worst_step < limit_of_step, f"{family} in {dtype}: a step's differ by {worst_step:.1e} of their norm"
        found[str(dtype).removeprefix("torch.")] = {
            "requests": REQUESTS,
            "with_the_same_tokens": alike,
            "lowest_share_of_the_same_tokens": same,
            "largest_relative_difference_of_logits": worst,
            "limit": limit,
        }
        if device.type == "cuda":
            found[str(dtype).removeprefix("torch.")] |= {
                "largest_relative_difference_of_a_step": worst_step,
                "limit_of_a_step": limit_of_step,
            }
    return found


def apart(logits: Tensor, expected: Tensor) -> float:
    """How far, relative to the norm of what is expected."""
    return ((logits - expected).norm() / expected.norm()).item()


@torch.inference_mode()
def logits_of_steps(model: omni.Omni, inputs: omni.Inputs, rows: int) -> list[Tensor]:
    """Of some decoding steps after a prompt, every token kept, in so many rows; always of the same tokens. On a GPU
    captured, where the model is compiled."""
    prefills, cache = model.engine.prefill([inputs] * rows, STEPS, None, "layerwise")
    compiled, on_gpu = model.engine.compiled, cache.lengths.is_cuda
    position = torch.tensor([float(each.next_position) for each in prefills], device=cache.lengths.device)
    token = torch.zeros(rows, dtype=torch.long, device=position.device)
    found: list[Tensor] = []

    def step() -> None:
        found[:] = [model.thinker.decode(token, position, cache)]

    run = step if compiled is None else partial(compiled._with_parts, step)
    if compiled is not None and on_gpu:
        lengths = cache.lengths.clone()
        warm_up(run)
        cache.lengths.copy_(lengths)
        run = capture(run).replay
    logits = []
    for number in range(STEPS):
        token.fill_(7 * number + 3)
        run()
        logits.append(found[0].clone())
        position += 1
    return logits


def _kernels(device: torch.device) -> dict[str, Any] | str:
    if device.type != "cuda":
        return "need a GPU; `make test` runs them in Triton's interpreter"
    from seats.kernels import pick_on_device

    draw, worst = random.Random(0), 0.0
    for seed in range(SHAPES):
        torch.manual_seed(seed)
        windows, tokens, channels = draw.randint(1, 40), draw.randint(1, 700), draw.choice((32, 80, 512))
        sizes = torch.randint(0, tokens + 1, (windows,), device=device)
        counts = keep_counts(sizes, draw.random() or 1.0)
        features = torch.randn(windows, tokens, channels, device=device)
        begun = begin(features, torch.rand(windows, tokens, device=device), sizes)
        keep = torch.zeros(windows, tokens, dtype=torch.bool, device=device)
        pick_on_device(*begun, sizes, counts, keep)
        cpu = [tensor.cpu() for tensor in (*begun, sizes, counts)]
        assert torch.equal(keep.cpu(), pick(*cpu)), f"picks differ at {windows} windows of {tokens}"
        heads, dim = draw.randint(1, 8), draw.choice((16, 64, 80))
        dtype = draw.choice((torch.float32, torch.bfloat16))
        q, k = torch.randn(2, min(4, windows), heads, tokens, dim, device=device).to(dtype).unbind()
        valid = torch.arange(tokens, device=device) < sizes[: len(q), None]
        weights = received_attention(q, k, valid)
        expected = received_attention(q.cpu(), k.cpu(), valid.cpu())
        error = (weights.cpu() - expected).abs().max().item()
        assert error < 1e-3, f"attention weights differ by {error:.1e} at {tuple(q.shape)}"
        worst = max(worst, error)
    return {"shapes": SHAPES, "picks": "equal", "largest_difference_of_weights": worst}
