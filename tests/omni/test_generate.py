"""The command line: an answer on stdout, figures on stderr, one sentence for a bad request."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ENVIRONMENT

import omni
from omni.generate import main
from seats import preset_for


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
        options = ["--retention", "0.1", "--video-ratio", "0.05", "--audio-ratio", "0.5", "--kv", kv]
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


def test_json_and_no_audio(checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--json", "--no-audio", "--fps", "1", clip, "What?") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["tokens"]) == 6
    assert isinstance(report["text"], str)
    assert report["stats"]["tokens"]["audio"] == 0
    assert report["stats"]["tokens"]["video"] > 0
    assert report["stats"]["media_seconds"] > 0


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


@pytest.mark.parametrize("pipe", ["stderr", "stdout"])
def test_an_interrupt_ends_the_command_at_once(checkpoint: Path, clip: Path, pipe: str) -> None:
    """SIGINT while the model loads and the clip is decoded (a bar is on stderr), and in the middle of an answer: status
    130, one line that says so, no traceback."""
    options = ["--model", checkpoint, "--device", "cpu", "--max-new-tokens", "20000"]
    command = [sys.executable, "-m", "omni.generate", *options, clip, "What happens here?"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        stream = getattr(process, pipe)
        assert stream.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1] == "omni-generate: interrupted."
    assert b"Traceback" not in err


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
        ["--json"],
    ],
)
def test_bad_options_are_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
