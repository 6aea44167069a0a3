"""Text ↔ token ids: the Qwen family's byte-level BPE, merged by sentencepiece.

A text goes through four steps: added tokens such as <|im_end|> are split off; what lies between is NFC
normalised; a pattern cuts it into words; BPE merges the bytes of each word.
"""

from __future__ import annotations

import codecs
import re
import struct
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from omni.processing.vocabulary import BYTE_CHARACTERS, TokenizerError, Vocabulary, read_vocabulary

__all__ = ["LazyTokenizer", "TextStream", "Tokenizer", "TokenizerError", "split_words"]

_BYTE_OF_CHARACTER = {ord(character): byte for byte, character in BYTE_CHARACTERS.items()}


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Finds the first of these texts that is there."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


class Tokenizer:
    """Encodes and decodes with one vocabulary.

    Two neighbours are merged when what they make is a token, the earliest merge first. That equals applying
    the merges as pairs for vocabularies in which each token has one merge, as training yields them.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from sentencepiece import SentencePieceProcessor

        self.added_tokens = {token.text: token.id for token in vocabulary.added}
        self._special = {token.id: token.text for token in vocabulary.added if token.special}
        self._ids = {**vocabulary.ids, **self.added_tokens}
        self._tokens = {id: token for token, id in self._ids.items()}
        # Longest first: where several added tokens start at one place, the longest wins.
        longest_first = sorted(self.added_tokens, key=len, reverse=True)
        # Whatever a file says of special ones: typed text makes none of them.
        normalized = {token.text for token in vocabulary.added if token.normalized and not token.special}
        self.marks = [text for text in self.added_tokens if text not in normalized]
        """Added tokens that typed text may not make."""
        self._added_pattern = _any_of(text for text in longest_first if text not in normalized)
        self._normalized_pattern = _any_of(unicodedata.normalize("NFC", t) for t in longest_first if t in normalized)
        self._added_ids = {unicodedata.normalize("NFC", text): self.added_tokens[text] for text in normalized}
        self._added_ids |= {text: id for text, id in self.added_tokens.items() if text not in normalized}
        self.special_tokens = vocabulary.special_tokens

        # Only bytes and what merges make can come out of BPE: other tokens of the vocabulary stay outside.
        scores = dict.fromkeys(BYTE_CHARACTERS.values(), 0)
        scores |= {left + right: -rank for rank, (left, right) in enumerate(vocabulary.merges)}
        self._piece_ids = [-1, *(vocabulary.ids[piece] for piece in scores)]
        self._bpe = SentencePieceProcessor(model_proto=_bpe_model(scores))

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads a checkpoint's tokenizer files: `omni.processing.vocabulary.read_vocabulary` says which."""
        return cls(read_vocabulary(Path(folder)))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokens) + 1

    def split(self, text: str) -> Iterator[str | int]:
        """The plain pieces of a text and the ids of the added tokens between them, in order.

        But for those that are normalized, which are part of a plain piece (`encode`).
        """
        return self._split(text, self._added_pattern)

    def _split(self, text: str, pattern: re.Pattern[str]) -> Iterator[str | int]:
        start = 0
        for match in pattern.finditer(text):
            if match.start() > start:
                yield text[start : match.start()]
            yield self._added_ids[match.group()]
            start = match.end()
        if start < len(text):
            yield text[start:]

    def encode(self, text: str, split_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. With split_special_tokens the whole text is plain and yields no added token but those
        that are normalized: who trains with tokens of their own types them, where nobody types <|im_end|>.

        Raises TokenizerError where the text holds half of a surrogate pair, which no UTF-8 can express.
        """
        if split_special_tokens:
            return self._encode_plain(text)
        ids: list[int] = []
        for piece in self.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode_plain(piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """Tokens that are normalized are looked for after NFC, as the tokenizers library does."""
        ids: list[int] = []
        for piece in self._split(unicodedata.normalize("NFC", text), self._normalized_pattern):
            ids += [piece] if isinstance(piece, int) else self._encode_words(piece)
        return ids

    def _encode_words(self, text: str) -> list[int]:
        try:
            words = [word.encode().decode("latin-1").translate(BYTE_CHARACTERS) for word in split_words(text)]
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds {error.object[error.start]!a}, half of a surrogate pair: decode it from its "
                'source with errors="replace".'
            ) from error
        # One thread: starting a pool takes longer than the words of a prompt.
        pieces = self._bpe.encode(words, out_type=int, num_threads=1)
        return [self._piece_ids[piece] for word in pieces for piece in word]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        written = {} if skip_special_tokens else self._special
        parts = (written[id].encode() if id in written else self.token_bytes(id) for id in ids)
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to a text: b"" for a special token and for an id that has no token.

        A model's embedding has more rows than its vocabulary has tokens, so such ids can be generated.
        """
        token = self._tokens.get(id)
        if token is None or id in self._special:
            return b""
        if token in self.added_tokens:
            return token.encode()
        return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")

    def token_to_id(self, token: str) -> int:
        """The id of an added token, or of a token written in byte characters. Raises TokenizerError."""
        if token not in self._ids:
            raise TokenizerError(f"the tokenizer has no token {token!r}: its files belong to another model.")
        return self._ids[token]

    def is_special(self, id: int) -> bool:
        """Whether an id is a special token, which decoding leaves out."""
        return id in self._special


class LazyTokenizer:
    """The tokenizer of a checkpoint, read when it is first called for; pickled it is the folder alone."""

    def __init__(self, folder: Path, tokenizer: Tokenizer | None = None) -> None:
        """tokenizer: of the folder, where it has been read already."""
        self.folder = folder
        self._read = tokenizer

    def __call__(self) -> Tokenizer:
        if self._read is None:
            self._read = Tokenizer.from_folder(self.folder)
        return self._read

    def __reduce__(self) -> tuple[type[LazyTokenizer], tuple[Path]]:
        return LazyTokenizer, (self.folder,)


class TextStream:
    """Turns token ids into text as they come and never splits a character.

    What `push` returned, and then `flush`, add up to `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this token completes: none, one or several."""
        return self._decoder.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """What an unfinished character at the end comes to: U+FFFD, or nothing where there is none."""
        return self._decoder.decode(b"", final=True)


def split_words(text: str) -> list[str]:
    """Cuts a text by `omni.processing.vocabulary.SPLIT_PATTERN` into words, which add up to the text.

    `re` has neither Unicode's letters and numbers (\\p{L}, \\p{N}) nor its white space as classes, so the
    pattern runs on a copy of the text in which each character is an ASCII one of the same class.
    """
    return [text[match.start() : match.end()] for match in _WORD.finditer(text.translate(_STAND_INS))]


_WORD = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    re.ASCII,
)


class _StandIns(dict[int, str]):
    """Code point → an ASCII character that the split pattern treats alike; filled as texts bring new ones."""

    def __missing__(self, code: int) -> str:
        self[code] = stand_in = _stand_in(chr(code))
        return stand_in


def _stand_in(character: str) -> str:
    kind = unicodedata.category(character)[0]
    if kind == "L":
        if character == "\N{LATIN SMALL LETTER LONG S}":
            return "s"  # Contractions ignore case, and S has two lower cases.
        return character if character.isascii() else "a"
    if kind == "N":
        return "0"
    if character in " '\t\n\v\f\r":
        return character
    return "\t" if kind == "Z" or character == "\x85" else "!"


_STAND_INS = _StandIns()


def _bpe_model(scores: dict[str, int]) -> bytes:
    """A sentencepiece model that merges the neighbours that make the highest score, and changes no text.

    Serialised by hand (sentencepiece_model.proto, ModelProto): protobuf would be a dependency for a handful
    of fields. Piece 0 is the unknown one that sentencepiece insists on; it is a space, which is no byte
    character, and so never met.
    """
    unknown_piece, byte_pair_encoding = b"\x18\x02", b"\x18\x02"  # SentencePiece.type, TrainerSpec.model_type
    as_it_stands = b"\x18\x00\x20\x00\x28\x00"  # NormalizerSpec: no dummy prefix, no white space handling
    fields = [_protobuf_field(1, _protobuf_field(1, b" ") + unknown_piece)]
    for piece, score in scores.items():
        score_field = b"\x15" + struct.pack("<f", score)
        fields.append(_protobuf_field(1, _protobuf_field(1, piece.encode()) + score_field))
    fields += [_protobuf_field(2, byte_pair_encoding), _protobuf_field(3, as_it_stands)]
    return b"".join(fields)


def _protobuf_field(number: int, content: bytes) -> bytes:
    """A length-delimited field: tag, length, content."""
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    return bytes((value,)) if value < 128 else bytes((value & 127 | 128,)) + _varint(value >> 7)
