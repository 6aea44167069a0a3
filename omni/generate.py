"""python -m omni.generate [media ...] "question": the answer on stdout, thoughts, progress and figures on stderr.

With --chat a conversation about them: `omni.chat`.
Bare, it asks the checkpoint `tiny` about a clip, both of which are shipped, with every token and with fewer.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import omni
from omni.arguments import OUT_OF_MEMORY, model_parser, open_streams, settings_parser

# PyTorch, whose import takes most of a second, waits until there is a question: nothing here needs it.


class UsageError(Exception):
    """Arguments that make no request: what was wrong and how to ask."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one question; returns the exit status: 0, 1 for a bad request, 2 for none, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    open_streams()
    state = {"interrupted": False, "importing": True}

    def interrupt(*_: object) -> None:
        # What is imported may take the exception for one of its own; and a second time there is no more patience.
        if state["importing"] or state["interrupted"]:
            os.write(2, INTERRUPTED.encode())
            os._exit(130)
        state["interrupted"] = True
        if ALARM is not None:
            signal.alarm(PATIENCE)
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    ours = ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else whoever calls has one
    if ours:
        signal.signal(signal.SIGINT, interrupt)
        if ALARM is not None:
            signal.signal(ALARM, interrupt)
    status = 130
    try:
        status = _run(arguments, lambda: state.update(importing=False))
    except BaseException as error:
        if not (state["interrupted"] or isinstance(error, KeyboardInterrupt)):
            raise
        state["interrupted"] = True
    finally:
        if ours:
            if ALARM is not None:
                signal.alarm(0)
                signal.signal(ALARM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if state["interrupted"]:  # also where a library swallowed it
        sys.stderr.write(INTERRUPTED)
        return 130
    return status


ALARM = getattr(signal, "SIGALRM", None)
PATIENCE = 5
"""Seconds after an interrupt. Callbacks from C, and what cleans up after objects, swallow exceptions: whatever still
runs then is ended as by a second interrupt. Windows, which has no alarm, waits for that one."""
INTERRUPTED = "\nomni-generate: interrupted.\n"
"""On a line of its own, after a bar or half an answer."""


def _run(arguments: list[str], imported: Callable[[], None]) -> int:
    """imported: called when PyTorch and all of the model's code is there."""
    options = None
    if arguments:
        # What follows "--" is no option, which argparse forgets where nothing came before it.
        end = arguments.index("--") if "--" in arguments else len(arguments)
        options = argument_parser().parse_intermixed_args(arguments[:end])
        try:
            words = [*options.words, *arguments[end + 1 :]]
            options.media, options.question = split_words(words, may_ask=options.chat)
            if options.chat:
                _refuse_in_chat(options)
        except UsageError as error:
            print(f"omni-generate: {error}", file=sys.stderr)
            return 2
        for source in options.media:  # known before anything is loaded; what else may be wrong with it, later
            if not re.match("[a-z]+:", source, re.IGNORECASE) and not os.path.lexists(source):
                print(f"omni-generate: {source} does not exist.", file=sys.stderr)
                return 1

    import torch

    from omni.answer import ERRORS, OutputError, answer, demo
    from omni.chat import chat

    imported()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            warnings.filterwarnings("ignore", module=r"torch\.")  # what its compiler says of itself
            if options is not None and options.chat:
                return chat(options)
            demo() if options is None else answer(options)
    except ERRORS as error:
        print(f"omni-generate: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError):
        print(f"omni-generate: {OUT_OF_MEMORY}", file=sys.stderr)
        return 1
    except (BrokenPipeError, OutputError) as error:
        if isinstance(error, OutputError):  # else its reader went away (`| head`): nothing more to say
            print(f"omni-generate: {error}", file=sys.stderr)
        sys.stdout = None  # or what it holds would be written at interpreter exit
        return 1
    return 0


def _refuse_in_chat(options: argparse.Namespace) -> None:
    for name, why in (
        ("json", "answers follow each other there"),
        ("explain", "/show PATH there draws what was kept for the last answer"),
        ("show", "/show PATH there draws what was kept for the last answer"),
    ):
        if getattr(options, name):
            raise UsageError(f"--{name} does not go with --chat: {why}.")


def split_words(words: list[str], *, may_ask: bool = False) -> tuple[list[str], str]:
    """Media and question of a command line, whichever comes first.

    What is there as a file, or looks like the name of one, is a medium. Of what is left the last is the question, and
    anything else a file that is missing. Where nothing is left, what ends in the name of another medium is the
    question ("Describe clip.mp4"). Raises UsageError where there is none, and for a single word that asks nothing;
    beside media one may ("Transcribe"), and so may "", since some models take sound alone. may_ask: there need be no
    question, which then is "".
    """
    how = 'Ask like this: omni-generate clip.mp4 "What happens here?"'
    told = [index for index, word in enumerate(words) if not _names_a_file(word)]
    if not told:
        ends = tuple(f" {name}" for word in words for name in (word, Path(word).name))
        told = [index for index, word in enumerate(words) if word.endswith(ends) and not os.path.lexists(word)]
    if may_ask and not told:
        return words, ""
    if not words:
        raise UsageError(f"there is no question. {how}")
    if not told:
        raise UsageError(
            f'there is no question, {words[-1]} names a file. End a question with "?"; "" asks without one. {how}'
        )
    at = told[-1]
    media, question = words[:at] + words[at + 1 :], words[at]
    if not (media or question.strip() or may_ask):
        raise UsageError(f"there is no question. {how}")
    others = [words[index] for index in told[:-1]]
    if others and not any(" " in word for word in others):
        raise UsageError(f"{others[0]!r} and {question!r} are no files: put the question in quotation marks. {how}")
    if re.fullmatch(r"(?![A-Za-z]+$)[\w-]+" if media else r"[\w-]+", question, re.ASCII):
        raise UsageError(f"{question!r} asks nothing. {how}")
    return media, question


def _names_a_file(word: str) -> bool:
    try:
        if os.path.lexists(word):
            return True
    except ValueError:  # a zero byte
        return False
    if re.fullmatch(r"((file|data|https?):|~?/|\.\.?/)\S*", word, re.IGNORECASE):
        return True
    if re.fullmatch(rf"[^?\n]*[^?\s]\.({MEDIA_ENDINGS})", word, re.IGNORECASE):  # with spaces, as phones name them
        return True
    # Questions without a space may have a slash further on: Chinese ones, and "Cat/dog?".
    return bool(re.fullmatch(r"\S*\.\w{2,5}|(?!.*\?$)[!-~]*/[!-~]*", word, re.ASCII))


MEDIA_ENDINGS = (
    "mp4|m4v|mov|mkv|webm|avi|mpe?g|m2?ts|wmv|flv|3gp|ogv|mp3|wav|flac|og[ga]|opus|m4a|aac|wma|aiff?|"
    "jpe?g|png|gif|webp|bmp|tiff?|avif|hei[cf]"
)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omni-generate",
        usage='%(prog)s [options] [media ...] "question"\n       %(prog)s [options] --chat [media ...] ["question"]',
        description="Answer a question about clips, pictures and sounds. Without arguments: a demonstration.",
        parents=[model_parser(), settings_parser()],
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar='media ... "question"',
        help="clips, pictures or sounds, told apart by their content, and a question in quotation marks",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="hold a conversation: each line of the terminal, or of stdin, is a question about media and all that was "
        "said before; /help there lists what else a line may be",
    )
    parser.add_argument("--urls", action="store_true", help="fetch media that are http:// or https:// addresses")
    parser.add_argument("--version", action="version", version=f"seats-omni {omni.__version__}")
    parser.add_argument("--show", metavar="PATH", help="draw what each stage kept: a page (.html) or a picture (.png)")
    parser.add_argument("--explain", action="store_true", help="print what each stage kept as a table, on stderr")
    parser.add_argument("--json", action="store_true", help="print answer and figures as one JSON object")
    return parser


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"omni-generate: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
