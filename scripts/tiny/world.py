"""A small audio-visual world: clips of coloured shapes and sounds, and questions about them.

    python scripts/tiny/world.py clips/ --split test --count 20      # mp4 files and questions.jsonl

Four shapes come and go one after another over a textured, noisy background, each with a sound of its own at some moment
of its stay. Every question is about what one cannot know from its words: of four options all are in the clip, so that
whoever sees or hears nothing is right one time in four. Scenes are drawn from a seed alone; splits share no seed and no
combination of colour, shape and sound.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE, FPS, RATE = 112, 4, 16_000
"""Pixels of a frame, frames a second, samples a second."""
SHORTEST, LONGEST = 8, 32
"""Seconds of a clip."""
BEEP = 0.3
"""Seconds from one beep of a row to the next."""

COLOURS = {
    "red": (225, 45, 45),
    "green": (45, 180, 70),
    "blue": (50, 90, 230),
    "yellow": (240, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SOUNDS = ("a low tone", "a high tone", "a rising sweep", "a falling sweep", "a row of beeps")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Sight:
    """A shape on screen from `start` to `end`, in seconds, on its way from one place to another, in pixels."""

    start: float
    end: float
    colour: str
    shape: str
    radius: float
    way: tuple[tuple[float, float], tuple[float, float]]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def with_article(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class Sound:
    """What is heard from `start` on, for `seconds`. hertz: where it begins; beeps: how many, 0 of other sounds."""

    start: float
    seconds: float
    name: str
    hertz: float
    beeps: int


@dataclass(frozen=True)
class Scene:
    """The i-th sound is heard while the i-th shape is on screen. seed: of background and noise."""

    seconds: int
    sights: tuple[Sight, ...]
    sounds: tuple[Sound, ...]
    seed: int


@dataclass(frozen=True)
class Question:
    """kind: what is asked. needs: "video", "audio" or "both". options: four, or none where the answer is free."""

    kind: str
    needs: str
    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def letter(self) -> str:
        """Of the right option."""
        return "ABCD"[self.options.index(self.answer)]

    @property
    def prompt(self) -> str:
        if not self.options:
            return self.text
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", self.options, strict=True)]
        return "\n".join([self.text, *lines, "Answer with the letter."])


def belongs(split: str, colour: str, shape: str, sound: str) -> bool:
    """Whether these three come together in a split.

    No combination is in two splits, but in training every colour comes with every shape, and both with every sound:
    none of them can be told from another.
    """
    kept = {"test": (0,), "validation": (1,), "train": (2, 3, 4, 5)}[split]
    return (list(COLOURS).index(colour) + SHAPES.index(shape) + SOUNDS.index(sound)) % len(SHAPES) in kept


def make_scene(split: str, number: int, longest: int = LONGEST) -> Scene:
    """The scene of that number of a split, of so many seconds at most; the same whenever it is asked for."""
    draw = np.random.default_rng([SPLITS.index(split), number])
    seconds = int(draw.integers(SHORTEST, longest + 1))
    # Four stays of two seconds at least, and what is left shared out at random between and around them.
    rest = draw.dirichlet(np.full(9, 0.6)) * (seconds - 8)
    edges = np.cumsum(rest + np.array([0, 2, 0, 2, 0, 2, 0, 2, 0]))
    while True:
        colours, shapes, names = (draw.permutation(list(all_of))[:4] for all_of in (COLOURS, SHAPES, SOUNDS))
        if all(belongs(split, *three) for three in zip(colours, shapes, names, strict=True)):
            break
    sights: list[Sight] = []
    sounds: list[Sound] = []
    for event in range(4):
        start, end = float(edges[2 * event]), float(edges[2 * event + 1])
        sights.append(draw_sight(draw, start, end, str(colours[event]), str(shapes[event])))
        sounds.append(draw_sound(draw, str(names[event]), start + 0.2, end - 0.2))
    return Scene(seconds, tuple(sights), tuple(sounds), int(draw.integers(2**31)))


def draw_sight(draw: np.random.Generator, start: float, end: float, colour: str, shape: str) -> Sight:
    radius = float(draw.uniform(18, 28))
    (x0, y0), (x1, y1) = (map(float, draw.uniform(radius, SIDE - radius, 2)) for _ in range(2))
    return Sight(start, end, colour, shape, radius, ((x0, y0), (x1, y1)))


def draw_sound(draw: np.random.Generator, name: str, earliest: float, end: float) -> Sound:
    """A sound of that name between two times, 1.6 s apart or more."""
    beeps = int(draw.integers(2, 6)) if "beeps" in name else 0
    length = BEEP * beeps if beeps else float(draw.uniform(0.8, 1.4))
    low, high = {"a row of beeps": (600, 900), "a low tone": (180, 320), "a rising sweep": (180, 320)}.get(
        name, (1400, 2400)
    )
    return Sound(float(draw.uniform(earliest, end - length)), length, name, float(draw.uniform(low, high)), beeps)


KINDS = {
    "colour": "video",
    "shape": "video",
    "first sight": "video",
    "first sound": "audio",
    "seen at a sound": "both",
    "heard at a sight": "both",
    "beeps": "audio",
    "name what was seen": "both",
    "before or after": "both",
}
"""What is asked, and what it needs; the last two in words, without options."""


def question(scene: Scene, kind: str, which: int, other: int) -> Question | None:
    """About the event number `which`, and `other` where it takes two; None where the scene has nothing of that kind.

    The right option stands where its event does.
    """
    names, heard = [sight.with_article for sight in scene.sights], [sound.name for sound in scene.sounds]
    sight, sound = scene.sights[which], scene.sounds[which]
    the_sound = f"the {sound.name.removeprefix('a ')}"
    asked: dict[str, tuple[str, list[str], str]] = {
        "colour": (f"What colour is the {sight.shape}?", [each.colour for each in scene.sights], sight.colour),
        "shape": (f"Which shape is {sight.colour}?", [each.shape for each in scene.sights], sight.shape),
        "first sight": ("What came on screen first?", names, names[0]),
        "first sound": ("Which sound came first?", heard, heard[0]),
        "seen at a sound": (f"What was on screen when {the_sound} sounded?", names, names[which]),
        "heard at a sight": (f"What was heard while the {sight.name} was on screen?", heard, heard[which]),
        "name what was seen": (f"Say what was on screen when {the_sound} sounded.", [], names[which]),
        "before or after": (
            f"Did {the_sound} sound before or after the {scene.sights[other].name} was on screen?",
            [],
            "before" if which < other else "after",
        ),
    }
    beeps = max(each.beeps for each in scene.sounds)
    if beeps:
        asked["beeps"] = "How many beeps are there?", [str(count) for count in range(2, 6)], str(beeps)
    if kind not in asked or (kind == "before or after" and which == other):
        return None
    text, options, answer = asked[kind]
    return Question(kind, KINDS[kind], text, tuple(options), answer)


def questions(scene: Scene, split: str, number: int) -> list[Question]:
    """One of every kind that the scene has, options in random order."""
    draw = np.random.default_rng([SPLITS.index(split), number, 1])
    found = []
    for kind in KINDS:
        which, other = (int(index) for index in draw.permutation(4)[:2])
        made = question(scene, kind, which, other)
        if made is not None:
            order = draw.permutation(len(made.options))
            found.append(replace(made, options=tuple(made.options[i] for i in order)))
    return found


def frames(scene: Scene, fps: int = FPS) -> NDArray[np.uint8]:
    """(seconds · fps, SIDE, SIDE, 3)."""
    draw = np.random.default_rng(scene.seed)
    background = texture(draw)
    pictures = np.empty((scene.seconds * fps, SIDE, SIDE, 3), np.uint8)
    for number in range(len(pictures)):
        picture = background + draw.normal(0, 6, (SIDE, SIDE, 1)).astype(np.float32)
        for sight in scene.sights:
            if sight.start <= number / fps < sight.end:
                rows, columns, cover = silhouette(sight, number / fps)
                part, colour = picture[rows, columns], np.array(COLOURS[sight.colour], np.float32)
                part += (colour - background[rows, columns]) * cover[..., None]
        pictures[number] = np.clip(picture, 0, 255)
    return pictures


def silhouette(sight: Sight, now: float) -> tuple[slice, slice, NDArray[np.float32]]:
    """Rows and columns that a shape touches at a time of its stay, and how much of each of their pixels it covers."""
    part = (now - sight.start) / (sight.end - sight.start)
    (x0, y0), (x1, y1) = sight.way
    centre = y0 + part * (y1 - y0), x0 + part * (x1 - x0)
    rows, columns = (
        slice(max(0, int(middle - sight.radius) - 2), min(SIDE, int(middle + sight.radius) + 3)) for middle in centre
    )
    y, x = np.mgrid[rows, columns].astype(np.float32)
    distance = outline(sight.shape, (x - centre[1]) / sight.radius, (y - centre[0]) / sight.radius)
    return rows, columns, np.clip((1 - distance) * sight.radius + 0.5, 0, 1)


def outline(shape: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Below 1 inside of a shape of radius 1."""
    distance = np.hypot(x, y)
    if shape == "circle":
        return distance
    if shape == "square":
        return np.maximum(abs(x), abs(y)) * 1.15
    if shape == "triangle":
        return np.maximum(y * 1.6, (abs(x) * 1.75 - y) * 0.9) + 0.2
    if shape == "cross":
        narrow, wide = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
        return np.maximum(narrow * 3.2, wide)
    if shape == "ring":
        return 1 + (abs(distance - 0.72) - 0.26)
    angle = np.arctan2(x, -y)
    return distance / (0.68 + 0.32 * np.cos(5 * angle))


def texture(draw: np.random.Generator) -> NDArray[np.float32]:
    """(SIDE, SIDE, 3): clouds, stripes or tiles of two dull colours."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    kind = draw.integers(3)
    if kind == 0:
        waves = [
            np.sin(2 * math.pi * (draw.uniform(-3, 3) * x + draw.uniform(-3, 3) * y + draw.random())) for _ in "123"
        ]
        share = 0.5 + sum(waves) / 6
    elif kind == 1:
        turn = draw.uniform(0, math.pi)
        share = 0.5 + 0.5 * np.sin(2 * math.pi * draw.uniform(3, 8) * (x * math.cos(turn) + y * math.sin(turn)))
    else:
        tiles = draw.integers(3, 9)
        share = (np.floor(x * tiles) + np.floor(y * tiles)) % 2
    first, second = draw.uniform(50, 130, (2, 1)) + draw.uniform(-18, 18, (2, 3))
    return (first + (second - first) * share[..., None]).astype(np.float32)


def waveform(scene: Scene) -> NDArray[np.float32]:
    """(seconds · RATE,), with a little hiss."""
    draw = np.random.default_rng([scene.seed, 1])
    sound = draw.normal(0, 0.004, scene.seconds * RATE)
    for each in scene.sounds:
        time = np.arange(round(each.seconds * RATE)) / RATE
        ends = each.hertz
        if "sweep" in each.name:
            ends = each.hertz * (5 if "rising" in each.name else 0.2)
        hertz = each.hertz * (ends / each.hertz) ** (time / each.seconds)
        wave = np.sin(2 * math.pi * np.cumsum(hertz) / RATE)
        edge = np.minimum(time, each.seconds - time) / 0.02
        if each.beeps:
            within = time % BEEP  # a beep of 0.18 s, then silence
            edge = np.where(within < 0.18, np.minimum(within, 0.18 - within) / 0.01, 0)
        start = round(each.start * RATE)
        sound[start : start + len(time)] += draw.uniform(0.15, 0.35) * wave * np.clip(edge, 0, 1)
    return sound.astype(np.float32)


def write_clip(path: Path, scene: Scene) -> None:
    """H.264 pictures and AAC sound."""
    import av

    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast"})
        video.width, video.height, video.pix_fmt = SIDE, SIDE, "yuv420p"
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        for number, picture in enumerate(frames(scene)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        sound = waveform(scene)
        for start in range(0, len(sound), 1024):
            block = av.AudioFrame.from_ndarray(sound[None, start : start + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = RATE, start, Fraction(1, RATE)
            file.mux(audio.encode(block))
        file.mux(audio.encode())


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="Write clips of the small world and questions about them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=20, help="clips (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene (default: %(default)s)")
    options = parser.parse_args()
    if options.count < 1 or options.first < 0:
        parser.error("--count must be at least 1 and --first not negative.")
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in tqdm(range(options.first, options.first + options.count), desc="Clips", unit="clip"):
        scene = make_scene(options.split, number)
        name = f"{options.split}-{number:05}.mp4"
        write_clip(options.folder / name, scene)
        for question in questions(scene, options.split, number):
            lines.append(json.dumps({"media": name, **asdict(question), "prompt": question.prompt}))
    (options.folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
