"""Writes a small Qwen2.5-Omni checkpoint with RANDOM weights, in the public layout.

    python scripts/make_checkpoint.py .demo/random

It has everything a released checkpoint has (config, sharded safetensors with an index, tokenizer files with
the family's special tokens, chat template), so it takes the same path through the library. Its answers are
noise: no training went into it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import weights
from omni.config import read_config
from omni.model import tensor_names
from omni.processing.chat import QWEN2_5_OMNI_TEMPLATE
from omni.thinker import Thinker

SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|AUDIO|> <|audio_bos|> <|audio_eos|> <|box_end|> <|quad_start|> "
    "<|quad_end|> <|vision_bos|> <|vision_eos|> <|vision_pad|> <|IMAGE|> <|VIDEO|>"
).split()
"""In the order of the released vocabulary."""

SAMPLE = """What happens here? A red circle moves over the wall while a high tone sounds; then the green square
appears and the tone is low. How many beeps are there, which shape was first, and what colour was on screen when
the sound stopped? You are a helpful assistant. system user assistant video audio image question answer"""


def byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2): printable ones as they are."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def learn_merges(text: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of an ASCII text, most frequent first."""
    words = [["Ġ", *word] for word in text.split()]
    merges = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        if not pairs:
            break
        pair = max(pairs, key=lambda p: (pairs[p], p))
        merges.append(pair)
        for word in words:
            for place in range(len(word) - 2, -1, -1):
                if (word[place], word[place + 1]) == pair:
                    word[place : place + 2] = ["".join(pair)]
    return merges


def write_tokenizer(folder: Path) -> dict[str, int]:
    """vocab.json, merges.txt, tokenizer_config.json, chat_template.json; returns the special tokens' ids."""
    merges = learn_merges(SAMPLE, 200)
    pieces = [*byte_characters(), *dict.fromkeys("".join(pair) for pair in merges)]
    special = {token: len(pieces) + index for index, token in enumerate(SPECIAL_TOKENS)}
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(pieces)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "added_tokens_decoder": {str(index): {"content": token, **flags} for token, index in special.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    write_json(folder / "chat_template.json", {"chat_template": QWEN2_5_OMNI_TEMPLATE})
    return special


def config(special: dict[str, int], hidden: int = 256, layers: int = 8) -> dict[str, object]:
    """`config.json` as the released checkpoints write it, with small sizes."""
    thinker = {
        "model_type": "qwen2_5_omni_thinker",
        "audio_token_index": special["<|AUDIO|>"],
        "image_token_index": special["<|IMAGE|>"],
        "video_token_index": special["<|VIDEO|>"],
        "audio_start_token_id": special["<|audio_bos|>"],
        "audio_end_token_id": special["<|audio_eos|>"],
        "vision_start_token_id": special["<|vision_bos|>"],
        "vision_end_token_id": special["<|vision_eos|>"],
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "vision_config": {
            "model_type": "qwen2_5_omni_vision_encoder",
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": hidden,
            "hidden_act": "silu",
            "tokens_per_second": 25,
        },
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": 128,
            "d_model": 128,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "n_window": 100,
            "output_dim": hidden,
            "max_source_positions": 1500,
            "activation_function": "gelu",
            "scale_embedding": False,
        },
        "text_config": {
            "model_type": "qwen2_5_omni_text",
            "vocab_size": -(-(max(special.values()) + 1) // 64) * 64,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
            "tie_word_embeddings": False,
            "use_sliding_window": False,
        },
    }
    return {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "torch_dtype": "bfloat16",
        "thinker_config": thinker,
    }


def random_tensors(thinker: Thinker) -> Iterator[tuple[str, Tensor]]:
    """Public names and values of a freshly initialised thinker, in bfloat16."""
    parameters = dict(thinker.named_parameters())
    for public, destination in tensor_names(thinker.config).items():
        value = parameters[destination.parameter].detach()
        rows = destination.rows
        yield public, (value if rows is None else value[rows]).bfloat16().contiguous()


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a small Qwen2.5-Omni checkpoint with random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    special = write_tokenizer(options.folder)
    write_json(options.folder / "config.json", config(special))
    write_json(options.folder / "generation_config.json", {"eos_token_id": [special["<|im_end|>"]]})
    torch.manual_seed(options.seed)
    thinker = Thinker(read_config(options.folder))
    for parameter in thinker.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    weights.save_sharded(dict(random_tensors(thinker)), options.folder, max_shard_bytes=4 << 20)
    count = sum(parameter.numel() for parameter in thinker.parameters())
    print(f"{options.folder}: {count / 1e6:.1f} M parameters with RANDOM weights; its answers are noise.")


if __name__ == "__main__":
    main()
