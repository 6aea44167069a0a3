"""Prefill, encoders and decode beside transformers (SDPA), same random weights, same threads, in one run.

    python scripts/bench.py                    # about 0.5 B parameters, float32, on the CPU
    python scripts/bench.py --family qwen3     # about 0.5 B active, of 1.1 B
    python scripts/bench.py prefill decode --repeats 3 --tokens 500
    python scripts/bench.py stages             # token selection against our own full prefill
    python scripts/bench.py compiled           # compiled against eager, first calls included

Writes benchmarks/results/<machine>-<family>-<date>.json, of `stages` and `compiled` one of their own, and renders
benchmarks/README.md from all result files. Every row alternates its sides and takes medians; the machine's matrix and
memory rates are measured in the same run, before and after, so that a figure can be read as a share of what the
machine can do.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omni
import seats
from omni import stages
from omni.cache import Cache
from omni.decoder import Layer
from omni.runtime.blank import blank_clip
from seats.plan import plan_without_selection

ROOT = Path(__file__).parents[1]
ROWS = ("prefill", "experts", "vision", "vision ragged", "audio", "decode")

DECODER = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 8,
    "hidden_size": 640,
    "intermediate_size": 1728,
    "num_heads": 8,
}
AUDIO = {
    "d_model": 640,
    "encoder_layers": 8,
    "encoder_attention_heads": 10,
    "encoder_ffn_dim": 2560,
}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen2.5": {
        "text_config": DECODER,
        "vision_config": {**VISION, "fullatt_block_indexes": [3, 7], "out_hidden_size": 896},
        "audio_config": {**AUDIO, "n_window": 100, "output_dim": 896},
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
            "rope_scaling": {"mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_type": "default"},
        },
        "vision_config": {**VISION, "deepstack_visual_indexes": [1, 3, 5], "out_hidden_size": 1024},
        "audio_config": {**AUDIO, "downsample_hidden_size": 240, "output_dim": 1024},
    },
}


def build_pair(family: str) -> tuple[Any, omni.Omni]:
    """transformers' thinker and ours with the same random weights, ours read from the other's files."""
    import transformers

    transformers.logging.set_verbosity_error()
    thinker = {**SIZES[family], "tie_word_embeddings": True, "vision_start_token_id": 151652}
    if family == "qwen3":
        thinker |= {"audio_end_token_id": 151670, "audio_start_token_id": 151669, "position_id_per_seconds": 13}
        config = transformers.Qwen3OmniMoeConfig(thinker_config=thinker, enable_audio_output=False)
        kind = transformers.Qwen3OmniMoeForConditionalGeneration
    else:
        config = transformers.Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False)
        kind = transformers.Qwen2_5OmniForConditionalGeneration
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    reference = kind(config).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        return reference.thinker, omni.load(folder, device="cpu", dtype=torch.float32)


def alternate(sides: list[Callable[[], float]], repeats: int) -> list[list[float]]:
    """Seconds of each side in each round; the sides take turns, so that a slow minute slows both."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(repeats):
        for side, seconds in zip(sides, times, strict=True):
            seconds.append(side())
    return times


def against(theirs: Callable[[], float], ours: Callable[[], float], repeats: int) -> dict[str, float]:
    """Medians of both sides, and the median of the rounds' ratios, with the lowest and the highest."""
    their_seconds, our_seconds = alternate([theirs, ours], repeats)
    ratios = sorted(their / our for their, our in zip(their_seconds, our_seconds, strict=True))
    return {
        "rounds": repeats,
        "speedup": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "their_seconds": statistics.median(their_seconds),
        "our_seconds": statistics.median(our_seconds),
    }


def timed(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return run


def measure_ceilings(repeats: int) -> dict[str, float]:
    """Matrix rate (float32, 2048³) and read rate (one matrix-vector product over 1 GiB) of this machine."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    big, x = torch.randn(65536, 4096), torch.randn(65536)
    work = [timed(lambda: a @ b), timed(lambda: x @ big)]
    alternate(work, 1)
    product, read = map(statistics.median, alternate(work, max(5, repeats)))
    return {"matrix_gflops": 2 * 2048**3 / product / 1e9, "read_gb_per_s": big.nbytes / read / 1e9}


def bench_prefill(reference: Any, model: omni.Omni, tokens: int, repeats: int) -> dict[str, float]:
    """A prompt through the decoder to the logits of its last position, cache written."""
    decoder = model.config.decoder
    x = torch.randn(1, tokens, decoder.hidden_size)
    positions = torch.arange(tokens).expand(3, 1, -1)

    def theirs() -> Tensor:
        hidden = reference.model.language_model(inputs_embeds=x, position_ids=positions, use_cache=True)
        return reference.lm_head(hidden.last_hidden_state[:, -1])

    def ours() -> Tensor:
        return whole_prefill(model, x, positions).logits

    row = compare(theirs, ours, repeats)
    return {**row, "our_gflops": 2 * prefill_work(model, [tokens], None) / row["our_seconds"] / 1e9}


def whole_prefill(model: omni.Omni, x: Tensor, positions: Tensor) -> stages.Staged:
    """Every token of a prompt, (1, S, hidden) at (3, 1, S), through the decoder."""
    prompt = stages.whole_prompt(x.shape[1])
    plan = plan_without_selection(model.config.decoder.num_layers, prompt.counts((1.0, 1.0)))
    return stages.prefill(
        model.thinker, plan, stages.fill_pool(plan, prompt, positions[:, 0], x, None, {}), pruned=True
    )


def active_weights(model: omni.Omni) -> float:
    """Weights of the decoder's layers that one token meets: of experts, its share."""
    decoder, total = model.config.decoder, 0.0
    for index, layer in enumerate(model.thinker.layers):
        weights = sum(parameter.numel() for parameter in layer.parameters())
        if decoder.is_sparse(index):
            experts = layer.mlp.gate_up.numel() + layer.mlp.down.numel()
            weights -= experts * (1 - decoder.experts_per_token / decoder.num_experts)
        total += weights
    return total


def bench_experts(reference: Any, model: omni.Omni, tokens: int, repeats: int) -> dict[str, float]:
    """One layer of experts, beside transformers' and beside one dense product of as many multiplications."""
    decoder = model.config.decoder
    x = torch.randn(1, tokens, decoder.hidden_size)
    dense = torch.nn.Linear(decoder.hidden_size, 3 * decoder.experts_per_token * decoder.expert_size, bias=False)
    theirs, ours = reference.model.language_model.layers[0].mlp, model.thinker.layers[0].mlp
    row = compare(lambda: theirs(x), lambda: ours(x), repeats)
    alternate([timed(lambda: dense(x))], 1)
    dense_row = against(timed(lambda: dense(x)), timed(lambda: ours(x)), repeats)
    flops = 2 * tokens * dense.weight.numel()
    return {**row, "our_gflops": flops / row["our_seconds"] / 1e9, "of_dense": dense_row["speedup"]}


def bench_vision(reference: Any, model: omni.Omni, side: int, repeats: int) -> dict[str, float]:
    """Eight temporal grids of side × side patches."""
    grid = torch.tensor([[8, side, side]])
    patches = torch.randn(8 * side * side, model.config.vision.patch_dim)
    return compare(
        lambda: reference.model.visual(patches, grid_thw=grid).pooler_output,
        lambda: model.thinker.vision(patches, grid)[0][0],
        repeats,
    )


def bench_audio(reference: Any, model: omni.Omni, repeats: int) -> dict[str, float]:
    """Thirty seconds of sound."""
    mel, length = torch.randn(1, 128, 3000), torch.tensor([3000])
    return compare(
        lambda: reference.model.audio_tower(mel[0], feature_lens=length).last_hidden_state,
        lambda: model.thinker.audio(mel, length)[0],
        repeats,
    )


def bench_decode(reference: Any, model: omni.Omni, repeats: int, prompt: int = 256, new: int = 16) -> dict[str, float]:
    """Seconds per new token, greedy, after a prompt; both sides feed on their own picks."""
    decoder = model.config.decoder
    x = torch.randn(1, prompt, decoder.hidden_size)
    positions = torch.arange(prompt).expand(3, 1, -1)
    steps = [torch.full((3, 1, 1), prompt + step) for step in range(new)]
    picks: dict[str, list[int]] = {}

    def theirs() -> float:
        language = reference.model.language_model
        out = language(inputs_embeds=x, position_ids=positions, use_cache=True)
        logits, tokens = reference.lm_head(out.last_hidden_state[:, -1]), []
        started = time.perf_counter()
        for step in steps:
            tokens.append(logits.argmax(-1))
            out = language(
                input_ids=tokens[-1][:, None],
                position_ids=step,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            logits = reference.lm_head(out.last_hidden_state[:, -1])
        seconds = time.perf_counter() - started
        picks["theirs"] = torch.cat(tokens).tolist()
        return seconds / new

    def ours() -> float:
        staged = whole_prefill(model, x, positions)
        cache = Cache.of_prefill(staged.keys, staged.values, staged.lengths, new)
        logits, tokens = staged.logits, []
        started = time.perf_counter()
        for step in steps:
            tokens.append(logits.argmax(-1))
            logits = model.thinker.decode(tokens[-1], step[0, :, 0], cache)
        seconds = time.perf_counter() - started
        picks["ours"] = torch.cat(tokens).tolist()
        return seconds / new

    alternate([theirs, ours], 1)
    if picks["theirs"] != picks["ours"]:
        raise SystemExit("the two sides do not pick the same tokens: nothing to compare.")
    row = against(theirs, ours, repeats)
    read = 4 * active_weights(model) + model.thinker.embedding.weight.nbytes  # the tied head
    rates = {f"{side}_read_gb_per_s": read / row[f"{side}_seconds"] / 1e9 for side in ("our", "their")}
    return {**row, **rates}


RETENTIONS = (0.35, 0.25, 0.15, 0.10)


def clip_request(model: omni.Omni, tokens: int) -> omni.Inputs:
    """About `tokens` tokens: a clip of noise with sound, a temporal grid of 144 tokens a second, and 100 of text."""
    per_second = 144 + model.config.audio.token_count(100)
    return blank_clip(model.config, max(1, (tokens - 100) // per_second))


class Clock:
    """Adds up the seconds spent inside some functions, which it wraps in place; inside one another they count once."""

    def __init__(self, places: list[tuple[Any, str]]) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False
        for owner, name in places:
            setattr(owner, name, self._clocked(name, getattr(owner, name)))

    def _clocked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            started, self.inside = time.perf_counter(), True
            result = function(*args, **kwargs)
            self.inside = False
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return run

    def read(self) -> dict[str, float]:
        seconds, self.seconds = self.seconds, {}
        return seconds


def prefill_work(model: omni.Omni, segments: list[int], config: seats.SeatsConfig | None) -> float:
    """Multiply-accumulates that are really done: attention below the diagonal, the head on the last token alone.

    The paper counts the whole square and the head on every token (`seats.prefill_macs`): of a small model with a large
    vocabulary, much that neither side does.
    """
    decoder = model.config.decoder
    ends = [decoder.num_layers]
    if config is not None and config.late_layer is not None:
        ends = [*config.drop_layers, config.late_layer - 1, decoder.num_layers]
    total, start = float(decoder.hidden_size * decoder.vocab_size), 0
    weights = active_weights(model) / decoder.num_layers
    for tokens, end in zip(segments, ends, strict=True):
        total += (end - start) * tokens * (weights + tokens * decoder.num_heads * decoder.head_dim)
        start = end
    return total


def bench_stages(model: omni.Omni, tokens: int, repeats: int) -> dict[str, Any]:
    """Prefill after the encoders, at every retention and with every token; and the encoders, with and without weights.

    Selection is everything that a full prefill does not do: Stage I, relevance, budgets, gathering of what is left.
    """
    inputs = clip_request(model, tokens)
    configs = [None, *(seats.preset_for(model.config, retention) for retention in RETENTIONS)]
    full = model.prefill(inputs)
    clock = Clock(
        [
            (stages, "fill_pool"),
            (stages, "select_before_decoder"),
            (Layer, "query_and_keys"),
            (stages, "relevance"),
            (stages, "select"),
            (stages, "compact"),
            (stages.Sequence, "take"),
            (stages, "prune"),
        ]
    )
    seconds: list[list[float]] = [[] for _ in configs]
    parts: list[list[dict[str, float]]] = [[] for _ in configs]
    prefills = [model.prefill(inputs, seats=config) for config in configs]
    clock.read()
    for _ in range(repeats):
        for side, config in enumerate(configs):
            seconds[side].append(model.prefill(inputs, seats=config).prefill_seconds)
            parts[side].append(clock.read())
    rows, median_seconds = {}, [statistics.median(own) for own in seconds]
    for side, retention in enumerate((1.0, *RETENTIONS)):
        ratios = sorted(whole / own for whole, own in zip(seconds[0], seconds[side], strict=True))
        shares = [sum(part.values()) / own for part, own in zip(parts[side], seconds[side], strict=True)]
        macs = prefills[side].full_macs / prefills[side].macs
        work = prefill_work(model, full.segments, None) / prefill_work(model, prefills[side].segments, configs[side])
        rows[f"{retention:.0%}"] = {
            "rounds": repeats,
            "macs_ratio": macs,
            "speedup": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "of_macs_ratio": statistics.median(ratios) / macs,
            "work_ratio": work,
            "of_work_ratio": statistics.median(ratios) / work,
            "gflops": 2 * prefill_work(model, prefills[side].segments, configs[side]) / median_seconds[side] / 1e9,
            "selection_share": statistics.median(shares),
            "seconds": median_seconds[side],
            "selection_seconds": {
                name: statistics.median(part[name] for part in parts[side]) for name in parts[side][0]
            },
            "segments": prefills[side].segments,
        }
    encode = [timed(lambda weigh=weigh: model.thinker.encode(inputs, weigh=weigh)) for weigh in (False, True)]
    alternate(encode, 1)
    plain, weighing = map(statistics.median, alternate(encode, repeats))
    return {"tokens": full.tokens, "rows": rows, "encoders": {"plain_seconds": plain, "weighing_seconds": weighing}}


def bench_compiled(reference: Any, model: omni.Omni, tokens: int, repeats: int) -> dict[str, Any]:
    """Compiled beside eager and, where it has the same part, transformers: seconds, and those of the first call."""
    inputs = clip_request(model, tokens)
    tokens = inputs.input_ids.shape[1]
    graphs = omni.Omni(model.thinker, model.folder, compile=True)
    decoder = model.config.decoder
    x, positions = torch.randn(1, tokens, decoder.hidden_size), torch.arange(tokens).expand(3, 1, -1)
    grid, mel, length = torch.tensor([[8, 24, 24]]), torch.randn(1, 128, 3000), torch.tensor([3000])
    patches = torch.randn(8 * 576, model.config.vision.patch_dim)
    call = graphs.engine.compiled.call
    rows: dict[str, list[Callable[[], float]]] = {
        f"prefill at {retention:.0%}": [
            lambda side=side, seats_config=seats_config: side.prefill(inputs, seats=seats_config).prefill_seconds
            for side in (graphs, model)
        ]
        for retention in (1.0, *RETENTIONS)
        for seats_config in (None if retention == 1 else seats.preset_for(model.config, retention),)
    }
    rows["prefill at 100%"].append(
        timed(lambda: reference.model.language_model(inputs_embeds=x, position_ids=positions, use_cache=True))
    )
    rows["vision"] = [
        timed(lambda: model.thinker.vision(patches, grid, call=call)),
        timed(lambda: model.thinker.vision(patches, grid)),
        timed(lambda: reference.model.visual(patches, grid_thw=grid)),
    ]
    rows["audio"] = [
        timed(lambda: model.thinker.audio(mel, length, call=call)),
        timed(lambda: model.thinker.audio(mel, length)),
        timed(lambda: reference.model.audio_tower(mel[0], feature_lens=length)),
    ]
    question = blank_clip(model.config, 1.0)

    def decode(side: omni.Omni) -> float:
        stats = side.generate(question, max_new_tokens=17, stop_token_ids=[]).stats
        return stats.decode_seconds / (stats.new_tokens - 1)

    rows["decode, per token"] = [lambda: decode(graphs), lambda: decode(model)]
    lowest = seats.preset_for(model.config, RETENTIONS[-1])
    rows["first token at 10%"] = [
        timed(lambda side=side: side.prefill(inputs, seats=lowest)) for side in (graphs, model)
    ]
    encoded = {weigh: model.thinker.encode(inputs, weigh=weigh) for weigh in (False, True)}
    encode, found = model.thinker.encode, {}
    for name, sides in rows.items():
        # Rows of the prefill leave the encoders out: they have rows of their own.
        only_prefill = name.startswith("prefill")
        model.thinker.encode = (lambda *_, weigh, call: encoded[weigh]) if only_prefill else encode
        first = timed(sides[0])()
        alternate(sides, 1)
        seconds = alternate(sides, repeats)
        ratios = sorted(eager / own for own, eager in zip(seconds[0], seconds[1], strict=True))
        found[name] = {
            "rounds": repeats,
            "speedup": statistics.median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "first_call_seconds": first,
            "seconds": statistics.median(seconds[0]),
            "eager_seconds": statistics.median(seconds[1]),
        }
        if len(sides) > 2:
            found[name]["their_seconds"] = statistics.median(seconds[2])
            against_theirs = [their / own for own, their in zip(seconds[0], seconds[2], strict=True)]
            found[name]["of_theirs"] = statistics.median(against_theirs)
        print_rows({name: found[name]})
    return {"tokens": model.prefill(inputs, seats=lowest).tokens, "rows": found, "compiled": True}


def compare(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    torch.testing.assert_close(ours(), theirs(), atol=1e-3, rtol=1e-3)  # and warms both up
    return against(timed(theirs), timed(ours), repeats)


def run(options: argparse.Namespace) -> dict[str, Any]:
    reference, model = build_pair(options.family)
    benches: dict[str, Callable[[], dict[str, float]]] = {
        "prefill": lambda: bench_prefill(reference, model, options.tokens, options.repeats),
        "experts": lambda: bench_experts(reference, model, options.tokens, 3 * options.repeats),
        # Near parity, where noise would decide: more rounds.
        "vision": lambda: bench_vision(reference, model, 24, 2 * options.repeats),
        "vision ragged": lambda: bench_vision(reference, model, 20, 3 * options.repeats),
        "audio": lambda: bench_audio(reference, model, 5 * options.repeats),
        "decode": lambda: bench_decode(reference, model, options.repeats),
    }
    with torch.inference_mode():
        before = measure_ceilings(options.repeats)
        if options.rows == ["stages"]:
            title = "token selection against our own full prefill"
            found = bench_stages(model, options.tokens, options.repeats)
            print_rows(found["rows"])
        elif options.rows == ["compiled"]:
            title = "compiled against eager"
            found = bench_compiled(reference, model, options.tokens, options.repeats)
        else:
            title, rows = "thinker against transformers", {}
            for name in options.rows:
                if name == ("experts" if options.family == "qwen2.5" else "vision ragged"):
                    continue  # no experts here, no windows there
                rows[name] = benches[name]()
                print_rows({name: rows[name]})
            found = {"tokens": options.tokens, "rows": rows}
        after = measure_ceilings(options.repeats)
    return {
        "bench": f"{title}, {options.family}-omni layout",
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "dtype": "float32",
        "parameters": sum(parameter.numel() for parameter in model.thinker.parameters()),
        "repeats": options.repeats,
        "ceilings": {"before": before, "after": after},
        **found,
    }


def print_rows(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        figures = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(f"{name}: {row['speedup']:.2f}x", figures, flush=True)


def machine() -> str:
    """The processor's name, as short as a file name."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = f"{models[0]} x{len(models)}" if models else name
    return name


def render(results: list[dict[str, Any]]) -> str:
    """benchmarks/README.md from all result files, newest first."""
    lines = [
        "# Benchmarks",
        "",
        "Rendered by `scripts/bench.py` from `results/`; do not edit. All sides run in turns on one machine with the",
        "same random weights and threads; a speed-up is the median of the rounds' ratios, seconds are medians.",
        "Repeat with `.venv/bin/python scripts/bench.py` and `… stages`, `… compiled`.",
    ]
    for result in sorted(results, key=lambda r: (r["date"], r["bench"]), reverse=True):
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        ceilings = result["ceilings"]
        rates = [
            f"{ceilings['before'][key]:.0f} before, {ceilings['after'][key]:.0f} after"
            for key in ("matrix_gflops", "read_gb_per_s")
        ]
        tokens = result["tokens"]
        if isinstance(tokens, dict):
            tokens = ", ".join(f"{count} {name}" for name, count in tokens.items() if count)
        lines += [
            "",
            f"## {result['bench']}: {result['machine']}, {result['date']}",
            "",
            f"{result['parameters'] / 1e6:.0f} M parameters, {result['dtype']}, {result['threads']} threads, "
            f"{tokens} prompt tokens; {versions}.",
            f"The machine's own rates: matrix product in GFLOP/s {rates[0]}; memory read in GB/s {rates[1]}.",
            "",
            *table(result),
        ]
    return "\n".join(lines) + "\n"


def table(result: dict[str, Any]) -> list[str]:
    if "encoders" in result:
        return stages_table(result)
    return compiled_table(result["rows"]) if "compiled" in result else pair_table(result["rows"])


def compiled_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| | compiled / eager speed | lowest to highest | rounds | compiled / transformers | compiled, s | eager, s "
        "| first call, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f} | {row['rounds']}"
        theirs = f"{row['of_theirs']:.2f}" if "of_theirs" in row else ""
        lines.append(
            f"| {name} | {row['speedup']:.2f} | {spread} | {theirs} | {row['seconds']:.3g} "
            f"| {row['eager_seconds']:.3g} | {row['first_call_seconds']:.3g} |"
        )
    return lines


def pair_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| | speed-up | lowest to highest | rounds | transformers, s | ours, s | ours in rates |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        rate = f"{row['our_gflops']:.0f} GFLOP/s" if "our_gflops" in row else ""
        rate += f", {row['of_dense']:.2f} of one dense product" if "of_dense" in row else ""
        rate += f"{row['our_read_gb_per_s']:.1f} GB/s" if "our_read_gb_per_s" in row else ""
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f}"
        seconds = f"{row['their_seconds']:.4g} | {row['our_seconds']:.4g}"
        lines.append(f"| {name} | {row['speedup']:.2f} | {spread} | {row['rounds']} | {seconds} | {rate} |")
    return lines


def stages_table(result: dict[str, Any]) -> list[str]:
    encoders = result["encoders"]
    lines = [
        "Prefill from embeddings to logits, all stages included. The encoders before it take "
        f"{encoders['plain_seconds']:.3g} s, and {encoders['weighing_seconds']:.3g} s where they also weigh attention "
        "for Stage I.",
        "",
        "Work is counted as both sides do it (attention below the diagonal, the head on the last token) and as the",
        "paper counts it (the whole square of attention, the head on every token that is left).",
        "",
        "| retention | tokens by segment | speed-up | lowest to highest | rounds | fewer multiply-accumulates, done "
        "| speed-up / that | by the paper's count | speed-up / that | selection's share | prefill, s | GFLOP/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["rows"].items():
        segments = " > ".join(map(str, row["segments"]))
        spread = f"{row['lowest']:.2f} to {row['highest']:.2f} | {row['rounds']}"
        lines.append(
            f"| {name} | {segments} | {row['speedup']:.2f} | {spread} | {row['work_ratio']:.2f} "
            f"| {row['of_work_ratio']:.2f} | {row['macs_ratio']:.2f} | {row['of_macs_ratio']:.2f} "
            f"| {row['selection_share']:.1%} | {row['seconds']:.3g} | {row['gflops']:.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SIZES, default="qwen2.5")
    parser.add_argument(
        "rows", nargs="*", metavar="row", help=f"some of {', '.join(ROWS)}; or stages or compiled alone"
    )
    parser.add_argument(
        "--tokens", type=int, help="prompt length: 2000 of the prefill row, 3000 of stages and compiled"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args()
    options.rows = options.rows or list(ROWS)
    alone = options.rows[0] if options.rows in (["stages"], ["compiled"]) else None
    if alone is None and (unknown := set(options.rows) - set(ROWS)):
        parser.error(f"no row {unknown.pop()!r}: choose from {', '.join(ROWS)}, or stages or compiled alone.")
    options.tokens = options.tokens or (3000 if alone else 2000)
    result = run(options)
    folder = options.results / "results"
    folder.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in result["machine"]).lower()
    kind = options.family.replace(".", "-") + (f"-{alone}" if alone else "")
    (folder / f"{name}-{kind}-{result['date']}.json").write_text(json.dumps(result, indent=1) + "\n")
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (options.results / "README.md").write_text(render(results))


if __name__ == "__main__":
    main()
