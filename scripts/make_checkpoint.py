"""Writes a small checkpoint of either family with RANDOM weights, in the public layout.

    python scripts/make_checkpoint.py .demo/random
    python scripts/make_checkpoint.py .demo/random3 --family qwen3

It has everything a released checkpoint has (config, sharded safetensors with an index, tokenizer files with
the family's special tokens, chat template), so it takes the same path through the library. Its answers are
noise: no training went into it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weights
from omni.config import read_config
from omni.model import tensor_names
from omni.processing.chat_template import QWEN2_5_OMNI_TEMPLATE, QWEN3_OMNI_TEMPLATE
from omni.thinker import Thinker


@dataclass(frozen=True)
class Family:
    """special, ordinary: added tokens in the order of the released vocabulary; only the special are left out of text.

    marks: role of a token → which it is. sizes: `config.json` with small sizes, from the ids of its tokens.
    """

    special: tuple[str, ...]
    ordinary: tuple[str, ...]
    marks: dict[str, str]
    template: str
    config: Callable[[dict[str, int], int], dict[str, Any]]


SAMPLE = """What happens here? A red circle moves over the wall while a high tone sounds; then the green square
appears and the tone is low. How many beeps are there, which shape was first, and what colour was on screen when
the sound stopped? You are a helpful assistant. system user assistant video audio image question answer"""


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2): printable ones as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of an ASCII text, most frequent first, within words and the space before them."""
    found = re.findall(r"( ?)([A-Za-z]+|[0-9]|[^\sA-Za-z0-9]+)", text)
    words = Counter(tuple(space.replace(" ", "Ġ") + word) for space, word in found)
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        words = Counter({_merged(word, merges[-1]): times for word, times in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    pieces = list(word)
    for place in range(len(pieces) - 2, -1, -1):
        if (pieces[place], pieces[place + 1]) == pair:
            pieces[place : place + 2] = ["".join(pair)]
    return tuple(pieces)


def write_tokenizer(folder: Path, family: Family, sample: str = SAMPLE, count: int = 200) -> dict[str, int]:
    """vocab.json, merges.txt, tokenizer_config.json, chat_template.json; returns the ids of the added tokens.

    sample: what `count` merges are learnt from.
    """
    merges = learn_merges(sample, count)
    pieces = [*byte_characters(), *dict.fromkeys("".join(pair) for pair in merges)]
    added = {token: len(pieces) + index for index, token in enumerate((*family.special, *family.ordinary))}
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokenizer = {
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": token in family.special}
            for token, index in added.items()
        },
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "chat_template.json", {"chat_template": family.template})
    return added


def text_config(vocab_size: int, hidden: int) -> dict[str, Any]:
    """What the decoders of both families share."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }


VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "in_channels": 3,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
AUDIO = {
    "num_mel_bins": 128,
    "d_model": 128,
    "encoder_layers": 2,
    "num_hidden_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 256,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
}


def qwen2_5_config(tokens: dict[str, int], vocab_size: int, hidden: int = 256) -> dict[str, Any]:
    """`config.json` as the released Qwen2.5-Omni checkpoints write it, with small sizes."""
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        **{f"{role}_token_index": tokens[role] for role in ("audio", "image", "video")},
        **{f"{role}_token_id": id for role, id in tokens.items() if role not in ("audio", "image", "video")},
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "vision_config": {
            **VISION,
            "model_type": "qwen2_5_omni_vision_encoder",
            "patch_size": 14,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": hidden,
            "hidden_act": "silu",
            "tokens_per_second": 25,
        },
        "audio_config": {
            **AUDIO,
            "model_type": "qwen2_5_omni_audio_encoder",
            "n_window": 100,
            "output_dim": hidden,
        },
        "text_config": {
            **text_config(vocab_size, hidden),
            "model_type": "qwen2_5_omni_text",
            "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
        },
    }
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "torch_dtype": "bfloat16",
        "thinker_config": thinker,
    }


def qwen3_config(tokens: dict[str, int], vocab_size: int, hidden: int = 256) -> dict[str, Any]:
    """`config.json` as the released Qwen3-Omni checkpoints write it, with small sizes."""
    thinker = {
        "model_type": "qwen3_omni_moe_thinker",
        **{f"{role}_token_id": id for role, id in tokens.items()},
        "position_id_per_seconds": 13,
        "seconds_per_chunk": 2,
        "vision_config": {
            **VISION,
            "model_type": "qwen3_omni_moe_vision_encoder",
            "patch_size": 16,
            "spatial_patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1, 2],
            "out_hidden_size": hidden,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "audio_config": {
            **AUDIO,
            "model_type": "qwen3_omni_moe_audio_encoder",
            "n_window": 50,
            "n_window_infer": 800,
            "conv_chunksize": 500,
            "downsample_hidden_size": 32,
            "output_dim": hidden,
        },
        "text_config": {
            **text_config(vocab_size, hidden),
            "model_type": "qwen3_omni_moe_text",
            "head_dim": 96,
            "attention_bias": False,
            "rope_scaling": {
                "interleaved": True,
                "mrope_interleaved": True,
                "mrope_section": [16, 16, 16],
                "rope_type": "default",
                "type": "default",
            },
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 128,
            "norm_topk_prob": True,
        },
    }
    return {
        "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
        "model_type": "qwen3_omni_moe",
        "enable_audio_output": False,
        "dtype": "bfloat16",
        "thinker_config": thinker,
    }


FAMILIES = {
    "qwen2.5": Family(
        special=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
            *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>"),
            *("<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
        ),
        ordinary=(),
        marks={
            "audio": "<|AUDIO|>",
            "image": "<|IMAGE|>",
            "video": "<|VIDEO|>",
            "audio_start": "<|audio_bos|>",
            "audio_end": "<|audio_eos|>",
            "vision_start": "<|vision_bos|>",
            "vision_end": "<|vision_eos|>",
        },
        template=QWEN2_5_OMNI_TEMPLATE,
        config=qwen2_5_config,
    ),
    "qwen3": Family(
        special=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
            *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
            *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
        ),
        ordinary=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        marks={
            "audio": "<|audio_pad|>",
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "audio_start": "<|audio_start|>",
            "audio_end": "<|audio_end|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        },
        template=QWEN3_OMNI_TEMPLATE,
        config=qwen3_config,
    ),
}


def public_tensors(thinker: Thinker) -> Iterator[tuple[str, Tensor]]:
    """Public names and values of a thinker, in bfloat16 on the CPU."""
    parameters = dict(thinker.named_parameters())
    for public, destination in tensor_names(thinker.config).items():
        yield public, destination.view(parameters[destination.parameter].detach()).bfloat16().contiguous().cpu()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, family_name: str = "qwen2.5", seed: int = 0) -> int:
    """Writes a checkpoint with random weights; returns how many parameters it has."""
    family = FAMILIES[family_name]
    folder.mkdir(parents=True, exist_ok=True)
    added = write_tokenizer(folder, family)
    vocab_size = -(-(max(added.values()) + 1) // 64) * 64
    config = family.config({role: added[token] for role, token in family.marks.items()}, vocab_size)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [added["<|im_end|>"]]})
    torch.manual_seed(seed)
    thinker = Thinker(read_config(folder))
    for parameter in thinker.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    weights.save_sharded(public_tensors(thinker), folder, max_shard_bytes=4 << 20)
    return sum(tensor.numel() for _, tensor in public_tensors(thinker))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen2.5")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = write_checkpoint(options.folder, options.family, options.seed)
    print(f"{options.folder}: {count / 1e6:.1f} M parameters with RANDOM weights; its answers are noise.")


if __name__ == "__main__":
    main()
