"""Measures reading: the frames of a clip that a model sees, against decoding all of it and scaling them one by one.

    python scripts/bench/bench_media.py                     # 64 s of 1080p and of 720p, H.264 with B frames
    python scripts/bench/bench_media.py --seconds 8 --heights 1080 --bframes 0 --gop 30   # as many telephones write it

Sides run in turns; both give the same pixels, which is checked. The clip is made first. `decord` is a side where it is
installed. The benchmark's row `media` is this.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_sides import Measured, target
from torch import Tensor

from omni.processing.frames import VisionSizes, sample_indices
from omni.processing.mel import SAMPLE_RATE

RATE = 30


def write_clip(
    path: Path, seconds: int, height: int, *, gop: int = 250, bframes: int = 3, sound: Tensor | None = None
) -> None:
    """A texture that moves, with some noise: about what a telephone writes in bits. sound: (n,) at 16 kHz."""
    import av

    width = height * 16 // 9 // 2 * 2
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(20, 220, (3, height // 12, width // 12), np.uint8))
    smooth = torch.nn.functional.interpolate(coarse[None].float(), (height + 256, width + 256), mode="bicubic")[0]
    texture = smooth.clamp(20, 220).byte().permute(1, 2, 0).contiguous().numpy()
    noise = rng.integers(-8, 9, (height + 64, width + 64, 1), np.int8).view(np.uint8)
    with av.open(str(path), "w") as file:
        options = {"preset": "veryfast", "bf": str(bframes), "g": str(gop)}
        stream = file.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", gop
        stream.bit_rate = 6 * width * height
        heard = file.add_stream("aac", rate=SAMPLE_RATE, layout="mono") if sound is not None else None
        for number in range(seconds * RATE):
            down, across = (round(128 + 120 * turn(number / 40)) for turn in (np.sin, np.cos))
            shown = texture[down : down + height, across : across + width]
            aside, below = rng.integers(64, size=2)
            shown = shown + noise[below : below + height, aside : aside + width]
            frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if heard is not None and sound is not None:
            block = av.AudioFrame.from_ndarray(sound[None].float().numpy(), format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = SAMPLE_RATE, 0, Fraction(1, SAMPLE_RATE)
            file.mux([*heard.encode(block), *heard.encode()])


def plain(path: Path, wanted: list[int], size: tuple[int, int]) -> Tensor:
    """Decodes all, on all cores; takes and scales by Pillow what is wanted."""
    import av
    from PIL import Image

    frames = torch.empty(len(wanted), 3, *size, dtype=torch.uint8)
    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"
        taken = {index: place for place, index in enumerate(wanted)}
        for number, frame in enumerate(file.decode(video=0)):
            if number in taken:
                picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
                frames[taken[number]] = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return frames


def by_decord(path: Path, wanted: list[int], size: tuple[int, int]) -> Tensor:
    """decord's frames, scaled by torch's bicubic: its pixels are others."""
    import decord  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from torch.nn.functional import interpolate

    frames = torch.from_numpy(decord.VideoReader(str(path)).get_batch(wanted).asnumpy()).permute(0, 3, 1, 2)
    scaled = torch.empty(len(wanted), 3, *size, dtype=torch.uint8)
    for some, into in zip(frames.split(8), scaled.split(8), strict=True):
        into.copy_(interpolate(some, size, mode="bicubic", antialias=True))
    return scaled


def media_row(seconds: int, height: int, rounds: int, *, gop: int = 250, bframes: int = 3) -> dict[str, Any]:
    """A row of the benchmark, of two frames a second."""
    from omni.processing.media import read_video
    from omni.processing.media.decoding import CORES

    sizes, wanted = VisionSizes(), sample_indices(seconds * RATE, RATE)
    size = sizes.clip_size(len(wanted), height, height * 16 // 9 // 2 * 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_clip(path, seconds, height, gop=gop, bframes=bframes)
        megabits = 8e-6 * path.stat().st_size / seconds
        sides: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: read_video(path, size_for=sizes.clip_size).frames,
            "decoding all, scaling in turn": lambda: plain(path, wanted, size),
        }
        if importlib.util.find_spec("decord"):
            sides["decord, torch's bicubic"] = lambda: by_decord(path, wanted, size)
        ours, theirs = (list(sides.values())[side]() for side in (0, 1))
        assert torch.equal(ours, theirs), "sides differ"
        del ours, theirs
        first: dict[str, float] = {}
        times: dict[str, list[float]] = {name: [] for name in sides}
        busy: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                started, all_threads, own = time.perf_counter(), time.process_time(), time.thread_time()
                side()
                times[name].append(time.perf_counter() - started)
                busy[name].append({"all": time.process_time() - all_threads, "calling": time.thread_time() - own})
                first.setdefault(name, times[name][0])
    row = Measured(first, times, {}).row({name: name for name in sides})
    row["targets"] = [
        target(f"times as fast as {name}", ratio["median"], 1.0 if "decord" in name else 1.6 if CORES < 8 else 4.0)
        for name, ratio in row["times_as_fast"].items()
    ]
    # However many cores there are, a side takes as long as its calling thread, and as all threads shared among cores.
    row["processor_seconds"] = {
        name: {threads: statistics.median(each[threads] for each in found) for threads in ("all", "calling")}
        for name, found in busy.items()
    }
    return row | {"frames": len(wanted), "size": list(size), "cores": CORES, "megabits_per_second": megabits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=64, help="of the clip (default: %(default)s)")
    parser.add_argument("--heights", type=int, nargs="+", default=[1080, 720], help="(default: 1080 720)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--gop", type=int, default=250, help="frames from keyframe to keyframe (default: %(default)s)")
    parser.add_argument("--bframes", type=int, default=3, help="between two others (default: %(default)s)")
    options = parser.parse_args()
    for height in options.heights:
        row = media_row(options.seconds, height, options.rounds, gop=options.gop, bframes=options.bframes)
        print(f"{options.seconds} s of {height}p:", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
