"""The command line: an answer on stdout, figures on stderr, one sentence for a bad request."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import wave
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import omni
import omni.arguments
import omni.generate
import seats
from omni import answer
from omni.config import DTYPES
from omni.engine import KV
from omni.generate import main, split_words
from seats import preset_for
from seats.methods import NAMES
from seats.methods.random import Random
from tests.omni.pairs import ENVIRONMENT


def run(checkpoint: Path, *arguments: str | Path) -> int:
    return main(["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "6", *map(str, arguments)])


def test_answers_about_a_clip(
    checkpoint: Path, clip: Path, model: omni.Omni, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the command prints is what the library answers, with figures by modality on stderr."""
    assert run(checkpoint, clip, "What happens here?") == 0
    out, err = capsys.readouterr()
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What happens here?"}]
    inputs = model.prepare([{"role": "user", "content": content}])
    answer = model.generate(inputs, max_new_tokens=6, seats=preset_for(model.config))
    assert out == answer.text + "\n"
    figures = err.splitlines()[-1]
    assert f"{answer.stats.tokens['video']} video, {answer.stats.tokens['audio']} audio" in figures
    assert "first token after" in figures
    assert err.splitlines()[-2].startswith(f"kept: {answer.stats.segments[0]} > ")
    assert "times fewer multiply-accumulates" in err
    assert "per second" in figures
    assert answer.stats.tokens["audio"] == 100


def test_retention_one_keeps_every_token(checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options may stand between media and question."""
    assert run(checkpoint, "--json", clip, "--retention", "1", "What?") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["stats"]["segments"] == [sum(report["stats"]["tokens"].values())]
    assert report["stats"]["macs"] == report["stats"]["full_macs"]
    assert "kept:" not in err


def test_ratios_and_kv(checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for kv in ("pruned", "layerwise"):
        options = ["--retention", "0.1", "--video-ratio", "0.9", "--audio-ratio", "0.5", "--kv", kv]
        assert run(checkpoint, "--json", *options, clip, "What?") == 0
        stats = json.loads(capsys.readouterr().out)["stats"]
        assert stats["segments"] == sorted(stats["segments"], reverse=True)
        assert stats["segments"][-1] == stats["tokens"]["text"]
        sizes.append(stats["cache_bytes"])
    assert sizes[0] < sizes[1]


def test_what_was_kept_is_shown(
    checkpoint: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--explain adds the library's table, --show writes its page with question and answer; the answer is the same."""
    assert run(checkpoint, clip, "What happens here?") == 0
    plain = capsys.readouterr().out
    page = tmp_path / "kept.html"
    assert run(checkpoint, "--explain", "--show", page, clip, "What happens here?") == 0
    out, err = capsys.readouterr()
    assert out == plain
    assert "\nBefore the decoder" in err and "video + audio tokens by window" in err
    text = page.read_text()
    assert "What happens here?" in text and str(checkpoint) in text
    assert run(checkpoint, "--show", tmp_path / "kept.txt", clip, "What?") == 1
    assert capsys.readouterr().err.splitlines() == [
        f"omni-generate: {tmp_path / 'kept.txt'}: what each stage kept is written as .html or .png."
    ]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_asked_about_is_not_drawn_over(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch, chat: bool
) -> None:
    """By its own name or another."""
    picture, link = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (56, 56), "red").save(picture)
    link.symlink_to(picture)
    (tmp_path / "linked").symlink_to(tmp_path)
    before = picture.read_bytes()
    for path in (picture, link, tmp_path / "linked" / "a.png"):
        if chat:
            monkeypatch.setattr(sys, "stdin", io.StringIO(f"What?\n/show {path}\n"))
            assert run(checkpoint, "--chat", "--max-new-tokens", "2", picture) == 1
        else:
            assert run(checkpoint, "--show", path, picture.as_uri(), "What?") == 1
        assert "would be written over" in capsys.readouterr().err.splitlines()[-1]
        assert picture.read_bytes() == before and link.is_symlink()


def test_qwen3_answers_the_same_way(
    write_checkpoint: Callable[[str], Path], clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_checkpoint("qwen3")
    assert run(checkpoint, clip, "What happens here?") == 0
    out, err = capsys.readouterr()
    assert run(checkpoint, "--json", clip, "What happens here?") == 0
    report = json.loads(capsys.readouterr().out)
    assert out == report["text"] + "\n"
    assert report["thought"] == ""
    assert report["stats"]["tokens"]["audio"] == 53
    assert "53 audio; first token after" in err.splitlines()[-1]


def test_thoughts_are_kept_apart(
    write_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template that opens a thought: what comes before the mark that ends it is no answer."""
    folder = shutil.copytree(write_checkpoint("qwen3"), tmp_path / "thinking")
    settings = json.loads((folder / "chat_template.json").read_text())
    thinking = settings["chat_template"] + "{% if add_generation_prompt %}<think>\n{% endif %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": thinking}))
    assert run(folder, "--json", "Why?") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["thought"]
    assert report["text"] == ""
    assert report["thought_cut"] is True
    assert run(folder, "Why?") == 0
    out, err = capsys.readouterr()
    assert out == "\n"
    assert report["thought"] in err
    assert "the thought was cut off at 6 tokens, before any answer: raise --max-new-tokens." in err


def test_sampling_settings(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint's own sampling, top-p and top-k on the command line; without sampling they are refused."""
    folder = shutil.copytree(checkpoint, tmp_path / "sampled")
    settings = {"eos_token_id": [1], "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(settings))

    def tokens(*options: str) -> list[int]:
        assert run(folder, "--json", "--seed", "3", *options, "Why?") == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    own = tokens("--temperature", "checkpoint")
    assert own == tokens("--temperature", "0.6", "--top-p", "0.95", "--top-k", "20")
    assert own != tokens("--temperature", "0.6")
    greedy = tokens()
    assert own != greedy
    assert tokens("--temperature", "checkpoint", "--top-k", "1") == greedy
    assert run(folder, "--top-p", "0.9", "--top-k", "5", "Why?") == 1
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("--top-p and --top-k is for sampling: add a --temperature above 0, or checkpoint.")
    )
    assert run(checkpoint, "--temperature", "checkpoint", "Why?") == 1
    assert "names no sampling settings in generation_config.json: give a temperature." in capsys.readouterr().err


def test_what_asks_nothing_to_be_drawn_is_said_before_anything_is_loaded(capsys) -> None:
    assert main(["--model", "no-such-folder", "--top-p", "0.9", "Why?"]) == 1
    assert capsys.readouterr().err.startswith("omni-generate: --top-p is for sampling: ")


def test_a_sound_may_be_asked_about_without_words(
    checkpoint: Path, clip: Path, model: omni.Omni, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects: "" is the library's message of the medium alone, as Qwen3-Omni's Captioner takes it."""
    assert run(checkpoint, "--json", "--retention", "1", clip, "") == 0
    inputs = model.prepare([{"role": "user", "content": [{"type": "video", "video": str(clip)}]}])
    assert json.loads(capsys.readouterr().out)["tokens"] == model.generate(inputs, max_new_tokens=6).tokens


def test_json_and_no_audio(checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--json", "--no-audio", "--fps", "1", clip, "What?") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tokens"]) == 6
    assert isinstance(report["text"], str)
    assert report["stats"]["tokens"]["audio"] == 0
    assert report["stats"]["tokens"]["video"] > 0
    assert report["stats"]["media_seconds"] > 0
    assert report["model"] == str(checkpoint)
    assert report["dtype"] == "float32" and report["device"] == "cpu"
    assert report["settings"]["fps"] == 1 and report["settings"]["method"] == "seats"


def test_sound_system_message_and_seed(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = tmp_path / "tone.bin"  # told apart by content, not by name
    with wave.open(str(sound), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(bytes(32_000))
    options = ["--system", "Be brief.", "--temperature", "1", "--seed", "3", "--json", sound, "What is said?"]
    reports = []
    for _ in range(2):
        assert run(checkpoint, *options) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[0]["stats"]["tokens"]["audio"] == 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mp4", "What?"], "missing.mp4 does not exist"),
        ([".", "What?"], "is a folder"),
        (["--device", "quantum", "What?"], "'quantum' cannot be used here"),
        (["--max-new-tokens", "40000", "What?"], "more than the model's 32768"),
        (["--max-pixels", "10", "What?"], "max_pixels must be at least 784"),
    ],
)
def test_bad_request_is_one_sentence(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(checkpoint, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("omni-generate: ")
    assert words in last
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_stdout_cannot_encode_is_escaped(
    checkpoint: Path, model: omni.Omni, monkeypatch: pytest.MonkeyPatch, capsys, encoding: str
) -> None:
    """Protects: an answer that was computed is not lost to its last character; JSON stays JSON."""
    text = model.generate(model.prepare([{"role": "user", "content": "Why?"}]), max_new_tokens=6).text
    assert not text.isascii()

    def printed(*options: str) -> str:
        out = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
        assert run(checkpoint, *options, "Why?") == 0
        sys.stdout.flush()
        return out.getvalue().decode(encoding)

    assert printed() == text.encode(encoding, "backslashreplace").decode(encoding) + "\n"
    written = printed("--json")
    assert json.loads(written)["text"] == text and written.isascii() == (encoding != "utf-8")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("options", [["Why?"], ["--json", "Why?"], ["--chat", "Why?"]])
def test_a_full_disk_is_one_sentence(checkpoint: Path, options: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n"))
    with open("/dev/full", "w") as full:  # noqa: PTH123, as stdout
        monkeypatch.setattr(sys, "stdout", full)
        assert run(checkpoint, *options) == 1
        with suppress(OSError):
            full.close()
    assert capsys.readouterr().err.splitlines() == ["omni-generate: stdout takes no answer: No space left on device."]


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_closed_streams_lead_nowhere(
    checkpoint: Path, chat: list[str], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Protects: `2>&-` and `>&-`. The answer alone is on stdout, whose place figures do not take."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run(checkpoint, *chat, "Why?") == 0
    whole = capsys.readouterr()
    for name, left in (("stderr", (whole.out, "")), ("stdout", ("", whole.err))):
        with monkeypatch.context() as closed:
            closed.setattr(sys, name, None)
            assert run(checkpoint, *chat, "Why?") == 0
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == (left[0], left[1].count("\n"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells what a number stands for")
def test_closed_streams_take_no_other_files_number() -> None:
    """Protects: what libraries write to stderr by its number never goes into a file that was opened later."""
    code = "import os, sys, omni.arguments as a; a.open_streams(); "
    code += (
        "print([os.readlink(f'/proc/self/fd/{n}') for n in (0, 2)], [each is None for each in (sys.stdin, sys.stderr)])"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{code}" <&- 2>&-', shell=True, capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout == "['/dev/null', '/dev/null'] [False, False]\n"


@pytest.mark.parametrize("moment", ["importing", "loading", "answering"])
def test_an_interrupt_ends_the_command_at_once(checkpoint: Path, clip: Path, moment: str) -> None:
    """SIGINT while PyTorch is imported, while the model loads and the clip is read, in the middle of an answer: status
    130, one line that says so, no traceback. What imports may take the exception for one of their own."""
    options = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", "20000"]
    # The probe says on stderr how far the command is.
    probe = "import sys, omni.generate as g; watch = sys.argv.pop(1); start = g._run; sys.stderr.write('+\\n'); "
    probe += "importing = lambda words, done: start(words, lambda: (done(), sys.stderr.write('+\\n')) and None); "
    probe += "g._run = importing if watch == 'loading' else start; sys.exit(g.main())"
    command = [sys.executable, "-c", probe, moment, *options, clip, "What happens here?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(2 if moment == "loading" else 1):
            assert process.stderr.readline() == b"+\n"
        if moment == "importing":
            time.sleep(0.2)
        if moment == "answering":
            assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.decode().split("\n")[-2:] == ["omni-generate: interrupted.", ""]
    assert b"Traceback" not in err


def test_an_interrupt_that_a_library_swallows_counts(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run_and_swallow(words: list[str], imported: Callable[[], None]) -> int:
        imported()
        with suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(omni.generate, "_run", run_and_swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray, where it ran before, has its own
    try:
        assert main(["What?"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\nomni-generate: interrupted.\n"


def test_an_interrupt_that_a_library_swallows_ends_what_goes_on() -> None:
    """Protects: an answer that would go on for minutes, with nothing left to stop it."""
    code = """
import signal, sys, time
import omni.generate as g
def run_on(words, imported):
    imported()
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    time.sleep(100)
    return 0
g._run, g.PATIENCE = run_on, 1
sys.exit(g.main(["What?"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (done.returncode, done.stderr) == (130, "\nomni-generate: interrupted.\n")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--version"], 0, f"seats-omni {omni.__version__}"),
        (["--help"], 0, "tiny knows its own small world alone"),
        (["missing.mp4", "What?"], 1, "omni-generate: missing.mp4 does not exist."),
        (["version"], 2, "omni-generate: 'version' asks nothing. Ask like this: omni-generate clip.mp4 \"What"),
    ],
)
def test_needs_no_model_to_say_so(arguments: list[str], status: int, words: str) -> None:
    """Nor PyTorch, whose import takes most of a second."""
    code = (
        "import sys, omni.generate as g\ntry: status = g.main()\nexcept SystemExit as stop: status = stop.code or 0\n"
    )
    code += "assert 'torch' not in sys.modules\nsys.exit(status)"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    said = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode, words in said) == (status, True), said


def test_answers_import_no_compiler(clip: Path) -> None:
    """Neither what makes the parameters nor the first operator of our own, whatever the method."""
    code = """
import sys, omni, seats.methods
model = omni.load("tiny", device="cpu")
content = [{"type": "video", "video": sys.argv[1]}, {"type": "text", "text": "Which sound came first?"}]
inputs = model.prepare([{"role": "user", "content": content}])
for name in seats.methods.NAMES:
    model.generate(inputs, seats=name, max_new_tokens=2)
found = {"torch._dynamo", "torch._inductor", "triton", "sympy"} & sys.modules.keys()
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code, omni.arguments.CLIP], check=True, env=ENVIRONMENT)


def test_the_demonstration_times_whole_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: what is kept of the first prefill would leave nothing to the others, and selection look slow."""
    asked: dict[str, Any] = {}

    def watched(source: str, **options: Any) -> Any:
        asked.update(options)
        raise MemoryError

    monkeypatch.setattr("omni.answer.load", watched)
    assert main([]) == 1
    assert asked == {"reuse": 0}


def test_the_parser_lists_what_there_is() -> None:
    """It cannot ask: that would import PyTorch."""
    assert omni.arguments.METHODS == NAMES
    assert omni.arguments.KV == KV
    assert tuple(DTYPES) == omni.arguments.DTYPES


@pytest.mark.parametrize(
    ("words", "media", "question"),
    [
        (["CLIP", "What happens?"], ["CLIP"], "What happens?"),
        (["What happens?", "CLIP"], ["CLIP"], "What happens?"),
        (["CLIP", "What happens?", "CLIP"], ["CLIP", "CLIP"], "What happens?"),
        (["missing.mp4", "What?"], ["missing.mp4"], "What?"),
        (["What?", "missing.mp4"], ["missing.mp4"], "What?"),
        (["https://example.org/a", "Why?"], ["https://example.org/a"], "Why?"),
        (["clips/one", "Why?"], ["clips/one"], "Why?"),
        (["My holiday clip.mp4", "What?"], ["My holiday clip.mp4"], "What?"),
        (["What?", "Video 2026-11-27 at 10.00.00.MP4"], ["Video 2026-11-27 at 10.00.00.MP4"], "What?"),
        (["My holiday.mp4", "Sound 1.wav", "Why so"], ["My holiday.mp4", "Sound 1.wav"], "Why so"),
        (["CLIP", "Describe clip.mp4"], ["CLIP"], "Describe clip.mp4"),
        (["What happens in a b.mp4", "c/a b.mp4"], ["c/a b.mp4"], "What happens in a b.mp4"),
        (["Describe clip.mp4", "CLIP", "Why so"], ["Describe clip.mp4", "CLIP"], "Why so"),
        (["CLIP", "Is it like My clip.mp4?"], ["CLIP"], "Is it like My clip.mp4?"),
        (["CLIP", "Pick one.\nA. an mp3\nB. some .mp3"], ["CLIP"], "Pick one.\nA. an mp3\nB. some .mp3"),
        (["CLIP", "Transcribe"], ["CLIP"], "Transcribe"),
        (["CLIP", ""], ["CLIP"], ""),
        (["Is clip.mp4 loud?"], [], "Is clip.mp4 loud?"),
        (["发生了什么"], [], "发生了什么"),
        (["CLIP", "他/她在做什么?"], ["CLIP"], "他/她在做什么?"),
        (["CLIP", "描述他/她的动作。"], ["CLIP"], "描述他/她的动作。"),
        (["CLIP", "Cat/dog?"], ["CLIP"], "Cat/dog?"),
        *(([name, "What?"], [name], "What?") for name in ("/数据/视频.mp4", "/数据/视频", "../été/clip", "~/ü/clip")),
        *(([name, "What?"], [name], "What?") for name in ("https://a.org/vidéo", "HTTPS://a.be/b?", "file:///tmp/ü")),
    ],
)
def test_media_and_question(clip: Path, words: list[str], media: list[str], question: str) -> None:
    here = [str(clip) if word == "CLIP" else word for word in words]
    assert split_words(here) == ([str(clip) if word == "CLIP" else word for word in media], question)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "there is no question."),
        ([""], "there is no question."),
        (["  "], "there is no question."),
        (["CLIP"], '"" asks without one.'),
        (["."], "there is no question, . names a file."),
        (["missing.mp4"], "there is no question, missing.mp4 names a file."),
        (["My holiday clip.mp4"], "there is no question, My holiday clip.mp4 names a file."),
        (["CLIP", "My holiday clip2.mp4"], "there is no question, My holiday clip2.mp4 names a file."),
        (["version"], "'version' asks nothing."),
        (["CLIP", "clip2"], "'clip2' asks nothing."),
        (["CLIP", "What", "happens", "here?"], "'What' and 'here?' are no files: put the question in quotation marks."),
    ],
)
def test_a_forgotten_question_is_noticed(clip: Path, words: list[str], reason: str, capsys) -> None:
    here = [str(clip) if word == "CLIP" else word for word in words]
    assert main(["--json", *here]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1
    assert reason in err and 'Ask like this: omni-generate clip.mp4 "What happens here?"' in err


def test_a_percentage_is_asked_about(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--retention", "35", "What?"])
    assert "must be above 0 and at most 1, not 35: 0.35?" in capsys.readouterr().err


def test_a_registered_method_is_known_by_its_name(
    checkpoint: Path,
    clip: Path,
    model: omni.Omni,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """To the library and to `main` of the same program: the answer, and what is kept, are the method's."""
    seats.register("half", lambda video_ratio, audio_ratio: Random(video_ratio=0.5, audio_ratio=0.5))
    request.addfinalizer(lambda: seats.METHODS.pop("half"))
    assert run(checkpoint, "--json", "--method", "half", clip, "What?") == 0
    report = json.loads(capsys.readouterr().out)
    content = [{"type": "video", "video": str(clip)}, {"type": "text", "text": "What?"}]
    inputs = model.prepare([{"role": "user", "content": content}])
    answer = model.generate(inputs, seats="half", max_new_tokens=6)
    expected = model.generate(inputs, seats=Random(video_ratio=0.5, audio_ratio=0.5), max_new_tokens=6)
    assert report["text"] == answer.text == expected.text
    assert report["stats"]["segments"] == answer.stats.segments == expected.stats.segments
    assert answer.stats.segments != model.generate(inputs, seats="random", max_new_tokens=6).stats.segments


def test_every_method_says_what_it_kept(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And tiny that it knows nothing of a clip that is not of its world; nothing draws a bar where nobody looks."""
    for method in ("seats", "divprune-om"):
        assert main(["--model", "tiny", "--device", "cpu", "--method", method, str(clip), "What happens here?"]) == 0
        err = capsys.readouterr().err
        assert "times fewer multiply-accumulates" in err and "\nkept: " in err
        assert "(media " in err and "%|" not in err
        assert err.startswith("omni-generate: tiny knows its own small world alone")
    assert main(["--model", "tiny", "--device", "cpu", str(omni.arguments.CLIP), "Which sound came first?"]) == 0
    out, err = capsys.readouterr()
    assert out == "a falling sweep\n"
    assert err.startswith("kept: ")


def test_bad_model_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "What?") == 1
    assert "config.json" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", "What?") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fps", "0", "What?"],
        ["--temperature", "-1", "What?"],
        ["--seed", str(2**64), "What?"],
        ["--retention", "0", "What?"],
    ],
)
def test_bad_options_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_a_stretch_of_the_media(
    checkpoint: Path, clip: Path, model: omni.Omni, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """--start and --end cut clips and sounds; where there is neither, they are refused."""
    assert run(checkpoint, "--json", "--start", "1", "--end", "3", clip, "What?") == 0
    stats = json.loads(capsys.readouterr().out)["stats"]
    part = {"type": "video", "video": str(clip), "video_start": 1, "video_end": 3}
    inputs = model.prepare([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    assert stats["tokens"] == model.prefill(inputs).tokens and stats["tokens"]["audio"] == 50
    for options, words in (
        (["--start", "9", clip], "video_start is 9 s, but"),
        (["--start", "2", "--end", "1", clip], "video_end, 1 s, must come after video_start, 2 s"),
        (["--start", "2"], "start and end are of clips and sounds"),
    ):
        assert run(checkpoint, *options, "What happens?") == 1
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_addresses_on_the_command_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """file:// and data: are read; the network only with --urls, and what came from it is gone afterwards."""
    folder = tmp_path / "with space"
    folder.mkdir()
    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    packed = base64.b64encode((folder / "a.png").read_bytes()).decode()
    tokens = []
    uri = (folder / "a.png").as_uri()
    for address in (uri, uri.replace("file://", "FILE:"), f"Data:image/png;base64,{packed}"):
        assert run(checkpoint, "--json", address, "What?") == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        assert run(checkpoint, address, "What?") == 1
        assert "--urls" in capsys.readouterr().err.splitlines()[-1]
        assert run(checkpoint, "--json", "--urls", address, "What?") == 0
        server.shutdown()
    tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert len(tokens) == 4 and tokens == tokens[:1] * 4
    assert not [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("seats-omni")]


@pytest.mark.parametrize("before", [[], ["--json"]])
def test_a_name_that_looks_like_an_option(
    checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, before: list[str]
) -> None:
    """After "--" nothing is an option, whether or not anything stands before it."""
    (tmp_path / "-clip.mp4").write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(answer, "answer", lambda options: seen.append((options.media, options.question)))
    assert main([*before, "--", "-clip.mp4", "What?"]) == 0
    assert seen == [(["-clip.mp4"], "What?")]
