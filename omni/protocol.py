"""How the tables of arXiv 2605.20035 were measured, where that differs from how clips are read and asked about here.

By the public code of its authors (github.com/xxayt/SEATS) with the versions that it pins, transformers 4.57.1 among
them. What stays ours: statistics of Stage I are in float32, theirs in bfloat16, and frames are scaled by Pillow, which
rounds each time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from omni.config import QWEN3
from seats.method import Method
from seats.methods import method_for, require_name

PROTOCOLS = ("ours", "paper")

PERSONA = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
INSTRUCTION = " Please analyze the video carefully and select the most appropriate answer from the given options."

FRAME_TOKENS = (128, 144)
"""Tokens' worth of pixels that a frame has at least and at most."""
TOTAL_TOKENS = 24576
"""Tokens' worth of pixels of a clip, two frames to a grid: of more than 341 frames each has less, down to 1.05 times
the least."""
AGAIN_TOKENS = (128, 768)
"""Likewise the bounds of a frame that is scaled a second time."""
SOUND_SECONDS = 300
"""Of a clip's sound, what is heard."""

RETENTIONS = (1.0, 0.35, 0.25, 0.15, 0.10)
"""The rows of the tables."""
PUBLISHED_RATIOS = {("omnizip", 0.35): None, ("omnizip", 0.25): (0.25, 0.25)}
"""Of a method that the tables do not have at every retention: video_ratio and audio_ratio, None for those of SEATS."""


@dataclass(frozen=True)
class Reading:
    """told_fps: where it is given, frames lie at even distances from a clip's first to its last, as qwen-omni-utils
    takes them (`torch.linspace`, rounded), and the model is told this rate whatever the true one is. sound_seconds: of
    a sound, no more is heard. again_tokens: where it is given, a clip's frames, scaled as asked, are scaled once more
    where these have fewer or more tokens' worth of pixels than that."""

    told_fps: float | None = None
    sound_seconds: int | None = None
    again_tokens: tuple[int, int] | None = None

    @property
    def sound_samples(self) -> int | None:
        """At 16 kHz: what Qwen2.5-Omni's extractor pads a sound to."""
        return None if self.sound_seconds is None else self.sound_seconds * 16_000

    def heard(self, start: float, end: float | None) -> tuple[float, float | None]:
        """The stretch of a sound that is heard of one from `start` to `end`."""
        if self.sound_seconds is None:
            return start, end
        return start, min(math.inf if end is None else end, start + self.sound_seconds)


OURS = Reading()
"""Every `total / count`-th frame, as transformers takes them; true times; the whole sound."""


def published_reading(config: Any) -> Reading:
    """config, here and below: has what `seats.preset_for` asks.

    1.0 s per temporal grid with Qwen2.5-Omni, 2.0 s with Qwen3-Omni: the processors' defaults, whatever the clip.

    Sound: the processors call WhisperFeatureExtractor with its own truncation=True, which cuts to `n_samples`
    (transformers 4.57.1, models/whisper/feature_extraction_whisper.py): 300 s in the file of Qwen2.5-Omni, and what
    lmms_eval/models/simple/qwen3_omni_zip.py of the authors' code sets for Qwen3-Omni, whose file says 30 s. What lies
    past this chunk is cut, it becomes no second one: of 310 s, of either family, 30,000 frames of log-mel come out.
    Sounds by themselves, which the tables do not have, the authors ask in pieces of 300 s.

    Frames are scaled twice. First qwen-omni-utils does, within the bounds of `pixel_bounds`. Rounded down to whole
    tokens a frame may have less than the least: one of 16:9 in a clip of more than 341 frames has 8 x 15 tokens, one of
    21:9 in any clip 7 x 18. Then Qwen2VLVideoProcessor (4.57.1) brings it within 128 and 768 tokens, `size` of
    both processors' `videos_kwargs`: to 9 x 16 and to 8 x 19.

    Clips of one to three frames have four here, some of them twice
    (`omni.processing.frames.sample_indices`); qwen-omni-utils takes two of two or three and refuses one.
    """
    told_fps = 1.0 if config.family == QWEN3 else 2.0
    return Reading(told_fps=told_fps, sound_seconds=SOUND_SECONDS, again_tokens=AGAIN_TOKENS)


def system_message(task: str) -> str:
    """What goes before a question of this task of lmms-eval.

    Nothing before those that are neither WorldSense's nor Daily-Omni's: so in the authors' code since a8e37a3
    (2026-07-24). Before that, from 5a24fdd (2026-06-07) to 584ef03, the persona stood there, without the instruction:
    a pair of brackets was taken away.
    """
    return PERSONA + INSTRUCTION if "worldsense" in task or "daily" in task else ""


def most_frames(task: str, config: Any) -> int:
    """Of a clip in a question of this task."""
    if "worldsense" in task or "daily" in task:
        return 128
    if config.family == QWEN3:
        return 196
    return 256 if "omnivideobench" in task else 768


def pixel_bounds(factor: int) -> dict[str, int]:
    """min_pixels, max_pixels and total_pixels of `Omni.prepare`. factor: pixels along the side of a token.

    `published_reading` says what becomes of a frame that these leave too small.
    """
    least, most = FRAME_TOKENS
    return {
        "min_pixels": least * factor**2,
        "max_pixels": most * factor**2,
        "total_pixels": TOTAL_TOKENS * factor**2,
    }


def published_method(name: str, config: Any, retention: float) -> Method | None:
    """A row of the tables, None for every token. Raises ValueError where the tables have no such row, and why."""
    require_name(name)
    if retention not in RETENTIONS:
        at = ", ".join(f"{kept:.0%}" for kept in RETENTIONS)
        raise ValueError(f"the paper's tables are at {at} alone, not at {retention:.4g}; protocol=ours takes any.")
    if retention == 1:
        return None
    ratios = None
    if any(name == method for method, _ in PUBLISHED_RATIOS):
        if (name, retention) not in PUBLISHED_RATIOS:
            at = ", ".join(f"{kept:.0%}" for method, kept in PUBLISHED_RATIOS if method == name)
            raise ValueError(f"{name} is published at {at} alone, not at {retention:.0%}: it keeps more than is asked.")
        ratios = PUBLISHED_RATIOS[name, retention]
    video, audio = ratios or (None, None)
    return method_for(name, config, retention, video_ratio=video, audio_ratio=audio)


def require_row(name: str, config: Any, retention: float, frames: int, protocol: str = "paper") -> None:
    """Raises ValueError where a protocol cannot run a row: by the settings alone, or on a clip of so many frames
    (`require_room`)."""
    require_name(name)
    seconds = frames // 2
    if protocol == "paper":
        method, seconds = published_method(name, config, retention), min(seconds, SOUND_SECONDS)
    else:
        method = None if retention == 1 else method_for(name, config, retention)
    if method is not None:
        require_room(method, config, frames, seconds)


def require_room(method: Method, config: Any, frames: int, seconds: float) -> None:
    """Raises ValueError where a method cannot keep what it is to keep of a clip of so many frames, as large as the
    paper's, with so many seconds of sound.

    A task's clips are of all lengths. Asked about is the longest that has every frame seen at two a second: shorter
    ones are no easier, since video and sound grow alike. Some that are longer might do, with more sound to a frame.
    """
    windows, rest = divmod(max(frames // 2, 1), method.window_grids)
    video = [FRAME_TOKENS[1] * method.window_grids] * windows + [FRAME_TOKENS[1] * rest] * (rest > 0)
    sound = int(seconds * (13 if config.family == QWEN3 else 25))
    method.entering(video, [50] * (sound // 50) + [sound % 50] * (sound % 50 > 0))
