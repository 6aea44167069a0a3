"""Renders one chat template: the program of the short-lived process that `omni.processing.chat_template` starts.

A checkpoint is foreign data, and its template is a program. jinja2's sandbox keeps it from Python's internals
but not from looping for ever or filling memory, so it runs in a process of its own, under the operating
system's limits. Nothing of this package is imported here: the process has to start in a blink.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[1:]  # of the process that started this one

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

CPU_SECONDS = 4
MEMORY_BYTES = 512 * 2**20
MAX_CHARACTERS = 4 * 2**20


class _LoudUndefined(jinja2.Undefined):
    """May be tested, as templates do, but not printed: a missing or forbidden value must not vanish."""

    def __str__(self) -> str:
        return self._fail_with_undefined_error()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, by which templates mark for trainers what a model says: its content, as it is."""

    tags = {"generation"}  # noqa: RUF012, jinja2's own way

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render(
    template: str,
    messages: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
    special_tokens: dict[str, str] | None = None,
) -> str:
    """The prompt that a template makes of messages; "" of None, for which it is only read.

    Offers what transformers' `chat_template_utils` does: `raise_exception`, `strftime_now`, a `tojson` that
    escapes no HTML, loop controls, `generation`, the tokenizer's `special_tokens` by their names, and `tools` and
    `documents`, which are None. Raises whatever the template raises, for a value that is not there, which transformers
    prints as nothing, too; and jinja2's TemplateError for a prompt of more than MAX_CHARACTERS.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
        undefined=_LoudUndefined,
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    program = environment.from_string(template)
    if messages is None:
        return ""
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    pieces = program.generate({**(special_tokens or {}), **given})
    prompt: list[str] = []
    characters = 0
    for piece in pieces:
        characters += len(piece)
        if characters > MAX_CHARACTERS:
            raise jinja2.TemplateError(f"the prompt is longer than {MAX_CHARACTERS} characters")
        prompt.append(piece)
    return "".join(prompt)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit_resources() -> None:
    """Processor time everywhere but on Windows, memory on Linux; a lower limit that is already set stays."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    for limit, value in ((resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_AS, MEMORY_BYTES)):
        with contextlib.suppress(ValueError):
            resource.setrlimit(limit, (value, value))


def main() -> None:
    """Reads `render`'s arguments as a JSON object; writes {"prompt": …} or {"error": …}."""
    _limit_resources()
    try:
        answer = {"prompt": render(**json.load(sys.stdin))}
    except MemoryError:
        answer = {"error": f"it needs more than {MEMORY_BYTES // 2**20} MiB of memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:1000]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
