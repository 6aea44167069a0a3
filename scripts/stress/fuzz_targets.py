"""What `fuzz.py` damages: for each target how sound files are made and who reads them."""

from __future__ import annotations

import base64
import json
import sys
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import omni
import weights
from omni.answer import ERRORS
from omni.config import ConfigError
from omni.inputs import InputError
from omni.processing import chat_template, sandbox
from omni.processing.chat_template import QWEN2_5_OMNI_TEMPLATE, ChatTemplateError, apply_chat_template, load_template
from omni.processing.frames import MediaError, VisionSizes
from omni.processing.media import kind_of, read_audio, read_image, read_video
from omni.processing.tokenizer import Tokenizer, TokenizerError
from omni.processing.vocabulary import SPLIT_PATTERN

sys.path.append(str(Path(__file__).parents[1]))
from make_checkpoint import write_checkpoint

RENDERED_HERE = mock.patch.object(chat_template, "render", sandbox.render)
"""Sound templates without a process of their own, which takes longer than all the rest."""
QUESTION = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "picture.png"}, {"type": "text", "text": "What happens, Zoë?"}],
    }
]


@dataclass(frozen=True)
class Target:
    """make: writes sound files into a folder, and returns the names of those to damage. read: reads them, the name of
    the damaged one given, and raises AssertionError where what it got is wrong. errors: how it may refuse."""

    make: Callable[[Path], list[str]]
    read: Callable[[Path, str], None]
    errors: tuple[type[Exception], ...]


def make_shard(folder: Path) -> list[str]:
    """The last shard of a checkpoint, as if it were the whole."""
    write_checkpoint(folder)
    (folder / weights.checkpoint.INDEX_FILE).unlink()
    *others, last = sorted(folder.glob("*.safetensors"))
    for shard in others:
        shard.unlink()
    return [last.rename(folder / weights.checkpoint.SINGLE_FILE).name]


def read_shard(folder: Path, name: str) -> None:
    """The safetensors library is the judge, but where it refuses what a thinker does not read."""
    from safetensors import SafetensorError, safe_open

    found = weights.read_index(folder)
    size = (folder / name).stat().st_size
    for tensor in found.values():
        assert tensor.offset + tensor.num_bytes <= size, "a tensor ends after the file"
    try:
        with safe_open(folder / name, "pt") as judge:
            for key, tensor in found.items():
                part = judge.get_slice(key)
                assert (tensor.shape, weights.checkpoint.DTYPES[part.get_dtype()]) == (
                    tuple(part.get_shape()),
                    tensor.dtype,
                ), f"{key} is not what the safetensors library reads"
    except SafetensorError:
        pass


def make_index(folder: Path) -> list[str]:
    write_checkpoint(folder)
    return [weights.checkpoint.INDEX_FILE]


@cache
def stored(folder: Path) -> dict[str, weights.StoredTensor]:
    """What a sound checkpoint holds, by its shards alone."""
    from safetensors import safe_open

    found = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            found |= dict.fromkeys(file.keys(), shard)
    return found


def read_index(folder: Path, name: str) -> None:
    shards = stored(folder)
    for key, tensor in weights.read_index(folder).items():
        assert tensor.path == shards[key], f"{key} is in {shards[key]}"


def make_configs(folder: Path) -> list[str]:
    from PIL import Image

    names = []
    for family in ("qwen2.5", "qwen3"):
        write_checkpoint(folder / family, family)
        settings = {"min_pixels": 3136, "max_pixels": 50176, "image_mean": [0.5, 0.5, 0.5], "size": {"longest_edge": 9}}
        (folder / family / "preprocessor_config.json").write_text(json.dumps(settings))
        Image.linear_gradient("L").resize((64, 48)).save(folder / family / "picture.png")
        names += [f"{family}/{name}" for name in ("config.json", "generation_config.json", "preprocessor_config.json")]
    return names


def read_model(folder: Path, name: str) -> None:
    """Loads the checkpoint and asks about a picture and a sound: the answer is numbers."""
    folder = (folder / name).parent
    model = omni.load(folder, device="cpu", dtype=torch.float32)
    sound = {"type": "audio", "audio": torch.sin(torch.arange(16_000) / 9)}
    picture = {"type": "image", "image": str(folder / "picture.png")}
    text = {"type": "text", "text": "What happens?"}
    with RENDERED_HERE:
        inputs = model.prepare([{"role": "user", "content": [picture, sound, text]}])
    logits = model.prefill(inputs).logits
    assert logits.shape == (model.config.decoder.vocab_size,)
    assert bool(logits.isfinite().all()), "the logits are not numbers"
    model.generate(inputs, max_new_tokens=2)


def make_vocabularies(folder: Path) -> list[str]:
    """The same tokenizer in the three ways in which checkpoints keep it."""
    write_checkpoint(folder / "split")
    for file in [*folder.glob("split/*.safetensors*"), *folder.glob("split/*config.json")]:
        if file.name != "tokenizer_config.json":
            file.unlink()
    config = json.loads((folder / "split/tokenizer_config.json").read_text())
    ids = json.loads((folder / "split/vocab.json").read_text())
    merges = (folder / "split/merges.txt").read_text().splitlines()[1:]
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    whole = {
        "added_tokens": [{"id": int(id), **entry} for id, entry in config["added_tokens_decoder"].items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "model": {"type": "BPE", "vocab": ids, "merges": [rule.split(" ") for rule in merges]},
    }
    (folder / "whole").mkdir()
    (folder / "whole/tokenizer.json").write_text(json.dumps(whole))
    (folder / "bare").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / "bare" / name).write_bytes((folder / "split" / name).read_bytes())
    added = {entry["content"]: int(id) for id, entry in config["added_tokens_decoder"].items()}
    (folder / "bare/added_tokens.json").write_text(json.dumps(added))
    roles = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
    (folder / "bare/special_tokens_map.json").write_text(json.dumps(roles))
    return [
        *(f"split/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
        "whole/tokenizer.json",
        *(f"bare/{name}" for name in ("added_tokens.json", "special_tokens_map.json", "merges.txt")),
    ]


def read_vocabulary(folder: Path, name: str) -> None:
    """What it encodes it decodes."""
    tokenizer = Tokenizer.from_folder((folder / name).parent)
    text = "What happens, Zoë?\n<|im_start|> e\u0301 日本 12 it's <|im_end|>"
    for split in (False, True):
        ids = tokenizer.encode(text, split_special_tokens=split)
        assert all(0 <= id < tokenizer.vocab_size for id in ids)
        found = tokenizer.decode(ids, skip_special_tokens=False)
        assert found == unicodedata.normalize("NFC", text), f"{text!r} came back as {found!r}"
    tokenizer.decode(
        range(tokenizer.vocab_size if tokenizer.vocab_size < 10_000 else 10_000), skip_special_tokens=False
    )


def make_templates(folder: Path) -> list[str]:
    make_vocabularies(folder)
    for file in folder.rglob("chat_template.json"):
        file.unlink()
    names = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    for name in names:
        (folder / name).mkdir()
    (folder / names[0] / names[0]).write_text(QWEN2_5_OMNI_TEMPLATE)
    (folder / names[1] / names[1]).write_text(json.dumps({"chat_template": QWEN2_5_OMNI_TEMPLATE}))
    named = [{"name": "default", "template": QWEN2_5_OMNI_TEMPLATE}, {"name": "tools", "template": "x"}]
    (folder / names[2] / names[2]).write_text(json.dumps({"chat_template": named}))
    return [f"{name}/{name}" for name in names]


def read_template(folder: Path, name: str) -> None:
    tokenizer = sound_tokenizer(folder / "split")
    template = load_template((folder / name).parent)
    if template is not None:
        ids = apply_chat_template(tokenizer, template, QUESTION)
        assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids)


@cache
def sound_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def make_media(folder: Path) -> list[str]:
    import av
    from make_clip import make_clip
    from PIL import Image

    make_clip(folder / "clip.mp4", 1.0, 0)
    for name in ("clip.mkv", "clip.mov", "clip.ts"):
        with av.open(str(folder / "clip.mp4")) as source, av.open(str(folder / name), "w") as file:
            streams = {stream: file.add_stream_from_template(stream) for stream in source.streams}
            for packet in source.demux():
                if packet.dts is not None:
                    packet.stream = streams[packet.stream]
                    file.mux(packet)
    for name, codec in (("clip.avi", "mpeg4"), ("clip.webm", "libvpx")):
        with av.open(str(folder / "clip.mp4")) as source, av.open(str(folder / name), "w") as file:
            stream = file.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for picture in source.decode(video=0):
                file.mux(stream.encode(picture.reformat(64, 48)))
            file.mux(stream.encode())
    with av.open(str(folder / "clip.mp4")) as source, av.open(str(folder / "clip.mpg"), "w", format="vob") as file:
        stream = file.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number, picture in enumerate(source.decode(video=0)):
            picture = picture.reformat(64, 48, "yuv420p")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())
    (folder / "joined.ts").write_bytes(2 * (folder / "clip.ts").read_bytes())
    sounds = {"a.wav": "pcm_s16le", "a.flac": "flac", "a.mp3": "libmp3lame", "a.opus": "libopus"}
    sounds |= {"a.m4a": "aac"}
    wave = 0.3 * torch.sin(torch.arange(24_000) / 20)[None]
    for name, codec in sounds.items():
        with av.open(str(folder / name), "w") as file:
            stream = file.add_stream(codec, rate=48_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(wave.numpy(), format="fltp", layout="mono")
            frame.sample_rate = 48_000
            resampler = av.AudioResampler(format=stream.format.name, frame_size=stream.frame_size or 1024)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                file.mux(stream.encode(part))
            file.mux(stream.encode())
    pictures = [Image.linear_gradient("L").resize((64, 48)).rotate(45 * turn).convert("RGB") for turn in range(6)]
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "jp2", "avif", "ico"):
        pictures[0].save(folder / f"still.{kind}")
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.from_pillow(pictures[0]).save(folder / "still.heic")
    for kind in ("gif", "png", "webp", "avif"):
        pictures[0].save(folder / f"moving.{kind}", save_all=True, append_images=pictures[1:], duration=100)
    return sorted(path.name for path in folder.iterdir())


def read_media(folder: Path, name: str) -> None:
    """As what it is, and as what it may be taken for."""
    kind = kind_of(folder / name)
    if kind == "image":
        picture = read_image(folder / name)
        assert picture.dtype == torch.uint8 and picture.dim() == 3 and len(picture) == 3
    sound = None if kind == "image" else read_audio(folder / name)
    if sound is not None:
        assert sound.dim() == 1 and len(sound) and bool(sound.isfinite().all())
    if kind == "video":
        clip = read_video(folder / name, max_frames=16, size_for=VisionSizes(video_max_pixels=2**17).clip_size)
        assert clip.frames.dtype == torch.uint8 and clip.frames.dim() == 4 and len(clip.frames) % 2 == 0
        assert 0 < clip.fps < float("inf") and 0 < clip.duration < float("inf")


def make_rows(folder: Path) -> list[str]:
    import av
    from PIL import Image

    write_checkpoint(folder / "model")
    Image.linear_gradient("L").resize((64, 48)).save(folder / "a.png")
    Image.linear_gradient("L").resize((48, 64)).save(folder / "b.png")
    with av.open(str(folder / "a.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=16_000, layout="mono")
        silence = torch.zeros(1, 32_000, dtype=torch.int16).numpy()
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
    picture = f"data:image/png;base64,{base64.b64encode((folder / 'a.png').read_bytes()).decode()}"
    rows: list[dict[str, Any]] = [
        {"id": "a", "media": "a.png", "question": "What is seen?", "retention": 0.5, "seed": 3, "temperature": 0.7},
        {"id": "b", "media": ["a.wav", picture], "question": "?", "start": 0.5, "end": 1.25},
        {"id": 7, "media": ["a.png", "b.png"], "question": "Which?", "max_pixels": 3136, "no_audio": True},
        {"id": "ü", "media": None, "question": "Who?", "max_new_tokens": 9, "system": "Be brief.", "kv": "layerwise"},
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answers = [{"id": "a", "text": "x", "tokens": [1]}, {"id": 7, "error": "no"}]
    (folder / "answers.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in answers))
    return ["questions.jsonl", "questions.jsonl", "answers.jsonl"]


def read_rows(folder: Path, name: str) -> None:
    """Each row is prepared or refused by itself; what its answer is written as can be read again."""
    from omni.batch import pack
    from omni.rows import Journal, Source, parse

    if name == "answers.jsonl":
        Journal(folder / name).write([json.dumps({"id": "new"})])
        assert "new" in Journal(folder / name).ids
        return
    source = Source(folder / name)
    ids, unreadable = source.scan()
    prepare, refused = preparer(folder), []
    for line in (folder / name).read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = parse(line)
            assert row["id"] in ids
            with RENDERED_HERE:
                told, inputs = prepare.prepared(row)
            assert json.loads(json.dumps(told))["id"] == row["id"] and pack([inputs], prepare.dtype)
        except ERRORS as error:
            refused.append(error)
    journal = folder / "journal.jsonl"
    journal.unlink(missing_ok=True)
    Journal(journal).write([json.dumps({"id": id}, ensure_ascii=False) for id in ids])
    assert Journal(journal).ids == set(ids)
    assert len(ids) + len(unreadable) >= len(refused) - 1
    if refused:
        raise refused[0]


@cache
def preparer(folder: Path) -> Any:
    from omni.batch import Pool, PrepareWorker, argument_parser

    arguments = ["--model", str(folder / "model"), str(folder / "questions.jsonl"), str(folder / "a.jsonl")]
    pool = Pool(decoders=1, replicas=1, threads=1, reserved=1, device="cpu")
    return PrepareWorker(argument_parser().parse_intermixed_args(arguments), pool, set())


TARGETS = {
    "safetensors": Target(make_shard, read_shard, (weights.CheckpointError,)),
    "index": Target(make_index, read_index, (weights.CheckpointError,)),
    "config": Target(make_configs, read_model, (ConfigError, weights.CheckpointError, InputError, TokenizerError)),
    "tokenizer": Target(make_vocabularies, read_vocabulary, (TokenizerError,)),
    "template": Target(make_templates, read_template, (ChatTemplateError, TokenizerError)),
    "media": Target(make_media, read_media, (MediaError,)),
    "rows": Target(make_rows, read_rows, (InputError, MediaError, ChatTemplateError, TokenizerError)),
}
