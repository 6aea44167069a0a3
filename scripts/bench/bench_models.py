"""What `bench.py` compares: our thinker and transformers', with the same random weights in the same memory."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weights
from omni import gemv
from omni.config import OmniConfig, read_config
from omni.model import tensor_names
from omni.thinker import Thinker

DECODER = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
}
INTERLEAVED = {"mrope_interleaved": True, "rope_type": "default"}
VISION = {"depth": 8, "hidden_size": 640, "intermediate_size": 1728, "num_heads": 8}
AUDIO = {"d_model": 640, "encoder_layers": 8, "encoder_attention_heads": 10, "encoder_ffn_dim": 2560}
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 8, "intermediate_size": 512}
SMALL_VISION = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4}
SMALL_AUDIO = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256}

SIZES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    # A few million parameters, to see that everything runs.
    "small": {
        "qwen2.5": {
            "text_config": {**DECODER, **SMALL},
            "vision_config": {**SMALL_VISION, "fullatt_block_indexes": [1, 3]},
            "audio_config": {**SMALL_AUDIO, "n_window": 100},
        },
        "qwen3": {
            "text_config": {
                **DECODER,
                **SMALL,
                "head_dim": 64,
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 128,
                "rope_scaling": {"mrope_section": [12, 10, 10], **INTERLEAVED},
            },
            "vision_config": {**SMALL_VISION, "deepstack_visual_indexes": [0, 1, 2]},
            "audio_config": {**SMALL_AUDIO, "downsample_hidden_size": 32},
        },
    },
    # About half a billion parameters at work, for a CPU.
    "0.5B": {
        "qwen2.5": {
            "text_config": DECODER,
            "vision_config": {**VISION, "fullatt_block_indexes": [3, 7]},
            "audio_config": {**AUDIO, "n_window": 100},
        },
        "qwen3": {
            "text_config": {
                **DECODER,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 64,
                "num_experts": 16,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 704,
                "rope_scaling": {"mrope_section": [12, 10, 10], **INTERLEAVED},
            },
            "vision_config": {**VISION, "deepstack_visual_indexes": [1, 3, 5]},
            "audio_config": {**AUDIO, "downsample_hidden_size": 240},
        },
    },
    # The released Qwen2.5-Omni-7B and Qwen3-Omni-30B-A3B: transformers' defaults where nothing is said. Of vision in
    # the former the default is not the released width (as in Qwen2.5-VL-7B).
    "full": {
        "qwen2.5": {
            "text_config": {
                "hidden_size": 3584,
                "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
            },
            "vision_config": {"hidden_size": 1280},
            "audio_config": {},
        },
        "qwen3": {
            "text_config": {
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
                "rope_scaling": {"mrope_section": [24, 20, 20], **INTERLEAVED},
            },
            "vision_config": {},
            "audio_config": {},
        },
    },
}


def make_config(family: str, size: str) -> tuple[Any, OmniConfig]:
    """transformers' configuration, and ours of the same config.json."""
    import transformers

    transformers.logging.set_verbosity_error()
    sections = SIZES[size][family]
    width, tied = sections["text_config"]["hidden_size"], size != "full"
    thinker: dict[str, Any] = {
        # Room for a clip of ten minutes with every token.
        "text_config": {"max_position_embeddings": 131072, "rope_theta": 1e6, **sections["text_config"]},
        "vision_config": {**sections["vision_config"], "out_hidden_size": width},
        "audio_config": {**sections["audio_config"], "output_dim": width},
        "vision_start_token_id": 151652,
        "tie_word_embeddings": tied,
    }
    thinker["text_config"]["tie_word_embeddings"] = tied
    if family == "qwen3":
        thinker |= {"audio_end_token_id": 151670, "audio_start_token_id": 151669, "position_id_per_seconds": 13}
        config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
        config.architectures = ["Qwen3OmniMoeForConditionalGeneration"]
    else:
        config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
        config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    config._attn_implementation = "sdpa"
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return config, read_config(Path(folder))


def make_reference(config: Any) -> nn.Module:
    """transformers' model, its parameters on `meta`."""
    import transformers

    kind = getattr(transformers, config.architectures[0])
    with parameters_on_meta():
        return kind(config).eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have parameters without memory; their buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def random_thinker(config: OmniConfig, device: torch.device, dtype: torch.dtype, std: float = 0.02) -> Thinker:
    """Weights as at the start of a training, or larger, made on the device."""
    with torch.device("meta"):
        thinker = Thinker(config)
    torch.manual_seed(0)
    for name, parameter in dict(thinker.named_parameters()).items():
        owner, _, leaf = name.rpartition(".")
        value = torch.zeros(parameter.shape, dtype=dtype, device=device)
        if parameter.dim() > 1:
            value.normal_(std=std)
        elif owner.endswith("norm"):
            value.fill_(leaf == "weight")
        setattr(thinker.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    weights.clear(thinker, tensor_names(config))
    return thinker.eval()


def share_weights(reference: nn.Module, thinker: Thinker) -> None:
    """Makes the parameters of transformers' model views of ours, whose products are fused."""
    parameters = dict(thinker.named_parameters())
    views = {
        without_wrappers(public): destination.view(parameters[destination.parameter])
        for public, destination in tensor_names(thinker.config).items()
    }
    for name in dict(reference.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        key = without_wrappers(name)
        if leaf in ("gate_up_proj", "down_proj") and key not in views:  # the experts of a layer as one tensor
            layer = key.removeprefix("thinker.").split(".mlp.")[0]
            value: Tensor = parameters[f"{layer}.mlp.{leaf.removesuffix('_proj')}"]
        elif leaf == "weight" and owner.endswith("lm_head") and key not in views:
            value = parameters["embedding.weight"]  # tied
        else:
            value = views[key]
        reference.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    reference.to(thinker.embedding.weight.device)  # the buffers


def without_wrappers(name: str) -> str:
    """transformers nests the public names deeper, one version not as another."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def as_loaded(thinker: Thinker, *, compiled: bool) -> Thinker:
    """The thinker as `omni.load` lays it out on this machine: on a CPU perhaps with tall matrices transposed."""
    weight = thinker.embedding.weight
    if weight.device.type != "cpu" or not gemv.for_model(thinker, weight.dtype, compiled=compiled).transposed:
        return thinker
    own = copy.deepcopy(thinker)
    for parameter in own.parameters():
        if parameter.dim() == 2 and parameter.shape[0] >= parameter.shape[1]:
            parameter.data = parameter.data.t().contiguous().t()
    return own


@contextmanager
def in_float32(module: nn.Module, layers: nn.ModuleList, method: str) -> Iterator[None]:
    """Inside, a model computes in float32 with the weights that it has.

    Its layers, run by `method`, one at a time, so that a model that fills most of a GPU has room; the rest at once.
    """

    @contextmanager
    def widened(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        kept = [(parameter, parameter.data) for parameter in parameters]
        try:
            for parameter, value in kept:
                parameter.data = value.float()
            yield
        finally:
            for parameter, value in kept:
                parameter.data = value

    def widening(layer: nn.Module) -> Callable[..., Any]:
        run = getattr(layer, method)

        def widened_run(*arguments: Any, **options: Any) -> Any:
            with widened(layer.parameters()):
                return run(*arguments, **options)

        return widened_run

    inside = {id(parameter) for parameter in layers.parameters()}
    for layer in layers:
        setattr(layer, method, widening(layer))
    try:
        with widened([parameter for parameter in module.parameters() if id(parameter) not in inside]):
            yield
    finally:
        for layer in layers:
            delattr(layer, method)


def their_prefill(language: Any, head: nn.Module, tokens: int, *, compiled: bool) -> Callable[[], Tensor]:
    """transformers' decoder from embeddings to the logits of the next token, the cache filled."""
    weight = head.weight
    x = torch.randn(1, tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    positions = torch.arange(tokens, device=weight.device).expand(3, 1, -1)

    def run(x: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = language(inputs_embeds=x, position_ids=positions, use_cache=True)
        cached = [part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)]
        return head(found.last_hidden_state[:, -1]), cached

    run = torch.compile(run, dynamic=False) if compiled else run

    without_gradients = torch.no_grad() if compiled else torch.inference_mode()
    return without_gradients(lambda: run(x, positions)[0])


def their_decode(
    language: Any, head: nn.Module, prompt: int, new: int, *, compiled: bool, wait: Callable[[], None]
) -> Callable[[], float]:
    """Seconds of each of transformers' steps after so many tokens, fed on its own picks.

    compiled: with its static cache, one graph for all steps, on a GPU replayed: as its `generate` does by itself with
    `cache_implementation="static"`. Else with the cache that grows.
    """
    from transformers import StaticCache

    device = head.weight.device
    ids = torch.zeros(1, prompt, dtype=torch.long, device=device)
    cache = StaticCache(config=language.config, max_cache_len=prompt + new) if compiled else None

    def step(token: Tensor, position: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        found = language(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)
        return head(found.last_hidden_state[:, -1:]).argmax(-1), found.past_key_values

    def picked(token: Tensor, position: Tensor) -> Tensor:
        return step(token, position, cache)[0]

    mode = "reduce-overhead" if device.type == "cuda" else None
    replayed = torch.compile(picked, fullgraph=True, dynamic=False, mode=mode)

    def decode() -> float:
        if cache is not None:
            cache.reset()
        token, grown = step(ids, None, cache)
        for index in range(new):
            if index == 2:  # by then a step is recorded
                wait()
                started = time.perf_counter()
            if cache is not None:
                position = torch.full((3, 1, 1), prompt + index, device=device)
                token = replayed(token, position).clone()
            else:
                token, grown = step(token, None, grown)
            token.tolist()
        return (time.perf_counter() - started) / (new - 2)

    without_gradients = torch.no_grad() if compiled else torch.inference_mode()
    return without_gradients(decode)
