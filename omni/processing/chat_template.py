"""Messages → token ids, through the checkpoint's chat template."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni.processing.reasoning import CLOSE, OPEN
from omni.processing.tokenizer import Tokenizer
from weights.files import parse_object, read_text

_TURNS = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role + '\n' }}"
    "{% if message.content is string %}"
    "{{ message.content }}"
    "{% else %}"
    "{% for part in message.content %}{{ media.get(part.type, part.text) }}{% endfor %}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)

QWEN2_5_OMNI_TEMPLATE = (
    "{% set media = {'image': '<|vision_bos|><|IMAGE|><|vision_eos|>',"
    " 'audio': '<|audio_bos|><|AUDIO|><|audio_eos|>', 'video': '<|vision_bos|><|VIDEO|><|vision_eos|>'} %}"
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}" + _TURNS
)
"""The Qwen2.5-Omni family's template (ChatML with media marks), for checkpoints that bring none."""

QWEN3_OMNI_TEMPLATE = (
    "{% set media = {'image': '<|vision_start|><|image_pad|><|vision_end|>',"
    " 'audio': '<|audio_start|><|audio_pad|><|audio_end|>',"
    " 'video': '<|vision_start|><|video_pad|><|vision_end|>'} %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message.role + '\n' }}"
    "{% set turn = namespace(text='') %}"
    "{% if message.content is string %}{% set turn.text = message.content %}"
    "{% else %}"
    "{% for part in message.content %}{% set turn.text = turn.text ~ media.get(part.type, part.text) %}{% endfor %}"
    "{% endif %}"
    "{% if message.role == 'assistant' and '</think>' in turn.text %}"
    "{{ turn.text.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ turn.text }}"
    "{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
)
"""The Qwen3-Omni family's: as the released one without tools, it adds no system message, opens no thought, and leaves
the thoughts of earlier answers out."""

ROLES = ("system", "user", "assistant")
MEDIA = ("image", "audio", "video")

_WALL_SECONDS = 30
# Of this user's what the interpreter may need to start: keys and names are none of a template's business.
_ENVIRONMENT = ("SYSTEMROOT",) if os.name == "nt" else ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class ChatTemplateError(ValueError):
    """Messages that are malformed, or a chat template that is damaged, fails or takes too much."""


def load_template(folder: Path) -> str | None:
    """The chat template of a checkpoint, or None where it has none.

    In the order of transformers' processors: the key chat_template of processor_config.json and of chat_template.json,
    then chat_template.jinja, then the key in tokenizer_config.json. It may hold named templates: then the one named
    "default". Raises ChatTemplateError for files that cannot be read as such.
    """
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        source = Path(folder) / name
        if not source.is_file():
            continue
        if source.suffix == ".jinja":
            return _read(source)
        try:
            template = parse_object(_read(source)).get("chat_template")
        except ChatTemplateError:
            raise
        except ValueError as error:
            raise ChatTemplateError(f"{source} cannot be read: {error}. Fetch it again.") from error
        if template is not None:
            return _text_of(template, source)
    return None


def _text_of(template: Any, source: Path) -> str:
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {str(entry.get("name")): entry.get("template") for entry in template}
    if isinstance(template, dict):
        if "default" not in template:
            names = ascii(", ".join(template))[1:-1][:80] or "none"
            raise ChatTemplateError(f'{source} has no chat template named "default", only: {names}.')
        template = template["default"]
    if not isinstance(template, str):
        raise ChatTemplateError(f"{source}: chat_template is neither a text nor a list of named texts.")
    return template


def _read(source: Path) -> str:
    try:
        return read_text(source)
    except ValueError as error:
        raise ChatTemplateError(f"{source} cannot be read: {error}. Fetch it again.") from error


def apply_chat_template(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a conversation, one placeholder id per media part.

    messages: {"role": "system" | "user" | "assistant", "content": text or list of parts}; a part is
    {"type": "text", "text": …} or {"type": "image" | "audio" | "video", that type: the medium}. The template
    sees that a medium is there, never the medium.

    Special tokens come from the template alone; typed ones stay plain text. To that end the characters with
    which added tokens begin and end (< and > in this family) are stood in for by private-use characters
    while the template runs. So no typed text can begin or end one: whole, in parts or beside the template's
    own text, and whatever the template strips or joins. Two consequences: a template that looks for such a
    token inside a text does not find it, and one that writes both edges of a token around a text makes it.
    Except for the marks of a thought in an assistant's turn, for templates that look for them to drop it:
    they are seen, and what the template leaves of them are marks.

    The template runs in a process of its own: see `render`. Raises ChatTemplateError for malformed messages
    and failing templates, TokenizerError for texts without UTF-8.
    """
    typed = set(json.dumps(_plain_messages(messages, {}), ensure_ascii=False)) | set(template)
    private = (char for char in map(chr, range(0xE000, 0xF900)) if char not in typed)
    edges = sorted({edge for mark in tokenizer.marks for edge in (mark[0], mark[-1])})
    stand_ins = dict(zip(edges, private, strict=False))
    if len(stand_ins) < len(edges):
        raise ChatTemplateError("the messages use up Unicode's private-use characters: take some out.")
    plain = _plain_messages(messages, stand_ins, CLOSE in template)
    prompt = render(template, plain, add_generation_prompt, tokenizer.special_tokens)
    restored = str.maketrans({stand_in: edge for edge, stand_in in stand_ins.items()})
    ids: list[int] = []
    for piece in tokenizer.split(prompt):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.encode(piece.translate(restored), split_special_tokens=True)
    return ids


def check_template(template: str) -> None:
    """Raises ChatTemplateError for a template that cannot be read as one."""
    render(template, None, False)


def _plain_messages(
    messages: Sequence[Mapping[str, Any]], stand_ins: Mapping[str, str], see_thoughts: bool = False
) -> list[dict[str, Any]]:
    """Checked copies of messages that hold text alone: stand-ins in typed text, media left out.

    see_thoughts: the marks of a thought are left as they are in an assistant's turns.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError('messages must be a list such as [{"role": "user", "content": "…"}].')
    table = str.maketrans(dict(stand_ins))
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ChatTemplateError(f'{where} must be an object with the keys "role" and "content" alone.')
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ChatTemplateError(f"{where} has the role {role!r}: known are {', '.join(ROLES)}.")
        kept = _MARKS if see_thoughts and role == "assistant" else _NOTHING
        if isinstance(content, str):
            plain.append({"role": role, "content": _plain_text(content, table, kept)})
        elif isinstance(content, (list, tuple)):
            parts = [_plain_part(part, f"{where}, part {i}", table, kept) for i, part in enumerate(content, 1)]
            plain.append({"role": role, "content": parts})
        else:
            raise ChatTemplateError(f"{where}: content must be a text or a list of parts, not {content!r:.80}.")
    return plain


def _plain_part(part: Any, where: str, table: Mapping[int, str], kept: re.Pattern[str]) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", *MEDIA):
        known = ", ".join(("text", *MEDIA))
        raise ChatTemplateError(f'{where}: "type" must be one of {known}, not {kind!r:.80}.')
    if part.get(kind) is None:
        raise ChatTemplateError(f'{where} is of type {kind!r} and needs the key "{kind}".')
    if kind in MEDIA:
        return {"type": kind, kind: kind}
    if not isinstance(part["text"], str):
        raise ChatTemplateError(f"{where}: text must be a string, not {part['text']!r:.80}.")
    return {"type": "text", "text": _plain_text(part["text"], table, kept)}


_MARKS, _NOTHING = re.compile(f"({OPEN}|{CLOSE})"), re.compile("((?!))")


def _plain_text(text: str, table: Mapping[int, str], kept: re.Pattern[str]) -> str:
    """A typed text with stand-ins, but for what `kept` finds."""
    pieces = kept.split(text)
    pieces[::2] = [piece.translate(table) for piece in pieces[::2]]
    return "".join(pieces)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """Renders a foreign template in jinja2's sandbox, in a process of its own; without messages it is read alone.

    special_tokens: "eos_token" and the like → text, which the template may name.
    Bounded: processor time, memory and the prompt's length (`omni.processing.sandbox` names the figures).
    On systems other than Linux memory is not, and on Windows the wall clock alone bounds the time. It imports from
    where this process does; of the environment it has what an interpreter needs to start. The process has this user's
    rights: what a hole in jinja2's sandbox would yield is not contained.
    Costs the start of a Python interpreter, about a tenth of a second. Raises ChatTemplateError.
    """
    # Modules of a cluster and `pip install --target` are found by PYTHONPATH, which it does not see.
    program = [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py")), *filter(None, sys.path)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    request = {
        "template": template,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "special_tokens": dict(special_tokens or {}),
    }
    try:
        done = subprocess.run(
            program, input=json.dumps(request).encode(), capture_output=True, timeout=_WALL_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise ChatTemplateError(f"the chat template took more than {_WALL_SECONDS} s: use another.") from error
    if done.returncode < 0:
        raise ChatTemplateError("the chat template was stopped: it took too much time or memory. Use another.")
    if done.returncode > 0:
        reason = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ChatTemplateError(f"the chat template could not be rendered: {reason}.")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ChatTemplateError(f"the chat template failed: {answer['error'].rstrip('.')}.")
    return answer["prompt"]
