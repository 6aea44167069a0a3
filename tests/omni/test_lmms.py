"""The model for lmms-eval: what it answers is what the library answers, whatever is batched with what."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import omni
import seats
from omni.inputs import InputError
from omni.processing.frames import patchify, resize, target_size
from omni.processing.prompt import clip_block
from omni.protocol import Reading
from seats import preset_for
from seats.methods.random import Random
from tests.omni.processing.clips import numbered_frame, tone, write_clip


class CacheHook:
    def __init__(self) -> None:
        self.added: list[tuple[str, Any, str]] = []

    def add_partial(self, kind: str, request: Any, answer: str) -> None:
        self.added.append((kind, request, answer))


class TokenCounts:
    """`lmms_eval.api.instance`: each sample of the log has what `to_dict` gives of its answer."""


class GenerationResult:
    """`lmms_eval.api.instance`: the evaluator takes `text` and `token_counts` of one, and any text as it is."""


class StandIn:
    """What `lmms_eval.api.model.lmms` gives a model, 0.7.3."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return Path(value).read_text().strip() if Path(value).is_file() else value


@pytest.fixture
def lmms(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`omni.lmms` with lmms-eval where that is installed, which is seldom beside the tests, else with stand-ins."""
    try:
        import accelerate  # noqa: F401
        import lmms_eval.api.model  # noqa: F401
    except ImportError:
        found: dict[str, dict[str, Any]] = {
            "accelerate": {"Accelerator": lambda: SimpleNamespace(process_index=0, num_processes=1)},
            "lmms_eval": {},
            "lmms_eval.api": {},
            "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
            "lmms_eval.api.model": {"lmms": StandIn},
            "lmms_eval.models": {},
            "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        }
        for name, attributes in found.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "omni.lmms", raising=False)
    import omni.lmms

    yield omni.lmms
    sys.modules.pop("omni.lmms", None)


def ask(model: Any, contents: list[list[dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
    """The questions as requests of one task."""
    model.task_dict = {"task": {"test": contents}}
    model.cache_hook = CacheHook()

    def messages(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": content}]

    requests = [
        SimpleNamespace(args=(str(number), messages, settings, number, "task", "test"))
        for number in range(len(contents))
    ]
    return model.generate_until(requests)


def test_answers_are_the_librarys(lmms: ModuleType, checkpoint: Path, clip: Path, model: omni.Omni) -> None:
    """Of plans in turns, so that batches are not in the order of the requests; media under "url" as lmms-eval has."""
    evaluated = lmms.SeatsOmni(
        pretrained=str(checkpoint), device="cpu", retention=0.35, batch_size=2, fps=1, max_frames=4
    )
    texts = ["What?", "What happens here?", "Why?", "What happened there?", "When?"]
    contents = [[{"type": "video", "url": str(clip)}, {"type": "text", "text": text}] for text in texts]
    contents.insert(2, [{"type": "text", "text": "No media at all."}])
    found = ask(evaluated, contents, {"max_new_tokens": 6, "do_sample": False})
    for content, answer in zip(contents, found, strict=True):
        ours = [{**part, part["type"]: part.get("url", part.get("text"))} for part in content]
        inputs = model.prepare([{"role": "user", "content": ours}], fps=1, max_frames=4)
        assert answer == model.generate(inputs, seats=preset_for(model.config, 0.35), max_new_tokens=6).text
    assert sorted(answer for *_, answer in evaluated.cache_hook.added) == sorted(found)


def test_requests_about_one_clip_follow_each_other(
    lmms: ModuleType, checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: whatever the order of a task, a clip is read in one go; answers stay in the order that was asked. What
    is no file goes where it stands, and its documents are looked at once."""
    clips = [clip, tmp_path / "same.mp4"]
    clips[1].write_bytes(clip.read_bytes())
    evaluated = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", retention=1, batch_size=1, fps=1, max_frames=4)
    texts = ["What?", "Who?", "Why?", "When?", "How?"]
    contents = [
        [{"type": "video", "url": str(clips[number % 2])}, {"type": "text", "text": text}]
        for number, text in enumerate(texts)
    ]
    settings = {"max_new_tokens": 4}
    found = ask(evaluated, contents, settings)
    assert found == [ask(evaluated, [content], settings)[0] for content in contents]
    assert len(set(found)) > 2

    def order(contents: list[list[dict[str, Any]]]) -> list[str]:
        seen: list[str] = []
        monkeypatch.setattr(
            lmms.SeatsOmni, "prepare", lambda _, messages, *__: seen.append(messages[0]["content"][-1]["text"])
        )
        monkeypatch.setattr(
            lmms.SeatsOmni, "answer", lambda model, _, numbers, *__: [model.fail(each, None) for each in numbers]
        )
        monkeypatch.setattr(evaluated.model.engine, "plan", lambda *_: None)
        ask(evaluated, contents, settings)
        return seen

    assert order(contents) == ["What?", "Why?", "How?", "Who?", "When?"]
    stretches = [
        [{**content[0], "start_time": number // 2, "end_time": None}, content[1]]
        for number, content in enumerate(contents)
    ]
    assert order(stretches) == texts
    looked: list[int] = []

    class Documents(list[Any]):
        def __getitem__(self, number: Any) -> Any:
            looked.append(number)
            return super().__getitem__(number)

    sound = {"array": [0.0] * 16_000, "sampling_rate": 16_000}
    decoded = Documents([{"type": "audio", "url": sound}, {"type": "text", "text": text}] for text in texts)
    assert order(decoded) == texts
    assert looked == [0, *range(5)]
    monkeypatch.undo()
    evaluated.on_error = "empty"
    del contents[1][0]["url"]
    assert ask(evaluated, contents, settings) == [found[0], "", *found[2:]]  # damaged: that request's alone


def test_every_token_system_prompt_and_silence(
    lmms: ModuleType, checkpoint: Path, clip: Path, tmp_path: Path, model: omni.Omni
) -> None:
    (tmp_path / "system.txt").write_text("Be brief.\n")
    evaluated = lmms.SeatsOmni(
        pretrained=str(checkpoint),
        device="cpu",
        retention=1,
        use_audio_in_video=False,
        system_prompt=str(tmp_path / "system.txt"),
        max_new_tokens=4,
    )
    assert evaluated.method is None
    (found,) = ask(evaluated, [[{"type": "video", "url": str(clip)}, {"type": "text", "text": "?"}]], {})
    user = {"role": "user", "content": [{"type": "video", "video": str(clip)}, {"type": "text", "text": "?"}]}
    inputs = model.prepare([{"role": "system", "content": "Be brief."}, user], use_audio_in_video=False)
    assert found == model.generate(inputs, max_new_tokens=4).text


def test_what_it_cannot_do_is_said(lmms: ModuleType, checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"seats_omni has no setting retenion\."):
        lmms.SeatsOmni(pretrained=str(checkpoint), retenion=0.1)
    with pytest.raises(InputError, match=r"dtype must be one of bfloat16, float16, float32, not 'int8'"):
        lmms.SeatsOmni(pretrained=str(checkpoint), dtype="int8")


def test_a_stretch_of_a_clip_is_the_parts_own(lmms: ModuleType) -> None:
    """Protects: start_time and end_time of lmms-eval's chat messages cut clips and sounds."""
    cut = {"url": "clip.mp4", "start_time": 3, "end_time": None}
    assert lmms.part_of({"type": "video", **cut})["video_start"] == 3
    found = lmms.part_of({"type": "audio", **cut, "end_time": 4.5})
    assert found == {"type": "audio", "audio": "clip.mp4", "audio_start": 3, "audio_end": 4.5}


def test_a_tasks_settings_are_obeyed_or_refused(lmms: ModuleType, checkpoint: Path, model: omni.Omni) -> None:
    evaluated = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", retention=1, max_new_tokens=4)
    assert evaluated.options({}) == {"max_new_tokens": 4}
    assert evaluated.options({"max_gen_toks": 7, "until": ["x"], "num_beams": 1}) == {"max_new_tokens": 7}
    assert evaluated.options({"max_new_tokens": 3, "max_gen_toks": 7}) == {"max_new_tokens": 3}
    drawn = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 3}
    assert evaluated.options(drawn) == {"max_new_tokens": 3, "temperature": 0.5, "top_k": 3, "top_p": 0.9}
    assert evaluated.options({"do_sample": True, "top_k": 0}) == {"max_new_tokens": 4, "temperature": 1.0}
    assert evaluated.options({**drawn, "do_sample": False}) == {"max_new_tokens": 3}
    assert evaluated.options({"temperature": 0, "top_p": None}) == {"max_new_tokens": 4}
    with pytest.raises(InputError, match=r"cannot obey this task's generation_kwargs: num_beams, repetition_penalty"):
        evaluated.options({"num_beams": 4, "repetition_penalty": 1.2})
    assert evaluated.options({"max_new_tokens": "16", "temperature": "0"}) == {"max_new_tokens": 16}
    for said, settings in {
        "max_gen_toks must be a whole number, not 'x'": {"max_gen_toks": "x"},
        "max_new_tokens must be a whole number, not 2.5": {"max_new_tokens": 2.5},
        "temperature must be a number, not 'hot'": {"temperature": "hot"},
        "top_k must be a whole number, not 1.5": {"do_sample": True, "top_k": 1.5},
    }.items():
        with pytest.raises(InputError, match=said):
            evaluated.options(settings)
    with pytest.raises(InputError, match="until must be a text or a list of texts"):
        lmms.ends_of({"until": 3})

    content = [{"type": "text", "text": "Why?"}]
    whole = model.generate(model.prepare([{"role": "user", "content": content}]), max_new_tokens=12).text
    assert len(whole) > 4
    for until in (whole[3], [whole[3], ""], ["not there", whole[2:4]]):
        (found,) = ask(evaluated, [content], {"until": until, "max_gen_toks": 12})
        ends = lmms.ends_of({"until": until})
        assert found == lmms.cut(whole, ends) and len(found) <= 3
    (found,) = ask(evaluated, [content], {"until": "not there", "max_gen_toks": 12})
    assert found == whole


def test_a_seed_makes_what_is_drawn_repeatable(lmms: ModuleType, checkpoint: Path) -> None:
    """Whatever ran before; of one question that is asked several times the answers differ, and so do seeds'."""

    def answers(settings: dict[str, Any], **more: Any) -> list[str]:
        evaluated = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", retention=1, **more)
        return ask(evaluated, [[{"type": "text", "text": "Why?"}]] * 4, {"max_new_tokens": 8, **settings})

    warm = {"temperature": 1.0}
    for batch_size in (1, 2):
        found = answers(warm, seed=3, batch_size=batch_size)
        assert answers(warm, seed="3", batch_size=batch_size) == found
        assert len(set(found)) == 4
        assert not set(answers(warm, seed=4, batch_size=batch_size)) & set(found)
    assert answers(warm) != answers(warm)
    assert answers({}, seed=3) == answers({})
    for wrong in ("x", -1, 1.5, 2**63, True):
        with pytest.raises(InputError, match=r"^seed must be a whole number from 0 to 2\^63 - 1, not "):
            answers(warm, seed=wrong)


def question_about(clip: Path) -> list[dict[str, Any]]:
    return [{"type": "video", "url": str(clip)}, {"type": "text", "text": "Which?\nA. one\nB. two"}]


@pytest.mark.parametrize("name", ["tiny", "qwen2.5", "qwen3"])
def test_as_published(
    lmms: ModuleType, write_checkpoint: Callable[[str], Path], clip: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """protocol=paper: frames, their size, seconds per grid, system message and ids are what its description says, by
    independent means; and the answer is the library's on these tensors, of one token with the text alone in the cache.
    """
    source = name if name == "tiny" else str(write_checkpoint(name))
    evaluated = lmms.SeatsOmni(pretrained=source, device="cpu", dtype="float32", protocol="paper", retention=0.35)
    model = evaluated.model
    assert (evaluated.kv, evaluated.on_error) == ("pruned", "empty")
    side = model.processor.sizes.factor
    told = 2.0 if name == "qwen3" else 1.0

    with av.open(str(clip)) as file:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    count = 8  # two a second for four seconds
    picked = torch.linspace(0, len(decoded) - 1, count).round().long().tolist()
    height, width = target_size(*decoded[0].shape[:2], factor=side, min_pixels=128 * side**2, max_pixels=144 * side**2)
    assert 128 <= height * width // side**2 <= 144
    frames = resize(torch.stack([decoded[number] for number in picked]).permute(0, 3, 1, 2), (height, width))

    for task in ("worldsense_omni", "videomme"):
        messages = [{"role": "user", "content": question_about(clip)}]
        inputs = evaluated.prepare(messages, task)
        assert torch.equal(inputs.pixel_values_videos, patchify(frames, model.processor.sizes, of_clip=True)[0])
        patch = model.processor.sizes.patch_size
        grid = [count // 2, height // patch, width // patch]
        assert inputs.video_grid_thw.tolist() == [grid]
        assert inputs.video_second_per_grid.tolist() == [told]
        sounds = model.config.audio.token_count(inputs.input_features.shape[2])
        tokenizer, tokens = model.tokenizer, model.config.token_ids
        block = clip_block(grid, told, sounds, model.config)
        ids = inputs.input_ids[0].tolist()
        first = next(at for at in range(len(ids)) if ids[at : at + len(block)] == block)
        system = (
            "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory "
            "and visual inputs, as well as generating text and speech. Please analyze the video carefully and select "
            "the most appropriate answer from the given options."
            if task == "worldsense_omni"
            else ""
        )
        opened, closed = (
            ("<|vision_start|>", "<|vision_end|>") if name == "qwen3" else ("<|vision_bos|>", "<|vision_eos|>")
        )
        begin = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{opened}"
        assert ids[:first] == tokenizer.encode(begin)
        end = f"{closed}Which?\nA. one\nB. two<|im_end|>\n<|im_start|>assistant\n"
        assert ids[first + len(block) :] == tokenizer.encode(end)
        assert tokens.video in block

    calls = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda inputs, **options: calls.append(options) or generate(inputs, **options)
    )
    (found,) = ask(evaluated, [question_about(clip)], {"max_new_tokens": 3})
    inputs = evaluated.prepare([{"role": "user", "content": question_about(clip)}], "task")
    expected = generate(inputs, seats=preset_for(model.config, 0.35), kv="pruned", max_new_tokens=3)
    assert found == expected.text and calls == [{"seats": evaluated.method, "kv": "pruned", "max_new_tokens": 3}]
    costs = found.token_counts.to_dict()
    assert (costs["macs"], costs["full_macs"]) == (expected.stats.macs, expected.stats.full_macs)
    assert costs["kept_tokens"] == expected.stats.segments and costs["output_tokens"] == len(expected.tokens)
    assert costs["input_tokens"] == inputs.input_ids.shape[1]
    assert min(costs[f"{step}_seconds"] for step in ("encode", "prefill", "decode")) >= 0


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """176 s of 16:9 pictures, 440 of them, with 310 s of sound."""
    return write_clip(
        tmp_path_factory.mktemp("long") / "clip.mkv",
        440,
        Fraction(5, 2),
        sound=tone(440, 310, 16_000)[None],
        rate=16_000,
        sound_codec="pcm_s16le",
        draw=lambda number: numbered_frame(number, (270, 480)),
    )


def grown(height: int, width: int, side: int) -> tuple[int, int]:
    """To 128 tokens' worth of pixels at least, in whole tokens."""
    factor = max(1.0, math.sqrt(128 * side**2 / (height * width)))
    return math.ceil(height * factor / side) * side, math.ceil(width * factor / side) * side


@pytest.mark.parametrize(
    ("family", "side", "count", "told", "first"),
    # 24,576 tokens for 352 frames, two of which make a grid, are 139.6 to a frame: at 16:9 8 x 15, and so below 128.
    # Where a token is of 32 x 32 pixels, 128 are more than 270 x 480 pixels: 9 x 16.
    [("qwen2.5", 28, 352, 1.0, (8 * 28, 15 * 28)), ("qwen3", 32, 196, 2.0, (9 * 32, 16 * 32))],
)
def test_long_clips_as_published(
    lmms: ModuleType,
    write_checkpoint: Callable[[str], Path],
    long_clip: Path,
    family: str,
    side: int,
    count: int,
    told: float,
    first: tuple[int, int],
) -> None:
    """Of more than 341 frames and of more than 300 s of sound, by plain arithmetic: which frames, scaled to what size
    by way of which, seconds per grid, how much sound, and every id."""
    evaluated = lmms.SeatsOmni(
        pretrained=str(write_checkpoint(family)), device="cpu", dtype="float32", protocol="paper", retention=1
    )
    inputs = evaluated.prepare([{"role": "user", "content": question_about(long_clip)}], "videomme")

    size = grown(*first, side)
    assert size == (9 * side, 16 * side)
    with av.open(str(long_clip)) as file:
        decoded = [frame.to_image() for frame in file.decode(video=0)]
    assert len(decoded) == 440
    picked = [round(number * 439 / (count - 1)) for number in range(count)]
    (frames,) = inputs.held("pixel_values_videos").frames
    assert frames.shape == (count, 3, *size)
    for number in range(0, count, 9):
        expected = decoded[picked[number]].resize(first[::-1], Image.Resampling.BICUBIC)
        expected = expected.resize(size[::-1], Image.Resampling.BICUBIC)
        assert torch.equal(frames[number], torch.from_numpy(np.array(expected)).permute(2, 0, 1)), number
    patch = side // 2
    assert inputs.video_grid_thw.tolist() == [[count // 2, size[0] // patch, size[1] // patch]]
    assert inputs.video_second_per_grid.tolist() == [told]

    assert inputs.input_features.shape == (1, 128, 30_000)
    assert inputs.feature_attention_mask.sum() == 30_000
    tokenizer = evaluated.model.tokenizer
    kinds = ("VIDEO", "AUDIO") if family == "qwen2.5" else ("video_pad", "audio_pad")
    marks = ("bos", "eos") if family == "qwen2.5" else ("start", "end")
    video, audio = (tokenizer.encode(f"<|{kind}|>") for kind in kinds)
    opened, closed = (tokenizer.encode(f"<|vision_{mark}|>") for mark in marks)
    begins, ends = (tokenizer.encode(f"<|audio_{mark}|>") for mark in marks)
    grid, grids = video * 144, count // 2
    if family == "qwen2.5":  # 25 tokens of sound a second, in turns of 2 s, two grids
        turns = (2 * grid + 50 * audio) * (grids // 2) + 50 * audio * (150 - grids // 2)
    else:  # 13 a second, so 26 to a grid
        turns = (grid + 26 * audio) * grids + audio * (3_900 - 26 * grids)
    begin = tokenizer.encode("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    end = tokenizer.encode("Which?\nA. one\nB. two<|im_end|>\n<|im_start|>assistant\n")
    assert inputs.input_ids[0].tolist() == begin + opened + begins + turns + ends + closed + end


def test_a_sound_by_itself_is_asked_in_pieces(lmms: ModuleType, checkpoint: Path) -> None:
    """As the paper's authors ask: all of it, 300 s to a piece; with true times it is one."""
    sound = {"array": tone(440, 310, 8_000), "sampling_rate": 8_000}
    content = [{"type": "audio", "url": sound}, {"type": "text", "text": "What?"}]
    for protocol, lengths in (("paper", [30_000, 1_000]), ("ours", [31_000])):
        evaluated = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", retention=1, protocol=protocol)
        inputs = evaluated.prepare([{"role": "user", "content": content}])
        assert inputs.feature_attention_mask.sum(dim=1).tolist() == lengths
        tokens = sum(((length - 1) // 2 - 1) // 2 + 1 for length in lengths)
        assert (inputs.input_ids == evaluated.model.tokenizer.encode("<|AUDIO|>")[0]).sum() == tokens
    part = lmms.part_of(content[0])
    for array in (tone(440, 300.05, 8_000), tone(440, 0.05, 8_000)):
        (piece,) = lmms.pieces_of({**part, "audio": (array, 8_000)}, evaluated.reading)
        (piece,) = lmms.pieces_of({**part, "audio": (array, 8_000)}, Reading(sound_seconds=300))
        assert piece["audio_start"] == 0
    stretch = {**part, "audio_start": 3}
    assert lmms.pieces_of(stretch, Reading(sound_seconds=300)) == [stretch]


def test_prompts_longer_than_the_context(lmms: ModuleType, checkpoint: Path, tmp_path: Path) -> None:
    """The paper's are run all the same; ours are refused. Of one checkpoint, whose limit is 200."""
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = (folder / "config.json").read_text()
    small = re.sub(r'("max_position_embeddings": )\d+', r"\g<1>200", config)
    assert small != config
    (folder / "config.json").write_text(small)
    content = [{"type": "text", "text": "word " * 600}]
    evaluated = lmms.SeatsOmni(pretrained=str(folder), device="cpu", retention=1)
    with pytest.raises(InputError, match="together more than the model's 200"):
        ask(evaluated, [content], {"max_new_tokens": 1})
    evaluated = lmms.SeatsOmni(pretrained=str(folder), device="cpu", retention=1, protocol="paper")
    (found,) = ask(evaluated, [content], {"max_new_tokens": 1})
    costs = found.token_counts.to_dict()
    assert costs["input_tokens"] > 600 and costs["output_tokens"] == 1


def test_a_registered_method_is_known_by_its_name(
    lmms: ModuleType, checkpoint: Path, clip: Path, model: omni.Omni, request: pytest.FixtureRequest
) -> None:
    half = Random(video_ratio=0.5, audio_ratio=0.5)
    seats.register("half", lambda video_ratio, audio_ratio: half)
    request.addfinalizer(lambda: seats.METHODS.pop("half"))
    evaluated = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", method="half", retention=0.1)
    assert evaluated.method == half
    (found,) = ask(evaluated, [question_about(clip)], {"max_new_tokens": 4})
    inputs = evaluated.prepare([{"role": "user", "content": question_about(clip)}])
    expected = model.generate(inputs, seats=half, max_new_tokens=4)
    assert found == expected.text and found.token_counts.to_dict()["kept_tokens"] == expected.stats.segments


def test_failures_stop_the_run_or_are_empty_answers(
    lmms: ModuleType, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a batch in which one fails, the others have their answers."""
    contents = [[{"type": "text", "text": text}] for text in ("one", "bad", "six")]
    for on_error in ("stop", "empty"):
        evaluated = lmms.SeatsOmni(
            pretrained=str(checkpoint), device="cpu", retention=1, batch_size=3, on_error=on_error
        )
        model = evaluated.model
        bad = evaluated.prepare([{"role": "user", "content": contents[1]}]).input_ids
        generate = model.generate

        def fails(inputs: Any, generate: Any = generate, bad: Any = bad, **options: Any) -> Any:
            if any(torch.equal(each.input_ids, bad) for each in inputs):
                raise MemoryError("too little")
            return generate(inputs, **options)

        monkeypatch.setattr(model, "generate", fails)
        if on_error == "stop":
            with pytest.raises(MemoryError):
                ask(evaluated, contents, {"max_new_tokens": 2})
            continue
        found = ask(evaluated, contents, {"max_new_tokens": 2})
        assert found[1] == "" and found[1].token_counts.to_dict() == {"error": "MemoryError: too little"}
        for number in (0, 2):
            inputs = evaluated.prepare([{"role": "user", "content": contents[number]}])
            assert found[number] == generate(inputs, max_new_tokens=2).text
        assert "1 of 3 answers failed and count as empty" in caplog.text
        assert len(evaluated.cache_hook.added) == 2
    # What cannot even be prepared.
    (found,) = ask(evaluated, [[{"type": "video", "url": "nowhere.mp4"}]], {})
    assert found == "" and "nowhere.mp4" in found.token_counts.to_dict()["error"]


def test_rows_that_are_not_published_are_refused_at_once(lmms: ModuleType) -> None:
    def made(**settings: Any) -> Any:
        return lmms.SeatsOmni(pretrained="tiny", device="cpu", **settings)

    with pytest.raises(ValueError, match="omnizip is published at 35%, 25% alone, not at 10%"):
        made(protocol="paper", method="omnizip", retention=0.1)
    with pytest.raises(ValueError, match=r"tables are at 100%, 35%, 25%, 15%, 10% alone, not at 0\.3; protocol=ours"):
        made(protocol="paper", retention=0.3)
    assert made(retention=0.3).method == preset_for(made(retention=1).model.config, 0.3)
    assert made(protocol="paper", retention=0.3, video_ratio=0.2, audio_ratio=0.4).method.video_ratio == 0.2
    with pytest.raises(InputError, match="protocol must be one of ours, paper, not 'theirs'"):
        made(protocol="theirs")
    with pytest.raises(InputError, match="on_error must be one of stop, empty, not 'skip'"):
        made(on_error="skip")


def test_settings_that_no_request_can_run_with_are_refused_at_once(lmms: ModuleType) -> None:
    """Protects: a run of nothing but empty answers, or one of other settings than were given."""
    for said, settings in {
        "No method 'best'; choose one of seats": {"method": "best", "retention": 1},
        "kv must be one of layerwise, pruned, not 'prune'": {"kv": "prune"},
        "retention must be a number above 0, not 'all'": {"retention": "all"},
        "fps must be a number above 0, not nan": {"fps": math.nan},
        "batch_size must be 1 or more, not 0": {"batch_size": 0},
        "max_new_tokens must be 1 or more, not 0": {"max_new_tokens": 0},
        r"max_frames must be \d or more, not 1": {"max_frames": 1},
    }.items():
        with pytest.raises(ValueError, match=said):
            lmms.SeatsOmni(pretrained="tiny", device="cpu", protocol="paper", **settings)
    evaluated = lmms.SeatsOmni(pretrained="tiny", device="cpu", video_ratio="0.2", batch_size="2")
    assert (evaluated.method.video_ratio, evaluated.batch_size) == (0.2, 2)


def test_rows_that_cannot_be_run_are_refused_before_the_first_question(
    lmms: ModuleType, checkpoint: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects: a run of nothing but empty answers. By the clips of the task, under the paper's protocol."""
    evaluated = lmms.SeatsOmni(
        pretrained=str(checkpoint), device="cpu", protocol="paper", method="dycoke", retention=0.1
    )
    assert evaluated.on_error == "empty"
    monkeypatch.setattr(evaluated, "prepare", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(InputError, match=r"^task cannot be run so: DyCoke keeps 25% of video at least"):
        ask(evaluated, [question_about(clip)], {"max_new_tokens": 1})
    for settings in ({"use_audio_in_video": False}, {"max_frames": 64, "fps": 4}):
        other = lmms.SeatsOmni(
            pretrained=str(checkpoint), device="cpu", protocol="paper", method="dycoke", retention=0.25, **settings
        )
        with pytest.raises(InputError, match="DyCoke keeps 25% of video at least"):
            ask(other, [question_about(clip)], {"max_new_tokens": 1})
    able = lmms.SeatsOmni(pretrained=str(checkpoint), device="cpu", protocol="paper", method="dycoke", retention=0.25)
    assert ask(able, [question_about(clip)], {"max_new_tokens": 1})[0].token_counts.to_dict()["macs"] > 0
