"""Asks one process a thousand short questions: its memory must stay, its answers must be those of a fresh model.

    python scripts/stress/soak.py                                                # 1000 requests over 30 plans, eagerly
    python scripts/stress/soak.py --compile --requests 240 --plans 2 --graphs 3    # graphs are made, and make room
    python scripts/stress/soak.py --questions 1000 --clips 50            # media and prefixes are kept, and make room

A plan is a clip of its own length and frame size and a question of its own length; it is asked about with every token
and with SEATS. All plans are gone through again and again, each in a run of twelve requests: eight at a time from
threads, then one by one, of which the last is closed after its first piece. What is expected comes from another
process, which loads the model anew for each answer and compiles nothing. Fails where an answer differs, or where memory
grows by more than `GROWTH` after a third of the requests. By then every plan was met, as many graphs are held as may
be, and the allocator has given every thread the memory that it uses again.

With --questions a model that keeps what it made of media and prompts, `--reuse` MiB at most, is asked questions drawn
at random about clips drawn at random, one to four together, at several retentions and with both caches. One in ten is
also asked of a model that keeps nothing: the tokens must be the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from long_clip import make_long_clip
from measure_load import MIB, memory

import omni
from omni.engine import KV
from omni.inputs import Inputs
from omni.model import Omni
from omni.runtime import graphs
from seats import preset_for

GROWTH = 64 * MIB
"""Of a compiled model: some 1 MiB for each graph that is made again stays with PyTorch (2.13), in its guards."""
RUN, THREADS = 12, 8
WORDS = "What happens here while the high tone sounds and which shape is on the wall when it stops?".split()


def make_plans(count: int, seconds: Sequence[int] = (1, 2, 3, 4, 6)) -> list[dict[str, Any]]:
    """Clips, by seconds and pixels, and questions; the same for a count."""
    sizes = [(56, 56), (84, 56), (56, 112), (112, 84), (84, 112), (112, 112)]
    choices = list(product(seconds, sizes))
    if not 0 < count <= len(choices):
        raise SystemExit(f"there may be 1 to {len(choices)} clips.")
    drawn = random.Random(0).sample(choices, count)
    return [
        {"seconds": seconds, "width": width, "height": height, "question": " ".join(WORDS[: 2 + number % len(WORDS)])}
        for number, (seconds, (width, height)) in enumerate(drawn)
    ]


def write_clips(plans: list[dict[str, Any]], folder: Path) -> None:
    for number, plan in enumerate(plans):
        make_long_clip(folder / f"{number}.mp4", plan["seconds"], plan["width"], plan["height"])


def request(model: Omni, folder: Path, plan: dict[str, Any], number: int, question: str) -> Inputs:
    content = [{"type": "video", "video": str(folder / f"{number}.mp4")}, {"type": "text", "text": question}]
    # The ceiling lowers the floor that a model of real clips has: short requests.
    return model.prepare([{"role": "user", "content": content}], max_pixels=plan["width"] * plan["height"])


def answer(model: Omni, folder: Path, plan: dict[str, Any], number: int, selects: bool, *, closed: bool = False) -> Any:
    """Tokens of an answer, from the file on; None of one that is closed after its first piece."""
    inputs = request(model, folder, plan, number, plan["question"])
    options = {"seats": preset_for(model.config) if selects else None, "max_new_tokens": 8, "stop_token_ids": []}
    if closed:
        stream = model.stream(inputs, **options)
        next(stream, None)
        stream.close()
        return None
    return model.generate(inputs, **options).tokens


def fresh_answers(checkpoint: Path, folder: Path, plans: list[dict[str, Any]]) -> Iterator[list[int]]:
    """Each by a model that has answered nothing before: of every plan with all tokens, then with SEATS."""
    for (number, plan), selects in product(enumerate(plans), (False, True)):
        yield answer(omni.load(checkpoint, device="cpu"), folder, plan, number, selects)


def soak(model: Omni, folder: Path, plans: list[dict[str, Any]], expected: list[list[int]], requests: int) -> bool:
    """Prints memory, rate and how many answers differed; whether all is as it should be."""
    passes = math.ceil(requests / (RUN * len(plans)))
    settled = math.ceil(passes / 3)
    draw = random.Random(1)
    done = closed = differed = 0
    resident = [resident_memory()]
    started = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        for each_pass in range(passes):
            order = list(enumerate(plans))
            draw.shuffle(order)
            for number, plan in order:
                # In turns with and without selection, eight of a run at the same time, the last one closed.
                jobs = [(model, folder, plan, number, index % 2 == 1) for index in range(RUN)]
                answers = list(pool.map(lambda job: answer(*job), jobs[:THREADS]))
                answers += [answer(*job, closed=job is jobs[-1]) for job in jobs[THREADS:]]
                for job, tokens in zip(jobs, answers, strict=True):
                    done, closed = done + 1, closed + (tokens is None)
                    differed += tokens is not None and tokens != expected[2 * number + job[-1]]
            resident.append(resident_memory())
            print(f"  pass {each_pass + 1}: {done} requests, {resident[-1] / MIB:.0f} MiB", flush=True)
    seconds = time.perf_counter() - started
    grown = resident[-1] - resident[settled]
    holds = not differed and grown <= GROWTH
    print(
        f"{done} requests over {len(plans)} plans, {closed} of them closed: {done / seconds:.2f} a second\n"
        f"memory: {resident[0] / MIB:.0f} MiB at the start, {resident[settled] / MIB:.0f} after a third of them, "
        f"{resident[-1] / MIB:.0f} at the end ({grown / MIB:+.1f}, bound {GROWTH / MIB:.0f})\n"
        f"answers that differed from a fresh model's: {differed}\n{'holds' if holds else 'DOES NOT HOLD'}"
    )
    return holds


PARTS, SAMPLED = 12, 10
"""Lines that tell memory over time; one question of so many is asked of the other model, too."""


def ask_again(model: Omni, plain: Omni, folder: Path, plans: list[dict[str, Any]], questions: int) -> bool:
    """Prints memory and what was kept and used again; whether all is as it should be."""
    draw = random.Random(2)
    methods = [None, preset_for(model.config), preset_for(model.config, 0.10)]
    done = sampled = differed = reused = asked_tokens = 0
    resident = [resident_memory()]
    started = time.perf_counter()
    while done < questions:
        number, plan = draw.choice(list(enumerate(plans)))
        texts = [" ".join(draw.sample(WORDS, draw.randint(1, len(WORDS)))) for _ in range(draw.randint(1, 4))]
        options = {"seats": draw.choice(methods), "kv": draw.choice(KV), "max_new_tokens": 8, "stop_token_ids": []}
        found = model.generate([request(model, folder, plan, number, text) for text in texts], **options)
        for text, generation in zip(texts, found, strict=True):
            done += 1
            reused += generation.stats.reused_tokens
            asked_tokens += sum(generation.stats.tokens.values())
            if done % SAMPLED == 0:
                expected = plain.generate(request(plain, folder, plan, number, text), **options).tokens
                sampled, differed = sampled + 1, differed + (generation.tokens != expected)
        if done >= len(resident) * questions / PARTS:
            resident.append(resident_memory())
            kept = model.engine.kept.nbytes, model.processor.reader.kept.nbytes
            told = ", ".join(f"{nbytes / MIB:.1f} MiB of {what}" for nbytes, what in zip(kept, KEPT, strict=True))
            share = reused / asked_tokens
            print(f"  {done} questions, {resident[-1] / MIB:.0f} MiB; {told}; {share:.0%} of tokens reused", flush=True)
    seconds = time.perf_counter() - started
    settled = math.ceil(len(resident) / 3)
    grown = resident[-1] - resident[settled]
    holds = not differed and grown <= GROWTH and reused > 0
    print(
        f"{done} questions about {len(plans)} clips: {done / seconds:.2f} a second, "
        f"{reused / asked_tokens:.0%} of their tokens reused\n"
        f"memory: {resident[0] / MIB:.0f} MiB at the start, {resident[settled] / MIB:.0f} after a third of them, "
        f"{resident[-1] / MIB:.0f} at the end ({grown / MIB:+.1f}, bound {GROWTH / MIB:.0f})\n"
        f"of {sampled} answers {differed} differed from those of a model that keeps nothing\n"
        f"{'holds' if holds else 'DOES NOT HOLD'}"
    )
    return holds


KEPT = ("encoders' outputs and prefixes", "frames and spectra")


def resident_memory() -> int:
    gc.collect()
    return memory()["VmRSS"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--plans", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--family", choices=("qwen2.5", "qwen3"), default="qwen2.5", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="run compiled: each plan is compiled twice")
    parser.add_argument("--graphs", type=int, default=graphs.MOST_GRAPHS, help="held at most (default: %(default)s)")
    parser.add_argument("--questions", type=int, help="drawn at random, instead of --requests")
    parser.add_argument("--clips", type=int, default=50, help="that --questions are about (default: %(default)s)")
    parser.add_argument("--reuse", type=int, default=8, help="MiB that --questions may keep (default: %(default)s)")
    parser.add_argument("--fresh", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    again = options.questions is not None
    plans = make_plans(options.clips, range(1, 10)) if again else make_plans(options.plans)
    if options.fresh:
        print(json.dumps(list(fresh_answers(*options.fresh, plans))))
        return
    with tempfile.TemporaryDirectory() as name:
        checkpoint, clips = Path(name) / "checkpoint", Path(name)
        make = Path(__file__).parents[1] / "make_checkpoint.py"
        subprocess.run([sys.executable, make, checkpoint, "--family", options.family], check=True)
        write_clips(plans, clips)
        if again:
            load = partial(omni.load, checkpoint, device="cpu")
            model = load(compile=options.compile, reuse=options.reuse * MIB)
            sys.exit(not ask_again(model, load(reuse=0), clips, plans, options.questions))
        command = [sys.executable, __file__, "--plans", str(options.plans), "--fresh", str(checkpoint), str(clips)]
        expected = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        graphs.MOST_GRAPHS = options.graphs
        model = omni.load(checkpoint, device="cpu", compile=options.compile)
        sys.exit(not soak(model, clips, plans, expected, options.requests))


if __name__ == "__main__":
    main()
