"""Trains `tiny`, the checkpoint that is shipped in `weights/tiny`: a thinker that understands the world of `world.py`.

    python scripts/tiny/train_tiny.py .train   # resumes what is there; leaves .train/training.png and .train/checkpoint

Clips are made without a file. First the encoders alone learn to say what is seen and heard at each of their tokens, in
the words of the decoder: a token is to resemble the embeddings of its colour and its shape, or of its sound and of how
many beeps there were so far. Then the decoder practises to name options by their letters, on text alone. Then it learns
to answer, many times about what the encoders made of the same clips, from a part of the tokens, which is several times
as fast. Then all learns from whole clips, each drawn anew. Many questions share a clip in one sequence and do not see
each other. `student.py` is what learns, and the hints that its layers are given.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import world
from lessons import CELL, CHOICES, QUESTIONS, Clip, Clips, Example, lessons, letters, to, words_of
from student import Student, profits_from_bfloat16, right_answers
from torch import nn
from torch.utils.data import DataLoader

import weights
from omni.config import OmniConfig, read_config
from omni.processing.processor import Processor

sys.path.append(str(Path(__file__).parents[1]))
from make_checkpoint import FAMILIES, public_tensors, qwen2_5_config, write_json, write_tokenizer

SHARES = 0.1, 0.7
"""Of the tokens of remembered clips, that are left in: fewer cost less, and what is left out is done without."""
LEARNING_RATE, WARM_UP, CLIPS_PER_STEP = 1e-3, 200, 2
SAVED_EVERY = 120
"""Seconds between two savings of the state, which a later run resumes."""


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
    draw = np.random.default_rng(0)
    asked = (lesson for number in range(200) for lesson in lessons(world.make_scene("train", number), draw, 16, 0.5))
    return "\n".join(f"{lesson.prompt}\n{lesson.answer}" for lesson in asked)


@dataclass(frozen=True)
class Course:
    """drills: of the encoders alone. letters: of the decoder, without a clip. readings: of the decoder, about
    `remembered` clips. clips: of all."""

    drills: int
    letters: int
    remembered: int
    readings: int
    clips: int

    @property
    def practised(self) -> int:
        """Drills and letters."""
        return self.drills + self.letters

    @property
    def seen(self) -> int:
        """All but whole clips."""
        return self.practised + self.readings

    @property
    def end(self) -> int:
        return self.seen + self.clips


def stream(
    student: Student, data: Clips, course: Course, done: int, device: torch.device, workers: int
) -> Iterator[Clip]:
    """What is learnt from, from number `done` on, on the CPU; remembered clips with their media, on the device."""
    from tqdm import tqdm

    def made(start: int, end: int) -> Iterator[Clip]:
        loader = DataLoader(
            data,
            batch_size=None,
            sampler=range(start, end),
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=lambda _: torch.set_num_threads(1),
        )
        return iter(loader)

    yield from made(done, course.drills)
    for _ in range(max(done, course.drills), course.practised):
        yield data.blank()
    first = course.drills + course.remembered
    if done < course.seen:
        known = []
        for clip in tqdm(made(course.drills, first), total=course.remembered, desc="Remembering", unit="clip"):
            with torch.no_grad():
                media = torch.cat(student.encode(to(clip, device))).bfloat16()
            # Copied: tensors of another process hold a file open each.
            heard_and_seen = replace(clip, patches=clip.patches[:0], mel=clip.mel[:0])
            known.append(replace(to(heard_and_seen, torch.device("cpu"), copy=True), media=media))
        for number in range(max(done, course.practised), course.seen):
            draw = np.random.default_rng([number, 3])
            yield known[int(draw.integers(len(known)))].thinned(float(draw.uniform(*SHARES)), draw)
    yield from made(first + max(0, done - course.seen), first + course.clips)


def train(folder: Path, course: Course, device: torch.device, workers: int, validated: int) -> None:
    from tqdm import tqdm

    checkpoint, state_file, log_file = folder / "checkpoint", folder / "state.pt", folder / "log.jsonl"
    config = write_files(checkpoint)
    torch.manual_seed(0)
    student = Student(config, words_of(Processor(checkpoint, config).tokenizer)).to(device)
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.97),
        fused=device.type == "cuda",
    )
    done, spent = 0, 0.0
    if state_file.is_file():
        state = torch.load(state_file, map_location=device, weights_only=True)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        done, spent = state["done"], state["seconds"]
    data = Clips(checkpoint, "train", course.drills + course.remembered + course.clips, course.drills)
    held_out = exam(Clips(checkpoint, "validation", validated))
    bar = tqdm(total=course.end, initial=done, unit="clip", smoothing=0.02)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=profits_from_bfloat16(device))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    means = torch.full((12,), math.nan)  # of the answers' loss and of those by token
    started = saved = time.monotonic()
    for clip in stream(student, data, course, done, device, workers):
        answer, hints = torch.full((), math.nan, device=device), torch.full((7,), math.nan, device=device)
        is_practice = course.drills <= done < course.practised
        with mixed:
            if done < course.drills:
                clip = to(clip, device)
            else:
                draw = np.random.default_rng([done, 4])
                asked = letters(done) if is_practice else lessons(clip.scene, draw, QUESTIONS, CHOICES)
                example = to(data.ask(clip, asked), device)
                clip = example.clip
            media, side = clip.media, torch.full((4,), math.nan, device=device)
            if not is_practice:
                media = torch.cat(student.encode(clip)) if media is None else media.float()
                side = student.labelled(clip, *media.split([clip.seen.shape[1], clip.heard.shape[1]]))
            loss = side.nansum()
            if done >= course.drills:
                logits, hints = student(example, media)
                answer = F.cross_entropy(logits, example.wanted, reduction="none") * example.weight
                answer = answer.sum() / len(example.kinds)
                loss = loss + answer + hints.sum()
        together = 1 if done < course.practised else CLIPS_PER_STEP
        (loss / together).backward()
        done += 1
        bar.update()
        losses = torch.cat((answer.detach()[None], side.detach(), hints.detach())).cpu()
        means = torch.where(means.isnan(), losses, torch.where(losses.isnan(), means, 0.98 * means + 0.02 * losses))
        if done % together == 0 or done == course.end:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done, course)
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{means[0]:.3f}", tokens=f"{means[1:].nansum():.3f}")
        if (done % 1000 == 0 and done > course.drills) or done == course.end:
            accuracy = validate(student, held_out, mixed, device)
            with log_file.open("a", encoding="utf-8") as file:
                line = {"clips": done, "seconds": spent + time.monotonic() - started, "loss": means[0].item()}
                line |= {"tokens": means[1:].tolist(), "accuracy": accuracy}
                file.write(json.dumps(line) + "\n")
            plot(log_file, folder / "training.png")
        if (done % together == 0 and time.monotonic() - saved > SAVED_EVERY) or done == course.end:
            saved = time.monotonic()
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"done": done, "seconds": spent + saved - started}
            torch.save(state, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
    bar.close()
    weights.save_sharded(public_tensors(student.thinker), checkpoint, max_shard_bytes=1 << 30)
    print(f"{checkpoint}: {done} clips in {(spent + time.monotonic() - started) / 60:.0f} minutes")


def plot(log_file: Path, picture: Path) -> None:
    """Loss of answers, and accuracy by kind of question, with options and without, over the clips learnt from."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]
    clips = [line["clips"] for line in lines]
    figure, (loss, *accuracies) = plt.subplots(1, 3, figsize=(18, 5), layout="constrained")
    loss.semilogy(clips, [line["loss"] for line in lines], ".-")
    loss.set(title="answers", xlabel="clips", ylabel="cross-entropy by question, nats")
    free = {kind for line in lines for kind in line["accuracy"] if kind.endswith(", free") or kind == "everything"}
    for axes, title, kinds in (
        (accuracies[0], "four options", sorted(lines[-1]["accuracy"].keys() - free)),
        (accuracies[1], "free answers", sorted(free)),
    ):
        for kind in kinds:
            right = [100 * line["accuracy"].get(kind, math.nan) for line in lines]
            axes.plot(clips, right, ".-", label=kind.removesuffix(", free"))
        axes.set(title=title, xlabel="clips", ylabel="right, % of validation", ylim=(0, 102))
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def learning_rate(done: int, course: Course) -> float:
    """Rises where something new begins, falls by half over the readings and to nearly nothing after."""
    if done <= course.practised:
        begun = done if done <= course.drills else done - course.drills
        return LEARNING_RATE * min(1, begun / WARM_UP)
    warm = min(1, (done - course.practised) / CLIPS_PER_STEP / WARM_UP)
    if done <= course.seen:
        return LEARNING_RATE * warm * (1 - 0.5 * (done - course.practised) / course.readings)
    return LEARNING_RATE * (0.26 + 0.24 * math.cos(math.pi * (done - course.seen) / course.clips))


def exam(clips: Clips) -> list[Example]:
    return [
        clips.ask(clip, lessons(clip.scene, np.random.default_rng([number, 5]), 2 * QUESTIONS, CHOICES))
        for number, clip in ((number, clips[number]) for number in range(clips.count))
    ]


@torch.no_grad()
def validate(student: Student, examples: list[Example], mixed: Any, device: torch.device) -> dict[str, float]:
    """Share of right answers by kind, the right beginning of each given."""
    right: dict[str, list[bool]] = {}
    for example in examples:
        example = to(example, device)
        with mixed:
            logits, _ = student(example, torch.cat(student.encode(example.clip)))
        for kind, hit in zip(example.kinds, right_answers(logits, example), strict=True):
            right.setdefault(kind, []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny checkpoint.")
    parser.add_argument("folder", type=Path, help="for the state, the log and the checkpoint; resumed where it has one")
    parser.add_argument("--drills", type=int, default=3000, help="of the encoders, first (default: %(default)s)")
    parser.add_argument("--letters", type=int, default=1000, help="practice without a clip (default: %(default)s)")
    parser.add_argument("--remembered", type=int, default=1600, help="clips for readings (default: %(default)s)")
    parser.add_argument("--readings", type=int, default=11_000, help="of the decoder alone (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=1200, help="that all learns from, last (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make clips (default: %(default)s)")
    parser.add_argument("--validated", type=int, default=24, help="clips that accuracy is measured on")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    course = Course(options.drills, options.letters, options.remembered, options.readings, options.clips)
    train(options.folder, course, torch.device(options.device), options.workers, options.validated)


if __name__ == "__main__":
    main()
