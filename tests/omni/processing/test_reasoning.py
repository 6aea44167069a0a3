"""Thoughts and answers are told apart, while they stream and afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni.processing.reasoning import AnswerStream, ends_in_thought, split_answer

OPEN, CLOSE, END, BEGIN = 300, 301, 302, 303


def tokenizer(marks: bool = True) -> Any:
    """One token per byte, a special token, and the marks."""
    added = {"<|im_end|>": END, "<|im_start|>": BEGIN, **({"<think>": OPEN, "</think>": CLOSE} if marks else {})}
    words = {OPEN: b"<think>", CLOSE: b"</think>"}
    return SimpleNamespace(
        added_tokens=added, token_bytes=lambda id: b"" if id in (END, BEGIN) else words.get(id) or bytes([id])
    )


def ids(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("prompt", "new", "thought", "text"),
    [
        ([], ids("plain"), "", "plain"),
        ([], [OPEN, *ids("\nhm\n"), CLOSE, *ids("\n\nyes\n"), END], "hm", "yes\n"),
        ([OPEN, *ids("\n")], [*ids("hm"), CLOSE, *ids("yes")], "hm", "yes"),
        ([OPEN, *ids("\n")], ids("never done"), "never done", ""),
        ([OPEN, CLOSE, *ids("\n\n")], ids("yes"), "", "yes"),  # a template that forbids to think
        ([BEGIN, *ids("It is "), OPEN, END, BEGIN, *ids("a\n")], ids("yes"), "", "yes"),  # spoken of in an earlier turn
        ([BEGIN, *ids("It is "), CLOSE, END, BEGIN, *ids("a\n"), OPEN, 10], ids("hm"), "hm", ""),
        ([], [OPEN, CLOSE, *ids("yes")], "", "yes"),
        ([], [*ids("yes"), CLOSE, *ids("no")], "", "yesno"),
        ([], [OPEN, *ids("é")[:1], CLOSE, *ids("é")], "\N{REPLACEMENT CHARACTER}", "é"),
    ],
)
def test_thought_and_answer(prompt: list[int], new: list[int], thought: str, text: str) -> None:
    assert split_answer(tokenizer(), prompt, new) == (thought, text)


def test_a_thought_that_is_cut_stays_one() -> None:
    """Whatever was opened before it, in the prompt or not, and whatever turns a model makes up."""
    for prompt, new, open in (
        ([BEGIN, OPEN], ids("hm"), True),
        ([BEGIN, OPEN], [*ids("hm"), BEGIN, *ids("x")], True),
        ([BEGIN, OPEN], [CLOSE, *ids("yes")], False),
        ([BEGIN, OPEN, END, BEGIN], ids("yes"), False),
    ):
        assert ends_in_thought(tokenizer(), prompt, new) == open
        assert bool(split_answer(tokenizer(), prompt, new)[1]) != open


def test_vocabularies_without_marks_yield_answers() -> None:
    assert split_answer(tokenizer(marks=False), [OPEN], [*ids("a"), CLOSE, *ids("b")]) == ("", "a</think>b")


@given(st.lists(st.one_of(st.sampled_from([OPEN, CLOSE, END, 10]), st.integers(0, 255)), max_size=30))
def test_streamed_pieces_add_up(new: list[int]) -> None:
    """What was streamed is what the whole generation says, but for blank lines at the thought's end."""
    stream = AnswerStream(tokenizer(), [])
    pieces = [*map(stream.push, new), stream.flush()]
    thought, text = split_answer(tokenizer(), [], new)
    assert "".join(piece.text for piece in pieces if not piece.is_thought) == text
    assert "".join(piece.text for piece in pieces if piece.is_thought).rstrip("\n") == thought
