"""python -m omni.generate [media ...] "question": the answer on stdout, thoughts, progress and figures on stderr.

Bare, it asks the checkpoint `tiny` about a clip, both of which are shipped, with every token and with fewer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from omni.config import DTYPES, ConfigError, OmniConfig
from omni.engine import KV, Prefill
from omni.inputs import InputError
from omni.model import Generation, load
from omni.processing.chat import ChatTemplateError
from omni.processing.frames import vision_sizes
from omni.processing.media import MediaError, kind_of
from omni.processing.tokenizer import TokenizerError
from omni.show import check_path, explain, show
from seats.method import Method
from seats.methods import NAMES, method_for
from weights import CheckpointError

CLIP = Path(__file__).parent / "demo" / "clip.mp4"
QUESTION = """What was on screen when the low tone sounded?
A. a purple circle
B. an orange ring
C. a red triangle
D. a green star
Answer with the letter."""
"""Of the clip, for the checkpoint `tiny`: it is D."""

ERRORS = (CheckpointError, ConfigError, TokenizerError, ChatTemplateError, MediaError, InputError)
"""Every way in which a request can be wrong; anything else is a fault of this library."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one question; returns the exit status: 0, 1 for a bad request, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = argument_parser().parse_intermixed_args(arguments) if arguments else None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            warnings.filterwarnings("ignore", module=r"torch\.")  # what its compiler says of itself
            demo() if options is None else _answer(options)
    except ERRORS as error:
        print(f"omni-generate: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError):
        print(
            "omni-generate: the device ran out of memory: lower --retention, --fps, --max-frames or --max-pixels, "
            "or take --dtype bfloat16.",
            file=sys.stderr,
        )
        return 1
    except BrokenPipeError:
        # The reader of stdout went away (`| head`): nothing more to say, not even at interpreter exit.
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        print("\nomni-generate: interrupted.", file=sys.stderr)  # on a line of its own, after a bar or half an answer
        return 130
    return 0


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omni-generate",
        usage='%(prog)s [options] [media ...] "question"',
        description="Answer a question about clips, pictures and sounds. Without arguments: a demonstration.",
        parents=[model_parser(), settings_parser()],
    )
    parser.add_argument("media", nargs="*", help="clips, pictures or sounds, told apart by their content")
    parser.add_argument("question")
    parser.add_argument("--show", metavar="PATH", help="draw what each stage kept: a page (.html) or a picture (.png)")
    parser.add_argument("--explain", action="store_true", help="print what each stage kept as a table, on stderr")
    parser.add_argument("--json", action="store_true", help="print answer and figures as one JSON object")
    return parser


def model_parser() -> argparse.ArgumentParser:
    """What to load, for command lines that take it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", default="Qwen/Qwen2.5-Omni-7B", help="hub id or folder (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="compile first: pays off over many requests, not one")
    return parser


def settings_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """How to answer a question, for command lines that take it."""
    parser = kind(add_help=False)
    parser.add_argument("--fps", type=_positive(float), default=2.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--max-frames", type=_positive(int), default=768, help="per clip (default: %(default)s)")
    parser.add_argument("--max-pixels", type=_positive(int), help="per frame or picture (default: the family's)")
    parser.add_argument(
        "--retention", type=_ratio, default=0.35, help="share of video and audio tokens to keep (default: %(default)s)"
    )
    parser.add_argument("--video-ratio", type=_ratio, help="of video alone (default: what --retention implies)")
    parser.add_argument("--audio-ratio", type=_ratio, help="of sound alone (default: what --retention implies)")
    parser.add_argument(
        "--method", choices=NAMES, default="seats", metavar="NAME", help=f"what to keep by: {', '.join(NAMES)}"
    )
    parser.add_argument(
        "--kv",
        choices=KV,
        default="layerwise",
        help="what decoding sees of video and sound: in each layer what it attended to (default), or, pruned as in the "
        "paper, what is left after the last: fewer bytes, for answers of one letter; answers in words suffer",
    )
    parser.add_argument("--max-new-tokens", type=_positive(int), default=512, help="default: %(default)s")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        default=0.0,
        help="0 is greedy (default); checkpoint takes its generation config's, with top-p and top-k",
    )
    parser.add_argument("--top-p", type=_ratio, help="draw from the likeliest tokens that share this probability")
    parser.add_argument("--top-k", type=_positive(int), help="draw from so many of the likeliest tokens")
    parser.add_argument("--seed", type=_seed, help="makes sampling repeatable")
    parser.add_argument("--system", help="system message (default: the chat template's)")
    parser.add_argument("--no-audio", action="store_true", help="leave out the sound of clips")
    return parser


def messages(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The command line as a conversation in the chat format."""
    content: list[dict[str, str]] = []
    for source in options.media:
        kind = kind_of(source)
        content.append({"type": kind, kind: source})
    content.append({"type": "text", "text": options.question})
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": content}]


def _answer(options: argparse.Namespace) -> None:
    if options.show:
        check_path(options.show)
    conversation = messages(options)  # a file that is not there is known before gigabytes are read
    model = load(
        options.model,
        device=_device(options.device),
        dtype=DTYPES[options.dtype] if options.dtype else None,
        revision=options.revision,
        compile=options.compile,
        progress=True,
    )
    started = time.perf_counter()
    inputs = model.prepare(
        conversation,
        use_audio_in_video=not options.no_audio,
        fps=options.fps,
        max_frames=options.max_frames,
        max_pixels=options.max_pixels,
        on_frame=_decoding_bar(),
    )
    media_seconds = time.perf_counter() - started
    method = method_of(options, model.config)
    prefills: list[Prefill] = []
    answer = model.stream(
        inputs,
        on_prefill=prefills.append,
        on_thought=None if options.json else lambda piece: print(piece, end="", file=sys.stderr, flush=True),
        max_new_tokens=options.max_new_tokens,
        **sampling_of(options),
        seats=method,
        kv=options.kv,
    )
    generation = _print_stream(answer, quiet=options.json)
    if options.json:
        stats = {**asdict(generation.stats), "media_seconds": media_seconds}
        print(json.dumps({**report_of(generation), "stats": stats}, ensure_ascii=False))
    elif generation.thought:
        print(file=sys.stderr)  # ends the line of the thought
    if generation.thought_cut:
        print(
            f"omni-generate: the thought was cut off at {len(generation.tokens)} tokens, before any answer: "
            "raise --max-new-tokens.",
            file=sys.stderr,
        )
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
            settings=f"{options.model}, retention {options.retention:g}, kv {options.kv}, fps {options.fps:g}",
        )


def demo() -> None:
    """Asks `tiny` about its clip and prints answers and figures side by side, a line for each retention."""
    model = load("tiny")
    content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": QUESTION}]
    inputs = model.prepare([{"role": "user", "content": content}])
    print(f"{CLIP}\n{QUESTION}\n")
    print(f"{'tokens kept':12} {'answer':24} {'tokens by layers':32} {'multiply-accumulates':>21} {'prefill':>9}")
    for retention in (1.0, 0.35, 0.10):
        selection = None if retention == 1 else method_for("seats", model.config, retention)
        model.prefill(inputs, seats=selection)  # so that what a first call costs is not in the figures
        answer = model.generate(inputs, seats=selection, max_new_tokens=32)
        stats = answer.stats
        kept = " > ".join(map(str, stats.segments))
        fewer = (
            f"{stats.macs / 1e9:.2f} G ({stats.macs_ratio:.1f}x fewer)" if selection else f"{stats.macs / 1e9:.2f} G"
        )
        print(f"{retention:<12.0%} {answer.text:24} {kept:32} {fewer:>21} {1000 * stats.prefill_seconds:6.0f} ms")
    print("\nNothing was compiled: for a single question that takes longer than the answer.")
    print('Ask about a clip of yours: python -m omni.generate --model Qwen/Qwen2.5-Omni-7B clip.mp4 "What happens?"')


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
                print(flush=True)
            return stop.value
        if not quiet:
            print(piece, end="", flush=True)


def figures(generation: Generation, media_seconds: float) -> str:
    """Tokens by modality, time to the first token in its parts, rate after it; before it what each stage kept."""
    stats = generation.stats
    tokens = ", ".join(f"{count} {name}" for name, count in stats.tokens.items() if count)
    first = media_seconds + stats.encode_seconds + stats.prefill_seconds
    kept = ""
    if len(stats.segments) > 1:
        steps = " > ".join(map(str, stats.segments))
        kept = f"kept: {steps} tokens, {stats.macs_ratio:.1f} times fewer multiply-accumulates\n"
    return (
        f"{kept}tokens: {tokens}; first token after {first:.2f} s (decode {media_seconds:.2f}, "
        f"encoders {stats.encode_seconds:.2f}, prefill {stats.prefill_seconds:.2f}); "
        f"{stats.new_tokens} new tokens, {stats.tokens_per_second:.1f} per second"
    )


def _decoding_bar() -> Callable[[int, int], None]:
    """A progress bar on stderr, one per clip."""
    from tqdm import tqdm

    bars: list[Any] = []

    def on_frame(done: int, total: int) -> None:
        if not bars or bars[-1].n >= bars[-1].total:
            bars.append(tqdm(total=total, desc="Decoding", unit="frame", file=sys.stderr, leave=False))
        bars[-1].update(done - bars[-1].n)
        if done == total:
            bars[-1].close()

    return on_frame


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"omni-generate: warning: {message}", file=sys.stderr)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here ({reason}); try --device cpu.") from None
    return device


def _number(kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r:.80}") from None


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = _number(kind, text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    return parse


def _not_negative(text: str) -> float:
    value = _number(float, text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return value


def _temperature(text: str) -> float | str:
    return text if text == "checkpoint" else _not_negative(text)


def _ratio(text: str) -> float:
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be above 0 and at most 1")
    return value


def _seed(text: str) -> int:
    value = _number(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
