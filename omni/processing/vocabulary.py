"""What a checkpoint's tokenizer files say, read and checked.

They write a byte as one printable character (GPT-2's `bytes_to_unicode`), called a byte character here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weights.files import fits_utf8, read_object, read_text

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What cuts a text into the words inside which BPE merges: Qwen2's, as its tokenizer.json has it."""


class TokenizerError(ValueError):
    """Tokenizer files that are missing, damaged or of another kind; an unknown token; text without UTF-8."""


@dataclass(frozen=True)
class AddedToken:
    """A token that stands for exactly its text and takes no part in BPE.

    special: left out of decoded text, as <|im_end|> is; others, such as <tool_call>, are part of the answer.
    normalized: looked for after NFC, in what other added tokens leave.
    """

    text: str
    id: int
    special: bool
    normalized: bool = False


def _byte_characters() -> dict[int, str]:
    """Byte → its byte character: itself where printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256)}


BYTE_CHARACTERS = _byte_characters()


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE vocabulary that does not contradict itself; making another raises TokenizerError.

    ids: token in byte characters → id. Added tokens may be in it or not. merges: pairs of tokens, most urgent
    first. special_tokens: "eos_token" and the like → text, for chat templates.
    """

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    added: Sequence[AddedToken] = ()
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_ids()
        self._check_added(made=self._check_merges())
        added = {token.text for token in self.added}
        allowed = set(BYTE_CHARACTERS.values())
        for token in self.ids:
            if not (token and allowed.issuperset(token)) and token not in added:
                raise TokenizerError(
                    f"the vocabulary's token {token!r:.80} is not written in byte characters: only byte-level "
                    "vocabularies are supported."
                )

    def _check_ids(self) -> None:
        owners: dict[int, str] = {}
        for token, id in self.ids.items():
            if type(id) is not int or id < 0:
                raise TokenizerError(f"the vocabulary gives {token!r:.80} the id {id!r:.80}: ids count from 0.")
            if owners.setdefault(id, token) != token:
                raise TokenizerError(f"the vocabulary gives {owners[id]!r:.80} and {token!r:.80} the same id {id}.")
        if missing := [byte for byte, character in BYTE_CHARACTERS.items() if character not in self.ids]:
            raise TokenizerError(
                f"the vocabulary has no token for {len(missing)} of the 256 bytes, {missing[0]:#04x} "
                "for one: only byte-level vocabularies are supported."
            )

    def _check_merges(self) -> set[str]:
        """The tokens that merges make."""
        made = [left + right for left, right in self.merges]
        parts = {part for pair in self.merges for part in pair}
        if unknown := sorted(parts.union(made) - self.ids.keys()):
            raise TokenizerError(f"merges use or make {unknown[0]!r:.80}, which is not in the vocabulary.")
        if len(set(made)) < len(made):
            token, times = Counter(made).most_common(1)[0]
            raise TokenizerError(
                f"{times} merges make {token!r:.80}: only vocabularies with one merge per token are supported."
            )
        return set(made)

    def _check_added(self, made: set[str]) -> None:
        owners = {id: token for token, id in self.ids.items()}
        seen: set[str] = set()
        for token in self.added:
            if not token.text or token.id < 0 or not fits_utf8(token.text):
                raise TokenizerError(f"the added token {token.text!r:.80} with the id {token.id} cannot be.")
            if token.text in seen:
                raise TokenizerError(f"the added token {token.text!r:.80} is listed twice.")
            seen.add(token.text)
            if owners.setdefault(token.id, token.text) != token.text:
                raise TokenizerError(f"{owners[token.id]!r:.80} and {token.text!r:.80} have the same id {token.id}.")
            if self.ids.get(token.text, token.id) != token.id:
                raise TokenizerError(
                    f"{token.text!r:.80} has the id {self.ids[token.text]} in the vocabulary and {token.id} "
                    "among the added tokens."
                )
            if token.text in made or token.text in BYTE_CHARACTERS.values():
                raise TokenizerError(
                    f"the added token {token.text!r:.80} also comes out of plain text, which could not be told from it."
                )


def has_vocabulary(folder: Path) -> bool:
    """Whether there is what `read_vocabulary` reads: tensors in, tensors out goes without."""
    return (folder / "vocab.json").is_file() or (folder / "tokenizer.json").is_file()


def require_vocabulary(folder: Path) -> None:
    if not has_vocabulary(folder):
        raise TokenizerError(f"{folder} holds no tokenizer: it needs vocab.json and merges.txt, or tokenizer.json.")


def read_vocabulary(folder: Path) -> Vocabulary:
    """Reads vocab.json and merges.txt, or tokenizer.json, and the added tokens.

    These come from the first of tokenizer_config.json (`added_tokens_decoder`), tokenizer.json
    (`added_tokens`) and added_tokens.json that lists any. Raises TokenizerError.
    """
    require_vocabulary(folder)
    ids_file, merges_file, whole_file = (folder / n for n in ("vocab.json", "merges.txt", "tokenizer.json"))
    whole = _read_object(whole_file) if whole_file.is_file() else {}
    if ids_file.is_file() and merges_file.is_file():
        ids = _read_object(ids_file)
        lines = (line.rstrip("\r") for line in _read_text(merges_file).split("\n"))
        merges = _pairs([line for line in lines if line and line[:8] != "#version"], merges_file)
    elif whole_file.is_file():
        model = _object(whole.get("model"), whole_file)
        _check_family(whole, model, whole_file)
        ids = _object(model.get("vocab"), whole_file)
        merges = _pairs(_list(model.get("merges"), whole_file), whole_file)
    else:
        raise TokenizerError(f"{folder} has no merges.txt: it needs vocab.json and merges.txt, or tokenizer.json.")
    return Vocabulary(ids, merges, _added_tokens(folder, whole), _special_tokens(folder))


def _check_family(whole: dict[str, Any], model: dict[str, Any], file: Path) -> None:
    """Refuses what a tokenizer.json may ask for and the family does not do."""
    sequence = _object(whole.get("pre_tokenizer"), file).get("pretokenizers")
    steps = [_object(step, file) for step in _list(sequence or [], file)]
    supported = (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(option) for option in ("byte_fallback", "ignore_merges", "dropout"))
        and not any(model.get(affix) for affix in ("continuing_subword_prefix", "end_of_word_suffix"))
        and whole.get("normalizer") == {"type": "NFC"}
        and [step.get("type") for step in steps] == ["Split", "ByteLevel"]
        and steps[0].get("pattern") == {"Regex": SPLIT_PATTERN}
        and (steps[0].get("behavior"), steps[0].get("invert")) == ("Isolated", False)
        and (steps[1].get("add_prefix_space"), steps[1].get("use_regex")) == (False, False)
    )
    if not supported:
        raise TokenizerError(
            f"{file} is no tokenizer of the Qwen2 family: that is BPE without options after NFC and the "
            "family's split pattern."
        )


def _added_tokens(folder: Path, whole: dict[str, Any]) -> list[AddedToken]:
    config_file, whole_file, bare_file = (
        folder / name for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")
    )
    config = _read_object(config_file) if config_file.is_file() else {}
    if by_id := _object(config.get("added_tokens_decoder") or {}, config_file):
        numbers = {id: int(id) if id.isdecimal() and len(id) < 20 else id for id in by_id}
        return [
            _added_token({**_object(entry, config_file), "id": numbers[id]}, config_file) for id, entry in by_id.items()
        ]
    if entries := _list(whole.get("added_tokens") or [], whole_file):
        return [_added_token(_object(entry, whole_file), whole_file) for entry in entries]
    if bare_file.is_file():
        special = _tokens_with_a_role(folder, config)
        return [
            _added_token({"content": text, "id": id, "special": text in special}, bare_file)
            for text, id in _read_object(bare_file).items()
        ]
    return []


def _added_token(entry: dict[str, Any], file: Path) -> AddedToken:
    text, id = entry.get("content"), entry.get("id")
    if not isinstance(text, str) or type(id) is not int:
        raise TokenizerError(f"{file} lists an added token without text or number: the file is damaged.")
    for flag in ("lstrip", "rstrip", "single_word"):
        if entry.get(flag):
            raise TokenizerError(f"{file}: the added token {text!r:.80} is {flag}, which is not supported.")
    return AddedToken(text, id, bool(entry.get("special")), bool(entry.get("normalized")))


def _special_tokens(folder: Path) -> dict[str, str]:
    """The texts of bos_token, eos_token and the like. What names none is Qwen2's class's."""
    config_file, roles_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config, map_ = (_read_object(file) if file.is_file() else {} for file in (config_file, roles_file))
    extra = config.get("extra_special_tokens")
    roles = {**_QWEN2_TOKENS, **map_, **(extra if isinstance(extra, dict) else {}), **config}
    texts = {
        role: token.get("content") if isinstance(token, dict) else token
        for role, token in roles.items()
        if role.endswith("_token")
    }
    return {role: text for role, text in texts.items() if isinstance(text, str)}


_QWEN2_TOKENS = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")


def _tokens_with_a_role(folder: Path, config: dict[str, Any]) -> set[str]:
    """What eos_token, additional_special_tokens and the like name: added_tokens.json has no such flag."""
    roles_file = folder / "special_tokens_map.json"
    roles = {**config, **(_read_object(roles_file) if roles_file.is_file() else {})}
    named: list[Any] = []
    for role, value in roles.items():
        if role.endswith(("_token", "_special_tokens")):
            named += value if isinstance(value, list) else [value]
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return {text for text in texts if isinstance(text, str)}


def _pairs(rules: list[Any], file: Path) -> list[tuple[str, str]]:
    """Merge rules, each "left right" or [left, right]."""
    pairs = []
    for number, rule in enumerate(rules, 1):
        parts = rule.split(" ") if isinstance(rule, str) else rule
        left, right = parts if isinstance(parts, list) and len(parts) == 2 else ("", "")
        if not (left and right and isinstance(left, str) and isinstance(right, str)):
            raise TokenizerError(f"{file}: merge {number} is not a pair of tokens: the file is damaged.")
        pairs.append((left, right))
    return pairs


def _object(value: Any, file: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} has a {type(value).__name__} where an object belongs: it is damaged.")
    return value


def _list(value: Any, file: Path) -> list[Any]:
    if not isinstance(value, list):
        raise TokenizerError(f"{file} has a {type(value).__name__} where a list belongs: it is damaged.")
    return value


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise TokenizerError(f"{file} cannot be read: {error}. Fetch it again.") from error


def _read_text(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError as error:
        raise TokenizerError(f"{file} cannot be read: {error}. Fetch it again.") from error
