"""What `tiny` learns from: clips of the world of `world.py`, made without a file, and questions about them.

A clip comes with labels, what is seen and heard at each of its tokens, and a question with what of the clip answers it;
many questions share a clip in one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import world
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from omni.config import read_config
from omni.inputs import Inputs
from omni.processing.chat_template import apply_chat_template
from omni.processing.frames import patchify
from omni.processing.mel import log_mel
from omni.processing.positions import layout
from omni.processing.processor import Processor
from omni.processing.prompt import clip_block, expand
from omni.processing.tokenizer import Tokenizer

SAMPLED_FPS = 2
"""Frames a second that the model sees, as by default."""
CELL = 28
"""Pixels along a side of what becomes one token."""
DRILL_SIGHTS, DRILL_SOUNDS = 32, 8
"""Seconds of pictures and of sound that the encoders learn from at a time."""
QUESTIONS, CHOICES = 14, 0.5
"""Asked about a clip at a time, and the share of them that have options."""
PRACTISED = 48
"""Options that are named by their letters at a time."""
BLOCK = 160
"""Tokens of questions, or a few more, that look at the clip and each other together."""
WHEN = ("before", "after")


@dataclass(frozen=True)
class Lesson:
    """about: the words of the answer, which `answer` is or which its letter stands for. sought: which tokens of the
    clip know it, as `where` says."""

    kind: str
    prompt: str
    answer: str
    about: str
    sought: tuple[int, int] | None = None
    weight: float = 1.0


def lessons(scene: world.Scene, draw: np.random.Generator, count: int, choices: float) -> list[Lesson]:
    """So many questions about a scene, drawn anew. choices: the share of those with options.

    A third of these name the right option: what letters are for is learnt apart from what is seen and heard.
    """
    found: list[Lesson] = []
    while len(found) < count - 1:
        which, other = (int(index) for index in draw.permutation(4)[:2])
        question = world.question(scene, str(draw.choice(list(world.KINDS))), which, other)
        if question is None:
            continue
        sought = where(scene, question.kind, which)
        if question.options and draw.random() < choices:
            kind, options = question.kind, tuple(draw.permutation(question.options).tolist())
            question = replace(question, options=options)
            if draw.random() < 1 / 3:
                kind, question = "letter", replace(question, text=f"Which letter is {question.answer}?")
                sought = None
            found.append(Lesson(kind, question.prompt, question.letter, question.answer, sought))
        else:
            named = question.kind in ("colour", "shape")
            answer = scene.sights[which].with_article if named else question.answer
            found.append(Lesson(f"{question.kind}, free", question.text, answer, answer, sought))
    told = ", ".join(
        f"{sight.with_article} with {sound.name.replace('a row of', str(sound.beeps))}"
        for sight, sound in zip(scene.sights, scene.sounds, strict=True)
    )
    return [*found, Lesson("everything", "Tell everything that happens.", told, "", weight=2.0)]


def where(scene: world.Scene, kind: str, which: int) -> tuple[int, int]:
    """What of a scene answers a question of that kind about its event number `which`: 0 and the number of its colour, 1
    and that of its sound, or 2 and that of beeps so far, as tokens are labelled; in a scene no two have the same."""
    if kind == "beeps":
        return 2, max(sound.beeps for sound in scene.sounds) - 1
    event = 0 if kind.startswith("first") else which
    if kind in ("colour", "shape", "first sight"):
        return 0, 1 + list(world.COLOURS).index(scene.sights[event].colour)
    return 1, 1 + world.SOUNDS.index(scene.sounds[event].name)


def letters(number: int) -> list[Lesson]:
    """Options to name by their letters, which need no clip."""
    draw, found = np.random.default_rng([number, 6]), list[Lesson]()
    while len(found) < PRACTISED:
        scene = world.make_scene("train", int(draw.integers(2**31)))
        found += [lesson for lesson in lessons(scene, draw, 2 * QUESTIONS, 1.0) if lesson.kind == "letter"]
    return found[:PRACTISED]


@dataclass
class Clip:
    """A scene as the model gets it, up to the end of the clip in the prompt.

    patches, grid, mel: as in `Inputs`, of one clip. ids, positions, source: (S,), (3, S), (S,) as in
    `omni.request.PrefillBatch`; next_position: of what follows. seen: (2, n) colour and shape at each token of video,
    heard: (2, n) the sound at each of sound and how many beeps there were so far, less one, beside: (2, n) colour and
    shape on screen then; 0 nothing. media: what the encoders make of it, (n, hidden), where that is known.
    """

    scene: world.Scene
    patches: Tensor
    grid: Tensor
    mel: Tensor
    ids: Tensor
    positions: Tensor
    source: Tensor
    next_position: int
    seen: Tensor
    heard: Tensor
    beside: Tensor
    media: Tensor | None = None

    def thinned(self, share: float, draw: np.random.Generator) -> Clip:
        """With so large a share of its tokens of video and sound, any of them."""
        kept = (self.source < 0).numpy() | (draw.random(len(self.ids)) < share)
        there = torch.from_numpy(kept.nonzero()[0])
        return replace(self, ids=self.ids[there], positions=self.positions[:, there], source=self.source[there])


@dataclass
class Example:
    """A clip with its questions, one sequence.

    ids, positions, source, group: of the clip, then of the questions; group 0 is the clip, which all see, the others
    the questions; blocks: where some of these begin, and the end. answers: (n,) places that predict a token of an
    answer, wanted: (n,) these tokens, lesson: (n,) of which question. ends: (m,) last tokens of questions, said: (m,) a
    word of the answer, by number, shares: (m,) one divided by how many of these there are. options: (k,) tokens of
    options, marks: (k,) number of their letters. asks: (q, 1) last tokens of questions that something of the
    clip answers, sought: (q, 2) what that is, as `where` says.
    picks: (o, 2) last tokens of questions with options, and the number of the right letter.
    """

    clip: Clip
    ids: Tensor
    positions: Tensor
    source: Tensor
    group: Tensor
    answers: Tensor
    wanted: Tensor
    lesson: Tensor
    weight: Tensor
    ends: Tensor
    said: Tensor
    shares: Tensor
    options: Tensor
    marks: Tensor
    asks: Tensor
    sought: Tensor
    picks: Tensor
    blocks: list[int]
    kinds: list[str]


def to(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    """A Clip or an Example on a device."""
    moved = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, (Tensor, Clip)):
            moved[field.name] = part.to(device, copy=copy) if isinstance(part, Tensor) else to(part, device, copy=copy)
    return replace(value, **moved)


class Clips(Dataset[Clip]):
    """Clips of a split by number, the first of them drills."""

    def __init__(self, folder: Path, split: str, count: int, drills: int = 0) -> None:
        self.config = read_config(folder)
        self.split, self.count, self.drills = split, count, drills
        processor = Processor(folder, self.config)
        self.tokenizer, self.sizes = processor.tokenizer, processor.sizes
        content = [{"type": "video", "video": ""}, {"type": "text", "text": "?"}]
        # The template once: what stands before the clip, and what between question and answer.
        frame = apply_chat_template(self.tokenizer, processor.template, [{"role": "user", "content": content}])
        end = frame.index(self.tokenizer.token_to_id("<|vision_eos|>")) + 1
        self.head, self.tail = frame[:end], frame[end + len(self.tokenizer.encode("?")) :]
        self.stop = self.tokenizer.token_to_id("<|im_end|>")
        self.words = words_of(self.tokenizer)
        self.dot, self.newline = (self.tokenizer.encode(text)[0] for text in ".\n")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Clip:
        config, is_drill = self.config, number < self.drills
        scene = drill(number) if is_drill else world.make_scene(self.split, number)
        patches, grid = patchify(
            torch.from_numpy(world.frames(scene, SAMPLED_FPS)).permute(0, 3, 1, 2), self.sizes, of_clip=True
        )
        seconds = DRILL_SOUNDS if is_drill else scene.seconds
        mel = log_mel(torch.from_numpy(world.waveform(replace(scene, seconds=seconds))), config.audio.num_mel_bins)
        step = self.sizes.temporal_patch_size / SAMPLED_FPS
        heard = config.audio.token_count(mel.shape[1])
        ids = expand(self.head, [(config.token_ids.video, clip_block(grid.tolist(), step, heard, config))])
        inputs = Inputs(
            torch.tensor([ids]),
            pixel_values_videos=patches,
            video_grid_thw=grid[None],
            video_second_per_grid=torch.tensor([step]),
            input_features=mel[None],
            feature_attention_mask=torch.ones(1, mel.shape[1], dtype=torch.long),
        )
        where = layout(inputs, config)
        source = torch.full((len(ids),), -1)
        source[where.video] = torch.arange(len(where.video))
        source[where.audio] = torch.arange(len(where.audio)) + len(where.video)
        return Clip(
            scene,
            patches,
            grid,
            mel,
            torch.tensor(ids),
            where.positions,
            source,
            int(where.next_position),
            torch.from_numpy(what_is_seen(scene)),
            torch.from_numpy(what_is_heard(scene, heard)),
            torch.from_numpy(what_is_beside(scene, heard)),
        )

    def blank(self) -> Clip:
        """No clip at all, for questions that need none."""
        empty, none = torch.empty(0), torch.empty(0, dtype=torch.long)
        two = none.view(2, 0)
        return Clip(world.Scene(0, (), (), 0), empty, none, empty, none, empty.expand(3, 0), none, 300, two, two, two)

    def option_tokens(self, ids: list[int]) -> list[tuple[int, int]]:
        """Places of the words of options in a prompt, each with the number of its letter."""
        found: list[tuple[int, int]] = []
        letter = -1
        for place in range(1, len(ids) - 1):
            if ids[place] == self.newline:
                letter = -1
            elif ids[place - 1] == self.newline and ids[place] in self.words["letter"] and ids[place + 1] == self.dot:
                letter = self.words["letter"].index(ids[place])
            elif letter >= 0 and ids[place] != self.dot:
                found.append((place, letter))
        return found

    def telling(self, text: str) -> list[int]:
        """Numbers of the words that tell an answer from others."""
        tokens = [self.tokenizer.encode(f" {word}")[-1] for word in text.split()]
        return [self.words["answer"].index(token) for token in tokens if token in self.words["answer"]]

    def ask(self, clip: Clip, asked: list[Lesson]) -> Example:
        start = len(clip.ids)
        ids, positions = clip.ids.tolist(), [clip.positions]
        group, wanted, lesson, weight = [0] * start, [], [], []
        answers: list[int] = []
        said: list[tuple[int, int, float]] = []
        marks: list[tuple[int, int]] = []
        asks: list[tuple[int, int, int]] = []
        picks: list[tuple[int, int]] = []
        blocks = [start]
        for index, each in enumerate(asked):
            prompt = [*self.tokenizer.encode(each.prompt), *self.tail]
            answer = [*self.tokenizer.encode(each.answer), self.stop]
            first = len(ids) + len(prompt) - 1
            answers += range(first, first + len(answer))
            words = self.telling(each.about)
            said += [(first, word, 1 / len(words)) for word in words]
            if each.sought is not None:
                asks.append((first, *each.sought))
            if answer[0] in self.words["letter"]:
                picks.append((first, self.words["letter"].index(answer[0])))
            marks += [(len(ids) + place, letter) for place, letter in self.option_tokens(prompt)]
            wanted += answer
            lesson += [index] * len(answer)
            weight += [each.weight / len(answer)] * len(answer)
            length = len(prompt) + len(answer) - 1  # the stop is read by nobody
            ids += (prompt + answer)[:-1]
            group += [index + 1] * length
            positions.append((torch.arange(length) + clip.next_position).expand(3, -1))
            if len(ids) - blocks[-1] >= BLOCK:
                blocks.append(len(ids))
        if blocks[-1] < len(ids):
            blocks.append(len(ids))
        return Example(
            clip,
            torch.tensor(ids),
            torch.cat(positions, dim=1),
            torch.cat((clip.source, torch.full((len(ids) - start,), -1))),
            torch.tensor(group),
            torch.tensor(answers),
            torch.tensor(wanted),
            torch.tensor(lesson),
            torch.tensor(weight),
            *(torch.tensor(column) for column in zip(*said, strict=True)),
            *torch.tensor(marks, dtype=torch.long).view(-1, 2).T,
            *torch.tensor(asks, dtype=torch.long).view(-1, 3).split((1, 2), dim=1),
            torch.tensor(picks, dtype=torch.long).view(-1, 2),
            blocks,
            [each.kind for each in asked],
        )


def drill(number: int) -> world.Scene:
    """Another shape every second, and sounds without a pause."""
    draw = np.random.default_rng([len(world.SPLITS), number])
    sights, sounds, at = [], [], 0.0
    for second in range(DRILL_SIGHTS):
        colour, shape = (str(draw.choice(list(all_of))) for all_of in (world.COLOURS, world.SHAPES))
        sights.append(world.draw_sight(draw, second, second + 1, colour, shape))
    while at + 1.8 <= DRILL_SOUNDS:
        sounds.append(world.draw_sound(draw, str(draw.choice(world.SOUNDS)), at, at + 1.8))
        at = sounds[-1].start + sounds[-1].seconds + 0.1
    return world.Scene(DRILL_SIGHTS, tuple(sights), tuple(sounds), int(draw.integers(2**31)))


def what_is_seen(scene: world.Scene) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(2, tokens): number of the colour and of the shape that covers a part of a token, 0 where none does."""
    side = world.SIDE // CELL
    labels = np.zeros((2, scene.seconds, side, side), np.int64)
    for second in range(scene.seconds):
        for sight in scene.sights:
            cover = np.zeros((world.SIDE, world.SIDE), np.float32)
            for now in (second, second + 1 / SAMPLED_FPS):
                if sight.start <= now < sight.end:
                    rows, columns, part = world.silhouette(sight, now)
                    cover[rows, columns] += part / 2
            there = rearrange(cover, "(h a) (w b) -> h w (a b)", a=CELL, b=CELL).mean(-1) > 0.08
            labels[0, second][there] = 1 + list(world.COLOURS).index(sight.colour)
            labels[1, second][there] = 1 + world.SHAPES.index(sight.shape)
    return labels.reshape(2, -1)


def what_is_heard(scene: world.Scene, tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(2, tokens): number of the sound at each token, 25 of which are a second, and how many beeps there were so far,
    less one; 0 where there is none."""
    labels = np.zeros((2, tokens), np.int64)
    for sound in scene.sounds:
        start, end = (round(25 * at) for at in (sound.start, sound.start + sound.seconds))
        labels[0, start:end] = 1 + world.SOUNDS.index(sound.name)
        for beep in range(1, sound.beeps):
            labels[1, round(25 * (sound.start + world.BEEP * beep)) : end] = beep
    return labels


def what_is_beside(scene: world.Scene, tokens: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(2, tokens): number of the colour and of the shape that is on screen at each token of sound, 0 where none is."""
    labels = np.zeros((2, tokens), np.int64)
    for sight in scene.sights:
        # From the first of the frames that show it on: those of its future a token cannot see.
        start = math.ceil(sight.start * SAMPLED_FPS) / SAMPLED_FPS
        now = slice(round(25 * start), round(25 * sight.end))
        labels[0, now] = 1 + list(world.COLOURS).index(sight.colour)
        labels[1, now] = 1 + world.SHAPES.index(sight.shape)
    return labels


def words_of(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of the word that tells each colour, shape, sound and count from the others; of letters; of all that answers
    say."""
    sounds = ("low", "high", "rising", "falling", "beeps")
    found = {
        name: [tokenizer.encode(f" {word}") for word in words]
        for name, words in (("colour", world.COLOURS), ("shape", world.SHAPES), ("sound", sounds))
    }
    found["count"] = [tokenizer.encode(count) for count in "2345"]
    found["letter"] = [tokenizer.encode(letter) for letter in "ABCD"]
    when = [tokenizer.encode(f" {word}") for word in WHEN]
    found["answer"] = [*found["colour"], *found["shape"], *found["sound"], *found["count"], *when]
    assert all(len(ids) == 1 for many in found.values() for ids in many), "a word that is not one token"
    return {name: [ids[0] for ids in many] for name, many in found.items()}
