"""config.json is foreign data: what cannot run is refused with the key or the architecture by name."""

from __future__ import annotations

import copy
import importlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import omni
import omni.config as config_module
from omni.config import DEFAULTS, VISION_ROPE_THETA, ConfigError, read_config, read_sampling
from tests.omni.pairs import SOUND, SOUND3, TEXT, TEXT3, VISION, VISION3
from weights import CheckpointError, save_sharded

BASE: dict[str, Any] = {
    "architectures": ["Qwen2_5OmniForConditionalGeneration"],
    "torch_dtype": "bfloat16",
    "thinker_config": {
        "text_config": {**TEXT, "hidden_act": "silu", "rms_norm_eps": 1e-6},
        "vision_config": {
            **VISION,
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
        },
        "audio_config": {**SOUND, "num_mel_bins": 128, "activation_function": "gelu"},
        "audio_token_index": 601,
        "image_token_index": 602,
        "video_token_index": 603,
        "audio_start_token_id": 604,
        "audio_end_token_id": 605,
        "vision_start_token_id": 606,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    },
}


BASE3: dict[str, Any] = {
    **BASE,
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"],
    "thinker_config": {
        **BASE["thinker_config"],
        "text_config": {**BASE["thinker_config"]["text_config"], **TEXT3, "norm_topk_prob": True},
        "vision_config": {**BASE["thinker_config"]["vision_config"], **VISION3, "hidden_act": "gelu_pytorch_tanh"},
        "audio_config": {**BASE["thinker_config"]["audio_config"], **SOUND3},
    },
}


# transformers writes into the sections of pairs when it makes models of them.
BASE, BASE3 = copy.deepcopy((BASE, BASE3))


def write(folder: Path, changes: dict[str, object], base: dict[str, Any] = BASE) -> Path:
    """`base` with `a.b.c` paths replaced; the value None removes the key."""
    config = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if value is None:
            del section[key]
        else:
            section[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_reads_sizes(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, {}))
    assert config.decoder.head_dim == 16
    assert config.vision.full_attention_blocks == (1, 3)
    assert (config.token_ids.audio, config.token_ids.video, config.dtype) == (601, 603, torch.bfloat16)
    assert config.stop_token_ids == ()


def test_reads_the_sizes_of_qwen3(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, {"thinker_config.text_config.decoder_sparse_step": 2}, BASE3))
    decoder = config.decoder
    assert (decoder.head_dim, decoder.num_experts, decoder.num_experts_per_tok) == (24, 6, 2)
    assert [decoder.is_sparse(layer) for layer in range(3)] == [False, False, False]
    assert (decoder.qk_norm, decoder.mrope_interleaved, decoder.norm_topk_prob) == (True, True, True)
    assert config.vision.deepstack_blocks == (1, 3)
    assert config.seconds_per_chunk is None
    # 26.57 s: 26 chunks of 13 tokens and ceil(57 / 8).
    assert config.audio.token_count(2657) == 26 * 13 + 8


CLASSES = {
    "qwen2_5_omni": ("Qwen2_5OmniThinkerConfig", "Qwen2_5OmniRotaryEmbedding"),
    "qwen3_omni_moe": ("Qwen3OmniMoeThinkerConfig", "Qwen3OmniMoeThinkerTextRotaryEmbedding"),
}
WITHOUT_DEFAULT = {"vision_start_token_id", "audio_end_token_id"}


@pytest.mark.parametrize("family", DEFAULTS)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Protects: a key that a file lacks means here what it means there, key by key, both families."""
    transformers = pytest.importorskip("transformers")
    config_name, rotary_name = CLASSES[family]
    theirs = getattr(transformers, config_name)()
    for section, defaults in DEFAULTS[family].items():
        owner = theirs if section == "thinker_config" else getattr(theirs, section, None)
        for key, value in defaults.items():
            if section == "rope_parameters":
                continue
            public = getattr(owner, key)
            assert (list(public) if isinstance(public, tuple) else public) == value, f"{section}.{key}"
    rope = DEFAULTS[family]["rope_parameters"]
    assert theirs.text_config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert theirs.vision_config.rope_parameters["rope_theta"] == VISION_ROPE_THETA
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert getattr(modeling, rotary_name)(theirs.text_config).mrope_section == rope["mrope_section"]
    assert not any(hasattr(theirs, key) for key in WITHOUT_DEFAULT - DEFAULTS[family]["thinker_config"].keys())


@pytest.mark.parametrize("family", DEFAULTS)
def test_only_what_no_default_exists_for_is_asked_of_a_file(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: every key that is read has its line in the table, and the rest of a file may be absent."""
    asked: set[tuple[str, str]] = set()
    get = config_module._Section.get

    def recorded(section: Any, *keys: str) -> Any:
        asked.add((section.name.rpartition(".")[2], keys[0]))
        return get(section, *keys)

    monkeypatch.setattr(config_module._Section, "get", recorded)
    needed = {"vision_start_token_id": 5, "audio_end_token_id": 6, "image_token_id": 1, "video_token_id": 2}
    needed |= {"audio_token_id": 3, "audio_start_token_id": 4}
    if family == "qwen3_omni_moe":  # its default sizes contradict one another
        needed |= {"text_config": {"hidden_size": 3584}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"{family}_thinker", **needed}))
    config = read_config(tmp_path)
    known = {(section, key) for section, defaults in DEFAULTS[family].items() for key in defaults}
    known |= {("json", key) for key in DEFAULTS[family]["thinker_config"].keys() | WITHOUT_DEFAULT}
    known |= {("rope_parameters", key) for key in DEFAULTS[family]["rope_parameters"]}
    assert asked <= known, asked - known
    assert config.decoder.norm_topk_prob == (family == "qwen3_omni_moe")
    assert (config.decoder.num_layers, config.decoder.num_kv_heads) == (28, 4)
    assert config.decoder.tie_word_embeddings is False


def test_a_thinkers_own_config_is_read_like_a_whole_models(tmp_path: Path) -> None:
    """Protects: fine-tunes of the thinker alone, under its own architecture or its model type."""
    for base, thinker in ((BASE, "Qwen2_5OmniThinker"), (BASE3, "Qwen3OmniMoeThinker")):
        whole = read_config(write(tmp_path, {}, base))
        own = {**base["thinker_config"], "architectures": [f"{thinker}ForConditionalGeneration"]}
        assert read_config(write(tmp_path, {}, own)) == whole
        typed = {**base["thinker_config"], "model_type": f"{whole.family}_thinker"}
        assert read_config(write(tmp_path, {}, typed)) == whole


@pytest.mark.parametrize("changes", [{"num_key_value_heads": None}, {"num_key_value_heads": 4}])
def test_key_heads_spelled_out_as_null_are_as_many_as_heads(tmp_path: Path, changes: dict[str, object]) -> None:
    base = copy.deepcopy(BASE)
    base["thinker_config"]["text_config"] |= changes
    assert read_config(write(tmp_path, {}, base)).decoder.num_kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config.num_experts_per_tok": 7}, "num_experts_per_tok must not exceed num_experts"),
        ({"text_config.attention_bias": True}, "attention_bias = True is not supported"),
        ({"audio_end_token_id": None}, "thinker_config lacks audio_end_token_id"),
        ({"text_config.layer_types": ["sliding_attention"]}, "layer_types: only 'full_attention' is supported"),
        ({"text_config.layer_types": 3}, "layer_types: only 'full_attention' is supported"),
        ({"vision_config.rope_parameters": {"rope_theta": 5000.0}}, "rope_theta = 5000.0 is not supported, only 10000"),
        ({"vision_config.head_dim": 4}, "vision_config.head_dim = 4 is not supported, only 16"),
        ({"vision_config.num_position_embeddings": 50}, "must be a square number, not 50"),
        ({"vision_config.deepstack_visual_indexes": [1, 5]}, "must be rising block numbers below 5"),
        ({"vision_config.hidden_act": "silu"}, "hidden_act = 'silu' is not supported"),
        ({"audio_config.n_window_infer": 450}, "n_window_infer must be a multiple of 2"),
    ],
)
def test_refuses_of_qwen3(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    changes = {f"thinker_config.{path}": value for path, value in changes.items()}
    with pytest.raises(ConfigError, match=words):
        read_config(write(tmp_path, changes, BASE3))


def test_reads_the_newer_rope_spelling_and_stop_tokens(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters; released files write rope_scaling and rope_theta."""
    parameters = {"rope_theta": 5e5, "mrope_section": [2, 3, 3], "rope_type": "default"}
    text = "thinker_config.text_config"
    write(
        tmp_path,
        {f"{text}.rope_scaling": None, f"{text}.rope_theta": None, f"{text}.rope_parameters": parameters},
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    config = read_config(tmp_path)
    assert config.decoder.rope_theta == 5e5
    assert config.stop_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": True}, (0.6, 0.95, 20)),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "talker_temperature": 0.9}, (0.6, 0.95, 20)),
        ({"do_sample": True}, (1.0, 1.0, 50)),
        ({"top_k": 0, "repetition_penalty": 1.0}, (1.0, 1.0, None)),
        ({"do_sample": False, "temperature": 0.6}, (0.0, 1.0, None)),
    ],
)
def test_reads_the_sampling_of_a_generation_config(tmp_path: Path, settings: Any, expected: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert read_sampling(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eos_token_id": 7, "talker_temperature": 0.9}, "names no sampling settings in generation_config.json"),
        ({"temperature": -1}, "generation_config.json.temperature must be a number from 0 to 100"),
        ({"top_p": "x"}, "top_p must be a number"),
        ({"top_k": 1.5}, "top_k must be a count"),
        ({"temperature": 0.6, "repetition_penalty": 1.05}, "repetition_penalty = 1.05 is not supported, only 1.0"),
        ({"temperature": 0.6, "num_beams": 4}, "num_beams = 4 is not supported, only 1"),
        ({"temperature": 0.6, "suppress_tokens": [1]}, r"suppress_tokens = \[1\] is not supported"),
        ({"temperature": 0.6, "guidance_scale": 1.5}, "guidance_scale = 1.5 is not supported, only 1.0"),
        ({"temperature": 0.6, "do_sample": "false"}, "do_sample must be true or false, not 'false'"),
    ],
)
def test_sampling_that_cannot_be_followed_is_named(tmp_path: Path, settings: Any, words: str) -> None:
    """Protects: with the checkpoint's sampling, nothing in it is passed over."""
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=words):
        read_sampling(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM.*Qwen2_5OmniForConditionalGeneration"),
        ({"architectures": None}, "none"),
        ({"thinker_config.vision_start_token_id": None}, "thinker_config lacks vision_start_token_id"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights .method 'gptq'. are not supported"),
        ({"thinker_config.text_config.quantization_config": {"bits": 4}}, "text_config.quantization_config: quantised"),
        ({"quantization_config": [4]}, "quantization_config must be a JSON object"),
        (
            {"thinker_config.text_config.hidden_size": -1},
            "text_config.hidden_size must be a positive integer",
        ),
        ({"thinker_config.text_config.vocab_size": 10**12}, "vocab_size must be a positive integer"),
        ({"architectures": 5}, "describes 5; supported"),
        ({"architectures": [["x"], {}]}, r"describes \['x'\], \{\}; supported"),
        ({"architectures": ["x" * 10_000]}, "describes x{80}; supported"),
        ({"thinker_config.text_config.rope_theta": 10**400}, "rope_theta must be a number from 1 to 1e[+]12"),
        ({"thinker_config.text_config.rope_theta": float("inf")}, "rope_theta must be a number"),
        ({"thinker_config.text_config.rope_theta": float("nan")}, "rope_theta must be a number"),
        ({"thinker_config.text_config.rms_norm_eps": 1e9}, "rms_norm_eps must be a number from 1e-12 to 1"),
        ({"thinker_config.seconds_per_chunk": 1e-300}, "seconds_per_chunk must be a number from 0.1 to 1000"),
        ({"thinker_config.audio_token_index": 640}, "the id 640 of the audio token is not below .* vocab_size"),
        ({"thinker_config.audio_token_index": 603}, "the video token and the audio token have the same id 603"),
        ({"thinker_config.text_config.num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"thinker_config.text_config.rope_scaling": {"mrope_section": [1, 1, 1]}}, "sum to 8"),
        (
            {"thinker_config.text_config.rope_scaling.rope_type": "yarn"},
            "rope_type = 'yarn' is not supported",
        ),
        ({"thinker_config.text_config.hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        (
            {"thinker_config.text_config.use_sliding_window": True},
            "use_sliding_window = True is not supported",
        ),
        ({"thinker_config.vision_config": [1]}, "vision_config must be a JSON object"),
        ({"thinker_config.vision_config.out_hidden_size": 65}, "vision encoder yields 65 channels"),
        ({"thinker_config.audio_config.n_window": 51}, "n_window must be even"),
        ({"thinker_config.audio_token_index": "x"}, "audio_token_index must be a token id"),
        ({"torch_dtype": "int8"}, "'int8' is not one of bfloat16"),
    ],
)
def test_refuses(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_config(write(tmp_path, changes))


ABSURD = {
    "text_config": "num_hidden_layers hidden_size intermediate_size num_attention_heads vocab_size num_experts",
    "vision_config": "depth hidden_size intermediate_size num_heads patch_size temporal_patch_size spatial_merge_size",
    "audio_config": "encoder_layers d_model encoder_ffn_dim n_window n_window_infer num_mel_bins",
}


@pytest.mark.parametrize("size", [10**7, 10**9, 2**31 - 1, 10**100])
@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in ABSURD.items() for key in keys.split()])
def test_absurd_sizes_are_refused_before_anything_is_made(tmp_path: Path, key: str, size: int) -> None:
    """Protects: no module, name or tensor is counted out on the word of a file; it costs no memory and no time."""
    if key == "text_config.vocab_size" and size == 10**7:
        return  # of a large vocabulary the weights are the judge
    tracemalloc.start()
    with pytest.raises(
        ConfigError, match=rf"config\.json\.thinker_config\.{key} must be a positive integer up to \d+, not"
    ):
        omni.load(write(tmp_path, {f"thinker_config.{key}": size}, BASE3), device="cpu")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_large_sizes_within_bounds_are_held_against_the_weights(tmp_path: Path) -> None:
    """Protects: a size that a model might have, but this one has not, is refused before memory is taken."""
    text = "thinker_config.text_config"
    write(tmp_path, {f"{text}.vocab_size": 2**24, f"{text}.intermediate_size": 2**20, f"{text}.num_hidden_layers": 200})
    save_sharded({"thinker.model.norm.weight": torch.ones(64)}, tmp_path, max_shard_bytes=1000)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        omni.load(tmp_path, device="cpu")


def test_files_of_another_folder_are_not_read(tmp_path: Path) -> None:
    """Protects: a checkpoint cannot point at other files of the machine, nor at a pipe that never ends."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (write(tmp_path, {}) / "config.json").rename(tmp_path / "other.json")
    (folder / "config.json").symlink_to("../other.json")
    with pytest.raises(ConfigError, match="is a link that leaves the folder"):
        read_config(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(ConfigError, match="is no regular file"):
        read_config(folder)
    (folder / "config.json").unlink()
    with (folder / "config.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(ConfigError, match="is longer than 100000000 bytes"):
        read_config(folder)


def test_the_hub_cache_links_to_its_blobs(tmp_path: Path) -> None:
    """Protects: a snapshot of the hub's cache, whose files are links to its blobs, is read."""
    snapshot, blobs = tmp_path / "models--o--n/snapshots/0123", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (write(tmp_path, {}) / "config.json").rename(blobs / "beef")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    assert read_config(snapshot).decoder.head_dim == 16


def test_a_name_may_not_occur_twice(tmp_path: Path) -> None:
    """Protects: a size that one reader takes for another."""
    (tmp_path / "config.json").write_text('{"architectures": [], "architectures": ["x"]}')
    with pytest.raises(ConfigError, match="a name occurs twice"):
        read_config(tmp_path)


def test_refuses_what_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ConfigError, match="not readable JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not readable JSON"):
        read_config(tmp_path)


def test_the_dtype_of_the_weights_where_none_is_named(tmp_path: Path) -> None:
    """Protects: float32 weights stay so on a GPU, as transformers keeps them, in one file and in shards."""
    write(tmp_path, {"torch_dtype": None})
    assert read_config(tmp_path).dtype == torch.bfloat16
    save_file({"thinker.a": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"thinker.a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_config(tmp_path).dtype == torch.float32
    save_file({"thinker.a": torch.zeros(1).half()}, tmp_path / "model.safetensors")
    assert read_config(tmp_path).dtype == torch.float16
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert read_config(tmp_path).dtype == torch.bfloat16
