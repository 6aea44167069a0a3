"""What command lines take: options, their values and their help. Needs no PyTorch."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

CLIP = Path(__file__).parent / "demo" / "clip.mp4"
QUESTION = """What was on screen when the low tone sounded?
A. a purple circle
B. an orange ring
C. a red triangle
D. a green star
Answer with the letter."""
"""Of the clip, for the checkpoint `tiny`: it is D."""

DTYPES = ("bfloat16", "float16", "float32")
KV = ("layerwise", "pruned")
METHODS = (
    "seats",
    "random",
    "fastv",
    "fastv-om",
    "visionzip",
    "visionzip-om",
    "divprune",
    "divprune-om",
    "dycoke",
    "fastvid",
    "omnizip",
    "dash",
    "evs",
    "vidcom2",
    "pyramiddrop",
    "pyramiddrop-om",
)
"""As in `omni.config`, `omni.engine` and `seats.methods`: what they list is behind PyTorch."""

TINY = "tiny knows its own small world alone, coloured shapes and tones (its clip: omni/demo/clip.mp4)"
OUT_OF_MEMORY = (
    "the device ran out of memory: lower --retention, --fps, --max-frames or --max-pixels, or take --dtype bfloat16."
)


def open_streams() -> None:
    """For a program's beginning: a standard stream that is closed (`2>&-`) leads nowhere, so that what is meant for
    one never goes to another; and what stdout's encoding lacks is escaped, as stderr does, not an error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # of what a notebook puts in its place
            cast(Any, stream).reconfigure(errors="backslashreplace")


def model_parser() -> argparse.ArgumentParser:
    """What to load, for command lines that take it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--model", default="Qwen/Qwen2.5-Omni-7B", help=f"hub id, folder or tiny (default: %(default)s); {TINY}"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub id")
    parser.add_argument("--adapter", help="LoRA to merge into the weights: hub id or folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own, float32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="compile first: pays off over many requests, not one")
    return parser


def methods() -> tuple[str, ...]:
    """METHODS, and what a program that calls `main` registered before (`seats.register`)."""
    return sys.modules["seats.methods"].names() if "seats.methods" in sys.modules else METHODS


def settings_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """How to answer a question, for command lines that take it."""
    parser = kind(add_help=False)
    parser.add_argument("--fps", type=_positive(float), default=2.0, help="frames per second (default: %(default)s)")
    parser.add_argument("--max-frames", type=_positive(int), default=768, help="per clip (default: %(default)s)")
    parser.add_argument("--max-pixels", type=_positive(int), help="per frame or picture (default: the family's)")
    parser.add_argument("--start", type=_not_negative, help="of clips and sounds, in seconds (default: 0)")
    parser.add_argument("--end", type=_positive(float), help="of clips and sounds, in seconds (default: their end)")
    parser.add_argument(
        "--retention", type=ratio, default=0.35, help="share of video and audio tokens to keep (default: %(default)s)"
    )
    parser.add_argument("--video-ratio", type=ratio, help="of video alone (default: what --retention implies)")
    parser.add_argument("--audio-ratio", type=ratio, help="of sound alone (default: what --retention implies)")
    parser.add_argument(
        "--method", choices=methods(), default="seats", metavar="NAME", help=f"what to keep by: {', '.join(methods())}"
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
    parser.add_argument("--top-p", type=ratio, help="draw from the likeliest tokens that share this probability")
    parser.add_argument("--top-k", type=_positive(int), help="draw from so many of the likeliest tokens")
    parser.add_argument("--seed", type=_seed, help="makes sampling repeatable")
    parser.add_argument("--system", help="system message (default: the chat template's)")
    parser.add_argument("--no-audio", action="store_true", help="leave out the sound of clips")
    return parser


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


def ratio(text: str) -> float:
    value = _number(float, text)
    if not 0 < value <= 1:
        meant = f", not {text}: {value / 100:g}?" if 2 <= value <= 100 else ""
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1{meant}")
    return value


def _seed(text: str) -> int:
    value = _number(int, text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError("must be from 0 to 2^63 - 1")
    return value
