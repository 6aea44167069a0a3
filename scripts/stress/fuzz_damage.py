"""How `fuzz.py` damages files: as bytes, and by the structure that their names promise."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

WORDS = [b"[" * 50_000, b'{"a":' * 20_000, b"9" * 5000, b"1e999", b"-1", b"NaN", b"null", b'"\\ud800"', b"\xff\xfe"]
WORDS += [b"\0", b"\r\n", b"\n\n", b"../", b"/etc/passwd", b"\xe2\x80\xa8", b"<|im_end|>", b"  ", b'"', b"{", b"}"]
WORDS += [b"{% for i in range(10**9) %}x{% endfor %}", b"{{ messages.__class__ }}", b"{{ 'a' * 10**9 }}", b"{{ x"]
WORDS += [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0\0\0\0\1"]

VALUES = (
    st.sampled_from([None, True, False, 0, 1, -1, 3, 2**31 - 1, 2**31, 10**9, 2**64, 10**400, 0.5, 1e-300, 1e300])
    | st.sampled_from([float("nan"), float("inf"), "", "a", "\ud800", "a\0b", "日", "../x", [], {}, [1], [[]]])
    | st.sampled_from([{"a": 1}, "<|im_end|>", "x" * 10_000, [0] * 1000, "model.safetensors"])
    | st.integers(-3, 3000)
    | st.floats()
    | st.text(max_size=5)
)


class Twice(dict[str, Any]):
    """Written out, its first name comes again at the end."""

    def items(self) -> Any:
        pairs = list(super().items())
        return pairs + pairs[:1]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as a path of keys."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@st.composite
def mutated_json(draw: st.DrawFn, text: bytes) -> bytes:
    """A JSON value with one to three places replaced, removed, doubled, nested deeper or copied from elsewhere."""
    value = [json.loads(text)]
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([path for path in places(value) if path]))
        holder: Any = value
        for key in path:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "twice", "nest", "copy"]))
        if action == "remove" and path:
            del holder[last]
        elif action == "twice" and isinstance(holder[last], dict):
            holder[last] = Twice(holder[last])
        elif action == "nest":
            holder[last] = draw(st.sampled_from([[holder[last]], {"a": holder[last]}, [holder[last]] * 2]))
        elif action == "copy":
            source: Any = value
            for key in draw(st.sampled_from(list(places(value)))):
                source = source[key]
            holder[last] = copy.deepcopy(source)
        else:
            holder[last] = copy.deepcopy(draw(VALUES))
    return json.dumps(value[0], ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")


@st.composite
def mutated_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with one to four bits flipped, spans cut, doubled or overwritten, words put in, the end cut off."""
    for _ in range(draw(st.integers(1, 4))):
        size = len(data)
        # Headers and indices stand at the ends.
        place = draw(st.integers(0, size) | st.integers(0, min(size, 600)) | st.integers(max(0, size - 600), size))
        length = draw(st.integers(1, 64) | st.integers(1, max(1, size)))
        head, span, tail = data[:place], data[place : place + length], data[place + length :]
        action = draw(st.sampled_from(["flip", "flip", "flip", "flip", "word", "word", "cut", "end", "double", "move"]))
        if action == "flip" and place < size:
            data = head + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        elif action == "word":
            word = draw(st.sampled_from(WORDS))
            data = head + word + (span + tail if draw(st.booleans()) else data[place + len(word) :])
        elif action == "cut":
            data = head + tail
        elif action == "end":
            data = head
        elif action == "double":
            data = head + span + span[: 1 << 20] + tail
        elif action == "move":
            other = draw(st.integers(0, size))
            data = head + data[other : other + length] + tail
    return data


def damaged(name: str, data: bytes) -> st.SearchStrategy[bytes]:
    """What a file may be damaged to: as bytes, and by the structure that its name promises."""
    if name.endswith(".json"):
        return mutated_json(data) | mutated_json(data) | mutated_json(data) | mutated_bytes(data)
    if name.endswith(".safetensors"):
        start = 8 + int.from_bytes(data[:8], "little")
        headers = mutated_json(data[8:start]) | mutated_bytes(data[8:start])
        return headers.map(lambda header: len(header).to_bytes(8, "little") + header + data[start:]) | mutated_bytes(
            data
        )
    if name.endswith(".jsonl"):
        lines = data.splitlines(keepends=True)
        one = st.integers(0, len(lines) - 1)
        return one.flatmap(
            lambda n: mutated_json(lines[n]).map(lambda new: b"".join([*lines[:n], new, b"\n", *lines[n + 1 :]]))
        ) | mutated_bytes(data)
    return mutated_bytes(data)
