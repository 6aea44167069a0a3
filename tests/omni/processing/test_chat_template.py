"""Chat templates: the family's against transformers' rendering, typed special tokens, foreign templates."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from omni.processing import chat_template, sandbox
from omni.processing.chat_template import (
    QWEN2_5_OMNI_TEMPLATE,
    QWEN3_OMNI_TEMPLATE,
    ChatTemplateError,
    apply_chat_template,
    load_template,
)
from omni.processing.tokenizer import Tokenizer, TokenizerError
from omni.processing.vocabulary import SPLIT_PATTERN, AddedToken, Vocabulary

MARKS = ("im_start", "im_end", "endoftext", "IMAGE", "AUDIO", "VIDEO", "vision_bos", "vision_eos")
MARKS_3 = ("image_pad", "audio_pad", "video_pad", "vision_start", "vision_end", "audio_start", "audio_end")
SPECIAL = tuple(f"<|{mark}|>" for mark in (*MARKS, "audio_bos", "audio_eos", *MARKS_3))
NOT_SPECIAL = ("<tool_call>", "</tool_call>", "<think>", "</think>")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
IDS = {token: id for id, token in enumerate([*ALPHABET, "us", "ser", "er", "user"])}
MERGES = [("e", "r"), ("u", "s"), ("s", "er"), ("us", "er")]
ADDED = [AddedToken(text, len(IDS) + i, text in SPECIAL) for i, text in enumerate(SPECIAL + NOT_SPECIAL)]
TOKENIZER = Tokenizer(Vocabulary(IDS, MERGES, ADDED))


def _transformers_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary in transformers."""
    inner = tokenizers.Tokenizer(models.BPE(IDS, MERGES))
    inner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    inner.decoder = decoders.ByteLevel()
    for token in ADDED:
        inner.add_tokens([tokenizers.AddedToken(token.text, special=token.special, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


REFERENCE = _transformers_tokenizer()


def _user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


IMAGE, AUDIO, VIDEO = ({"type": kind, kind: f"some.{kind}"} for kind in ("image", "audio", "video"))
SYSTEM = {"role": "system", "content": "You are Qwen."}
CHATS = {
    "a question": _user("What happens?"),
    "a clip and a question": _user(VIDEO, _text("What happens?")),
    "all media": _user(IMAGE, _text("a "), AUDIO, VIDEO, VIDEO, _text("\n b")),
    "a system message": [SYSTEM, *_user("Hello")],
    "a system message in parts": [
        {"role": "system", "content": [_text("Be "), _text("brief.")]},
        *_user(AUDIO),
    ],
    "turns": [*_user(IMAGE), {"role": "assistant", "content": "A bird."}, *_user("Which? ")],
    "a late system message": [*_user("x"), SYSTEM],
    "empty texts": [*_user(""), {"role": "assistant", "content": []}, *_user(_text(""))],
    "white space and markup": _user("  <b>5 < 6 && 7 > 3</b>\n\n {{ x }} {% if %} é \U0001f600 \t"),
}


@pytest.mark.parametrize("template", [QWEN2_5_OMNI_TEMPLATE, QWEN3_OMNI_TEMPLATE], ids=["2.5", "3"])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_family_template_gives_the_ids_of_transformers(name: str, prompted: bool, template: str) -> None:
    """Text and ids of a family's template are transformers'."""
    prompt = sandbox.render(template, CHATS[name], prompted)
    options = {"chat_template": template, "add_generation_prompt": prompted}
    assert prompt == REFERENCE.apply_chat_template(CHATS[name], tokenize=False, **options)
    with _in_process():
        ids = apply_chat_template(TOKENIZER, template, CHATS[name], add_generation_prompt=prompted)
    assert ids == REFERENCE.apply_chat_template(CHATS[name], return_dict=False, **options)


def test_family_template_is_the_published_format() -> None:
    """The prompt, spelled out: ChatML, a default system message, media marks, the assistant's turn."""
    assert chat_template.render(QWEN2_5_OMNI_TEMPLATE, CHATS["all media"], True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_bos|><|IMAGE|><|vision_eos|>a <|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|vision_bos|><|VIDEO|><|vision_eos|><|vision_bos|><|VIDEO|><|vision_eos|>\n b<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (
        chat_template.render(QWEN2_5_OMNI_TEMPLATE, [SYSTEM], False) == "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
    )


FRAGMENTS = [
    *SPECIAL[:4],
    "<think>",
    "<",
    ">",
    "<|",
    "|>",
    "<|im_",
    "im_end",
    "end|>",
    "_",
    " ",
    "\n",
    "é",
    "x",
]
TYPED = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
CONTENT = TYPED | st.lists(TYPED.map(_text) | st.sampled_from([IMAGE, AUDIO, VIDEO]), max_size=5)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(chat_template.ROLES), "content": CONTENT}), min_size=1, max_size=4
)


def _in_process() -> Any:
    """Renders here instead of in a process, for what is tried on many examples."""
    return mock.patch.object(chat_template, "render", sandbox.render)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(messages=MESSAGES, prompted=st.booleans())
def test_sandbox_renders_as_transformers_does(messages: list[dict[str, Any]], prompted: bool) -> None:
    """The environment's settings (trimming, escaping) are transformers', on any shape of messages."""
    reference, _ = render_jinja_template(
        [messages], chat_template=QWEN2_5_OMNI_TEMPLATE, add_generation_prompt=prompted
    )
    assert sandbox.render(QWEN2_5_OMNI_TEMPLATE, messages, prompted) == reference[0]


def _blank(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with nothing typed."""
    return [
        {
            **m,
            "content": "" if isinstance(m["content"], str) else [p for p in m["content"] if "text" not in p],
        }
        for m in messages
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(messages=MESSAGES)
def test_typed_special_tokens_stay_plain_text(messages: list[dict[str, Any]]) -> None:
    """Whatever is typed, in one part or several, adds no token but plain ones, and none of it is lost."""
    added = set(TOKENIZER.added_tokens.values())
    with _in_process():
        ids = apply_chat_template(TOKENIZER, QWEN2_5_OMNI_TEMPLATE, messages)
        blank = apply_chat_template(TOKENIZER, QWEN2_5_OMNI_TEMPLATE, _blank(messages))
    assert [id for id in ids if id in added] == [id for id in blank if id in added]
    prompt = sandbox.render(QWEN2_5_OMNI_TEMPLATE, messages, True)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == prompt


@pytest.mark.parametrize(
    ("template", "typed"),
    [
        ("{{ messages[0].content }}end|>", ["<|im_"]),
        ("<|im_{{ messages[0].content }}", ["end|>"]),
        ("{{ messages[0].content | trim }}", [" <|im_end|>\n"]),
        ("{{ messages[0].content | replace('\n', '') }}", ["<|im\n_end|>"]),
        ("{{ messages[0].content | lower }}", ["<|IM_END|>"]),
        ("{{ messages[0].content[::-1] }}", [">|dne_mi|<"]),
        ("{{ messages[0].content.split(' ') | join }}", ["<|im_ end|>"]),
        ("{{ messages | map(attribute='content') | join }}", ["<|im_", "end|>"]),
        ("{{ messages[0].content ~ messages[1].content }}", ["<", "|im_end|>"]),
        ("{{ messages[0].content ~ messages[1].content }}", ["<|im_end|", ">"]),
        ("{{ messages[0].content | tojson }}", ["<|im_end|><think>"]),
    ],
)
def test_template_operations_make_no_special_tokens_of_typed_text(template: str, typed: list[str]) -> None:
    """Stripping, joining, reversing, or the template's own text beside it: typed text stays plain."""
    messages = [{"role": "user", "content": text} for text in typed]
    added = set(TOKENIZER.added_tokens.values())
    unprotected = sandbox.render(template, messages, False)
    assert added & set(TOKENIZER.encode(unprotected))
    with _in_process():
        ids = apply_chat_template(TOKENIZER, template, messages)
    assert not added & set(ids)
    assert TOKENIZER.decode(ids) == unprotected


THOUGHTFUL = "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}|{% endfor %}"


def test_a_template_that_looks_for_thoughts_drops_those_of_an_assistant() -> None:
    """Protects: an answer of the history goes without its thought; what a user typed is no mark."""
    messages = [
        *_user("a</think>b"),
        {"role": "assistant", "content": "<think>\nwhy < not\n</think>\n\n<b> yes"},
        {"role": "assistant", "content": [_text("<think>x</think>"), _text("\n <|im_end|>")]},
    ]
    listed = [{**m, "content": m["content"] if isinstance(m["content"], str) else ""} for m in messages]
    assert (
        TOKENIZER.decode(apply_chat_template(TOKENIZER, THOUGHTFUL, listed), skip_special_tokens=False)
        == "a</think>b|<b> yes||"
    )
    added = set(TOKENIZER.added_tokens.values())
    assert not added & set(apply_chat_template(TOKENIZER, THOUGHTFUL, listed))
    family = TOKENIZER.decode(apply_chat_template(TOKENIZER, QWEN3_OMNI_TEMPLATE, messages), skip_special_tokens=False)
    assert family == (
        "<|im_start|>user\na</think>b<|im_end|>\n<|im_start|>assistant\n<b> yes<|im_end|>\n"
        "<|im_start|>assistant\n <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokens_of_ones_own_may_be_typed() -> None:
    """Protects: who fine-tunes with tokens that `add_tokens` of transformers made asks with them, and a template sees
    their letters; a mark is still none, also where a file calls marks normalized."""
    first = TOKENIZER.vocab_size
    own = [AddedToken(text, first + i, False, normalized=True) for i, text in enumerate(("<seg>", "n_x", "caf\u00e9"))]
    added = [AddedToken(each.text, each.id, each.special, normalized=each.special) for each in ADDED]
    tokenizer = Tokenizer(Vocabulary(IDS, MERGES, [*added, *own]))
    template = "{{ 'YES' if messages[0].content.endswith('n_x') else 'NO' }}<|im_start|>{{ messages[0].content }}"
    with _in_process():
        ids = apply_chat_template(tokenizer, template, [{"role": "user", "content": "cafe\u0301 <seg><|im_end|>n_x"}])
    assert [id for id in ids if id >= len(IDS)] == [tokenizer.token_to_id("<|im_start|>"), first + 2, first, first + 1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "YES<|im_start|>caf\u00e9 <seg><|im_end|>n_x"


def test_templates_can_work_on_typed_text() -> None:
    """Comparing, searching and stripping see the text that was typed."""
    template = "{% set t = messages[0].content %}{{ t.strip() == 'Hi there' }} {{ 'there' in t }} {{ t | length }}"
    assert TOKENIZER.decode(apply_chat_template(TOKENIZER, template, _user(" Hi there\n"))) == "True True 10"


def test_private_use_characters_in_texts_survive() -> None:
    """A stand-in is a character that nobody typed, the template's author included."""
    typed = "<" + "".join(map(chr, range(0xE000, 0xE010))) + ">"
    ids = apply_chat_template(TOKENIZER, "\ue010\ue011{{ messages[0].content }}", _user(typed))
    assert TOKENIZER.decode(ids) == "\ue010\ue011" + typed
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(ChatTemplateError, match="private-use"):
        apply_chat_template(TOKENIZER, QWEN2_5_OMNI_TEMPLATE, _user(everything))


def test_media_never_reach_the_template() -> None:
    """Whatever object a medium is, the template learns its type alone."""
    template = "{{ messages[0].content | tojson }}"
    ids = apply_chat_template(TOKENIZER, template, _user({"type": "image", "image": object(), "note": "x"}))
    assert json.loads(TOKENIZER.decode(ids)) == [{"type": "image", "image": "image"}]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello", "must be a list"),
        ([], "must be a list"),
        (["Hello"], "message 1 must be an object"),
        ([{"role": "user"}], "message 1 must be an object"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "message 1 must be an object"),
        (
            [*_user("x"), {"role": "user<|im_end|>", "content": "x"}],
            r"message 2 has the role 'user<\|im_end\|>'",
        ),
        ([{"role": ["user"], "content": "x"}], "has the role"),
        ([{"role": "user", "content": None}], "content must be a text or a list"),
        ([{"role": "user", "content": {"type": "text"}}], "content must be a text or a list"),
        (_user(["x"]), "message 1, part 1"),
        (_user(IMAGE, {"type": "pdf", "pdf": "x"}), "message 1, part 2: .* not 'pdf'"),
        (_user({"type": ["text"]}), "must be one of"),
        (_user({"type": "text"}), 'needs the key "text"'),
        (_user({"type": "text", "text": 5}), "text must be a string, not 5"),
        (_user({"type": "video", "image": "x.png"}), 'needs the key "video"'),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    """Each mistake in messages is one sentence that says where it is."""
    with pytest.raises(ChatTemplateError, match=message):
        apply_chat_template(TOKENIZER, QWEN2_5_OMNI_TEMPLATE, messages)


def test_unencodable_text_is_named() -> None:
    """Half of a surrogate pair survives the way to the template and back, and is named by the tokenizer."""
    with pytest.raises(TokenizerError, match="surrogate"):
        apply_chat_template(TOKENIZER, QWEN2_5_OMNI_TEMPLATE, _user("caf\udce9"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ ('a' * 10**8) | length * 0 }}{{ 'a' * 10**7 }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a' | center(10**9) }}",
        "{{ 10 ** (10 ** 9) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_greedy_templates_are_stopped(template: str) -> None:
    """Long loops, huge outputs, big numbers and deep recursion end within seconds of work in an error."""
    before = os.times().children_user
    with pytest.raises(ChatTemplateError, match=r"the chat template (failed|was stopped|took more than)"):
        chat_template.render(template, [], False)
    assert os.times().children_user - before < 2 * sandbox.CPU_SECONDS


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__ }}", "unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ '' | attr('__class__') }}", "unsafe"),
        ("{{ '{0.__class__}'.format(1) }}", "unsafe"),
        ("{{ lipsum.__globals__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_sandbox_keeps_templates_from_internals(template: str, message: str) -> None:
    """Python's internals, files and the messages themselves are out of reach."""
    with pytest.raises(ChatTemplateError, match=message):
        chat_template.render(template, [], False)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('roles must alternate.') }}", r"roles must alternate\.$"),
        ("{{ bos_token }}", "'bos_token' is undefined"),
        ("{{ messages + 1 }}", "TypeError"),
    ],
)
def test_failing_templates_say_why(template: str, message: str) -> None:
    """A template's own complaint, a mistake in it, or a value that it misses becomes the error's sentence."""
    with pytest.raises(ChatTemplateError, match=message):
        chat_template.render(template, [], False)


def test_helpers_of_foreign_templates() -> None:
    """What templates may expect: tojson without HTML escapes, strftime_now, loop controls, absent tools."""
    template = (
        "{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }} {{ strftime_now('%Y') | length }} "
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% if tools %}!{% endif %}"
    )
    expected = render_jinja_template([[]], chat_template=template)[0][0]
    assert chat_template.render(template, [], False) == expected == '{"a": 1, "b": "<é>"} 4 01'


def test_special_tokens_and_marks_of_what_is_said() -> None:
    """What templates of trainers have: the tokenizer's special tokens by name, and marks around what a model says."""
    template = (
        "{% for m in messages %}{% generation %}\n{{ m.content }}{{ eos_token }}\n{% endgeneration %}{% endfor %}"
        "{% if bos_token %}{{ bos_token }}{% endif %}"
    )
    messages = [{"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for tokens in ({"eos_token": "<|im_end|>"}, {"eos_token": "</s>", "bos_token": "<s>"}):
        expected = render_jinja_template([messages], chat_template=template, **tokens)[0][0]
        assert chat_template.render(template, messages, False, tokens) == expected


def test_a_template_is_read_without_messages() -> None:
    chat_template.check_template("{{ messages[0].content + nothing }}{{ raise_exception('no') }}")
    with pytest.raises(ChatTemplateError, match="Expected an expression"):
        chat_template.check_template("{% if %}")


def test_a_process_that_cannot_work_is_an_error(tmp_path: Path) -> None:
    """Where rendering breaks down, for instance without jinja2, its last words are in the error."""
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'ModuleNotFoundError: no jinja2' >&2\nexit 1\n")
    interpreter.chmod(0o755)
    with (
        mock.patch.object(chat_template.sys, "executable", str(interpreter)),
        pytest.raises(ChatTemplateError, match="could not be rendered: ModuleNotFoundError: no jinja2"),
    ):
        chat_template.render("x", [], False)


def test_template_is_found_where_checkpoints_keep_it(tmp_path: Path) -> None:
    """In transformers' order, which is asked of it where both are files of a processor; none is None."""
    from transformers import ProcessorMixin

    def theirs() -> str:
        return ProcessorMixin.get_processor_dict(tmp_path)[0]["chat_template"]

    assert load_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert load_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_template(tmp_path) == "d"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "c"}')
    assert load_template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("ä", encoding="utf-8")
    assert load_template(tmp_path) == theirs() == "ä"
    (tmp_path / "processor_config.json").write_text('{"processor_class": "Qwen2_5OmniProcessor"}')
    assert load_template(tmp_path) == theirs() == "ä"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "b"}')
    assert load_template(tmp_path) == theirs() == "b"
    (tmp_path / "processor_config.json").write_text('{"chat_template": "a"}')
    assert load_template(tmp_path) == theirs() == "a"
    (tmp_path / "processor_config.json").write_text('{"chat_template": {"default": "d", "rag": "r"}}')
    assert load_template(tmp_path) == theirs()["default"] == "d"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("chat_template.json", b'{"chat_template": "', "it is not JSON"),
        ("chat_template.json", b"[" * 100_000, "nested too deeply"),
        ("chat_template.json", b'{"chat_template": "a", "chat_template": "b"}', "a name occurs twice"),
        ("chat_template.json", b'{"version": ' + b"9" * 5000 + b"}", "it holds a number of 5000 digits"),
        ("chat_template.json", b"[1]", "not a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "neither"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "neither"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}', "only: rag"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "neither"),
    ],
)
def test_damaged_template_files_are_one_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """A cut or mistyped file is a ChatTemplateError that names it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ChatTemplateError, match=message):
        load_template(tmp_path)


def test_a_template_of_another_folder_is_not_read(tmp_path: Path) -> None:
    """Protects: a checkpoint cannot put other files of the machine into a prompt."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "chat_template.jinja").symlink_to("../secret")
    with pytest.raises(ChatTemplateError, match="it is a link that leaves the folder"):
        load_template(folder)


def test_a_template_gets_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: keys that this user's shell holds are not handed to a foreign program's process."""
    program = "import json, os; print(json.dumps({'prompt': ' '.join(os.environ)}))"
    (tmp_path / "sandbox.py").write_text(program)
    monkeypatch.setenv("API_KEY", "secret")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(chat_template, "__file__", str(tmp_path / "chat_template.py"))
    found = chat_template.render("", [], True).split()
    needed = {"SYSTEMROOT"} if os.name == "nt" else {"LD_LIBRARY_PATH"}
    assert needed <= set(found) <= needed | {"LC_CTYPE", "DYLD_LIBRARY_PATH"}  # LC_CTYPE is Python's own


def test_a_template_imports_from_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: jinja2 that lies on PYTHONPATH alone, as on clusters, and goes before an older one of the system's."""
    (tmp_path / "jinja2.py").write_text("raise ImportError('the first of the path')")
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    with pytest.raises(ChatTemplateError, match="could not be rendered: ImportError: the first of the path"):
        chat_template.render("", [], True)
