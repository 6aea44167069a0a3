"""Writes a small clip to ask questions about: coloured shapes that bounce, a note for every bounce."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

HEIGHT, WIDTH, FPS, RATE = 240, 320, 12, 24_000


@dataclass
class Shape:
    """A disc, square or diamond: `sides` is the exponent of its outline |x|^p + |y|^p = 1."""

    colour: tuple[float, float, float]
    outline: float
    radius: float
    x: float
    y: float
    speed_x: float
    speed_y: float
    hertz: float


def shapes() -> list[Shape]:
    """Each has its colour, its way and its note of a chord."""
    return [
        Shape((0.92, 0.22, 0.20), 2.0, 30, 70, 80, 95, 60, 261.6),  # a red disc, C
        Shape((0.20, 0.45, 0.95), 8.0, 25, 220, 150, -70, 85, 329.6),  # a blue square, E
        Shape((0.98, 0.80, 0.15), 1.0, 34, 150, 110, 60, -110, 392.0),  # a yellow diamond, G
    ]


def move(shape: Shape, seconds: float) -> bool:
    """Moves on and tells whether it bounced off an edge."""
    shape.x += shape.speed_x * seconds
    shape.y += shape.speed_y * seconds
    bounced = False
    if (shape.x < shape.radius and shape.speed_x < 0) or (shape.x > WIDTH - shape.radius and shape.speed_x > 0):
        shape.speed_x, bounced = -shape.speed_x, True
    if (shape.y < shape.radius and shape.speed_y < 0) or (shape.y > HEIGHT - shape.radius and shape.speed_y > 0):
        shape.speed_y, bounced = -shape.speed_y, True
    return bounced


def draw(background: Tensor, moving: list[Shape]) -> Tensor:
    """(3, H, W) in [0, 1]: the shapes with soft edges and a shadow, in order."""
    y, x = torch.meshgrid(torch.arange(HEIGHT).float(), torch.arange(WIDTH).float(), indexing="ij")
    picture = background
    for shape in moving:
        for shift, colour, strength in ((5, (0.0, 0.0, 0.0), 0.35), (0, shape.colour, 1.0)):
            across, down = (x - shape.x - shift).abs(), (y - shape.y - shift).abs()
            distance = (across**shape.outline + down**shape.outline) ** (1 / shape.outline)
            cover = (shape.radius - distance + 0.5).clamp(0, 1) * strength
            picture = picture * (1 - cover) + torch.tensor(colour).view(3, 1, 1) * cover
    return picture


def texture(seed: int) -> Tensor:
    """(3, H, W): soft clouds between two greens."""
    generator = torch.Generator().manual_seed(seed)
    clouds = torch.zeros(1, 1, HEIGHT, WIDTH)
    for cells, weight in ((4, 0.6), (8, 0.3), (16, 0.1)):
        grid = torch.rand(1, 1, cells, cells, generator=generator)
        clouds += weight * F.interpolate(grid, (HEIGHT, WIDTH), mode="bicubic", align_corners=True)
    dark, light = (torch.tensor(colour).view(3, 1, 1) for colour in ((0.10, 0.28, 0.25), (0.55, 0.75, 0.60)))
    return (dark + (light - dark) * clouds[0].clamp(0, 1)).clamp(0, 1)


def note(hertz: float) -> Tensor:
    """(n,) float32: a struck bell that dies away."""
    time = torch.arange(round(0.9 * RATE)) / RATE
    partials = sum(torch.sin(2 * math.pi * hertz * k * time) * w for k, w in ((1, 1.0), (2, 0.4), (3, 0.15)))
    attack = (time / 0.005).clamp(max=1)
    return 0.2 * partials * attack * torch.exp(-4 * time)


def make_clip(path: Path, seconds: float, seed: int) -> None:
    """Writes H.264 pictures and AAC sound to `path`."""
    background, moving = texture(seed), shapes()
    count = max(1, round(seconds * FPS))
    sound = torch.zeros(round(count / FPS * RATE))
    with av.open(str(path), "w", options={"movflags": "faststart"}) as file:
        video = file.add_stream("libx264", rate=FPS, options={"crf": "24"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        for number in range(count):
            for shape in moving:
                if move(shape, 1 / FPS):
                    start = number * RATE // FPS
                    struck = note(shape.hertz)[: len(sound) - start]
                    sound[start : start + len(struck)] += struck
            pixels = (draw(background, moving) * 255).round().byte().permute(1, 2, 0).contiguous()
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024].numpy(), format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, start, Fraction(1, RATE)
            file.mux(audio.encode(block))
        file.mux(audio.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="where to write it, for example clip.mp4")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long it plays (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="changes the background (default: 0)")
    arguments = parser.parse_args()
    if not 0 < arguments.seconds <= 3600:
        parser.error("--seconds must be above 0 and at most 3600.")
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    make_clip(arguments.path, arguments.seconds, arguments.seed)


if __name__ == "__main__":
    main()
