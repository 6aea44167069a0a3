"""Adapters: what PEFT's LoRA adds to a checkpoint's tensors, merged into the weights while they load.

An adapter is a folder with adapter_config.json and adapter_model.safetensors (PEFT's `utils/save_and_load.py`): of each
adapted module two factors, lora_A (rank, in) and lora_B (out, rank), whose product B · A times a scale is added to its
weight (arXiv 2106.09685, section 4.1; the rank-stabilised scale is of arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from weights.checkpoint import CheckpointError, StoredTensor, listed, read_tensors
from weights.files import read_object
from weights.load import LowRank
from weights.names import Layout, released_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OTHER_PARTS = ("talker.", "token2wav.", "code2wav.")

# Settings of PEFT's LoraConfig that change nothing in what is merged: which modules were trained follows from the
# tensors, the rest is about training, or read below.
_HARMLESS = set(
    "auto_mapping base_model_name_or_path peft_type peft_version task_type revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config corda_config lora_ga_config "
    "qalora_group_size target_parameters runtime_config ensure_weight_tying unsloth_fixed".split()
)
Targets = dict[str, tuple[int | None, slice | None]]
"""Tensor → of which expert it is, and which rows of that expert's part."""

Patterns = list[tuple[re.Pattern[str], Any]]
"""What a module's name must match, and the setting that it has then."""

MAX_PATTERNS = 50_000
"""More than the largest thinker has modules, one expert at a time."""
MAX_CHOICES = 4 * 10**8
"""Ways in which all patterns of a table together may try to match all names: minutes at most."""

MAX_PATTERN_LENGTH = 10_000
MAX_ALPHA = 1e9

_INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")
"""Beginnings of training that leave the base's weights as they are."""


def base_of(folder: Path) -> str | None:
    """The base that the adapter in a folder is for, "unnamed" where it does not say; None for no adapter."""
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        named = read_object(folder / CONFIG_FILE).get("base_model_name_or_path")
    except ValueError:
        named = None
    return named if isinstance(named, str) and named else "unnamed"


def read_adapter(folder: Path, layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LowRank]:
    """What an adapter adds, by the name of the checkpoint's tensor.

    layout, shapes: of the checkpoint. Names may begin with `base_model.model.` and `thinker.` or not, and be spelled in
    any layout. What adapts other parts of the model is left out. Raises CheckpointError, which lists all that is wrong,
    for what is no plain LoRA of linear layers and convolutions, or does not fit.
    """
    try:
        config = read_object(folder / CONFIG_FILE)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read: {error}.") from None
    problems = _unsupported(config)
    if not (folder / WEIGHTS_FILE).is_file():
        others = sorted(file.name for file in folder.glob("adapter_model*"))
        problems.append(f"{WEIGHTS_FILE} is absent" + (f", {others[0]} is not read" if others else "") + ".")
        raise listed(f"The adapter in {folder} is not supported:", problems)
    pairs: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in read_tensors(folder, WEIGHTS_FILE).items():
        module = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|base_layer)\.weight", name)
        if (module[1] if module else name.removeprefix("base_model.model.")).startswith(OTHER_PARTS):
            continue
        if module is None:
            problems.append(f"{name!r} is not one of a plain LoRA's factors.")
        else:
            pairs.setdefault(module[1], {})[module[2]] = tensor
    patterns: dict[str, Patterns] = {}
    for table in ("rank_pattern", "alpha_pattern"):
        try:
            patterns[table] = _compiled(config.get(table), len(pairs))
        except ValueError as error:
            problems.append(f"{table} {error}.")
            patterns[table] = []
    deltas: dict[str, LowRank] = {}
    for module_name, factors in pairs.items():
        try:
            found = _deltas(module_name, factors, pairs.keys(), config, patterns, layout, shapes)
            if found.keys() & deltas.keys():
                raise ValueError("is there twice, under two spellings")
            deltas |= found
        except ValueError as error:
            problems.append(f"{module_name!r} {error}.")
    if not pairs and not problems:
        problems.append(f"{WEIGHTS_FILE} adapts nothing of the thinker.")
    if problems:
        raise listed(f"The adapter in {folder} does not fit or is not supported:", problems)
    return deltas


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """What the settings say that a product of two factors does not do."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type = {config.get('peft_type')!r:.40}: only 'LORA' is supported.")
    if config.get("bias", "none") != "none":
        problems.append(f"bias = {config['bias']!r:.40}: only 'none' is supported.")
    if type(config.get("use_rslora") or False) is not bool:
        problems.append(f"use_rslora = {config['use_rslora']!r:.40}: it must be true or false.")
    if config.get("init_lora_weights") not in _INITIAL:
        problems.append(
            f"init_lora_weights = {config['init_lora_weights']!r:.40} changes the base, too: convert the adapter "
            "to plain LoRA when saving it (PEFT's path_initial_model_for_weight_conversion)."
        )
    for key, value in config.items():
        if key not in _HARMLESS and value not in (None, False, [], {}, ""):
            problems.append(f"{key} = {value!r:.80} is not supported: merge it with PEFT and load what that saves.")
    return problems


def _deltas(
    module: str,
    factors: Mapping[str, StoredTensor],
    modules: Collection[str],
    config: Mapping[str, Any],
    patterns: Mapping[str, Patterns],
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, LowRank]:
    """The tensors that a module's factors adapt, and what is added to them. Raises ValueError, a phrase."""
    if missing := sorted({"lora_A", "lora_B"} - factors.keys()):
        raise ValueError(f"has no {' and no '.join(missing)}")
    # PEFT saves a head that is adapted along, and takes that one when it loads.
    right, left, base = factors["lora_A"], factors["lora_B"], factors.get("base_layer")
    if module.removesuffix(".base_layer").endswith(".mlp.experts"):
        module = f"{module.removesuffix('.base_layer')}.{_expert_parameter(module, modules, config)}"
        targets, shape, experts = _of_experts(released_name(module) or "", layout, shapes)
    else:
        released = released_name(f"{module}.weight")
        target = layout.spell(released) if released else ""
        targets = {target: (None, None)}
        shape, experts = shapes.get(target, ()), 0
    if not shape:
        raise ValueError("is no module whose weight this checkpoint holds by itself")
    if base is not None and base.shape != shape:
        raise ValueError(f"has a base of {base.shape}, for a weight of {shape}")
    ranks = right.shape[0] if right.shape else 0
    fits = (left.shape[:1], left.shape[1:2], math.prod(left.shape[2:])) == (shape[:1], (ranks,), 1)
    if len(shape) < 2 or not ranks or ranks % max(experts, 1) or not fits or right.shape[1:] != shape[1:]:
        raise ValueError(f"has factors of {left.shape} and {right.shape}, for a weight of {shape}")
    rank = ranks // max(experts, 1)
    stated = _of_module(patterns["rank_pattern"], module, config.get("r"))
    alpha = _of_module(patterns["alpha_pattern"], module, config.get("lora_alpha"))
    if stated != rank:
        raise ValueError(f"has factors of rank {rank}, {CONFIG_FILE} says {stated!r:.40}")
    if type(alpha) not in (int, float) or not abs(alpha) <= MAX_ALPHA:
        raise ValueError(f"has no alpha up to {MAX_ALPHA:g}: {CONFIG_FILE} says {alpha!r:.40}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return {
        target: LowRank(left, right, scale, base, experts, expert, rows) for target, (expert, rows) in targets.items()
    }


def _expert_parameter(module: str, modules: Collection[str], config: Mapping[str, Any]) -> str:
    """Which parameter of a layer of experts PEFT wrapped under a module's name.

    It wraps them in the order in which the layer has them, one around the other (`lora.ParamWrapper`).
    """
    if module.endswith(".base_layer"):
        return "gate_up_proj"
    if f"{module}.base_layer" in modules:
        return "down_proj"
    listed = config.get("target_parameters")
    ends = {str(name).rpartition(".")[2] for name in listed} if isinstance(listed, list) else set()
    if len(found := ends & {"gate_up_proj", "down_proj"}) != 1:
        raise ValueError(f"adapts a parameter that target_parameters in {CONFIG_FILE} does not tell")
    return found.pop()


def _of_experts(
    released: str, layout: Layout, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Targets, tuple[int, ...], int]:
    """The tensors that hold a fused parameter of experts, with the expert and the rows of each; shape of one expert's
    part; how many experts."""
    if (target := layout.spell(released)) in shapes:
        return {target: (None, None)}, shapes[target][1:], shapes[target][0]
    experts, _, parameter = released.rpartition(".")
    parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
    targets: Targets = {}
    shape: tuple[int, ...] = ()
    count = 0
    while layout.spell(f"{experts}.{count}.{parts[0]}.weight") in shapes:
        start = 0
        for part in parts:
            target = layout.spell(f"{experts}.{count}.{part}.weight")
            targets[target] = count, slice(start, start + shapes[target][0])
            start += shapes[target][0]
        shape = start, *shapes[target][1:]
        count += 1
    return targets, shape, count


def _of_module(patterns: Patterns, module: str, default: Any) -> Any:
    """A setting of one module: of the first pattern that matches its name, as PEFT's `get_pattern_key` has it."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _compiled(table: Any, names: int) -> Patterns:
    """The patterns of `rank_pattern` or `alpha_pattern`, which match the end of a name from one of its dots on.

    names: how many there are. Foreign regular expressions: those that could try more than MAX_CHOICES ways are refused.
    Raises ValueError, a phrase.
    """
    table = table or {}
    if not isinstance(table, Mapping):
        raise ValueError("must be an object")
    if len(table) > MAX_PATTERNS:
        raise ValueError(f"has {len(table)} patterns, more than {MAX_PATTERNS}")
    choices = 0.0
    for key in table:
        choices += _choices(key) * max(names, 1)
        if choices > MAX_CHOICES:
            raise ValueError(
                f"has patterns that can match in too many ways, to {key!r:.80}: write the modules' names instead"
            )
    try:
        return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in table.items()]
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"has a key that is no pattern ({error!s:.80})") from None


def _choices(pattern: str) -> float:
    """At most in how many ways a regular expression can try to match a module's name, which has up to 100 characters.

    Each repetition may take every length, each option be there or not, each group be any of its alternatives. Repeated
    groups multiply without bound, and what a group may begin with can hide them.
    """
    bare = re.sub(r"\\.", "_", f"({pattern})", flags=re.DOTALL)
    if len(pattern) > MAX_PATTERN_LENGTH or re.search(r"\)[*+{]|\(\?(?!:)", bare):
        return math.inf
    ways = 100.0 ** min(len(re.findall(r"[*+{]", bare)), 20) * 2.0 ** min(bare.count("?"), 32)
    for group in re.split(r"[()]", bare):
        ways = min(ways * (1 + group.count("|")), 1e30)
    return ways
