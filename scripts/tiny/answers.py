"""Which answers are right: for `evaluate.py`, and for lmms-eval's tasks (`scripts/tasks`)."""

from __future__ import annotations

import re
from typing import Any


def is_right(text: str, question: dict[str, Any]) -> bool:
    """A question has "answer" and "options", none where the answer is free.

    Of options the first letter by itself counts, of free answers the words.
    """
    if question["options"]:
        found = re.search(r"\b[A-D]\b", text)
        return found is not None and question["options"]["ABCD".index(found[0])] == question["answer"]
    return words(text) == words(question["answer"])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
