"""Asks about a clip of an hour and prints the memory that each step takes at most.

    python scripts/stress/long_clip.py                         # writes the hour, asks at a retention that fits
    python scripts/stress/long_clip.py --family qwen3 --minutes 20

A process of its own decodes, encodes, prefills and answers with a small random checkpoint. It is asked with every token
first, which does not fit: the error names the retention that does. Small frames at a low rate: what an hour asks for is
the most frames that the model takes of a clip, at the size that it sees them, and the sound. Fails where the peak is
above `BOUND`.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from measure_load import MIB, memory

import omni
from omni.inputs import InputError
from seats import preset_for

SIZE, FPS, RATE = 96, 4, 16_000
NEW = 32
BOUND = 2048 * MIB
"""What the process may take at most for an hour: 270 MiB are libraries and model, 430 the tensors of the request (768
frames of 336 x 336 pixels as bytes, and the spectrum), the rest embeddings of 145,000 tokens, a few times over."""


def make_long_clip(path: Path, seconds: float, width: int = SIZE, height: int = SIZE) -> None:
    """A square that goes to and fro, and a tone whose height tells the minute: H.264 and AAC, in constant memory."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "g": str(30 * FPS)})
        video.width, video.height = width, height
        video.pix_fmt = "yuv420p"
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        time_of_sound = np.arange(RATE, dtype=np.float32) / RATE
        pixels = np.empty((height, width, 3), dtype=np.uint8)
        for second in range(math.ceil(seconds)):
            for number in range(second * FPS, (second + 1) * FPS):
                pixels[:] = (20, 60, second * 255 // math.ceil(seconds))
                x, y = (round((side - 24) * (0.5 + 0.4 * math.sin(number / 40))) for side in (width, height))
                pixels[y : y + 24, x : x + 24] = (240, 200, 40)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, FPS)
                file.mux(video.encode(frame))
            tone = 0.3 * np.sin(2 * np.pi * (200 + 10 * (second // 60)) * time_of_sound)
            block = av.AudioFrame.from_ndarray(tone[None].astype(np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, second * RATE, Fraction(1, RATE)
            file.mux(audio.encode(block))
        file.mux(video.encode())
        file.mux(audio.encode())


def ask(folder: Path, clip: Path) -> bool:
    """Answers in this process and prints time and peak of every step; whether all stay within `BOUND`."""
    begun = begin()
    model = omni.load(folder, device="cpu")
    peaks = [report("load", begun)]

    begun = begin()
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens?"}]
    inputs = model.prepare([{"role": "user", "content": content}])
    peaks.append(report("decode", begun))

    options = {"max_new_tokens": NEW, "stop_token_ids": []}
    retention = 1.0
    try:
        model.generate(inputs, **options)
    except InputError as error:
        print(f"  every token: {error}")
        retention = float(re.findall(r"at retention ([\d.]+)", str(error))[0])

    begun = begin()
    stats = model.generate(inputs, seats=preset_for(model.config, retention), **options).stats
    peaks.append(report("answer", begun))
    print(
        f"  retention {retention:g}: {' > '.join(map(str, stats.segments))} tokens kept, encoders "
        f"{stats.encode_seconds:.1f} s, prefill {stats.prefill_seconds:.1f} s, {stats.new_tokens} new tokens"
    )
    holds = max(peaks) <= BOUND
    print(f"peak {max(peaks) / MIB:.0f} MiB, bound {BOUND / MIB:.0f}: {'holds' if holds else 'DOES NOT HOLD'}")
    return holds


def begin() -> float:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    return time.perf_counter()


def report(name: str, begun: float) -> int:
    """Bytes that the process has taken at most since `begin`."""
    peak, now = memory()["VmHWM"], memory()["VmRSS"]
    seconds = time.perf_counter() - begun
    print(f"{name:7s}{seconds:7.1f} s, peak {peak / MIB:6.0f} MiB, then {now / MIB:6.0f}", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("qwen2.5", "qwen3"), default="qwen2.5", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the clip (default: %(default)g)")
    parser.add_argument("--ask", nargs=2, type=Path, metavar=("FOLDER", "CLIP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        sys.exit(not ask(*options.ask))
    with tempfile.TemporaryDirectory() as name:
        folder, clip = Path(name) / "checkpoint", Path(name) / "clip.mp4"
        make = Path(__file__).parents[1] / "make_checkpoint.py"
        subprocess.run([sys.executable, make, folder, "--family", options.family], check=True)
        begun = time.perf_counter()
        make_long_clip(clip, 60 * options.minutes)
        seconds, size = time.perf_counter() - begun, clip.stat().st_size / MIB
        print(f"{options.minutes:g} minutes written in {seconds:.1f} s, {size:.0f} MiB", flush=True)
        # A process of its own, whose peak is none of the writing.
        sys.exit(subprocess.run([sys.executable, __file__, "--ask", folder, clip]).returncode)


if __name__ == "__main__":
    main()
