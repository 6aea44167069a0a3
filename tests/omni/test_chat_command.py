"""omni-generate --chat: a conversation by pipe and in a terminal; what goes wrong ends an answer, never the talk."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import omni
from omni import chat
from omni.arguments import CLIP
from omni.generate import main, split_words
from seats import preset_for
from tests.omni.pairs import ENVIRONMENT

SMALL = {"fps": 1, "max_frames": 4}


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: str | Path, lines: list[str], *more
) -> tuple[int, list[str], list[str]]:
    """Status, answers and what was said beside them."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "5", "--chat"]
    command += ["--fps", "1", "--max-frames", "4", *map(str, more)]
    status = main(command)
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


def kept(line: str) -> list[int]:
    """Tokens by layers that a line of figures tells."""
    return [int(count) for count in line[1:].partition(" of ")[0].split(" > ")]


def test_a_conversation_is_messages(model: omni.Omni, checkpoint: Path, clip: Path, monkeypatch, capsys) -> None:
    """Each answer is the library's of all that was said, at the retention of that moment; figures are on stderr."""
    texts = ["What happens here?", "And then?", "Why?"]
    lines = [texts[0], "", texts[1], "/retention 1", texts[2], "/quit", "never asked"]
    status, out, err = talk(monkeypatch, capsys, checkpoint, lines, "--system", "Be brief.", clip)
    messages: list[dict] = [{"role": "system", "content": "Be brief."}]
    expected = []
    for text, seats in zip(texts, (preset_for(model.config, 0.35), preset_for(model.config, 0.35), None), strict=True):
        media = [] if len(messages) > 1 else [{"type": "video", "video": str(clip)}]
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": text}]})
        expected.append(model.generate(model.prepare(messages, **SMALL), seats=seats, max_new_tokens=5))
        messages.append({"role": "assistant", "content": expected[-1].text})
    assert status == 0
    assert out == [answer.text for answer in expected]
    figures = [line for line in err if line.startswith("[")]
    assert [kept(line) for line in figures] == [answer.stats.segments for answer in expected]
    assert all("first after" in line and "per second]" in line for line in figures)
    assert [line for line in err if line not in figures] == ["omni-generate: retention 1."]


def test_the_first_question_may_stand_in_the_command(checkpoint: Path, clip: Path, monkeypatch, capsys) -> None:
    assert split_words([str(clip)], may_ask=True) == ([str(clip)], "")
    _, piped, _ = talk(monkeypatch, capsys, checkpoint, ["What happens?"], clip)
    assert talk(monkeypatch, capsys, checkpoint, [], clip, "What happens?")[1] == piped
    _, alone, err = talk(monkeypatch, capsys, checkpoint, ["Who are you?"])
    assert len(alone) == 1 and " of " in err[-1]  # without media, too


def test_what_fails_leaves_no_trace(checkpoint: Path, clip: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A medium that is none, a medium whose frames are damaged, a context that overflows, commands that are none: a
    sentence each, and the answers after them are those of a conversation without them."""
    broken = tmp_path / "my broken clip.mp4"
    content = clip.read_bytes()
    at = content.index(b"mdat")
    broken.write_bytes(content[:at] + b"mdat" + bytes(len(content) - at - 4))
    (tmp_path / "note.txt").write_text("no medium")
    page = tmp_path / "kept.html"
    lines = [
        "/show kept.html",
        "What happens here?",
        "/flip",
        f"/{tmp_path}",
        f"/media {tmp_path / 'gone.mp4'}",
        f"/media {tmp_path / 'note.txt'}",
        f"/media {broken}",
        "What of this?",
        "word " * 40_000,
        "/retention 35",
        "/retention half",
        "/quit now",
        f"/show {tmp_path / 'kept.txt'}",
        f"/show {page}",
        "And then?",
    ]
    status, out, err = talk(monkeypatch, capsys, checkpoint, lines, clip)
    assert status == 1
    _, alone, _ = talk(monkeypatch, capsys, checkpoint, ["What happens here?", "And then?"], clip)
    assert out == alone
    said = [line.removeprefix("omni-generate: ") for line in err if not line.startswith("[")]
    for line, words in zip(
        said,
        [
            "/show draws what was kept for the last answer, and there is none yet.",
            "there is no command /flip; /help lists those that are.",
            "there is no command //",
            "gone.mp4 does not exist.",
            "note.txt",
            f"the next question is also about {broken}.",
            "The media of this question are left out.",
            "more than the model's",
            "/retention: must be above 0 and at most 1, not 35: 0.35?",
            "/retention: must be a number, not 'half'",
            "/quit takes nothing, not 'now'.",
            "what each stage kept is written as .html or .png.",
            f"{page} shows what was kept for the last answer.",
        ],
        strict=True,
    ):
        assert words in line
    assert "What happens here?" in page.read_text() and alone[0] in page.read_text()


def test_media_wait_for_a_question_that_is_answered(
    checkpoint: Path, clip: Path, model: omni.Omni, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A question that is too long takes no medium with it; several come in their order; /new forgets all."""
    spaced = tmp_path / "a clip.mp4"
    spaced.write_bytes(clip.read_bytes())
    lines = ["word " * 40_000, f"/media '{spaced}' {CLIP}", "What?", "/new", "What?"]
    _, out, err = talk(monkeypatch, capsys, checkpoint, lines, "--retention", "1", clip)
    content = [{"type": "video", "video": str(each)} for each in (clip, spaced, CLIP)]
    answers = []
    for media in (content, []):
        inputs = model.prepare([{"role": "user", "content": [*media, {"type": "text", "text": "What?"}]}], **SMALL)
        answers.append(model.generate(inputs, max_new_tokens=5))
    assert out == [answer.text for answer in answers]
    assert [kept(line) for line in err if line.startswith("[")] == [answer.stats.segments for answer in answers]


def test_a_question_whose_thought_was_cut_is_forgotten(
    write_checkpoint, clip: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Protects: a model is not shown an empty answer of its own as if it had said nothing; the medium waits."""
    folder = shutil.copytree(write_checkpoint("qwen3"), tmp_path / "thinking")
    settings = json.loads((folder / "chat_template.json").read_text())
    thinking = settings["chat_template"] + "{% if add_generation_prompt %}<think>\n{% endif %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": thinking}))
    asked = []
    prepare = chat.prepare
    monkeypatch.setattr(
        chat, "prepare", lambda model, said, options: asked.append(said) or prepare(model, said, options)
    )
    status, out, err = talk(monkeypatch, capsys, folder, ["Why?", "And then?"], clip)
    assert (status, out) == (0, ["", ""])
    kinds = [[part["type"] for part in message["content"]] for said in asked for message in said]
    assert kinds == [["video", "text"], ["video", "text"]]
    assert [message["content"][1]["text"] for said in asked for message in said] == ["Why?", "And then?"]
    assert err.count("omni-generate: the question is forgotten.") == 2


def test_help_lists_every_command(monkeypatch, capsys) -> None:
    status, out, err = talk(monkeypatch, capsys, "tiny", ["/help"])
    assert status == 0 and not out
    found = [line.split()[0] for line in err]
    assert found == ["/media", "/retention", "/show", "/new", "/help", "/quit", "anything"]


@pytest.mark.parametrize("option", [["--json"], ["--explain"], ["--show", "kept.html"]])
def test_what_does_not_go_with_it_is_refused(option: list[str], capsys) -> None:
    assert main(["--chat", *option, "What?"]) == 2
    assert capsys.readouterr().err.startswith(f"omni-generate: {option[0]} does not go with --chat: ")


def test_what_is_wrong_before_the_first_question_ends_it(checkpoint: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "note.txt").write_text("no medium")
    for more, words in (
        ([tmp_path / "gone.mp4"], "gone.mp4 does not exist."),
        (["My holiday clip.mp4"], "My holiday clip.mp4 does not exist."),
        ([tmp_path / "note.txt"], "note.txt"),
        (["--top-k", "3"], "--top-k is for sampling"),
        (["--method", "fastv", "--retention", "0.1"], "token selection cannot run"),
    ):
        status, out, err = talk(monkeypatch, capsys, checkpoint, ["What?"], *more)
        assert (status, out, len(err)) == (1, [], 1)
        assert words in err[0]


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        self.end, there = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "omni.generate", *map(str, arguments)],
            stdin=there,
            stdout=there,
            stderr=there,
            env=ENVIRONMENT | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: _control(there),
        )
        os.close(there)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def interrupt(self, line: str = "") -> None:
        """Ctrl-C at a prompt, until there is another: readline does not see one that comes when it has written the
        prompt and does not wait for a key yet."""
        for _ in range(9):
            self.type(f"{line}\x03")
            with suppress(AssertionError):
                self.until("> ", 5)
                return
        raise AssertionError(f"no prompt came after {self.seen!r}")

    def until(self, text: str, seconds: float = 240) -> str:
        """What is on the screen up to this, from where the last look ended."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            self.read(deadline)
        before, _, self.seen = self.seen.partition(text)
        return before

    def read(self, deadline: float) -> None:
        ready, _, _ = select.select([self.end], [], [], max(0.0, deadline - time.monotonic()))
        try:
            more = os.read(self.end, 4096).decode(errors="replace") if ready else ""
        except OSError:  # Linux says so where the other end is closed
            more = ""
        assert more, f"nothing came after {self.seen!r}"
        self.seen += more


def _control(terminal: int) -> None:
    """Makes it the controlling terminal, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_an_interrupt_ends_the_answer_alone(checkpoint: Path) -> None:
    """In a terminal: Ctrl-C in the middle of an answer, then at an empty prompt and on half a line; the conversation
    goes on, what was said stays, and the line before comes back from the history."""
    terminal = Terminal("--model", checkpoint, "--device", "cpu", "--max-new-tokens", "20000", "--chat")
    try:
        terminal.until("> ")
        terminal.type("What happens here?\n")
        terminal.until("What happens here?\r\n")
        while not terminal.seen:
            terminal.read(time.monotonic() + 240)
        terminal.type("\x03")
        terminal.until("omni-generate: stopped; what was said stays.")
        terminal.until("> ")
        terminal.interrupt()
        terminal.interrupt("half a li")
        terminal.type("\x10\n")  # up in the history, as with the arrow: half a line is not in it
        terminal.until("What happens here?\r\n")
        terminal.type("\x03")  # before there is anything of an answer, or not
        terminal.until("omni-generate: stopped")
        terminal.until("> ")
        terminal.type("/quit\n")
        terminal.until("/quit\r\n")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_an_interrupt_ends_a_conversation_by_pipe(checkpoint: Path) -> None:
    """Nobody is there to go on."""
    options = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "20000", "--chat", "What happens?"]
    command = [sys.executable, "-m", "omni.generate", *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(2)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err.decode().endswith("\nomni-generate: interrupted.\n") and b"Traceback" not in err


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_in_another_encoding_are_lines(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pasted as Latin-1 is refused where it is asked, and the next line is read."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nWhy?\n"), encoding="utf-8"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert list(chat._lines("", terminal)) == ["caf\udce9?", "Why?"]


def test_text_of_windows_is_read_or_refused_in_words(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Protects: a byte-order mark before a command makes no question of it, and UTF-16 is told to whoever saved it so,
    line by line, with nothing of it asked."""

    def said(content: bytes) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        status = main(["--model", "tiny", "--device", "cpu", "--max-new-tokens", "2", "--chat"])
        out, err = capsys.readouterr()
        assert not out
        return status, err.splitlines()

    text = "/retention 0.5\r\n/retention 0.6\n"
    told = ["omni-generate: retention 0.5.", "omni-generate: retention 0.6."]
    assert said(text.encode("utf-8-sig")) == (0, told)
    refused = "omni-generate: the question is no UTF-8 text: save the questions as UTF-8, or set the terminal to it."
    assert said("What?\nWho?".encode("utf-16-le")) == (1, [refused] * 2)
    assert said("What?\nWho?".encode("utf-16")) == (1, [refused] * 2)
    assert said("caf\xe9?".encode("latin-1")) == (1, [refused])
