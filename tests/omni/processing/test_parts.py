"""Settings of message parts: each is obeyed, goes before the call's, or is refused by name."""

from __future__ import annotations

import base64
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import number_of, numbered_frame, tone, write_clip, write_sound
from PIL import Image
from torch import Tensor

from omni.config import read_config
from omni.inputs import InputError, Inputs
from omni.processing import chat_template, sandbox
from omni.processing.chat_template import ChatTemplateError
from omni.processing.frames import MediaError
from omni.processing.media import read_video
from omni.processing.mel import log_mel
from omni.processing.parts import KEYS
from omni.processing.processor import Processor

RATE = 16_000


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A warning where a test does not ask for one is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(autouse=True)
def rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates without a process of their own, which takes longer than all the rest."""
    monkeypatch.setattr(chat_template, "render", sandbox.render)


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Processor:
    return Processor(checkpoint, read_config(checkpoint))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A clip of 10 s at 10 frames a second, each second of its sound of another pitch; the sound alone; a picture."""
    folder = tmp_path_factory.mktemp("parts")
    sound = np.concatenate([tone(300 + 100 * second, 1, RATE) for second in range(10)])[None]
    picture = folder / "a.png"
    Image.fromarray(numbered_frame(77, (560, 840))).save(picture)
    return {
        "video": write_clip(folder / "a.mp4", 100, 10, gop=20, sound=sound, rate=RATE),
        "audio": write_sound(folder / "a.wav", sound, RATE, "pcm_s16le"),
        "image": picture,
    }


def asked(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def numbers(inputs: Inputs, clip: int = 0) -> list[int]:
    return [number_of(frame) for frame in inputs.held("pixel_values_videos").frames[clip]]


def size(inputs: Inputs, kind: str = "video") -> tuple[int, ...]:
    grid = inputs.video_grid_thw if kind == "video" else inputs.image_grid_thw
    assert grid is not None
    return tuple(14 * side for side in grid[0, 1:].tolist())


def heard(inputs: Inputs) -> Tensor:
    assert inputs.input_features is not None
    return inputs.input_features[0]


@pytest.mark.parametrize(
    ("settings", "expected", "rate"),
    [
        ({}, list(range(0, 100, 5)), 2.0),
        ({"fps": 1}, list(range(0, 100, 10)), 1.0),
        ({"fps": 0.5}, [0, 25, 50, 75], 0.5),
        ({"nframes": 4}, [0, 25, 50, 75], 0.4),
        ({"nframes": 2}, [0, 50], 0.2),
        ({"nframes": 5.0}, [0, 25, 50, 75], 0.4),
        ({"min_frames": 40}, [int(2.5 * n) for n in range(40)], 4.0),
        ({"min_frames": 39}, [int(2.5 * n) for n in range(40)], 4.0),
        ({"max_frames": 11}, list(range(0, 100, 10)), 1.0),
        ({"max_frames": 2}, [0, 50], 0.2),
        ({"fps": 5, "max_frames": 10, "min_frames": 10}, list(range(0, 100, 10)), 1.0),
        ({"video_start": 4, "video_end": 8}, list(range(40, 80, 5)), 2.0),
        ({"video_start": 7.5}, [75, 81, 87, 93], 2.0),
        ({"video_end": 2.0, "fps": 4}, [0, 2, 5, 7, 10, 12, 15, 17], 4.0),
        ({"video_start": 2, "video_end": 4, "nframes": 10}, list(range(20, 40, 2)), 5.0),
        ({"video_start": 9, "video_end": 99, "nframes": 2}, [90, 95], 2.0),
        ({"fps": None, "video_start": None}, list(range(0, 100, 5)), 2.0),
        ({"fps": np.float32(1)}, list(range(0, 100, 10)), 1.0),
    ],
)
def test_frames_of_a_clip(
    processor: Processor, files: dict[str, Path], settings: dict[str, Any], expected: list[int], rate: float
) -> None:
    """Protects: how many, from where to where; the model is told the rate that they have."""
    part = {"type": "video", "video": files["video"], "use_audio_in_video": False, **settings}
    inputs = processor.prepare(asked(part))
    assert numbers(inputs) == expected
    assert inputs.video_second_per_grid is not None
    assert float(inputs.video_second_per_grid[0]) == pytest.approx(2 / rate, rel=1e-3)


def test_a_parts_own_settings_go_first(processor: Processor, files: dict[str, Path]) -> None:
    """Protects: they are of their part alone, and beat the call's options, in both directions."""
    silent = {"type": "video", "video": str(files["video"]), "use_audio_in_video": False}
    inputs = processor.prepare(asked({**silent, "fps": 1}, silent, {**silent, "min_frames": 12}), fps=0.6, max_frames=6)
    assert numbers(inputs, 0) == [0, 16, 33, 50, 66, 83]
    assert numbers(inputs, 1) == [0, 16, 33, 50, 66, 83]
    assert numbers(inputs, 2) == [int(n * 100 / 12) for n in range(12)]
    inputs = processor.prepare(asked({**silent, "max_pixels": 784 * 4}), min_pixels=784 * 8)
    assert np.prod(size(inputs)) <= 784 * 4
    inputs = processor.prepare(asked({**silent, "min_pixels": 784 * 20}), max_pixels=784 * 8)
    assert np.prod(size(inputs)) >= 784 * 20


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (560, 840)),
        ({"max_pixels": 784 * 150}, (280, 420)),
        ({"min_pixels": 784 * 2400}, (1120, 1680)),
        ({"total_pixels": 784 * 150}, (280, 420)),
        ({"total_pixels": 784 * 150.5, "max_pixels": 784 * 24}, (112, 168)),
        ({"resized_height": 280, "resized_width": 420}, (280, 420)),
        ({"resized_height": 100, "resized_width": 300}, (112, 308)),
        ({"resized_height": 1000, "resized_width": 1000, "max_pixels": 784 * 100}, (280, 280)),
        ({"resized_height": 28, "resized_width": 28, "min_pixels": 784 * 9}, (84, 84)),
    ],
)
def test_sizes_of_a_picture(
    processor: Processor, files: dict[str, Path], settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    assert size(processor.prepare(asked({"type": "image", "image": files["image"], **settings})), "image") == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_pixels": 784 * 24}, (112, 168)),
        ({"max_pixels": 784 * 6, "min_pixels": 784}, (56, 84)),
        ({"min_pixels": 784 * 600, "max_pixels": 784 * 700}, (560, 840)),
        ({"total_pixels": 784 * 60, "min_pixels": 784}, (56, 84)),
        ({"resized_height": 84, "resized_width": 140}, (84, 140)),
    ],
)
def test_sizes_of_a_clip(
    processor: Processor, files: dict[str, Path], settings: dict[str, Any], expected: tuple[int, int]
) -> None:
    """Protects: bounds of a frame, and of all frames (here 20, two to a grid)."""
    part = {"type": "video", "video": files["video"], "use_audio_in_video": False, **settings}
    assert size(processor.prepare(asked(part))) == expected


def test_sound_of_a_stretch(processor: Processor, files: dict[str, Path]) -> None:
    """Protects: of clips and sounds the same stretch is heard, its times from 0."""
    sound = torch.from_numpy(np.concatenate([tone(300 + 100 * second, 1, RATE) for second in range(10)]))
    cut = processor.prepare(asked({"type": "audio", "audio": files["audio"], "audio_start": 2, "audio_end": 4.5}))
    torch.testing.assert_close(heard(cut), log_mel(sound[2 * RATE : 9 * RATE // 2]), atol=2e-2, rtol=0)
    tail = processor.prepare(asked({"type": "audio", "audio": (sound, RATE), "audio_start": 8.0}))
    torch.testing.assert_close(heard(tail), log_mel(sound[8 * RATE :]), atol=1e-5, rtol=0)
    clip = processor.prepare(asked({"type": "video", "video": files["video"], "video_start": 2, "video_end": 4.5}))
    assert heard(clip).shape == (128, 250)
    for second, hertz in ((0.5, 500), (1.5, 600), (2.25, 700)):
        alone = log_mel(torch.from_numpy(tone(hertz, 0.3, RATE)))[:, 15]
        assert int(heard(clip)[:, int(100 * second)].argmax()) == int(alone.argmax())


def test_whether_a_clip_is_heard_is_its_own_affair(processor: Processor, files: dict[str, Path]) -> None:
    clip = {"type": "video", "video": files["video"]}
    inputs = processor.prepare(asked(clip, {**clip, "use_audio_in_video": False}))
    assert inputs.input_features is not None and len(inputs.input_features) == 1
    inputs = processor.prepare(asked(clip, {**clip, "use_audio_in_video": True}), use_audio_in_video=False)
    assert inputs.input_features is not None and len(inputs.input_features) == 1 and inputs.use_audio_in_video
    with pytest.raises(MediaError, match=r"audio_track is 1, but .* has 1 sound track "):
        processor.prepare(asked({**clip, "audio_track": 1}))
    assert processor.prepare(asked({**clip, "audio_track": 0})).input_features is not None


@pytest.mark.parametrize("name", ["fps", "sample_fps"])
def test_a_list_of_frames_is_a_clip(processor: Processor, tmp_path: Path, name: str, files: dict[str, Path]) -> None:
    """Protects: paths, addresses, PIL pictures and arrays; all of them, at the rate that is stated; an odd last one is
    repeated, as qwen-omni-utils does."""
    pictures = [Image.fromarray(numbered_frame(number)) for number in range(5)]
    for number in (0, 1):
        pictures[number].save(tmp_path / f"{number}.png")
    mixed = [str(tmp_path / "0.png"), (tmp_path / "1.png").as_uri(), pictures[2]]
    mixed += [np.array(pictures[3]), torch.from_numpy(numbered_frame(4)).permute(2, 0, 1)]
    inputs = processor.prepare(asked({"type": "video", "video": mixed, name: 0.5}))
    assert numbers(inputs) == [0, 1, 2, 3, 4, 4]
    assert inputs.video_second_per_grid is not None and float(inputs.video_second_per_grid[0]) == 4.0
    array = np.stack([numbered_frame(number) for number in range(9)])
    for source in (array, torch.from_numpy(array), list(array), (list(array), 4)):
        part = {"type": "video", "video": source, **({} if isinstance(source, tuple) else {name: 4})}
        expected = [0, 2, 4, 6] if isinstance(source, tuple) else [*range(9), 8]
        assert numbers(processor.prepare(asked(part))) == expected
    part = {"type": "video", "video": list(array), name: 4}
    assert numbers(processor.prepare(asked({**part, "max_frames": 4}))) == [0, 2, 4, 6]
    assert numbers(processor.prepare(asked({**part, "video_start": 1.0, "video_end": 2.0}))) == [4, 5, 6, 7]


@pytest.mark.parametrize("count", [2, 6])
def test_a_tuple_of_frames_is_a_list_of_them(processor: Processor, count: int) -> None:
    """Protects: two pictures are no pair of frames and their rate."""
    arrays = tuple(numbered_frame(number) for number in range(count))
    for frames in (arrays, tuple(map(torch.from_numpy, arrays)), tuple(map(Image.fromarray, arrays))):
        part = {"type": "video", "video": frames}
        assert numbers(processor.prepare(asked({**part, "fps": 2}))) == list(range(count))
        with pytest.raises(InputError, match="message 1, part 1: a list of frames needs fps"):
            processor.prepare(asked(part))
        with pytest.raises(MediaError, match="a tuple of frames does not say how fast they follow: give fps"):
            read_video(frames)
    assert numbers(processor.prepare(asked({"type": "video", "video": (list(arrays), np.array([2.0]))})))


def test_an_array_without_a_rate_is_told_of_fps(processor: Processor) -> None:
    """Protects: of fps, not of its sound."""
    array = np.zeros((9, 64, 96, 3), np.uint8)
    for source, what in ((array, "an array"), (torch.from_numpy(array), "an array"), (list(array), "a list")):
        with pytest.raises(InputError, match=rf"message 1, part 1: {what} of frames needs fps"):
            processor.prepare(asked({"type": "video", "video": source}))
    with pytest.raises(InputError, match="audio_track is for files"):
        processor.prepare(asked({"type": "video", "video": list(array), "fps": 2, "audio_track": 0}))
    with pytest.raises(MediaError, match="without a single frame"):
        processor.prepare(asked({"type": "video", "video": [], "fps": 2}))
    with pytest.raises(MediaError, match=r"gone\.png does not exist"):
        processor.prepare(asked({"type": "video", "video": ["gone.png"], "fps": 2}))


def test_names_of_chat_completions(processor: Processor, files: dict[str, Path]) -> None:
    """Protects: every public name of a medium leads to the same tensors."""

    def same(plain: dict[str, Any], *others: dict[str, Any]) -> None:
        expected = processor.prepare(asked(plain))
        for other in others:
            found = processor.prepare(asked(other))
            assert torch.equal(found.input_ids, expected.input_ids)
            for name in ("pixel_values", "pixel_values_videos"):
                ours, theirs = found.held(name), expected.held(name)
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert all(torch.equal(a, b) for a, b in zip(ours.frames, theirs.frames, strict=True))
            if expected.input_features is not None:
                assert torch.equal(heard(found), heard(expected))

    image, audio, video = (str(files[kind]) for kind in ("image", "audio", "video"))
    packed = {kind: base64.b64encode(path.read_bytes()).decode() for kind, path in files.items()}
    same(
        {"type": "image", "image": image, "max_pixels": 784 * 50},
        {"type": "image_url", "image_url": {"url": f"file://{image}"}, "max_pixels": 784 * 50},
        {"type": "image_url", "image_url": {"url": image, "detail": "auto"}, "max_pixels": 784 * 50},
        {"type": "image_url", "image_url": f"data:image/png;base64,{packed['image']}", "max_pixels": 784 * 50},
        {"type": "image", "url": image, "max_pixels": 784 * 50},
        {"type": "image", "path": image, "max_pixels": 784 * 50, "image": None},
        {"type": "image", "base64": packed["image"], "max_pixels": 784 * 50},
        {"type": "image", "image": files["image"].read_bytes(), "max_pixels": 784 * 50},
    )
    same(
        {"type": "audio", "audio": audio, "audio_end": 2},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{packed['audio']}"}, "audio_end": 2},
        {"type": "input_audio", "input_audio": {"data": packed["audio"], "format": "wav"}, "audio_end": 2},
        {"type": "audio", "path": files["audio"], "audio_end": 2},
    )
    same(
        {"type": "video", "video": video, "nframes": 4},
        {"type": "video_url", "video_url": {"url": f"file://{video}"}, "nframes": 4},
        {"type": "video", "url": video, "nframes": 4},
        {"type": "video", "url": video, "video": video, "nframes": 4},
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "fsp": 1}, r"a video has no key 'fsp'; it may have type, video, fps, .*, audio_track\."),
        ({"type": "image", "fps": 1}, r"an image has no key 'fps'; it may have type, image, min_pixels"),
        (
            {"type": "audio", "video_start": 1},
            r"an audio has no key 'video_start'; it may have .*, audio_start",
        ),
        ({"type": "video", "x" * 5000: 1}, r"a video has no key 'x{79};"),
        ({"type": "video", "fps": 0}, "fps must be a number of frames per second above 0, not 0"),
        ({"type": "video", "fps": "2"}, "fps must be .*, not '2'"),
        ({"type": "video", "fps": True}, "fps must be .*, not True"),
        ({"type": "video", "fps": float("nan")}, "fps must be .*, not nan"),
        ({"type": "video", "fps": 10**400}, "fps must be .*, not 10"),
        ({"type": "video", "video_start": 10**400}, "video_start must be .*, not 10"),
        ({"type": "video", "nframes": 1}, "nframes must be a whole number of at least 2 .*, not 1"),
        (
            {"type": "video", "nframes": 10**30},
            "nframes must be .* and at most 100000, not 10",
        ),
        ({"type": "video", "nframes": 2.5}, "nframes must be .*, not 2.5"),
        ({"type": "video", "max_frames": [4]}, r"max_frames must be .*, not \[4\]"),
        ({"type": "video", "fps": 1, "nframes": 4}, "give fps or nframes, not both"),
        ({"type": "video", "nframes": 4, "max_frames": 8}, "nframes says how many frames: leave max_frames out"),
        ({"type": "video", "min_frames": 9, "max_frames": 4}, "min_frames must not exceed max_frames"),
        ({"type": "video", "min_frames": 5, "max_frames": 5}, "min_frames and max_frames, both 5, allow no even"),
        ({"type": "video", "video_start": -1}, "video_start must be a number of seconds .*, not -1"),
        ({"type": "video", "video_start": 3, "video_end": 3}, "video_end, 3 s, must come after video_start, 3 s"),
        ({"type": "audio", "audio_start": 3, "audio_end": 2}, "audio_end, 2 s, must come after audio_start, 3 s"),
        ({"type": "video", "video_end": 0}, "video_end, 0 s, must come after video_start, 0 s"),
        ({"type": "image", "max_pixels": 0}, "max_pixels must be a number of pixels of at least 1, not 0"),
        ({"type": "video", "min_pixels": 1e30}, "min_pixels must be a number of pixels of .* at most 67108864, not 1e"),
        (
            {"type": "video", "resized_height": 56, "resized_width": 1e308},
            "resized_width must be a number of pixels of .* at most 67108864, not 1e",
        ),
        ({"type": "image", "max_pixels": 100}, "message 1, part 1: max_pixels must be at least 784"),
        ({"type": "image", "min_pixels": 9000, "max_pixels": 1000}, "min_pixels must not exceed max_pixels"),
        ({"type": "image", "resized_height": 280}, "resized_height needs resized_width beside it"),
        ({"type": "video", "use_audio_in_video": 1}, "use_audio_in_video must be true or false, not 1"),
        ({"type": "video", "audio_track": -1}, "audio_track must be a whole number of at least 0, not -1"),
        ({"type": "video", "sample_fps": 2}, "sample_fps is the rate of a list of frames; of a clip give fps"),
        ({"type": "video", "video_start": 60}, r"video_start is 60 s, but .*a\.mp4 ends at 10\.00 s"),
        ({"type": "audio", "audio_start": 60}, r"audio_start is 60 s, but .*a\.wav ends at 10\.00 s"),
        ({"type": "video", "url": "b.mp4"}, 'has two sources, under "video" and "url"'),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(
    processor: Processor, files: dict[str, Path], part: dict[str, Any], message: str
) -> None:
    """Protects: one sentence that says where, which key, and what it may be."""
    with pytest.raises((InputError, MediaError), match=message) as caught:
        processor.prepare(asked({part["type"]: str(files[part["type"]]), **part}))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"fps": value}, "fps must be a number of frames per second above 0, not") for value in ("2", None, True, 0)),
        *(
            ({"max_frames": value}, "max_frames must be a whole number of at least 2, not")
            for value in ("8", None, 10.5)
        ),
        *(
            ({"max_pixels": value}, "max_pixels must be a number of pixels of at least 1, not")
            for value in ("x", math.nan)
        ),
        ({"total_pixels": -1}, "total_pixels must be a number of pixels of at least 1, not -1"),
        ({"min_pixels": True}, "min_pixels must be a number of pixels of at least 1 and at most"),
        *(({"use_audio_in_video": value}, "use_audio_in_video must be true or false, not") for value in ("no", None)),
    ],
)
def test_options_of_a_call_are_held_to_the_same(processor: Processor, options: dict[str, Any], message: str) -> None:
    """Protects: what a part's key may not be, the option may not be, and nothing is read for it."""
    with pytest.raises(InputError, match=f"^{message}"):
        processor.prepare(asked({"type": "video", "video": "not read.mp4"}), **options)


def test_options_of_a_call_may_be_any_numbers(processor: Processor, files: dict[str, Path]) -> None:
    plain = processor.prepare(
        asked({"type": "video", "video": files["video"]}), fps=1, max_frames=8, max_pixels=784 * 24
    )
    numbers = {"fps": np.float32(1), "max_frames": np.int64(8), "max_pixels": 784 * 24.0}
    assert torch.equal(
        processor.prepare(asked({"type": "video", "video": files["video"]}), **numbers).input_ids, plain.input_ids
    )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "text", "text": "x", "cache_control": {}},
            "has no key 'cache_control'; it may have type, text",
        ),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "detail must be auto.*max_pixels"),
        ({"type": "image_url", "image_url": {"uri": "a.png"}}, "image_url has no key 'uri'; it may have url, detail"),
        ({"type": "image_url", "image_url": {}}, 'image_url needs the key "url"'),
        ({"type": "image_url"}, "is of type 'image_url' and needs the key \"image_url\""),
        ({"type": "input_audio", "input_audio": "UklG"}, r'input_audio must be an object such as {"data": …}'),
        ({"type": "input_audio", "input_audio": {"data": "%%%"}}, "input_audio: its content is not base64"),
        ({"type": "video", "video": "a.mp4", "sample_fps": 2, "fps": 2}, "give fps or sample_fps, not both"),
        ({"type": "image", "base64": 5}, "base64: its content must be base64, not a int"),
        ({"type": "video", "image": "x.png"}, 'needs the key "video"'),
        ({"type": "pdf", "pdf": "x"}, "must be one of"),
        ("text", "must be one of"),
    ],
)
def test_malformed_parts_are_named(processor: Processor, part: Any, message: str) -> None:
    with pytest.raises((InputError, MediaError, ChatTemplateError), match=message) as caught:
        processor.prepare(asked(part))
    assert "message 1, part 1" in str(caught.value)


def test_addresses_need_to_be_asked_for(processor: Processor) -> None:
    """Protects: nothing is fetched by a message, whatever keys it has."""
    for part in (
        {"type": "image", "image": "https://192.0.2.1/a.png"},
        {"type": "image_url", "image_url": {"url": "https://192.0.2.1/a.png"}},
        {"type": "video", "video": ["https://192.0.2.1/a.png"], "fps": 1},
    ):
        with pytest.raises(MediaError, match="urls=True"):
            processor.prepare(asked(part))
    with pytest.raises(InputError, match="no key 'urls'"):
        processor.prepare(asked({"type": "image", "image": "https://192.0.2.1/a.png", "urls": True}))


def test_every_key_is_told(processor: Processor, files: dict[str, Path]) -> None:
    """Protects: the message about an unknown key lists each that is known; all of them are JSON's names."""
    for kind, known in KEYS.items():
        with pytest.raises(InputError) as caught:
            processor.prepare(asked({"type": kind, kind: str(files[kind]), "what": 1}))
        assert all(f" {key}" in str(caught.value) for key in known)
    assert json.loads(json.dumps({kind: list(known) for kind, known in KEYS.items()}))
