"""omni-generate --chat: a conversation, each line a question; answers on stdout, all else on stderr.

In the library a conversation is a list of messages, which this keeps:

- A question and the media named before it are a message; its answer is the next, without a reasoning model's thought.
- What failed leaves no trace. Its media wait for the next question, but for those that cannot be read.
- An answer that Ctrl-C stops stays as far as it was said. Where nothing was, nothing was asked; nor where a thought was
  cut off before any answer.

In a terminal Ctrl-C stops an answer, and otherwise clears the line; /quit, or the end of the input, ends it all. Where
questions come from a file or a pipe there is no prompt, and Ctrl-C ends the program: nobody is there to go on.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from omni.answer import (
    ERRORS,
    NOT_ITS_WORLD,
    answering,
    check_stretch,
    described,
    load_model,
    media_part,
    method_of,
    of_its_world,
    prepare,
    print_thought,
    put,
    sampling_of,
    warn_of_cut_thought,
)
from omni.arguments import OUT_OF_MEMORY, ratio
from omni.engine import Prefill
from omni.inputs import InputError, Inputs
from omni.model import Generation, Omni
from omni.processing.frames import vision_sizes
from omni.processing.media import MediaError, fetched
from omni.processing.media.files import named
from omni.show import check_path, show

PROMPT = "> "
BYTE_ORDER_MARK = "\ufeff"
"""Before the first line, from editors and shells of Windows."""


def chat(options: argparse.Namespace) -> int:
    """Talks until the input ends. Returns the exit status: 1 where a line that came from no terminal was refused.

    Raises one of ERRORS, or MemoryError, for what is wrong before the first question, and OutputError.
    """
    with ExitStack() as stack:
        talk = Conversation(options, stack)
        talk.add(options.media)
        if talk.waiting:
            check_stretch(talk.waiting, options)
        sampling_of(options)
        talk.load()
        if talk.terminal:
            stack.enter_context(_interrupts())
            say("/help lists what a line may be; Ctrl-D or /quit ends.")
        for line in _lines(options.question, talk.terminal):
            try:
                talk.take(line)
            except KeyboardInterrupt:  # of a command, or one more while the first was seen to
                if not talk.terminal:
                    raise
                say("stopped.")
            if talk.ended:
                break
    return int(talk.refused and not talk.terminal)


@dataclass
class Shown:
    """What /show draws: the last answer's request and prefill, without the cache that it was decoded from."""

    inputs: Inputs
    prefill: Prefill
    question: str
    answer: str
    settings: str


class Conversation:
    """What `--chat` holds between two lines: the model, what was said so far, and media named for the next question.

    messages: what was said. waiting: parts of the next message, media named since. sources: all media that were named.
    files: what was fetched.
    """

    def __init__(self, options: argparse.Namespace, files: ExitStack) -> None:
        self.options, self.files = options, files
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []
        self.sources: list[Any] = []
        self.last: Shown | None = None
        self.terminal = sys.stdin is not None and sys.stdin.isatty()
        self.refused = self.ended = False
        self.begin()

    def begin(self) -> None:
        system = self.options.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.waiting = []

    def load(self) -> None:
        self.model: Omni = load_model(self.options)
        method_of(self.options, self.model.config)

    def take(self, line: str) -> None:
        """Answers a line, or does what it says."""
        line = line.rstrip()
        try:
            if line.startswith("/"):
                self.obey(*line.partition(" ")[::2])
            elif line:
                self.ask(line)
        except (*ERRORS, MemoryError) as error:
            self.refuse(f"{error}" or OUT_OF_MEMORY)
        except torch.OutOfMemoryError:
            self.refuse(OUT_OF_MEMORY)

    def refuse(self, why: str) -> None:
        self.refused = True
        say(why)

    def obey(self, name: str, rest: str) -> None:
        if name not in COMMANDS:
            there = f" /media {name} would add that file." if os.path.lexists(name) else ""
            raise InputError(f"there is no command {name:.80}; /help lists those that are.{there}")
        COMMANDS[name].run(self, rest.strip())

    def ask(self, question: str) -> None:
        if re.search("[\0\udc80-\udcff]", question):  # a zero byte, as UTF-16 has them, or what `_lines` let pass
            raise InputError("the question is no UTF-8 text: save the questions as UTF-8, or set the terminal to it.")
        media, self.waiting = self.waiting, []
        content = [*media, {"type": "text", "text": question}]
        said, answered = [*self.messages, {"role": "user", "content": content}], False
        pieces: list[str] = []
        try:
            generation = self.answer(said, question, pieces)
            answered = bool(pieces) or not generation.thought_cut
            if not answered:
                say("the question is forgotten.")
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            answered = bool(pieces)
            put()
            say("stopped; " + ("what was said stays." if answered else "the question is forgotten."))
        except MediaError as error:
            left = "The media of this question are left out." if media else "/new begins without it."
            media = []
            raise MediaError(f"{error} {left}") from None
        except InputError as error:
            raise InputError(f"{error}{' /new begins anew.' if self.messages else ''}") from None
        finally:
            if answered:
                self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]
            else:
                self.waiting = [*media, *self.waiting]

    def answer(self, said: list[dict[str, Any]], question: str, pieces: list[str]) -> Generation:
        """Prints the next answer, whose pieces are also put into `pieces` as they come."""
        started = time.perf_counter()
        inputs = prepare(self.model, said, self.options)
        media_seconds = time.perf_counter() - started
        if self.options.model == "tiny" and self.last is None and not of_its_world(inputs):
            print(NOT_ITS_WORLD, file=sys.stderr)

        def remember(prefill: Prefill) -> None:
            lean = replace(prefill, cache=cast(Any, None))
            self.last = Shown(inputs, lean, question, "", described(self.options))

        with closing(
            self.model.stream(
                inputs, on_prefill=remember, on_thought=print_thought, **answering(self.options, self.model.config)
            )
        ) as stream:
            generation: Generation | None = None
            while generation is None:
                try:
                    pieces.append(next(stream))
                    put(pieces[-1], end="")
                except StopIteration as stop:
                    generation = stop.value
        put()
        if generation.thought:
            print(file=sys.stderr)  # ends its line
        warn_of_cut_thought(generation)
        cast(Shown, self.last).answer = generation.text
        print(figures(generation, media_seconds), file=sys.stderr)
        return generation

    def add(self, sources: list[str]) -> None:
        """Media for the next question; all of them or, where one cannot be read, none."""
        urls = self.options.urls
        local = [self.files.enter_context(fetched(source, urls=urls)) for source in sources]
        self.waiting += [media_part(source, self.options) for source in local]
        self.sources += local

    def media(self, rest: str) -> None:
        sources = paths(rest)
        self.add(sources)
        say(f"the next question is also about {', '.join(map(named, sources))}.")

    def retention(self, rest: str) -> None:
        if rest:
            try:
                changed = argparse.Namespace(**{**vars(self.options), "retention": ratio(rest)})
            except argparse.ArgumentTypeError as error:
                raise InputError(f"/retention: {error}") from None
            method_of(changed, self.model.config)
            self.options = changed
        say(f"retention {self.options.retention:g}.")

    def show(self, rest: str) -> None:
        last = self.last
        if last is None:
            raise InputError("/show draws what was kept for the last answer, and there is none yet.")
        if len(found := paths(rest)) != 1:
            raise InputError("/show takes one path: /show kept.html")
        path = check_path(found[0], self.sources)
        sizes = vision_sizes(self.model.folder, self.model.config)
        texts = {"question": last.question, "answer": last.answer, "settings": last.settings}
        show(last.inputs, last.prefill, path, sizes=sizes, **texts)
        say(f"{path} shows what was kept for the last answer.")

    def new(self, rest: str) -> None:
        _nothing("/new", rest)
        self.begin()
        say("a new conversation, without media.")

    def help(self, rest: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        lines = [f"{command.usage:{width}}  {command.what}" for command in COMMANDS.values()]
        print("\n".join([*lines, f"{'anything else':{width}}  a question"]), file=sys.stderr)

    def quit(self, rest: str) -> None:
        _nothing("/quit", rest)
        self.ended = True


@dataclass(frozen=True)
class Command:
    usage: str
    what: str
    run: Callable[[Conversation, str], None]


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        Command("/media PATH ...", "add clips, pictures or sounds to the next question", Conversation.media),
        Command("/retention SHARE", "of video and audio tokens to keep from now on", Conversation.retention),
        Command("/show PATH", "draw what was kept for the last answer: .html or .png", Conversation.show),
        Command("/new", "forget what was said and shown", Conversation.new),
        Command("/help", "this", Conversation.help),
        Command("/quit", "end, as Ctrl-D does; Ctrl-C stops an answer", Conversation.quit),
    )
}


def _nothing(name: str, rest: str) -> None:
    if rest:
        raise InputError(f"{name} takes nothing, not {rest!r:.80}.")


def paths(rest: str) -> list[str]:
    """One path or several, as a shell reads them; a single one may have spaces as it stands. Raises InputError."""
    if os.path.lexists(whole := _expanded(rest)):
        return [whole]
    try:
        found = [_expanded(each) for each in shlex.split(rest)]
    except ValueError as error:
        raise InputError(f"{rest!r:.80} cannot be read as paths: {error}.") from None
    if not found:
        raise InputError("there is no path: /media clip.mp4, /show kept.html")
    return found


def _expanded(path: str) -> str:
    return str(Path.home() / path[2:]) if path.startswith("~/") else path


def figures(generation: Generation, media_seconds: float) -> str:
    """A line of what an answer took; `omni.answer.figures` has more of it."""
    stats = generation.stats
    first = media_seconds + stats.encode_seconds + stats.prefill_seconds
    return (
        f"[{' > '.join(map(str, stats.segments))} of {sum(stats.tokens.values())} tokens kept, "
        f"{stats.reused_tokens} reused; "
        f"first after {first:.2f} s; {stats.new_tokens} new, {stats.tokens_per_second:.1f} per second]"
    )


def say(message: str) -> None:
    print(f"omni-generate: {message}", file=sys.stderr)


def _lines(first: str, terminal: bool) -> Iterator[str]:
    if first:
        yield first
    # What is no UTF-8 is refused where it is asked, and may be a path.
    with suppress(AttributeError):
        # A file of questions is UTF-8 also where a console is not, as on Windows.
        cast(Any, sys.stdin).reconfigure(errors="surrogateescape", **({} if terminal else {"encoding": "utf-8"}))
    if not terminal:
        for number, line in enumerate(sys.stdin or ()):
            yield line.removeprefix("" if number else BYTE_ORDER_MARK).rstrip("\n")
        return
    read = _reader()
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        yield line


def _reader() -> Callable[[], str]:
    """Asks for a line, with history and completion of paths where both ends are a terminal: else the prompt would be
    among the answers."""
    if sys.stdout.isatty():
        with suppress(ImportError):
            import readline

            readline.set_completer_delims(" \t\n")
            readline.parse_and_bind("tab: complete")
        return lambda: input(PROMPT)

    def read() -> str:
        print(PROMPT, end="", file=sys.stderr, flush=True)
        if line := sys.stdin.readline():
            return line.rstrip("\n")
        raise EOFError

    return read


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C is ours, not the command's, which would end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
