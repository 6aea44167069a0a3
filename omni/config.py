"""The sizes of a thinker, read from a public checkpoint's own `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from seats.cost import prefill_macs
from weights.adapters import base_of
from weights.checkpoint import stored_dtype
from weights.files import read_object

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Frames = TypeVar("Frames", int, Tensor)

QWEN2_5, QWEN3 = "qwen2_5_omni", "qwen3_omni_moe"

ARCHITECTURES = {
    "Qwen2_5OmniForConditionalGeneration": QWEN2_5,
    "Qwen2_5OmniModel": QWEN2_5,  # in the released 3B and 7B files
    "Qwen2_5OmniThinkerForConditionalGeneration": QWEN2_5,
    "Qwen2OmniNaViTThinkerForConditionalGeneration": QWEN2_5,  # of the thinker, in the same files
    "Qwen3OmniMoeForConditionalGeneration": QWEN3,
    "Qwen3OmniMoeThinkerForConditionalGeneration": QWEN3,
}
"""Public architecture name → family, of whole models and of thinkers alone."""

MODEL_TYPES = {QWEN2_5: QWEN2_5, f"{QWEN2_5}_thinker": QWEN2_5, QWEN3: QWEN3, f"{QWEN3}_thinker": QWEN3}
"""What names the family in a file that names no architecture."""

_COMMON_AUDIO = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "activation_function": "gelu",
    "scale_embedding": False,
    "output_dim": 3584,
}

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    QWEN2_5: {
        "thinker_config": {
            "audio_token_index": 151646,
            "image_token_index": 151655,
            "video_token_index": 151656,
            "audio_start_token_id": 151647,
            "audio_end_token_id": 151648,
            "position_id_per_seconds": 25,
            "seconds_per_chunk": 2,
            "tie_word_embeddings": False,
        },
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
        },
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32,
            "hidden_size": 3584,
            "hidden_act": "silu",
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "audio_config": {**_COMMON_AUDIO, "n_window": 100},
    },
    QWEN3: {
        "thinker_config": {
            "audio_token_id": 151646,
            "image_token_id": 151655,
            "video_token_id": 151656,
            "audio_start_token_id": 151647,
            "position_id_per_seconds": 25,
            "tie_word_embeddings": False,
        },
        "text_config": {
            "vocab_size": 3584,
            "hidden_size": 2048,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": True,
            "mlp_only_layers": [],
        },
        "rope_parameters": {"rope_theta": 1e6, "mrope_section": [24, 20, 20]},
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": 4304,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 3584,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "audio_config": {**_COMMON_AUDIO, "n_window": 50, "n_window_infer": 800, "downsample_hidden_size": 480},
    },
}
"""Family → section → what a key means where a file lacks it: the defaults of transformers' configuration classes.

What is not here (the mark before pictures, in Qwen3-Omni the mark after sounds) has none there, either.
"""

VISION_ROPE_THETA = 10_000
"""Of both vision encoders; transformers 5 writes it down."""

# Several times what public models have: beyond these a file is damaged or hostile, and modules, names and
# tensors are counted out before anything is held against the weights.
MAX_LAYERS = 256
MAX_WIDTH = 2**20
MAX_HEADS = 4096
MAX_TOKENS = 2**24
MAX_MEL_FRAMES = 60_000
"""Ten minutes: sounds are padded to whole windows."""
PRODUCT_WIDTH = 64
"""Channels that the vision encoder's MLPs are filled up to with zeros, which change no sum. Hopper's matrix kernels
want rows of whole 16 bytes, and the compiler spaces rows by whole 128 bytes, which the kernels that add a bias refuse.
Qwen2.5-Omni's 3420 are neither, Qwen3-Omni's 4304 not the latter; 3456 and 4352 take 1 % more memory there."""


class ConfigError(ValueError):
    """A `config.json` that is missing, damaged, or of a model this library does not run."""


@dataclass(frozen=True)
class VisionConfig:
    """Vision encoder (transformers' `Qwen2_5OmniVisionEncoderConfig`, `Qwen3OmniMoeVisionEncoderConfig`).

    Sizes in pixels and channels. `window_size` and `full_attention_blocks` are of Qwen2.5-Omni;
    `num_position_embeddings`, a square number, and `deepstack_blocks` of Qwen3-Omni: blocks whose output joins the
    first decoder layers, too.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    window_size: int = 0
    full_attention_blocks: tuple[int, ...] = ()
    num_position_embeddings: int = 0
    deepstack_blocks: tuple[int, ...] = ()

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def padded_size(self) -> int:
        """intermediate_size up to a whole number of `PRODUCT_WIDTH`: the width that the MLPs have in memory."""
        return -(-self.intermediate_size // PRODUCT_WIDTH) * PRODUCT_WIDTH


@dataclass(frozen=True)
class AudioConfig:
    """Audio encoder (transformers' `Qwen2_5OmniAudioEncoderConfig`, `Qwen3OmniMoeAudioEncoderConfig`).

    A chunk is `2 · n_window` mel frames. Of Qwen3-Omni: `n_window_infer`, mel frames that see each other, and
    `conv_channels` of the strided convolutions.
    """

    num_mel_bins: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    n_window: int
    output_size: int
    n_window_infer: int = 0
    conv_channels: int = 0

    @property
    def chunk_frames(self) -> int:
        return 2 * self.n_window

    @property
    def alone_from(self) -> int:
        """Mel frames from which on a sound is encoded as if alone.

        In Qwen3-Omni shorter ones are padded to the longest of a prompt, a chunk at most, and its convolutions see
        where they end.
        """
        return self.chunk_frames if self.conv_channels else 0

    def token_count(self, mel_frames: Frames) -> Frames:
        """Audio tokens of a sound of `mel_frames` valid frames.

        Qwen2.5-Omni halves them twice, the second time without the odd one. Qwen3-Omni halves the frames of every
        chunk three times, rounding up.
        """
        if not self.conv_channels:
            return -(-mel_frames // 2) // 2
        chunks, rest = mel_frames // self.chunk_frames, mel_frames % self.chunk_frames
        return chunks * -(-self.chunk_frames // 8) + -(-rest // 8)


@dataclass(frozen=True)
class DecoderConfig:
    """Text decoder (transformers' `Qwen2_5OmniTextConfig`, `Qwen3OmniMoeTextConfig`).

    What has a default is where Qwen3-Omni differs: no biases on q, k and v but an RMSNorm per head on q and k, and
    experts in every layer but `dense_layers`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: tuple[int, int, int]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool = False
    mrope_interleaved: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    dense_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        return self.num_experts > 0 and layer not in self.dense_layers

    def macs(self, tokens: int, drops: Sequence[tuple[int, int]] = (), layers: int | None = None) -> int:
        """Multiply-accumulates of a prefill, as `seats.cost.prefill_macs`, with the head; or of some layers alone."""
        return prefill_macs(
            tokens,
            drops,
            num_layers=self.num_layers if layers is None else layers,
            hidden_size=self.hidden_size,
            # Where a few layers of many are dense, the count takes them for sparse ones.
            intermediate_size=self.num_experts_per_tok * self.moe_intermediate_size or self.intermediate_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            vocab_size=self.vocab_size if layers is None else 0,
            head_dim=self.head_dim,
        )


@dataclass(frozen=True)
class TokenIds:
    """Ids of the placeholders and of the marks around media."""

    image: int
    video: int
    audio: int
    vision_start: int
    audio_start: int
    audio_end: int


@dataclass(frozen=True)
class OmniConfig:
    """One thinker: its three networks, its token ids and its clock.

    seconds_per_chunk: of clips with sound, in Qwen2.5-Omni; Qwen3-Omni has no such chunks.
    """

    family: str
    vision: VisionConfig
    audio: AudioConfig
    decoder: DecoderConfig
    token_ids: TokenIds
    positions_per_second: int
    seconds_per_chunk: float | None
    dtype: torch.dtype
    stop_token_ids: tuple[int, ...]


class _Section:
    """One object of config.json: typed look-ups whose errors name the full key. An absent key is its default."""

    def __init__(self, values: Any, name: str, defaults: Mapping[str, Any] | None = None) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must be a JSON object, not {type(values).__name__}.")
        self.values, self.name, self.defaults = values, name, defaults or {}

    def section(self, key: str, defaults: Mapping[str, Any] | None = None) -> _Section:
        """An object inside; an empty one where it is absent."""
        return _Section(self.values[key] if self.has(key) else {}, f"{self.name}.{key}", defaults)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, *keys: str) -> Any:
        """The value under the first of `keys` that is there, else the first that has a default."""
        for values in (self.values, self.defaults):
            for key in keys:
                if values.get(key) is not None:
                    return values[key]
        raise ConfigError(f"{self.name} lacks {' or '.join(keys)!s}.")

    def count(self, key: str, most: int) -> int:
        value = self.get(key)
        if type(value) is not int or not 0 < value <= most:
            raise ConfigError(f"{self.name}.{key} must be a positive integer up to {most}, not {value!r:.80}.")
        return value

    def token(self, *keys: str) -> int:
        value = self.get(*keys)
        if type(value) is not int or not 0 <= value < MAX_TOKENS:
            raise ConfigError(f"{self.name}.{keys[0]} must be a token id, not {value!r:.80}.")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        value = self.get(key)
        if type(value) not in (int, float) or not least <= value <= most:
            raise ConfigError(f"{self.name}.{key} must be a number from {least:g} to {most:g}, not {value!r:.80}.")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise ConfigError(f"{self.name}.{key} must be true or false, not {value!r:.80}.")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise ConfigError(f"{self.name}.{key} must be a list of integers, not {value!r:.80}.")
        return tuple(value)

    def expect(self, key: str, *allowed: object) -> None:
        """Refuses a value that would change the computation: all but the default or, where given, `allowed`."""
        allowed = allowed or (self.defaults[key],)
        if self.has(key) and self.values[key] not in allowed:
            raise ConfigError(f"{self.name}.{key} = {self.values[key]!r:.80} is not supported, only {allowed[0]!r}.")


def read_config(folder: Path) -> OmniConfig:
    """Reads `config.json` and, where there is one, `generation_config.json` of a checkpoint folder.

    The former may be a whole model's, whose `thinker_config` counts, or a thinker's own. Raises ConfigError, which
    names the key, or the architecture and the supported ones.
    """
    root = _Section(_read_json(folder / "config.json"), "config.json")
    family = _family(root, folder)
    defaults = DEFAULTS[family]
    is_whole = root.has("thinker_config")
    thinker = _Section(
        root.values["thinker_config"] if is_whole else root.values,
        "config.json.thinker_config" if is_whole else "config.json",
        defaults["thinker_config"],
    )
    text, vision, audio = (
        thinker.section(key, defaults[key]) for key in ("text_config", "vision_config", "audio_config")
    )
    for section in (root, thinker, text, vision, audio):
        _refuse_quantised(section)
    decoder = _decoder(text, thinker, family)
    # transformers has either spelling in one family alone; files of both have been seen with either.
    spellings = ("index", "id") if family == QWEN2_5 else ("id", "index")
    placeholders = {
        kind: thinker.token(*(f"{kind}_token_{spelling}" for spelling in spellings))
        for kind in ("image", "video", "audio")
    }
    config = OmniConfig(
        family=family,
        vision=_vision(vision, family),
        audio=_audio(audio, family),
        decoder=decoder,
        token_ids=TokenIds(
            **placeholders,
            vision_start=thinker.token("vision_start_token_id"),
            audio_start=thinker.token("audio_start_token_id"),
            audio_end=thinker.token("audio_end_token_id"),
        ),
        positions_per_second=thinker.count("position_id_per_seconds", most=1000),
        seconds_per_chunk=thinker.number("seconds_per_chunk", 0.1, 1000) if family == QWEN2_5 else None,
        dtype=_dtype(root, thinker, text) or stored_dtype(folder) or torch.bfloat16,  # as every public one stores
        stop_token_ids=_stop_token_ids(folder, root, thinker, text),
    )
    for width, owner in ((config.vision.out_hidden_size, "vision"), (config.audio.output_size, "audio")):
        if width != decoder.hidden_size:
            raise ConfigError(
                f"the {owner} encoder yields {width} channels but the decoder takes {decoder.hidden_size}."
            )
    owners: dict[int, str] = {}
    for name, id in vars(config.token_ids).items():
        if id >= decoder.vocab_size:
            raise ConfigError(f"the id {id} of the {name} token is not below text_config's vocab_size.")
        if owners.setdefault(id, name) != name:
            raise ConfigError(f"the {owners[id]} token and the {name} token have the same id {id}.")
    return config


_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beams": 1,
    "min_new_tokens": 0,
    "min_length": 0,
    "top_h": None,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
    "watermarking_config": None,
}
"""Other settings of generation_config.json that change which token is picked, and the value with which none does."""


def read_sampling(folder: Path) -> tuple[float, float, int | None]:
    """Temperature, top_p and top_k of a checkpoint's `generation_config.json`; temperature 0 where it says greedy.

    What it lacks of the three is transformers' default: 1, 1 and 50; a file that names one of them is taken to sample,
    whether or not it says do_sample. Raises ConfigError where it names no sampling at all, or settings that cannot be
    followed.
    """
    path = folder / "generation_config.json"
    section = _Section(
        _read_json(path) if path.is_file() else {}, path.name, {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
    )
    sampled = section.values.get("do_sample")
    if sampled is None and not any(section.has(key) for key in section.defaults):
        raise ConfigError(f"{folder} names no sampling settings in generation_config.json: give a temperature.")
    for key, value in _NEUTRAL.items():
        if section.values.get(key) != []:
            section.expect(key, value)
    if sampled is not None and type(sampled) is not bool:
        raise ConfigError(f"generation_config.json.do_sample must be true or false, not {sampled!r:.80}.")
    if sampled is False:
        return 0.0, 1.0, None
    top_k = section.get("top_k")
    if type(top_k) is not int or top_k < 0:
        raise ConfigError(f"generation_config.json.top_k must be a count, not {top_k!r:.80}.")
    return section.number("temperature", 0, 100), section.number("top_p", 1e-6, 1), top_k or None


def _family(root: _Section, folder: Path) -> str:
    names = root.values.get("architectures")
    if not names:
        named = root.values.get("model_type")
        if isinstance(named, str) and named in MODEL_TYPES:
            return MODEL_TYPES[named]
        names = ["none"]
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES] if type(names) is list else []
    if not known:
        named = ", ".join(map(str, names)) if type(names) is list else repr(names)
        raise ConfigError(
            f"{folder / 'config.json'} describes {ascii(named)[1:-1][:80]}; supported: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[known[0]]


def _refuse_quantised(section: _Section) -> None:
    for key in ("quantization_config", "compression_config"):
        if section.values.get(key):
            method = section.section(key).values.get("quant_method", "unnamed")
            raise ConfigError(
                f"{section.name}.{key}: quantised weights (method {method!r:.40}) are not supported; load the "
                "checkpoint that was quantised, which is in bfloat16, float16 or float32."
            )


def _vision(section: _Section, family: str) -> VisionConfig:
    section.expect("hidden_act")
    rope = section.section("rope_parameters")
    rope.expect("rope_type", "axial", "default")
    rope.expect("rope_theta", VISION_ROPE_THETA)
    config = VisionConfig(
        depth=section.count("depth", most=MAX_LAYERS),
        hidden_size=section.count("hidden_size", most=MAX_WIDTH),
        intermediate_size=section.count("intermediate_size", most=MAX_WIDTH),
        num_heads=section.count("num_heads", most=MAX_HEADS),
        in_channels=section.count("in_channels", most=3),
        patch_size=section.count("patch_size", most=256),
        temporal_patch_size=section.count("temporal_patch_size", most=16),
        spatial_merge_size=section.count("spatial_merge_size", most=16),
        out_hidden_size=section.count("out_hidden_size", most=MAX_WIDTH),
    )
    if config.hidden_size % (4 * config.num_heads):
        raise ConfigError(f"{section.name}: hidden_size must be a multiple of 4 · num_heads for 2-D rotary.")
    section.expect("head_dim", config.hidden_size // config.num_heads)
    if family == QWEN2_5:
        window = section.count("window_size", most=MAX_WIDTH)
        if window % (config.patch_size * config.spatial_merge_size):
            raise ConfigError(f"{section.name}: window_size must be a multiple of patch_size · spatial_merge_size.")
        return replace(config, window_size=window, full_attention_blocks=section.counts("fullatt_block_indexes"))
    embeddings = section.count("num_position_embeddings", most=MAX_WIDTH)
    deepstack = section.counts("deepstack_visual_indexes")
    if math.isqrt(embeddings) ** 2 != embeddings:
        raise ConfigError(f"{section.name}.num_position_embeddings must be a square number, not {embeddings}.")
    if list(deepstack) != sorted(set(deepstack)) or any(block >= config.depth for block in deepstack):
        raise ConfigError(f"{section.name}.deepstack_visual_indexes must be rising block numbers below {config.depth}.")
    return replace(config, num_position_embeddings=embeddings, deepstack_blocks=deepstack)


def _audio(section: _Section, family: str) -> AudioConfig:
    section.expect("activation_function")
    section.expect("scale_embedding")
    config = AudioConfig(
        num_mel_bins=section.count("num_mel_bins", most=1024),
        hidden_size=section.count("d_model", most=MAX_WIDTH),
        num_layers=section.count("encoder_layers", most=MAX_LAYERS),
        num_heads=section.count("encoder_attention_heads", most=MAX_HEADS),
        intermediate_size=section.count("encoder_ffn_dim", most=MAX_WIDTH),
        n_window=section.count("n_window", most=MAX_MEL_FRAMES),
        output_size=section.count("output_dim", most=MAX_WIDTH),
    )
    if config.hidden_size % (2 * config.num_heads):
        raise ConfigError(f"{section.name}: d_model must be an even multiple of encoder_attention_heads.")
    if family == QWEN2_5:
        if config.n_window % 2:
            raise ConfigError(f"{section.name}: n_window must be even, so that pooled pairs stay inside a chunk.")
        return config
    window = section.count("n_window_infer", most=MAX_MEL_FRAMES)
    if window % config.chunk_frames:
        raise ConfigError(f"{section.name}: n_window_infer must be a multiple of 2 · n_window.")
    return replace(config, n_window_infer=window, conv_channels=section.count("downsample_hidden_size", most=MAX_WIDTH))


def _decoder(section: _Section, thinker: _Section, family: str) -> DecoderConfig:
    section.expect("hidden_act")
    section.expect("use_sliding_window", False)
    kinds = section.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ConfigError(f"{section.name}.layer_types: only 'full_attention' is supported, for every layer.")
    # Files written before transformers 5 say rope_scaling and rope_theta, later ones rope_parameters; the former goes
    # first there.
    rope = section.section(
        "rope_scaling" if section.values.get("rope_scaling") else "rope_parameters", DEFAULTS[family]["rope_parameters"]
    )
    rope.expect("rope_type", "default", "mrope")
    rope.expect("type", "default", "mrope")
    num_heads = section.count("num_attention_heads", most=MAX_HEADS)
    hidden_size = section.count("hidden_size", most=MAX_WIDTH)
    if not section.has("head_dim") and hidden_size % num_heads:
        raise ConfigError(f"{section.name}: hidden_size must be a multiple of num_attention_heads.")
    head_dim = section.count("head_dim", most=MAX_WIDTH) if section.has("head_dim") else hidden_size // num_heads
    mrope_section = rope.counts("mrope_section")
    if len(mrope_section) != 3 or sum(mrope_section) * 2 != head_dim:
        raise ConfigError(f"{rope.name}.mrope_section must be three counts that sum to {head_dim // 2}.")
    num_layers = section.count("num_hidden_layers", most=MAX_LAYERS)
    # Spelled out as null, key heads are as many as heads, in transformers' class of the older family.
    null_heads = section.values.get("num_key_value_heads", 0) is None
    config = DecoderConfig(
        vocab_size=section.count("vocab_size", most=MAX_TOKENS),
        hidden_size=hidden_size,
        intermediate_size=section.count("intermediate_size", most=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if null_heads else section.count("num_key_value_heads", most=MAX_HEADS),
        head_dim=head_dim,
        rope_theta=(section if not rope.has("rope_theta") and section.has("rope_theta") else rope).number(
            "rope_theta", 1, 1e12
        ),
        mrope_section=(mrope_section[0], mrope_section[1], mrope_section[2]),
        rms_norm_eps=section.number("rms_norm_eps", 1e-12, 1),
        max_position_embeddings=section.count("max_position_embeddings", most=MAX_TOKENS),
        # Head and embedding belong to the thinker, so its word goes first; released files say it in text_config.
        tie_word_embeddings=(
            section if not thinker.has("tie_word_embeddings") and section.has("tie_word_embeddings") else thinker
        ).flag("tie_word_embeddings"),
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{section.name}: num_attention_heads must be a multiple of num_key_value_heads.")
    if family != QWEN3:
        return config
    section.expect("attention_bias")
    step = section.count("decoder_sparse_step", most=MAX_LAYERS)
    dense = set(section.counts("mlp_only_layers")) | {layer for layer in range(num_layers) if (layer + 1) % step}
    config = replace(
        config,
        qk_norm=True,
        mrope_interleaved=True,
        num_experts=section.count("num_experts", most=512),
        num_experts_per_tok=section.count("num_experts_per_tok", most=512),
        moe_intermediate_size=section.count("moe_intermediate_size", most=MAX_WIDTH),
        norm_topk_prob=section.flag("norm_topk_prob"),
        dense_layers=tuple(sorted(layer for layer in dense if layer < num_layers)),
    )
    if config.num_experts_per_tok > config.num_experts:
        raise ConfigError(f"{section.name}: num_experts_per_tok must not exceed num_experts.")
    return config


def _dtype(root: _Section, thinker: _Section, text: _Section) -> torch.dtype | None:
    for section in (thinker, text, root):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                name = str(section.values[key]).removeprefix("torch.")
                if name not in DTYPES:
                    raise ConfigError(f"{section.name}.{key} = {name!r:.80} is not one of {', '.join(DTYPES)}.")
                return DTYPES[name]
    return None


def _stop_token_ids(folder: Path, root: _Section, thinker: _Section, text: _Section) -> tuple[int, ...]:
    sections = [thinker, text, root]
    if (folder / "generation_config.json").is_file():
        sections.insert(0, _Section(_read_json(folder / "generation_config.json"), "generation_config.json"))
    for section in sections:
        if section.has("eos_token_id"):
            value = section.values["eos_token_id"]
            return section.counts("eos_token_id") if isinstance(value, list) else (section.token("eos_token_id"),)
    return ()


def _read_json(path: Path) -> Any:
    if not path.exists():
        if (base := base_of(path.parent)) is not None:
            raise ConfigError(
                f"{path.parent} is an adapter for {base!r}, no checkpoint: load that, with this as its adapter "
                "(omni.load(base, adapter=...), --adapter)."
            )
        raise ConfigError(f"{path} does not exist; a checkpoint folder holds config.json.")
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON: {error}.") from None
