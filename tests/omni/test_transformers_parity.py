"""Our thinker against transformers' own, live, on random small models and requests."""

from __future__ import annotations

import random
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omni.processing.positions import layout
from omni.processing.prompt import clip_block
from tests.omni.pairs import FAMILIES, Pair, as_batch, make_request

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_5": ("qwen2_5", {}),
    "qwen2_5, one key head, tied": (
        "qwen2_5",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3, one key head, tied": (
        "qwen3",
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "norm_topk_prob": False},
    ),
}
REQUESTS = {
    "text": [("text", 20)],
    "image of whole windows": [("text", 5), ("image", 16, 8), ("text", 4)],
    "image of odd size": [("text", 5), ("image", 10, 22), ("text", 4)],
    "sound of odd length": [("text", 5), ("audio", 437), ("text", 4)],
    "sounds of less than a second": [("text", 5), ("audio", 57), ("audio", 83), ("text", 4)],
    "sound of more than a batch": [("text", 5), ("audio", 3377), ("text", 4)],
    "clip without sound": [("text", 5), ("video", 3, 6, 10, 1.0), ("text", 4)],
    "clip with shorter sound": [("text", 5), ("video", 6, 6, 10, 1.0, 420), ("text", 4)],
    "clip with longer sound": [("text", 5), ("video", 2, 8, 6, 1.0, 1101), ("text", 4)],
    "slow clip with sound": [("text", 5), ("video", 3, 6, 6, 9.375, 2800), ("text", 2)],
    "clip whose seconds single precision rounds up": [("text", 5), ("video", 41, 4, 4, 2 / 1.3, 6400), ("text", 2)],
    "clip whose seconds single precision rounds down": [("text", 5), ("video", 71, 4, 4, 2 / 4.6, 3200), ("text", 2)],
    "more grids than a batch": [("text", 5), ("video", 11, 10, 6, 0.8, 850), ("text", 4)],
    "several clips with sound": [
        *[("text", 3), ("video", 2, 6, 6, 1.0, 300), ("text", 3), ("video", 4, 8, 4, 1.0, 700)],
        *[("text", 4), ("audio", 333), ("image", 6, 6), ("text", 2)],
    ],
    "several media apart": [
        *[
            ("text", 3),
            ("image", 6, 6),
            ("image", 10, 4),
            ("text", 3),
            ("audio", 250),
            ("video", 3, 6, 6, 0.5),
        ],
        *[("text", 4), ("video", 2, 10, 6, 1.0), ("audio", 641), ("text", 2)],
    ],
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    family, text = MODELS[request.param]
    return make_pair(family, text=text, seed=len(request.param))


@pytest.fixture(scope="module", params=FAMILIES)
def rounded_pair(request: pytest.FixtureRequest, make_pair) -> Pair:
    return make_pair(request.param, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", REQUESTS)
def test_logits_and_positions_equal_transformers(pair: Pair, name: str) -> None:
    """The whole path, every head layout and medium: logits within 1e-4 in float32, positions exactly."""
    inputs = make_request(pair, REQUESTS[name])
    expected = pair.reference_logits(inputs)
    assert expected.std() > 0.1, "logits too flat to tell a right model from a wrong one"
    torch.testing.assert_close(pair.model.prefill(inputs).logits, expected, atol=1e-4, rtol=0)
    places = layout(inputs, pair.model.config)
    # transformers 5.17 has it a level higher.
    owner = pair.reference.model if hasattr(pair.reference.model, "get_rope_index") else pair.reference
    positions, deltas = owner.get_rope_index(
        inputs.input_ids,
        inputs.image_grid_thw,
        inputs.video_grid_thw,
        torch.ones_like(inputs.input_ids),
        inputs.use_audio_in_video,
        inputs.mel_lengths,
        inputs.video_second_per_grid,
    )
    assert torch.equal(places.positions, positions[:, 0].to(places.positions.dtype))
    assert places.next_position == inputs.input_ids.shape[1] + float(deltas)


def random_sizes(family: str, seed: int) -> dict[str, dict[str, Any]]:
    """Sizes of a small model, drawn within what the family's layout allows."""
    draw = random.Random(seed)
    head_dim, kv_heads = draw.choice([8, 16, 24]), draw.choice([1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    first = draw.randint(1, head_dim // 2 - 2)
    second = draw.randint(1, head_dim // 2 - first - 1)
    depth, vision_heads = draw.randint(2, 5), draw.choice([1, 2, 3])
    width, layers = heads * head_dim, draw.randint(1, 4)
    sections = [first, second, head_dim // 2 - first - second]
    rope = {"mrope_section": sections, "rope_type": "default", "type": "default"}
    text: dict[str, Any] = {
        "vocab_size": draw.randint(620, 700),
        "hidden_size": width,
        "intermediate_size": draw.randint(20, 120),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": draw.choice([1e4, 1e6]),
        "rope_scaling": rope,
        "tie_word_embeddings": draw.random() < 0.5,
    }
    vision = {
        "depth": depth,
        "num_heads": vision_heads,
        "hidden_size": vision_heads * draw.choice([8, 12, 20]),
        "intermediate_size": draw.randint(20, 80),
    }
    sound_heads = draw.choice([1, 2, 4])
    sound = {
        "d_model": sound_heads * draw.choice([8, 14]),
        "encoder_attention_heads": sound_heads,
        "encoder_layers": draw.randint(1, 3),
        "encoder_ffn_dim": draw.randint(20, 80),
    }
    if family == "qwen2_5":
        vision["fullatt_block_indexes"] = draw.sample(range(depth), draw.randint(1, depth))
        sound["n_window"] = draw.choice([20, 50, 100])
    else:
        width = 8 * draw.randint(4, 12)
        experts = draw.randint(2, 9)
        text |= {
            "hidden_size": width,
            "head_dim": head_dim,
            "rope_scaling": {**rope, "mrope_interleaved": True},
            "num_experts": experts,
            "num_experts_per_tok": draw.randint(1, experts),
            "moe_intermediate_size": 8 * draw.randint(1, 6),
            "norm_topk_prob": draw.random() < 0.5,
            "decoder_sparse_step": draw.choice([1, 2]),
            "mlp_only_layers": draw.sample(range(layers), draw.randint(0, 1)),
        }
        vision["num_position_embeddings"] = draw.choice([9, 25, 64])
        vision["deepstack_visual_indexes"] = sorted(draw.sample(range(depth), draw.randint(0, depth)))
        sound["n_window_infer"] = draw.choice([200, 300, 800])
        sound["downsample_hidden_size"] = draw.choice([4, 10])
    vision["out_hidden_size"] = sound["output_dim"] = width
    return {"text": text, "vision": vision, "sound": sound}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_configurations_equal_transformers(make_pair, family: str, seed: int) -> None:
    """No size is taken for granted: heads, widths, depths, sections, windows, experts and ties drawn at random."""
    pair = make_pair(family, seed=seed, **random_sizes(family, seed))
    for name in ("several media apart", "several clips with sound", "clip with longer sound"):
        inputs = make_request(pair, REQUESTS[name], seed=seed)
        expected = pair.reference_logits(inputs)
        assert expected.std() > 0.1, "logits too flat to tell a right model from a wrong one"
        torch.testing.assert_close(pair.model.prefill(inputs).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REQUESTS)
def test_bfloat16_logits_equal_transformers(rounded_pair: Pair, name: str) -> None:
    """The dtype that checkpoints are run in: within 2e-2 relative of transformers in float32 on the same weights.

    Not of its bfloat16, which on some processors is farther from its own float32 than that: routes of experts flip.
    """
    inputs = make_request(rounded_pair, REQUESTS[name])
    exact = replace(rounded_pair, reference=deepcopy(rounded_pair.reference).float()).reference_logits(inputs)
    got = rounded_pair.model.prefill(inputs).logits
    assert (got - exact).norm() / exact.norm() < 2e-2


def test_greedy_answer_equals_transformers(pair: Pair) -> None:
    """Cache and positions while decoding: forty tokens equal those of transformers' generate."""
    inputs = make_request(pair, REQUESTS["several clips with sound"])
    answer = pair.model.generate(inputs, max_new_tokens=40, stop_token_ids=[])
    generated = pair.reference.generate(
        **as_batch(inputs), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert answer.tokens == generated[0, inputs.input_ids.shape[1] :].tolist()


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4)),
    seconds=st.sampled_from([0.2, 0.5, 0.8, 1.0, 2.0, 3.7, 9.375]) | st.integers(1, 96).map(lambda rate: 8 / rate),
    audio_tokens=st.integers(1, 700),
)
def test_clip_ids_equal_transformers(grid: tuple[int, int, int], seconds: float, audio_tokens: int) -> None:
    """Frames and sound take turns exactly as in transformers' processor, token by token."""
    from transformers import Qwen2_5OmniProcessor as Public

    names = {"audio_bos_token": "<", "audio_eos_token": ">", "video_token": "v", "audio_token": "a"}
    public = SimpleNamespace(**names, video_processor=SimpleNamespace(merge_size=2))
    public.get_chunked_index = lambda *values: Public.get_chunked_index(public, *values)
    thw = torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]]).numpy()
    expected = Public.replace_video_with_audio_token(
        public,
        {"video_grid_thw": thw, "video_second_per_grid": [seconds]},
        0,
        {"num_audio_tokens": [audio_tokens]},
        0,
        position_id_per_seconds=25,
        seconds_per_chunk=2.0,
    )
    tokens = SimpleNamespace(video="v", audio="a", audio_start="<", audio_end=">")
    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(token_ids=tokens, vision=vision, positions_per_second=25, seconds_per_chunk=2.0)
    assert "".join(clip_block(thw[0].tolist(), seconds, audio_tokens, config)) == expected
