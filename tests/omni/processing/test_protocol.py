"""Clips as the measurements of arXiv 2605.20035 read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import number_of, tone, write_clip
from PIL import Image

import omni
from omni.processing.frames import VisionSizes
from omni.processing.media import read_video
from omni.processing.media.timeline import Timeline, Wish
from omni.processing.reader import bounded
from omni.protocol import (
    OURS,
    Reading,
    most_frames,
    pixel_bounds,
    published_method,
    published_reading,
    require_row,
    system_message,
)


class Released:
    """What a protocol asks of a released model's configuration."""

    def __init__(self, family: str, num_layers: int, hidden_size: int) -> None:
        self.family = family
        self.decoder = type("Decoder", (), {"num_layers": num_layers, "hidden_size": hidden_size})


SEVEN = Released("qwen2_5_omni", 28, 3584)
THIRTY = Released("qwen3_omni_moe", 48, 2048)


def linspace(total: int, count: int) -> list[int]:
    """qwen-omni-utils' indices."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


@pytest.mark.parametrize(
    ("total", "rate", "most", "count"),
    [(97, 10, 768, 18), (97, 10, 6, 6), (80, 25, 768, 6), (41, 30, 768, 4), (3, 10, 768, 4)],
)
def test_frames_lie_between_both_ends(total: int, rate: int, most: int, count: int) -> None:
    """At two a second, made even, at least 4; not every total / count-th, of which the last is never taken."""
    timeline = Timeline([number / rate for number in range(total)], total / rate, (float(rate),))
    sample = timeline.sample(Wish(max_frames=most, told_fps=1.0), "the clip")
    assert sample.indices == linspace(total, count)
    assert sample.fps == 1.0
    assert timeline.sample(Wish(max_frames=most), "the clip").indices != sample.indices


def test_by_index_where_the_rate_varies() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 2.0, 2.1, 2.2, 4.0, 4.9]
    sample = Timeline(times, 5.0, (2.0,)).sample(Wish(told_fps=2.0), "the clip")
    assert sample.indices == linspace(10, 10)


def test_frames_of_a_file(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", 50, 10)
    video = read_video(path, told_fps=2.0)
    assert [number_of(frame) for frame in video.frames] == linspace(50, 10)
    assert video.fps == 2.0


@pytest.mark.parametrize(("family", "side"), [("qwen2.5", 28), ("qwen3", 32)])
def test_frames_that_are_too_small_are_scaled_again(
    write_checkpoint: Callable[[str], Path], family: str, side: int
) -> None:
    """21:9: 144 tokens at most are 7 x 18 in whole ones, fewer than 128, so these are scaled to 8 x 19. A clip as it is
    read otherwise keeps the first size."""
    model = omni.load(str(write_checkpoint(family)), device="cpu")
    drawn = np.random.default_rng(0).integers(0, 256, (4, 9 * side, 21 * side, 3), dtype=np.uint8)
    messages = [{"role": "user", "content": [{"type": "video", "video": (drawn, 2.0)}]}]
    bounds = pixel_bounds(side)
    for reading, sizes in (
        (published_reading(model.config), ((7 * side, 18 * side), (8 * side, 19 * side))),
        (OURS, ((7 * side, 18 * side),)),
    ):
        inputs = model.processor.prepare(messages, **bounds, reading=reading)
        (frames,) = inputs.held("pixel_values_videos").frames
        for number, frame in enumerate(drawn):
            picture = Image.fromarray(frame)
            for height, width in sizes:
                picture = picture.resize((width, height), Image.Resampling.BICUBIC)
            assert torch.equal(frames[number], torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def test_a_share_of_pixels_is_no_whole_number() -> None:
    """As in qwen-omni-utils: 24,576 tokens' worth for 360 frames, two to a grid, are 107,042.1 pixels to a frame."""
    sizes = bounded(VisionSizes(), **pixel_bounds(28))
    assert sizes.clip_size(360, 148, 1110) == (4 * 28, 32 * 28)


def test_sound_is_cut() -> None:
    assert OURS.heard(3.0, None) == (3.0, None)
    reading = Reading(sound_seconds=300)
    assert reading.heard(0.0, None) == (0.0, 300)
    assert reading.heard(5.0, 20.0) == (5.0, 20.0)
    assert reading.heard(5.0, 400.0) == (5.0, 305.0)
    assert reading.sound_samples == 4_800_000


def test_a_second_more_than_is_heard(tmp_path: Path) -> None:
    """To the sample, from a file."""
    from omni.processing.media import read_audio

    path = write_clip(tmp_path / "clip.mp4", 30, 10, sound=np.stack([tone(440, 3, 44_100)] * 2))
    start, end = Reading(sound_seconds=2).heard(0.0, None)
    heard = read_audio(path, start=start, end=end)
    assert heard is not None and len(heard) == 32_000


def test_what_is_asked_of_each_task() -> None:
    assert system_message("dailyomni").startswith("You are Qwen, a virtual human")
    assert system_message("worldsense_omni").endswith("the most appropriate answer from the given options.")
    assert system_message("videomme") == system_message("lvomnibench") == system_message("omnivideobench") == ""
    tasks = ("worldsense_omni", "dailyomni", "omnivideobench", "videomme", "lvomnibench")
    assert [most_frames(task, SEVEN) for task in tasks] == [128, 128, 256, 768, 768]
    assert [most_frames(task, THIRTY) for task in tasks] == [128, 128, 196, 196, 196]
    assert pixel_bounds(28) == {"min_pixels": 100_352, "max_pixels": 112_896, "total_pixels": 19_267_584}


def test_rows_of_the_tables() -> None:
    method = published_method("omnizip", SEVEN, 0.25)
    assert method is not None and (method.video_ratio, method.audio_ratio) == (0.25, 0.25)
    method = published_method("seats", THIRTY, 0.10)
    assert method is not None and (method.video_ratio, method.audio_ratio) == (0.07, 0.45)
    assert published_method("seats", SEVEN, 1) is None
    with pytest.raises(ValueError, match="omnizip is published at 35%, 25% alone, not at 10%"):
        published_method("omnizip", SEVEN, 0.10)
    with pytest.raises(ValueError, match=r"tables are at 100%, 35%, 25%, 15%, 10% alone, not at 0\.3; protocol=ours"):
        published_method("seats", SEVEN, 0.30)
    require_row("seats", SEVEN, 0.30, 128, "ours")
    require_row("omnizip", SEVEN, 0.10, 128, "ours")
    for protocol in ("paper", "ours"):
        with pytest.raises(ValueError, match="FastV cannot keep 6% of video on average"):
            require_row("fastv-om", SEVEN, 0.10, 128, protocol)
        with pytest.raises(ValueError, match="DyCoke keeps 26% of video at least"):
            require_row("dycoke", THIRTY, 0.15, 196, protocol)
    with pytest.raises(ValueError, match="FastV cannot keep 6% of video on average"):
        require_row("fastv-om", SEVEN, 0.10, 128)
    with pytest.raises(ValueError, match="DyCoke keeps 25% of video at least"):
        require_row("dycoke", SEVEN, 0.10, 128)
    for name in ("seats", "random", "visionzip-om", "divprune", "fastvid"):
        require_row(name, SEVEN, 0.10, 768)
        require_row(name, THIRTY, 0.10, 196)
