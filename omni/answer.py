"""What the command line does with a question, once it is known to be one: everything here needs PyTorch."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from statistics import median
from typing import Any

from omni.arguments import CLIP, QUESTION, TINY, settings_parser
from omni.config import ConfigError, OmniConfig
from omni.engine import Prefill
from omni.inputs import InputError, Inputs
from omni.kept import explain
from omni.model import Generation, Omni, load, load_to_ask
from omni.processing.chat_template import ChatTemplateError
from omni.processing.frames import vision_sizes
from omni.processing.media import MediaError, fetched, kind_of
from omni.processing.tokenizer import TokenizerError
from omni.show import check_path, show
from seats.method import Method
from seats.methods import method_for
from weights import CheckpointError

ERRORS = (CheckpointError, ConfigError, TokenizerError, ChatTemplateError, MediaError, InputError)
"""Every way in which a request can be wrong; anything else is a fault of this library."""


class OutputError(Exception):
    """Stdout takes no more: a full disk, a terminal that is gone."""


def put(text: str = "", end: str = "\n") -> None:
    """Prints at once. Raises OutputError, and BrokenPipeError where nobody reads any more."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"stdout takes no answer: {error.strerror or error}.") from None


def answer(options: argparse.Namespace) -> None:
    """Prints an answer, and on stderr what it took. Raises one of ERRORS, OutputError or MemoryError."""
    if options.show:
        check_path(options.show, options.media)
    sampling_of(options)  # what it refuses is known before gigabytes are read
    with ExitStack() as files:
        options.media = [files.enter_context(fetched(source, urls=options.urls)) for source in options.media]
        conversation = messages(options)  # and a file that is not there
        model = load_model(options)
        started = time.perf_counter()
        inputs = prepare(model, conversation, options)
        media_seconds = time.perf_counter() - started
    if options.model == "tiny" and not of_its_world(inputs):
        print(NOT_ITS_WORLD, file=sys.stderr)
    prefills: list[Prefill] = []
    answer = model.stream(
        inputs,
        on_prefill=prefills.append,
        on_thought=None if options.json else print_thought,
        **answering(options, model.config),
    )
    generation = _print_stream(answer, quiet=options.json)
    if options.json:
        stats = {**asdict(generation.stats), "media_seconds": media_seconds}
        settings = {name: getattr(options, name) for name in vars(settings_parser().parse_args([]))}
        asked = {"model": options.model, "device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
        report = {**report_of(generation), "stats": stats, **asked, "settings": settings}
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        put(json.dumps(report, ensure_ascii=codecs.lookup(encoding).name != "utf-8"))
    elif generation.thought:
        print(file=sys.stderr)  # ends the line of the thought
    warn_of_cut_thought(generation)
    print(figures(generation, media_seconds), file=sys.stderr)
    if options.explain:
        print(explain(inputs, prefills[0]), file=sys.stderr)
    if options.show:
        show(
            inputs,
            prefills[0],
            options.show,
            sizes=vision_sizes(model.folder, model.config),
            question=options.question,
            answer=generation.text,
            settings=described(options),
        )


def load_model(options: argparse.Namespace) -> Omni:
    return load_to_ask(
        options.model,
        temperature=options.temperature,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        adapter=options.adapter,
        compile=options.compile,
        progress=sys.stderr.isatty(),
    )


def prepare(model: Omni, conversation: list[dict[str, Any]], options: argparse.Namespace) -> Inputs:
    return model.prepare(
        conversation,
        use_audio_in_video=not options.no_audio,
        fps=options.fps,
        max_frames=options.max_frames,
        max_pixels=options.max_pixels,
        on_frame=_reading_bar() if sys.stderr.isatty() else None,
        encode_while_reading=True,
        seats=method_of(options, model.config),
    )


def answering(options: argparse.Namespace, config: OmniConfig) -> dict[str, Any]:
    """The options that make an answer of a request, as `Omni.stream` takes them."""
    return {
        "max_new_tokens": options.max_new_tokens,
        **sampling_of(options),
        "seats": method_of(options, config),
        "kv": options.kv,
    }


def described(options: argparse.Namespace) -> str:
    """What a page of `omni.show` says of the command."""
    return f"{options.model}, retention {options.retention:g}, kv {options.kv}, fps {options.fps:g}"


NOT_ITS_WORLD = f"omni-generate: {TINY}: what it says of anything else means nothing."


def print_thought(piece: str) -> None:
    print(piece, end="", file=sys.stderr, flush=True)


def warn_of_cut_thought(generation: Generation) -> None:
    if generation.thought_cut:
        print(
            f"omni-generate: the thought was cut off at {len(generation.tokens)} tokens, before any answer: "
            "raise --max-new-tokens.",
            file=sys.stderr,
        )


TIMES = 5
"""Prefills of the demonstration whose median is shown."""


def demo() -> None:
    """Asks `tiny` about its clip and prints answers and figures side by side, a line for each retention."""
    model = load("tiny", reuse=0)  # each prefill is timed as if nothing was known
    content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": QUESTION}]
    inputs = model.prepare([{"role": "user", "content": content}])
    put(f"{CLIP}\n{QUESTION}\n")
    put(
        f"{'tokens kept':12} {'answer':8} {'tokens by layers':28} {'multiply-accumulates':>21} "
        f"{'first prefill':>14} {f'median of {TIMES}':>13}"
    )
    for retention in (1.0, 0.35, 0.10):
        selection = None if retention == 1 else method_for("seats", model.config, retention)
        # A first call costs more: memory is taken, code is read.
        first, *seconds = (model.prefill(inputs, seats=selection).prefill_seconds for _ in range(1 + TIMES))
        answer = model.generate(inputs, seats=selection, max_new_tokens=32)
        stats = answer.stats
        kept = " > ".join(map(str, stats.segments))
        macs = f"{stats.macs / 1e9:.2f} G"
        fewer = f"{macs} ({stats.macs_ratio:.1f}x fewer)" if selection else macs
        put(
            f"{retention:<12.0%} {answer.text:8} {kept:28} {fewer:>21} "
            f"{1000 * first:11.0f} ms {1000 * median(seconds):10.0f} ms"
        )
    put("\nNothing was compiled: for a single question that takes longer than the answer.")
    put('Ask about a clip of yours: python -m omni.generate --model Qwen/Qwen2.5-Omni-7B clip.mp4 "What happens?"')


def of_its_world(inputs: Inputs) -> bool:
    """Whether a request looks like what `tiny` was trained on: one clip of `scripts/tiny/world.py`'s frame size."""
    grids = inputs.video_grid_thw
    return grids is not None and grids[:, 1:].tolist() == [[8, 8]] and inputs.image_grid_thw is None


def messages(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The command line as a conversation in the chat format."""
    content = [media_part(source, options) for source in options.media]
    check_stretch(content, options)
    content.append({"type": "text", "text": options.question})
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": content}]


def media_part(source: Any, options: argparse.Namespace) -> dict[str, Any]:
    """A medium as a part of a message, with the stretch that the options name. Raises MediaError."""
    kind = kind_of(source)
    stretch = {} if kind == "image" else {f"{kind}_start": options.start, f"{kind}_end": options.end}
    return {"type": kind, kind: source, **stretch}


def check_stretch(media: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Raises InputError where --start or --end have nothing to cut."""
    if not (options.start is None and options.end is None) and all(part["type"] == "image" for part in media):
        raise InputError("start and end are of clips and sounds, and there is none.")


def method_of(options: argparse.Namespace, config: OmniConfig) -> Method | None:
    """None where every token is kept, whatever the model: one too shallow for the stages can still do that."""
    given = {options.video_ratio, options.audio_ratio} - {None}
    if options.retention == 1 and given <= {1.0}:
        return None
    ratios = {"video_ratio": options.video_ratio, "audio_ratio": options.audio_ratio}
    try:
        return method_for(options.method, config, options.retention, **ratios)
    except ValueError as error:
        raise InputError(f"token selection cannot run: {error} --retention 1 keeps every token.") from None


def report_of(generation: Generation) -> dict[str, Any]:
    """An answer without its figures, as JSON has it."""
    names = ("text", "thought", "thought_cut", "tokens")
    return {name: getattr(generation, name) for name in names}


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that choose among tokens, as `Omni.generate` takes them."""
    names = [name for name in ("top_p", "top_k") if getattr(options, name) is not None]
    if names and options.temperature == 0:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"{flags} is for sampling: add a --temperature above 0, or checkpoint.")
    return {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}


def _print_stream(answer: Any, *, quiet: bool) -> Generation:
    while True:
        try:
            piece = next(answer)
        except StopIteration as stop:
            if not quiet:
                put()
            return stop.value
        if not quiet:
            put(piece, end="")


def figures(generation: Generation, media_seconds: float) -> str:
    """Tokens by modality, time to the first token in its parts, rate after it; before it what each stage kept."""
    stats = generation.stats
    tokens = ", ".join(f"{count} {name}" for name, count in stats.tokens.items() if count)
    first = media_seconds + stats.encode_seconds + stats.prefill_seconds
    kept, whole = "", sum(stats.tokens.values())
    if stats.segments != [whole]:
        steps = " > ".join(map(str, stats.segments))
        kept = f"kept: {steps} of {whole} tokens, {stats.macs_ratio:.1f} times fewer multiply-accumulates\n"
    return (
        f"{kept}tokens: {tokens}; first token after {first:.2f} s (media {media_seconds:.2f}, "
        f"encoders {stats.encode_seconds:.2f}, prefill {stats.prefill_seconds:.2f}); "
        f"{stats.new_tokens} new tokens, {stats.tokens_per_second:.1f} per second"
    )


def _reading_bar() -> Callable[[int, int], None]:
    """A progress bar on stderr, one per clip."""
    from tqdm import tqdm

    bars: list[Any] = []

    def on_frame(done: int, total: int) -> None:
        if not bars or bars[-1].n >= bars[-1].total:
            bars.append(tqdm(total=total, desc="Reading", unit="frame", file=sys.stderr, leave=False))
        bars[-1].update(done - bars[-1].n)
        if done == total:
            bars[-1].close()

    return on_frame
