"""Trains `tiny`, the checkpoint that is shipped in `weights/tiny`: a thinker that understands the world of `world.py`.

    python scripts/train_tiny.py .train                  # resumes what is there; writes .train/checkpoint at the end

Every clip is drawn anew and made without a file. First the encoders alone learn to say what is seen and heard at each
of their tokens, in the words of the decoder: a token is to resemble the embeddings of its colour and its shape, or of
its sound. Then all learns to answer, and after a few layers of the decoder a token of sound is to say, in the same
way, what is on screen: without that, what is seen at a sound is found by chance. Many questions share a clip in one
sequence and do not see each other.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import world
from einops import rearrange
from make_checkpoint import FAMILIES, public_tensors, qwen2_5_config, write_json, write_tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import weights
from omni.config import OmniConfig, read_config
from omni.decoder import Layer
from omni.inputs import Inputs
from omni.processing.chat import encode_chat
from omni.processing.frames import patchify
from omni.processing.mel import log_mel
from omni.processing.positions import layout
from omni.processing.processor import Processor
from omni.processing.prompt import clip_block, expand
from omni.processing.tokenizer import Tokenizer
from omni.thinker import Thinker

SAMPLED_FPS = 2
"""Frames a second that the model sees, as by default."""
CELL = 28
"""Pixels along a side of what becomes one token."""
DRILL_SIGHTS, DRILL_SOUNDS = 32, 8
"""Seconds of pictures and of sound that the encoders learn from at a time."""
TALK_SHARE = 0.7
"""Of the clips that are asked about without options."""
SHORT_SHARE, SHORT_CLIP = 0.85, 12
"""Until this part of the clips is done they have so many seconds at most: they cost a third of the longer ones."""
BESIDE_LAYER = 3
"""After this layer of the decoder tokens of sound say what is on screen."""
BLOCK = 160
"""Tokens of questions, or a few more, that look at the clip and each other together."""
LEARNING_RATE, WARM_UP, CLIPS_PER_STEP = 1e-3, 200, 6
ABSENT_WEIGHT = 0.1
"""Of tokens where nothing is seen or heard, most of all, in the loss by token."""


def write_files(folder: Path) -> OmniConfig:
    """All of the checkpoint but its tensors."""
    family = FAMILIES["qwen2.5"]
    folder.mkdir(parents=True, exist_ok=True)
    added = write_tokenizer(folder, family, sample_text(), 600)
    vocab_size = -(-(max(added.values()) + 1) // 64) * 64
    config = qwen2_5_config({role: added[token] for role, token in family.marks.items()}, vocab_size, 192)
    thinker = config["thinker_config"]
    thinker["text_config"] |= {
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        # Half of the frequencies tell time, which is all that sound and pictures are matched by.
        "rope_scaling": {"mrope_section": [12, 6, 6], "rope_type": "default", "type": "default"},
    }
    thinker["tie_word_embeddings"] = True  # transformers looks here, too
    thinker["audio_config"] |= {"encoder_layers": 3, "num_hidden_layers": 3, "encoder_ffn_dim": 512}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [added["<|im_end|>"]]})
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "feature_extractor_type": "WhisperFeatureExtractor",
            "processor_class": "Qwen2_5OmniProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "feature_size": 128,
            "min_pixels": CELL**2 * 4,
            "max_pixels": CELL**2 * 64,
            "video_min_pixels": CELL**2 * 4,
            "video_max_pixels": CELL**2 * 64,
        },
    )
    return read_config(folder)


def sample_text() -> str:
    """What the vocabulary is learnt from."""
    asked = (lesson for number in range(200) for lesson in lessons("train", number))
    return "\n".join(f"{lesson.prompt}\n{lesson.answer}" for lesson in asked)


@dataclass(frozen=True)
class Lesson:
    kind: str
    prompt: str
    answer: str
    weight: float = 1.0


def lessons(split: str, number: int, longest: int = world.LONGEST, talk: bool = False) -> list[Lesson]:
    """The questions of a clip, the same sorts without options about all there is, and everything that happens in it.

    talk: the questions that have options, which are learnt when the others are known, name what is asked for.
    """
    scene = world.make_scene(split, number, longest)
    asked = []
    for question in world.questions(scene, split, number):
        kind = question.kind
        if question.options and talk:
            kind, question = "letter", replace(question, text=f"Which letter is {question.answer}?")
        asked.append(Lesson(kind, question.prompt, question.letter if question.options else question.answer))
    draw = np.random.default_rng([number, 2])
    for kind in world.KINDS:
        # In words, about every event, or with the others about one.
        for which in range(4) if talk else draw.permutation(4)[:1]:
            other = (which + 1 + int(draw.integers(3))) % 4
            question = world.question(scene, kind, int(which), other)
            if question is not None and question.text not in {lesson.prompt for lesson in asked}:
                answer = scene.sights[int(which)].with_article if kind in ("colour", "shape") else question.answer
                asked.append(Lesson(f"{kind}, free", question.text, answer))
    told = ", ".join(
        f"{sight.with_article} with {sound.name.replace('a row of', str(sound.beeps))}"
        for sight, sound in zip(scene.sights, scene.sounds, strict=True)
    )
    return [*asked, Lesson("everything", "Tell everything that happens.", told, 2.0)]


@dataclass
class Example:
    """A clip with its questions, one sequence.

    ids, positions, source, group: (S,), (3, S), (S,), (S,) as in `omni.stages.Request`; group 0 is the clip, which all
    see, the others the questions; blocks: where some of these begin, and the end. answers: (n,) places that predict a
    token of an answer, wanted: (n,) these tokens, lesson: (n,) of which question. seen: (2, n) colour and shape at each
    token of video, heard: (n,) the sound at each of sound, beside: (2, n) colour and shape on screen then; 0 nothing.
    """

    patches: Tensor
    grid: Tensor
    mel: Tensor
    ids: Tensor
    positions: Tensor
    source: Tensor
    group: Tensor
    answers: Tensor
    wanted: Tensor
    lesson: Tensor
    weight: Tensor
    seen: Tensor
    heard: Tensor
    beside: Tensor
    blocks: list[int]
    kinds: list[str]

    def to(self, device: torch.device) -> Example:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Example(
            **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
        )


class Examples(Dataset[Example]):
    """The clips of a split, by number: first drills, then talks, to `short` only clips of SHORT_CLIP at most."""

    def __init__(self, folder: Path, split: str, count: int, drills: int = 0, talks: int = 0, short: int = 0) -> None:
        self.config = read_config(folder)
        self.split, self.count = split, count
        self.drills, self.talks, self.short = drills, talks, short
        processor = Processor(folder, self.config)
        self.tokenizer, self.sizes = processor.tokenizer, processor.sizes
        content = [{"type": "video", "video": ""}, {"type": "text", "text": "?"}]
        # The template once: what stands before the clip, and what between question and answer.
        frame = encode_chat(self.tokenizer, processor.template, [{"role": "user", "content": content}])
        end = frame.index(self.tokenizer.id_of("<|vision_eos|>")) + 1
        self.head, self.tail = frame[:end], frame[end + len(self.tokenizer.encode("?")) :]
        self.stop = self.tokenizer.id_of("<|im_end|>")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Example:
        config, longest = self.config, SHORT_CLIP if number < self.short else world.LONGEST
        is_drill = number < self.drills
        scene = drill(number) if is_drill else world.make_scene(self.split, number, longest)
        patches, grid = patchify(torch.from_numpy(world.frames(scene, SAMPLED_FPS)).permute(0, 3, 1, 2), self.sizes)
        seconds = DRILL_SOUNDS if is_drill else scene.seconds
        mel = log_mel(torch.from_numpy(world.waveform(replace(scene, seconds=seconds))), config.audio.num_mel_bins)
        step = self.sizes.temporal_patch_size / SAMPLED_FPS
        heard = config.audio.token_count(mel.shape[1])
        clip = expand(self.head, [(config.tokens.video, clip_block(grid.tolist(), step, heard, config))])
        inputs = Inputs(
            torch.tensor([clip]),
            pixel_values_videos=patches,
            video_grid_thw=grid[None],
            video_second_per_grid=torch.tensor([step]),
            input_features=mel[None],
            feature_attention_mask=torch.ones(1, mel.shape[1], dtype=torch.long),
        )
        where = layout(inputs, config)
        ids, positions = list(clip), [where.positions]
        group, answers, wanted, lesson, weight, kinds = [0] * len(clip), [], [], [], [], []
        blocks = [len(clip)]
        asked = [] if is_drill else lessons(self.split, number, longest, talk=number < self.talks)
        for index, each in enumerate(asked):
            prompt = [*self.tokenizer.encode(each.prompt), *self.tail]
            answer = [*self.tokenizer.encode(each.answer), self.stop]
            first = len(ids) + len(prompt) - 1
            answers += range(first, first + len(answer))
            wanted += answer
            lesson += [index] * len(answer)
            weight += [each.weight / len(answer)] * len(answer)
            length = len(prompt) + len(answer) - 1  # the stop is read by nobody
            ids += (prompt + answer)[:-1]
            group += [index + 1] * length
            positions.append((torch.arange(length) + int(where.next_position)).expand(3, -1))
            kinds.append(each.kind)
            if len(ids) - blocks[-1] >= BLOCK:
                blocks.append(len(ids))
        if blocks[-1] < len(ids):
            blocks.append(len(ids))
        source = torch.full((len(ids),), -1)
        source[where.video] = torch.arange(len(where.video))
        source[where.audio] = torch.arange(len(where.audio)) + len(where.video)
        return Example(
            patches,
            grid,
            mel,
            torch.tensor(ids),
            torch.cat(positions, dim=1),
            source,
            torch.tensor(group),
            torch.tensor(answers),
            torch.tensor(wanted),
            torch.tensor(lesson),
            torch.tensor(weight),
            torch.from_numpy(what_is_seen(scene)),
            torch.from_numpy(what_is_heard(scene, heard)),
            torch.from_numpy(what_is_beside(scene, heard)),
            blocks,
            kinds,
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
    """(tokens,): number of the sound at each token, 25 of which are a second, 0 where there is none."""
    labels = np.zeros(tokens, np.int64)
    for sound in scene.sounds:
        labels[round(25 * sound.start) : round(25 * (sound.start + sound.seconds))] = 1 + world.SOUNDS.index(sound.name)
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


class Student(nn.Module):
    """The thinker in training. words: ids of what is told apart, colours, shapes and sounds in their order."""

    def __init__(self, config: OmniConfig, words: dict[str, list[int]]) -> None:
        super().__init__()
        self.thinker, self.words = Thinker(config), words
        for name, parameter in self.thinker.named_parameters():
            if parameter.dim() > 1:
                std = parameter[0].numel() ** -0.5
                if name.startswith("layers") and name.endswith(("output.weight", "down.weight")):
                    std /= math.sqrt(2 * config.decoder.num_layers)
                nn.init.normal_(parameter, std=std)

    def forward(self, example: Example, answers: bool = True) -> tuple[Tensor | None, Tensor]:
        """(n, vocab) logits where answers are predicted, and (3,) losses by token of colour, shape and sound, or (5,)
        with those of colour and shape beside a sound."""
        thinker = self.thinker
        # All grids of a clip at once: they do not see each other.
        grids, height, width = example.grid.tolist()
        patches = example.patches.view(grids, height * width, -1)
        pictures = thinker.vision.encode_batch(patches, thinker.vision.layout(height, width), None)[0].flatten(1, 2)
        sound, _ = thinker.audio(example.mel[None], torch.tensor([example.mel.shape[1]]))
        side = [
            self.told(pictures[0], "colour", example.seen[0]),
            self.told(pictures[0], "shape", example.seen[1]),
            self.told(sound, "sound", example.heard),
        ]
        if not answers:
            return None, torch.stack(side)
        media = torch.cat((pictures[0], sound))[None, None]
        x, _ = thinker.embed(example.ids[None], example.source[None], media)
        rotary = thinker.rotary(example.positions[:, None])
        for number, layer in enumerate(thinker.layers, 1):
            x = through(cast(Layer, layer), x, rotary, example)
            if number == BESIDE_LAYER:
                features = F.rms_norm(x[0, example.source >= len(pictures[0])], x.shape[-1:])
                side += [self.told(features, name, example.beside[i]) for i, name in enumerate(("colour", "shape"))]
        return thinker.logits(x[0, example.answers]), torch.stack(side)

    def told(self, features: Tensor, name: str, labels: Tensor) -> Tensor:
        """Loss of the likeliest word by embedding, nothing being as likely as a word at a right angle."""
        logits = F.linear(features, self.thinker.embedding.weight[self.words[name]]).float()
        return weighted(F.pad(logits, (1, 0)), labels)


def words_of(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Ids of the word that tells each colour, shape and sound from the others."""
    sounds = ("low", "high", "rising", "falling", "beeps")
    found = {
        name: [tokenizer.encode(f" {word}") for word in words]
        for name, words in (("colour", world.COLOURS), ("shape", world.SHAPES), ("sound", sounds))
    }
    assert all(len(ids) == 1 for many in found.values() for ids in many), "a word that is not one token"
    return {name: [ids[0] for ids in many] for name, many in found.items()}


def through(layer: Layer, x: Tensor, rotary: tuple[Tensor, Tensor], example: Example) -> Tensor:
    """A layer: the clip sees itself, a question the clip and itself."""
    q, k, v = layer.attention.project(layer.attention_norm(x), rotary)
    if x.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # attention's backward pass takes twice as long in bfloat16
            mixed = attention(q.float(), k.float(), v.float(), example)
    else:
        mixed = attention(q, k, v, example)
    x = x + layer.attention.output(rearrange(mixed, "b h s d -> b s (h d)"))
    return x + layer.mlp(layer.mlp_norm(x))


def attention(q: Tensor, k: Tensor, v: Tensor, example: Example) -> Tensor:
    clip = example.blocks[0]
    seen, told = k[:, :, :clip], v[:, :, :clip]
    mixed = [F.scaled_dot_product_attention(q[:, :, :clip], seen, told, is_causal=True, enable_gqa=True)]
    for start, end in pairwise(example.blocks):
        group = example.group[start:end]
        own = (group[:, None] == group).tril()
        mixed.append(
            F.scaled_dot_product_attention(
                q[:, :, start:end],
                torch.cat((seen, k[:, :, start:end]), dim=2),
                torch.cat((told, v[:, :, start:end]), dim=2),
                attn_mask=F.pad(own, (clip, 0), value=True),
                enable_gqa=True,
            )
        )
    return torch.cat(mixed, dim=2)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[0] = ABSENT_WEIGHT
    return F.cross_entropy(logits, labels, weight)


def right_answers(logits: Tensor, example: Example) -> list[bool]:
    """By question: whether every token of the answer is the likeliest, given those before."""
    right = torch.ones(len(example.kinds), device=logits.device)
    hits = (logits.argmax(dim=-1) == example.wanted).float()
    return right.scatter_reduce(0, example.lesson, hits, "amin").bool().tolist()


def train(folder: Path, drills: int, clips: int, device: torch.device, workers: int, validated: int) -> None:
    from tqdm import tqdm

    checkpoint, state_file, log_file = folder / "checkpoint", folder / "state.pt", folder / "log.jsonl"
    config = write_files(checkpoint)
    torch.manual_seed(0)
    student = Student(config, words_of(Processor(checkpoint, config).tokenizer)).to(device)
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.97)
    )
    done = 0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    held_out = [Examples(checkpoint, "validation", validated)[number] for number in range(validated)]
    talks, short = (drills + round(share * (clips - drills)) for share in (TALK_SHARE, SHORT_SHARE))
    data = Examples(checkpoint, "train", clips, drills, talks, short)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(done, clips),
        num_workers=workers,
        prefetch_factor=8,
        worker_init_fn=lambda _: torch.set_num_threads(1),
    )
    bar = tqdm(total=clips, initial=done, unit="clip", smoothing=0.02)
    mixed = torch.autocast(device.type, torch.bfloat16)
    means, saved = torch.full((6,), math.nan), time.monotonic()  # of the answers' loss and of those by token
    for example in loader:
        example = example.to(device)
        with mixed:
            logits, side = student(example, answers=done >= drills)
        answer = torch.full((), math.nan, device=device)
        loss = side.sum()
        if logits is not None:
            answer = F.cross_entropy(logits, example.wanted, reduction="none") * example.weight
            answer = answer.sum() / len(example.kinds)
            loss = loss + answer
        together = 1 if done < drills else CLIPS_PER_STEP
        (loss / together).backward()
        done += 1
        bar.update()
        losses = F.pad(torch.cat((answer.detach()[None], side.detach())), (0, 5 - len(side)), value=math.nan).cpu()
        means = torch.where(means.isnan(), losses, 0.98 * means + 0.02 * losses)
        if done % together == 0 or done == clips:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, drills, clips)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{means[0]:.3f}", tokens=f"{means[1:].nansum():.3f}")
        if (done % 1000 == 0 and done > drills) or done == clips:
            accuracy = validate(student, held_out, mixed, device)
            with log_file.open("a", encoding="utf-8") as file:
                line = {"clips": done, "loss": means[0].item(), "tokens": means[1:].tolist(), "accuracy": accuracy}
                file.write(json.dumps(line) + "\n")
        if time.monotonic() - saved > 120 or done == clips:
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            saved = time.monotonic()
    bar.close()
    weights.save_sharded(public_tensors(student.thinker), checkpoint, max_shard_bytes=1 << 30)


def learning_rate(done: int, drills: int, clips: int) -> float:
    """Rises at the beginning of both parts, falls along a cosine in the second."""
    if done <= drills:
        return LEARNING_RATE * min(1, done / WARM_UP)
    since = done - drills
    fall = 0.51 + 0.49 * math.cos(math.pi * since / (clips - drills))
    return LEARNING_RATE * min(1, since / CLIPS_PER_STEP / WARM_UP) * fall


@torch.no_grad()
def validate(student: Student, examples: list[Example], mixed: Any, device: torch.device) -> dict[str, float]:
    """Share of right answers by kind, the right beginning of each given."""
    right: dict[str, list[bool]] = {}
    for example in examples:
        example = example.to(device)
        with mixed:
            logits, _ = student(example)
        for kind, hit in zip(example.kinds, right_answers(logits, example), strict=True):
            right.setdefault(kind, []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny checkpoint.")
    parser.add_argument("folder", type=Path, help="for the state, the log and the checkpoint; resumed where it has one")
    parser.add_argument("--drills", type=int, default=3000, help="of the encoders, first (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=14_000, help="with questions (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make clips (default: %(default)s)")
    parser.add_argument("--validated", type=int, default=60, help="clips that accuracy is measured on")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    train(
        options.folder,
        options.drills,
        options.drills + options.clips,
        torch.device(options.device),
        options.workers,
        options.validated,
    )


if __name__ == "__main__":
    main()
