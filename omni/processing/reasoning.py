"""What a reasoning checkpoint thinks, between <think> and </think>, told apart from what it answers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from typing import NamedTuple

from omni.processing.tokenizer import TextStream, Tokenizer

OPEN, CLOSE = "<think>", "</think>"
TURN_BEGIN = "<|im_start|>"


class Piece(NamedTuple):
    text: str
    is_thought: bool


class AnswerStream:
    """Turns new token ids into pieces of thought and answer as they come; the marks are part of neither.

    prompt: the ids before them. Reasoning templates leave a thought open at the end of the prompt, in the turn that is
    to be said: marks of earlier turns, which may be spoken of there, open nothing. Blank lines after a mark are left
    out. Vocabularies without the marks yield answers alone. is_thought: whether one is open now.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._marks = {tokenizer.added_tokens[mark]: mark for mark in (OPEN, CLOSE) if mark in tokenizer.added_tokens}
        begin = tokenizer.added_tokens.get(TURN_BEGIN)
        turn = takewhile(lambda id: id != begin, reversed(list(prompt)))
        last = next((self._marks[id] for id in turn if id in self._marks), CLOSE)
        self.is_thought, self._skip_blank = last == OPEN, last == OPEN
        self._text = TextStream(tokenizer)

    def push(self, id: int) -> Piece:
        """The characters that this token completes: none, one or several."""
        if id not in self._marks:
            return self._piece(self._text.push(id))
        piece = self.flush()
        self._text = TextStream(self._tokenizer)
        self.is_thought, self._skip_blank = self._marks[id] == OPEN, True
        return piece

    def flush(self) -> Piece:
        """What an unfinished character at the end comes to."""
        return self._piece(self._text.flush())

    def _piece(self, text: str) -> Piece:
        if self._skip_blank:
            text = text.lstrip("\n")
            self._skip_blank = not text
        return Piece(text, self.is_thought)


def ends_in_thought(tokenizer: Tokenizer, prompt: Iterable[int], ids: Iterable[int]) -> bool:
    """Whether a generation leaves a thought open."""
    stream = AnswerStream(tokenizer, prompt)
    for id in ids:
        stream.push(id)
    return stream.is_thought


def split_answer(tokenizer: Tokenizer, prompt: Iterable[int], ids: Iterable[int]) -> tuple[str, str]:
    """Thought and answer of a whole generation; the thought is "" where there is none."""
    stream = AnswerStream(tokenizer, prompt)
    pieces = [*map(stream.push, ids), stream.flush()]
    thought, text = ("".join(piece.text for piece in pieces if piece.is_thought is kind) for kind in (True, False))
    return thought.rstrip("\n"), text
