"""The released sizes, built on `meta`: nothing about them may wait for a machine with 20 GB to show."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from omni.cache import Cache
from omni.config import DecoderConfig, OmniConfig, read_config
from omni.decoder import Layer
from omni.engine import KV
from omni.layers import directly
from omni.model import tensor_names
from omni.prefix import CachedPrefix
from omni.processing.positions import Layout
from omni.request import Prompt, _windows, fill_pool, whole_prompt
from omni.reuse import REUSE_BYTES
from omni.rope import multimodal_rotary
from omni.stages import Prefix, prefill
from omni.thinker import Thinker
from seats.config import preset_for
from seats.counts import AUDIO_WINDOW
from seats.plan import make_plan, plan_without_selection

ROPE = {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}}
SMALLER = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
}
SIZES: dict[str, dict[str, Any]] = {
    "7B": {},
    "3B": {**SMALLER, "num_key_value_heads": 2, "vocab_size": 151936},
    "3B tied": {**SMALLER, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "30B-A3B": {
        "rope_scaling": {**ROPE["rope_scaling"], "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        "vocab_size": 152064,
        "hidden_size": 2048,
        "intermediate_size": 768,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 65536,
    },
}


@pytest.fixture(scope="module", params=SIZES)
def built(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[OmniConfig, dict[str, torch.Size], int]:
    """Our configuration, and transformers' tensors of the same config.json under their public names."""
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.core_model_loading")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    text = SIZES[request.param]
    width = text.get("hidden_size", 3584)
    tied = text.get("tie_word_embeddings", False)
    thinker = {
        "text_config": {**ROPE, **text},
        "vision_config": {"out_hidden_size": width},
        "audio_config": {"output_dim": width},
    }
    thinker |= {"vision_start_token_id": 151652, "tie_word_embeddings": tied}
    if "num_experts" in text:
        thinker |= {"audio_end_token_id": 151648, "position_id_per_seconds": 13}
        config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
        kind = transformers.Qwen3OmniMoeForConditionalGeneration
    else:
        thinker["vision_config"]["hidden_size"] = 1280  # released; transformers' default is another
        config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
        kind = transformers.Qwen2_5OmniForConditionalGeneration
    config.architectures = [kind.__name__]
    folder = tmp_path_factory.mktemp("full-size")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    with torch.device("meta"):
        model = kind(config)
    public = loading.revert_weight_conversion(model, model.state_dict())
    if tied:  # one tensor under two names; files hold the first
        del public["thinker.lm_head.weight"]
    count = sum(parameter.numel() for parameter in model.thinker.parameters())
    return read_config(folder), {name: tensor.shape for name, tensor in public.items()}, count


def test_names_shapes_and_counts_equal_the_public_checkpoints(built) -> None:
    """Every tensor of the released files has one destination of its shape, and nothing else is expected."""
    config, public, count = built
    with torch.device("meta"):
        thinker = Thinker(config)
    parameters = dict(thinker.named_parameters())
    names = tensor_names(config)
    assert names.keys() == public.keys()
    filled = {name: destination.view(parameters[destination.parameter]) for name, destination in names.items()}
    for name, part in filled.items():
        assert part.shape == public[name], name
    assert sum(part.numel() for part in filled.values()) == count
    # In memory the vision MLPs are wider, to whole 128 bytes in 16 bits: by little.
    held = sum(parameter.numel() for parameter in parameters.values())
    assert count < held < 1.002 * count
    vision = config.vision
    wide = 3 * vision.hidden_size if vision.full_attention_blocks else 2 * vision.hidden_size
    biases = 2 if vision.full_attention_blocks else 1
    assert vision.padded_size % 64 == 0
    assert held - count == vision.depth * (vision.padded_size - vision.intermediate_size) * (wide + biases)
    assert {destination.parameter for destination in names.values()} == parameters.keys()


def test_prefill_runs_at_full_size(built) -> None:
    """Shapes of the whole path hold together at the released sizes, on meta: pictures, sound, a decoder of fewer
    layers, as all are alike."""
    config, _, _ = built
    config = replace(config, decoder=replace(config.decoder, num_layers=4))
    hidden, levels = config.decoder.hidden_size, len(config.vision.deepstack_blocks)
    with torch.device("meta"):
        thinker = Thinker(config)
        features = {"video": torch.empty(1 + levels, 144, hidden)}
        sound, _ = thinker.audio.encode_sound(torch.empty(128, 7777), None, directly)
    prompt = whole_prompt(200)
    plan = plan_without_selection(config.decoder.num_layers, prompt.counts(None))
    none = torch.empty(0, dtype=torch.long)
    clip = torch.full((200,), -1).index_fill(0, torch.arange(9, 153), 0)
    places = Layout(torch.zeros(3, 200, dtype=torch.long), 200, none, torch.arange(9, 153), none, clip)
    ids = torch.zeros(1, 200, dtype=torch.long)
    batch = fill_pool(plan, prompt, places, ids, features, {}, torch.device("meta"))
    staged = prefill(thinker, plan, batch, pruned=True)
    cache = Cache.of_prefill(staged.keys, staged.values, staged.lengths, 100)
    token, position = torch.empty(1, dtype=torch.long, device="meta"), torch.empty(1, device="meta")
    next_logits = thinker.decode(token, position, cache)
    grids = torch.tensor([[6, 16, 36], [1, 30, 22]])
    patches = torch.empty(6 * 16 * 36 + 30 * 22, config.vision.patch_dim, device="meta")
    pictures, _ = thinker.vision(patches, grids)
    assert staged.logits.shape == next_logits.shape == (1, config.decoder.vocab_size)
    assert sound.shape == (config.audio.token_count(7777), hidden)
    assert pictures.shape == (1 + levels, (6 * 16 * 36 + 30 * 22) // 4, hidden)
    assert len(cache.keys) == config.decoder.num_layers
    assert cache.keys[0].shape == (1, config.decoder.num_kv_heads, 384, config.decoder.head_dim)


def test_cache_of_the_papers_clip(built, capsys: pytest.CaptureFixture[str]) -> None:
    """10,000 video, 1,667 audio and 100 text tokens in bfloat16: what a cache takes with every token, with what each
    layer attended to, and with what the last one did; and what is kept for the next question. Prints the table."""
    config, _, _ = built
    with torch.device("meta"):
        thinker = Thinker(config).to(torch.bfloat16)
    video, audio, text = 10_000, 1_667, 100
    order = torch.arange(video + audio + text)
    prompt = Prompt(
        text=order[video + audio :],
        video=order[:video],
        audio=order[video : video + audio],
        video_sizes=tuple(_windows(video, 288)),
        audio_sizes=tuple(_windows(audio, AUDIO_WINDOW)),
        video_clips=(0,) * len(_windows(video, 288)),
        audio_clips=(0,) * len(_windows(audio, AUDIO_WINDOW)),
        windows=(35, 35),
    )
    decoder = config.decoder
    of_token = 2 * 2 * decoder.num_kv_heads * decoder.head_dim
    sizes = {"every token": of_token * len(order) * decoder.num_layers}
    none = torch.empty(0, dtype=torch.long)
    places = Layout(torch.zeros(3, len(order), dtype=torch.long), 0, none, prompt.video, prompt.audio, order * 0)
    features = {
        name: torch.empty(1, count, decoder.hidden_size, dtype=torch.bfloat16, device="meta")
        for name, count in (("video", video), ("audio", audio))
    }
    levels = 1 + len(config.vision.deepstack_blocks)
    kept = {"encoders": 2 * decoder.hidden_size * (levels * video + audio)}
    kept["every token"] = sizes["every token"]
    for retention in (0.35, 0.10):
        method = preset_for(config, retention)
        plan = make_plan(method, decoder.num_layers, prompt.counts(method))
        ids = torch.zeros(1, len(order), dtype=torch.long)
        batch = fill_pool(plan, prompt, places, ids, features, {}, torch.device("meta"))
        for kv in KV:
            staged = prefill(thinker, plan, batch, pruned=kv == "pruned")
            sizes[f"{retention:.0%}, {kv}"] = sum(stored.nbytes for stored in (*staged.keys, *staged.values))
        first = prefill(thinker, plan, batch, pruned=False, keep=True)
        layers = plan.segments[0].layers[1]
        ids = torch.zeros(len(order), dtype=torch.long)
        assert first.first is not None
        prefix = Prefix(first.first.sequence, first.keys[:layers], first.values[:layers])
        kept[f"{retention:.0%}"] = CachedPrefix(ids, places.positions, ids, prefix).nbytes
    with capsys.disabled():
        shape = f"{decoder.num_layers} layers of {decoder.hidden_size}"
        for what, held in (("cache", sizes), ("kept", kept)):
            listed = "; ".join(f"{name} {size / 1e6:.1f} MB" for name, size in held.items())
            print(f"\n{shape}, {what}: {listed}", end="")
    # What is kept by default holds the clip, be it with every token.
    assert kept["encoders"] + kept["every token"] + kept["10%"] < REUSE_BYTES
    for retention, share in ((0.35, 0.4), (0.10, 0.15)):
        assert sizes[f"{retention:.0%}, layerwise"] < share * sizes["every token"]
        # A segment may hold a few slots more than it needs, and here it ends with none of video or sound.
        assert sizes[f"{retention:.0%}, pruned"] == of_token * text * decoder.num_layers


def test_a_layer_of_experts_at_full_size() -> None:
    """2048 channels, 128 experts of 768, 8 per token, in bfloat16 on the CPU: real numbers, and the right ones."""
    config = DecoderConfig(
        vocab_size=1,
        hidden_size=2048,
        intermediate_size=0,
        num_layers=1,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rope_theta=1e6,
        mrope_section=(24, 20, 20),
        rms_norm_eps=1e-6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        qk_norm=True,
        mrope_interleaved=True,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        layer = Layer(config, 0)
    layer = layer.to_empty(device="cpu").bfloat16().requires_grad_(False)
    for parameter in layer.parameters():
        if parameter.dim() < 3:
            parameter.uniform_(-0.05, 0.05)
        else:  # experts, 600 million numbers: one, times a factor of each
            one = torch.empty_like(parameter[:1]).uniform_(-0.05, 0.05)
            torch.mul(one, torch.empty(len(parameter), 1, 1).uniform_(0.5, 1.5).bfloat16(), out=parameter)
    x = torch.randn(1, 3, 2048).bfloat16()
    positions = torch.arange(3).expand(3, 1, -1)
    cos, sin = multimodal_rotary(positions, 128, 1e6, (24, 20, 20), interleaved=True)
    rotary = (cos.unsqueeze(1), sin.unsqueeze(1))
    y, _, _ = layer.prefill(x, rotary)
    assert y.dtype == torch.bfloat16
    # The experts again, one token and one expert at a time, in float32.
    mixed = x + layer.attention.prefill(layer.attention_norm(x), rotary)[0]
    tokens = layer.mlp_norm(mixed)[0]
    shares, chosen = layer.mlp.route(tokens)
    expected = mixed[0].float()
    for row, (parts, experts) in enumerate(zip(shares.float(), chosen.tolist(), strict=True)):
        for share, expert in zip(parts, experts, strict=True):
            gate, up = (layer.mlp.gate_up[expert].float() @ tokens[row].float()).chunk(2)
            expected[row] += share * (layer.mlp.down[expert].float() @ (F.silu(gate) * up))
    assert (y[0].float() - expected).norm() / expected.norm() < 1e-2
