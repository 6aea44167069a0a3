"""Media are read once; whatever changes, in a file or in what is asked of it, is read anew."""

from __future__ import annotations

import base64
import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from clips import numbered_frame, tone, write_clip, write_sound
from PIL import Image

from omni.config import QWEN2_5, QWEN3, read_config
from omni.processing import chat_template, reader, sandbox
from omni.processing.frames import MediaError, VisionSizes
from omni.processing.media import identity as identities
from omni.processing.parts import read_parts
from omni.processing.processor import Processor
from omni.processing.reader import Reader
from omni.protocol import OURS
from omni.reuse import REUSE_BYTES

RATE = 16_000
OPTIONS = {"fps": 2.0, "max_frames": 768, "use_audio_in_video": True, "reading": OURS}
SIZES = VisionSizes(video_min_pixels=28**2, image_min_pixels=28**2)


@pytest.fixture(autouse=True)
def no_unexpected_warning() -> Iterator[None]:
    """A warning where a test does not ask for one is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A clip of 4 s with sound, a sound of 2 s, a picture."""
    folder = tmp_path_factory.mktemp("reader")
    picture = folder / "a.png"
    Image.fromarray(numbered_frame(77, (56, 84))).save(picture)
    made = {
        "video": write_clip(folder / "a.mp4", 40, 10, sound=tone(440, 4, RATE)[None], rate=RATE),
        "audio": write_sound(folder / "a.wav", tone(880, 2, RATE)[None], RATE, "pcm_s16le"),
        "image": picture,
    }
    return {kind: settled(path) for kind, path in made.items()}


@pytest.fixture(scope="module", autouse=True)
def stamps_settle_at_once() -> Iterator[None]:
    """Else each file of a test would have to be two seconds old: those who ask for that set it."""
    before, identities.SETTLED = identities.SETTLED, 0.0
    yield
    identities.SETTLED = before


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was decoded, in turn."""
    found: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        read = getattr(reader, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found.append({"listen": "audio"}.get(name, name.removeprefix("read_")))
            return read(*arguments, **options)

        return call

    for name in ("read_video", "listen", "read_image"):
        monkeypatch.setattr(reader, name, counted(name))
    return found


def settled(path: Path) -> Path:
    """Its stamps are not those of what comes next, however coarse the clock."""
    time.sleep(0.02)
    return path


def make_reader(family: str = QWEN2_5, limit: int = REUSE_BYTES) -> Reader:
    return Reader(SimpleNamespace(family=family, audio=SimpleNamespace(num_mel_bins=128)), limit)  # type: ignore[arg-type]


def read(one: Reader, *content: dict[str, Any], on_frame: Any = None, **options: Any) -> list[Any]:
    """Frames, pictures and spectrograms, in order."""
    _, parts = read_parts([{"role": "user", "content": list(content)}])
    seen, mels = one.read(parts, SIZES, OPTIONS | options, on_frame)
    return [getattr(each, "frames", each) for each in seen] + mels


def video(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **settings}


def audio(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": source, **settings}


def image(source: Any, **settings: Any) -> dict[str, Any]:
    return {"type": "image", "image": source, **settings}


def same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        one is other is None or torch.equal(one, other) for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("family", [QWEN2_5, QWEN3])
def test_read_once_and_the_same_to_the_bit(family: str, files: dict[str, Path], calls: list[str]) -> None:
    """Protects: what is kept is what would be read, for both families' padding of sounds; and it is kept."""
    prompts = [
        [video(str(files["video"]))],
        [video(str(files["video"])), audio(str(files["audio"]))],
        [audio(str(files["audio"])), image(files["image"])],
        [image(files["image"]), video(files["video"].as_uri())],
    ]
    kept, without = make_reader(family), make_reader(family, 0)
    for _ in range(2):
        for content in prompts:
            assert same(read(kept, *content), read(without, *content))
        assert not without.kept.nbytes
    calls.clear()
    for content in prompts:
        read(kept, *content)
    assert calls == []
    assert kept.kept.nbytes > 8 * 3 * 56 * 84


def test_what_is_asked_otherwise_is_read_anew(files: dict[str, Path], calls: list[str]) -> None:
    """Protects: no setting of a part or a call is answered with what another gave; each touches what it shapes."""
    one, clip = make_reader(), str(files["video"])
    read(one, video(clip))
    calls.clear()
    for settings in (
        {"fps": 4.0},
        {"nframes": 4},
        {"max_frames": 6},
        {"min_frames": 10},
        {"max_pixels": 2 * 28**2},
        {"total_pixels": 8 * 28**2},
        {"min_pixels": 12 * 28**2},
        {"resized_height": 28, "resized_width": 84},
    ):
        read(one, video(clip, **settings))
        read(one, video(clip, **settings))
        assert calls == ["video"], settings
        calls.clear()
    for settings in ({"video_start": 1.0}, {"video_end": 3.0}):
        read(one, video(clip, **settings))
        assert sorted(calls) == ["audio", "video"]
        calls.clear()
    read(one, video(clip, audio_track=0))
    assert calls == ["audio"]
    calls.clear()
    for options in ({"fps": 1.0}, {"max_frames": 4}):
        read(one, video(clip), **options)
        assert calls == ["video"]
        calls.clear()
    read(one, video(clip), use_audio_in_video=False)
    read(one, video(clip, fps=2))
    assert calls == []
    for settings in ({}, {"audio_start": 0.5}, {"audio_end": 1.5}):
        read(one, audio(str(files["audio"]), **settings))
    assert calls == ["audio"] * 3
    calls.clear()
    for settings in ({}, {"max_pixels": 28**2}, {"resized_height": 28, "resized_width": 28}):
        read(one, image(files["image"], **settings))
    assert calls == ["image"] * 3


def test_sounds_are_padded_to_the_longest_of_their_prompt(files: dict[str, Path], calls: list[str]) -> None:
    """Protects: Qwen3-Omni's spectrogram of a sound depends on those beside it."""
    one, sound, clip = make_reader(QWEN3), audio(str(files["audio"])), video(str(files["video"]))
    alone, beside = read(one, sound)[1], read(one, sound, clip)[2]
    assert calls.count("audio") == 3
    assert alone.shape != beside.shape or not torch.equal(alone, beside)
    assert same(read(one, sound, clip)[2:], read(make_reader(QWEN3, 0), sound, clip)[2:])
    calls.clear()
    assert same(read(one, sound)[1:], [alone]) and calls == []


def test_a_changed_file_is_read_anew(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: written over in place, with the same size, and the very same stamps; or another file in its place."""
    monkeypatch.setattr(identities, "SETTLED", 2.0)
    path, one = tmp_path / "a.wav", make_reader()
    for hertz in (300, 500, 700):
        write_sound(path, tone(hertz, 1, RATE)[None], RATE, "pcm_s16le")
        os.utime(path, (1e9, 1e9))  # the time of change of its content says nothing
        assert same(read(one, audio(path)), read(make_reader(limit=0), audio(path)))
    other = write_sound(tmp_path / "b.wav", tone(900, 1, RATE)[None], RATE, "pcm_s16le")
    other.replace(path)
    assert same(read(one, audio(path)), read(make_reader(limit=0), audio(path)))


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Protects: pixels of one content are never found under the identity of the next."""
    path = tmp_path / "a.png"
    settled_image(path, 1)
    one, look = make_reader(), reader.read_image

    def slowly(source: Any) -> Any:
        found = look(source)
        settled_image(path, 2)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(reader, "read_image", slowly)
        before = read(one, image(path))
    after = read(one, image(path))
    assert not torch.equal(before[0], after[0])
    assert same(after, read(make_reader(limit=0), image(path)))


def settled_image(path: Path, number: int) -> None:
    Image.fromarray(numbered_frame(number, (56, 84))).save(path, compress_level=0)
    settled(path)


def test_other_sources_are_known_by_their_content(files: dict[str, Path], tmp_path: Path, calls: list[str]) -> None:
    """Protects: bytes, data: addresses and file objects, left where they stand; two files of one content are two."""
    data = files["image"].read_bytes()
    one = make_reader()
    for _ in range(2):
        read(one, image(data))
        read(one, image(bytearray(data)))
    assert calls == ["image"]
    file = io.BytesIO(data)
    file.seek(7)
    assert identities.identity(file) is not None and file.tell() == 7
    calls.clear()
    for _ in range(2):
        read(one, image(file))
    assert len(calls) == 1
    array = torch.zeros(56, 84, 3, dtype=torch.uint8)
    for source in (array, array.numpy(), Image.fromarray(array.numpy()), [array]):
        assert identities.identity(source) is None
    read(one, image(array))
    array.fill_(200)
    assert read(one, image(array))[0].max() == 200
    with (tmp_path / "a.txt").open("w+") as text:
        assert identities.identity(text) is None
    os.mkfifo(tmp_path / "pipe")
    for missing in (tmp_path / "none.mp4", tmp_path, tmp_path / "pipe", "file://elsewhere/a", "a\0b", object()):
        found = identities.identity(missing)
        assert found is None or found.stamps


def test_warnings_are_given_again(tmp_path: Path, calls: list[str]) -> None:
    """Protects: that a clip is cut off is said at every question, by the name that this question gives it."""
    path = write_clip(tmp_path / "a.mp4", 40, 10, faststart=True, sound=tone(440, 4, RATE)[None], rate=RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    settled(path)
    one = make_reader()
    found = []
    for source in (str(path), str(path), path.read_bytes()):
        with pytest.warns(UserWarning, match="cut off") as given:
            read(one, video(source))
        found.append(sorted(str(each.message) for each in given))
    assert found[0] == found[1] and sorted(calls) == ["audio", "audio", "video", "video"]
    assert found[2] == sorted(each.replace(str(path), "the data") for each in found[0])


def test_errors_are_not_kept(tmp_path: Path, files: dict[str, Path]) -> None:
    """Protects: a file that was no clip, and now is one, is read; nor is what an interrupt left half read kept."""
    path, one = tmp_path / "a.mp4", make_reader()
    path.write_bytes(b"no clip" * 100)
    for _ in range(2):
        with pytest.raises(MediaError):
            read(one, video(str(path)))
    shutil.copyfile(files["video"], path)
    settled(path)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(one, video(str(path)), on_frame=interrupt)
    assert same(read(one, video(str(path))), read(make_reader(limit=0), video(str(files["video"]))))


def test_memory_is_bounded_and_the_last_used_stay(tmp_path: Path, calls: list[str]) -> None:
    """Protects: however many clips are asked about, no more than the limit is held."""
    paths = [settled(write_clip(tmp_path / f"{number}.mp4", 8, 2)) for number in range(4)]
    (nbytes,) = {read(make_reader(), video(path))[0].nbytes for path in paths}
    one = make_reader(limit=2 * (nbytes + 3000))
    calls.clear()
    for number in (0, 1, 0, 2, 0, 3, 0):
        read(one, video(paths[number]))
        assert one.kept.nbytes <= one.kept.limit
    assert calls.count("video") == 4
    one.kept.clear()
    assert one.kept.nbytes == 0
    small = make_reader(limit=nbytes - 1)
    read(small, video(paths[0]))
    assert small.kept.nbytes <= 3000  # the clip alone exceeds it


def test_what_is_written_to_is_read_anew(files: dict[str, Path]) -> None:
    """Protects: a request that somebody changed in place does not change the next."""
    one, content = make_reader(), [video(files["video"]), image(files["image"])]
    plain = [each if each is None else each.clone() for each in read(one, *content)]
    with torch.inference_mode():
        for each in read(one, *content):
            if each is not None:
                each.zero_()
    assert same(read(one, *content), plain)


def test_progress_is_told_of_what_is_known(files: dict[str, Path]) -> None:
    """Protects: a bar of progress ends, although nothing is decoded."""
    one = make_reader()
    for expected in (8, 1):
        done: list[tuple[int, int]] = []
        read(one, video(files["video"]), on_frame=lambda *counts, done=done: done.append(counts))
        assert len(done) == expected and done[-1] == (8, 8)


def test_threads_ask_at_once(files: dict[str, Path]) -> None:
    """Protects: who comes second reads for himself or finds what is right."""
    one = make_reader()
    expected = read(make_reader(limit=0), video(files["video"]), audio(files["audio"]))
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(read, one, video(files["video"]), audio(files["audio"])) for _ in range(8)]
        assert all(same(job.result(), expected) for job in jobs)


def test_two_prompts_about_one_clip(
    checkpoint: Path, files: dict[str, Path], calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: with other text around it a clip is the same; `forget` drops it; a reuse of 0 keeps none."""
    monkeypatch.setattr(chat_template, "render", sandbox.render)
    config = read_config(checkpoint)
    kept, without = Processor(checkpoint, config), Processor(checkpoint, config, reuse=0)

    def ask(one: Processor, question: str) -> dict[str, Any]:
        content = [video(str(files["video"])), {"type": "text", "text": question}]
        return one.prepare([{"role": "user", "content": content}]).tensors()

    for question in ("What?", "Who, where and when?"):
        found, expected = ask(kept, question), ask(without, question)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sorted(calls) == ["audio"] * 3 + ["video"] * 3
    address = "data:video/mp4;base64," + base64.b64encode(files["video"].read_bytes()).decode()
    for _ in range(2):
        kept.prepare([{"role": "user", "content": [video(address), {"type": "text", "text": "What?"}]}])
    assert len(calls) == 8
    kept.forget()
    ask(kept, "What?")
    assert len(calls) == 10
