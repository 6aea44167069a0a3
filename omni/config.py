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
from weights.files import read_object

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Frames = TypeVar("Frames", int, Tensor)

QWEN2_5, QWEN3 = "qwen2_5_omni", "qwen3_omni_moe"

ARCHITECTURES = {
    "Qwen2_5OmniForConditionalGeneration": QWEN2_5,
    "Qwen2_5OmniModel": QWEN2_5,  # in the released 3B and 7B files
    "Qwen3OmniMoeForConditionalGeneration": QWEN3,
}
"""Public architecture name → family."""

# Several times what public models have: beyond these a file is damaged or hostile, and modules, names and
# tensors are counted out before anything is held against the weights.
MAX_LAYERS = 256
MAX_WIDTH = 2**20
MAX_HEADS = 4096
MAX_TOKENS = 2**24
MAX_MEL_FRAMES = 60_000
"""Ten minutes: sounds are padded to whole windows."""


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
    experts_per_token: int = 0
    expert_size: int = 0
    normalise_experts: bool = False
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
            intermediate_size=self.experts_per_token * self.expert_size or self.intermediate_size,
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
    tokens: TokenIds
    positions_per_second: int
    seconds_per_chunk: float | None
    dtype: torch.dtype
    stop_token_ids: tuple[int, ...]


class _Section:
    """One object of config.json: typed look-ups whose errors name the full key."""

    def __init__(self, values: Any, name: str) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must be a JSON object, not {type(values).__name__}.")
        self.values, self.name = values, name

    def section(self, key: str) -> _Section:
        return _Section(self._get((key,)), f"{self.name}.{key}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _get(self, keys: tuple[str, ...]) -> Any:
        for key in keys:
            if self.has(key):
                return self.values[key]
        raise ConfigError(f"{self.name} lacks {' or '.join(keys)!s}.")

    def count(self, *keys: str, most: int) -> int:
        """A positive integer, under the first of `keys` that is there."""
        value = self._get(keys)
        if type(value) is not int or not 0 < value <= most:
            raise ConfigError(f"{self.name}.{keys[0]} must be a positive integer up to {most}, not {value!r:.80}.")
        return value

    def token(self, *keys: str) -> int:
        value = self._get(keys)
        if type(value) is not int or not 0 <= value < MAX_TOKENS:
            raise ConfigError(f"{self.name}.{keys[0]} must be a token id, not {value!r:.80}.")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        value = self._get((key,))
        if type(value) not in (int, float) or not least <= value <= most:
            raise ConfigError(f"{self.name}.{key} must be a number from {least:g} to {most:g}, not {value!r:.80}.")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where the key is absent."""
        value = self.values.get(key, False)
        if type(value) is not bool:
            raise ConfigError(f"{self.name}.{key} must be true or false, not {value!r:.80}.")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        value = self._get((key,))
        if not isinstance(value, list) or any(type(item) is not int or item < 0 for item in value):
            raise ConfigError(f"{self.name}.{key} must be a list of integers, not {value!r:.80}.")
        return tuple(value)

    def expect(self, key: str, *allowed: object) -> None:
        """Refuses a value that would change the computation; an absent key means the family's own."""
        if self.has(key) and self.values[key] not in allowed:
            raise ConfigError(f"{self.name}.{key} = {self.values[key]!r:.80} is not supported, only {allowed[0]!r}.")


def read_config(folder: Path) -> OmniConfig:
    """Reads `config.json` and, where there is one, `generation_config.json` of a checkpoint folder.

    Raises ConfigError, which names the key, or the architecture and the supported ones.
    """
    root = _Section(_read_json(folder / "config.json"), "config.json")
    names = root.values.get("architectures") or ["none"]
    known = [name for name in names if isinstance(name, str) and name in ARCHITECTURES] if type(names) is list else []
    if not known:
        named = ", ".join(map(str, names)) if type(names) is list else repr(names)
        raise ConfigError(
            f"{folder / 'config.json'} describes {ascii(named)[1:-1][:80]}; supported: {', '.join(ARCHITECTURES)}."
        )
    family = ARCHITECTURES[known[0]]
    thinker = root.section("thinker_config")
    decoder = _decoder(thinker.section("text_config"), thinker, family)
    config = OmniConfig(
        family=family,
        vision=_vision(thinker.section("vision_config"), family),
        audio=_audio(thinker.section("audio_config"), family),
        decoder=decoder,
        tokens=TokenIds(
            image=thinker.token("image_token_index", "image_token_id"),
            video=thinker.token("video_token_index", "video_token_id"),
            audio=thinker.token("audio_token_index", "audio_token_id"),
            vision_start=thinker.token("vision_start_token_id"),
            audio_start=thinker.token("audio_start_token_id"),
            audio_end=thinker.token("audio_end_token_id"),
        ),
        positions_per_second=thinker.count("position_id_per_seconds", most=1000),
        seconds_per_chunk=thinker.number("seconds_per_chunk", 0.1, 1000) if family == QWEN2_5 else None,
        dtype=_dtype(root, thinker),
        stop_token_ids=_stop_token_ids(folder, root, thinker),
    )
    for width, owner in ((config.vision.out_hidden_size, "vision"), (config.audio.output_size, "audio")):
        if width != decoder.hidden_size:
            raise ConfigError(
                f"the {owner} encoder yields {width} channels but the decoder takes {decoder.hidden_size}."
            )
    owners: dict[int, str] = {}
    for name, id in vars(config.tokens).items():
        if id >= decoder.vocab_size:
            raise ConfigError(f"the id {id} of the {name} token is not below text_config's vocab_size.")
        if owners.setdefault(id, name) != name:
            raise ConfigError(f"the {owners[id]} token and the {name} token have the same id {id}.")
    return config


def _vision(section: _Section, family: str) -> VisionConfig:
    section.expect("hidden_act", "silu" if family == QWEN2_5 else "gelu_pytorch_tanh")
    config = VisionConfig(
        depth=section.count("depth", most=MAX_LAYERS),
        hidden_size=section.count("hidden_size", most=MAX_WIDTH),
        intermediate_size=section.count("intermediate_size", most=MAX_WIDTH),
        num_heads=section.count("num_heads", most=MAX_HEADS),
        in_channels=section.count("in_channels", "in_chans", most=3),
        patch_size=section.count("patch_size", most=256),
        temporal_patch_size=section.count("temporal_patch_size", most=16),
        spatial_merge_size=section.count("spatial_merge_size", most=16),
        out_hidden_size=section.count("out_hidden_size", most=MAX_WIDTH),
    )
    if config.hidden_size % (4 * config.num_heads):
        raise ConfigError(f"{section.name}: hidden_size must be a multiple of 4 · num_heads for 2-D rotary.")
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
    section.expect("activation_function", "gelu")
    section.expect("scale_embedding", False)
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
    section.expect("hidden_act", "silu")
    section.expect("use_sliding_window", False)
    # Files written before transformers 5 say rope_scaling and rope_theta, later ones rope_parameters.
    rope = section.section("rope_parameters" if section.has("rope_parameters") else "rope_scaling")
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
    sparse = family == QWEN3
    num_layers = section.count("num_hidden_layers", most=MAX_LAYERS)
    config = DecoderConfig(
        vocab_size=section.count("vocab_size", most=MAX_TOKENS),
        hidden_size=hidden_size,
        # A decoder of experts alone need not say how wide a dense layer would be.
        intermediate_size=(
            section.count("intermediate_size", most=MAX_WIDTH) if not sparse or section.has("intermediate_size") else 0
        ),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=section.count("num_key_value_heads", most=MAX_HEADS),
        head_dim=head_dim,
        rope_theta=(rope if rope.has("rope_theta") else section).number("rope_theta", 1, 1e12),
        mrope_section=(mrope_section[0], mrope_section[1], mrope_section[2]),
        rms_norm_eps=section.number("rms_norm_eps", 1e-12, 1),
        max_position_embeddings=section.count("max_position_embeddings", most=MAX_TOKENS),
        # Head and embedding belong to the thinker, so its word goes first; released files say it in text_config.
        tie_word_embeddings=(thinker if thinker.has("tie_word_embeddings") else section).flag("tie_word_embeddings"),
    )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{section.name}: num_attention_heads must be a multiple of num_key_value_heads.")
    if not sparse:
        return config
    section.expect("attention_bias", False)
    step = section.count("decoder_sparse_step", most=MAX_LAYERS)
    dense = set(section.counts("mlp_only_layers")) if section.has("mlp_only_layers") else set()
    dense |= {layer for layer in range(num_layers) if (layer + 1) % step}
    if dense and not config.intermediate_size:
        raise ConfigError(f"{section.name} lacks intermediate_size, the width of its dense layers.")
    config = replace(
        config,
        qk_norm=True,
        mrope_interleaved=True,
        num_experts=section.count("num_experts", most=512),
        experts_per_token=section.count("num_experts_per_tok", most=512),
        expert_size=section.count("moe_intermediate_size", most=MAX_WIDTH),
        normalise_experts=section.flag("norm_topk_prob"),
        dense_layers=tuple(sorted(layer for layer in dense if layer < num_layers)),
    )
    if config.experts_per_token > config.num_experts:
        raise ConfigError(f"{section.name}: num_experts_per_tok must not exceed num_experts.")
    return config


def _dtype(root: _Section, thinker: _Section) -> torch.dtype:
    for section in (thinker, thinker.section("text_config"), root):
        for key in ("dtype", "torch_dtype"):
            if section.has(key):
                name = str(section.values[key]).removeprefix("torch.")
                if name not in DTYPES:
                    raise ConfigError(f"{section.name}.{key} = {name!r:.80} is not one of {', '.join(DTYPES)}.")
                return DTYPES[name]
    return torch.bfloat16  # what every public checkpoint of the family stores


def _stop_token_ids(folder: Path, root: _Section, thinker: _Section) -> tuple[int, ...]:
    sections = [thinker, thinker.section("text_config"), root]
    if (folder / "generation_config.json").is_file():
        sections.insert(0, _Section(_read_json(folder / "generation_config.json"), "generation_config.json"))
    for section in sections:
        if section.has("eos_token_id"):
            value = section.values["eos_token_id"]
            return section.counts("eos_token_id") if isinstance(value, list) else (section.token("eos_token_id"),)
    return ()


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; a checkpoint folder holds config.json.")
    try:
        return read_object(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not readable JSON: {error}.") from None
