"""The tokenizer against the `tokenizers` library, on the public vocabulary and on one trained here."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from omni.processing.tokenizer import TextStream, Tokenizer, TokenizerError, split_words
from omni.processing.vocabulary import SPLIT_PATTERN, AddedToken, Vocabulary

PUBLIC = Path(__file__).parents[4] / "shared" / "data" / "qwen2_tokenizer"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|VIDEO|>")
NOT_SPECIAL = ("<tool_call>", "</tool_call>")

TEXTS = {
    "latin": "Der Bär aß süße Äpfel, où l'été finit à São Paulo; żółć, İstanbul, Ærøskøbing.",
    "greek": "Γρήγορη καφέ αλεπού πηδάει πάνω από το νωχελικό σκυλί.",
    "cyrillic": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "arabic": "نصٌّ حكيمٌ لهُ سِرٌّ قاطِعٌ وَذُو شَأنٍ عَظيمٍ ١٢٣",
    "hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא חברה, שָׁלוֹם",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १९४७",
    "tamil": "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "georgian": "ვეპხის ტყაოსანი შოთა რუსთაველი",
    "chinese": "视频里发生了什么?一只葵花鹦鹉在跳舞,2024年5月1日。",
    "japanese": "いろはにほへと ちりぬるを、カタカナと漢字が混ざる。が",
    "korean": "다람쥐 헌 쳇바퀴에 타고파. 한글",
    "code": "def f(x: int) -> str:\n\treturn f'{x!r:>8}'  # != 1e-5\n\n\n    if (a[i] && !b) { x++; }\r\n",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 🇩🇪🇯🇵 👍🏽 ☕️ e\u0301 #️⃣",
    "spaces": "  a   b \t c\u00a0d\u2003\u3000e \n \n\n  f\r\n\r\n   \u0085g\u2028h   ",
    "digits": "3.14159 1234567890 ½ ² Ⅷ ١٢٣ 1,000,000.00",
    "contractions": "I'm you're HE'S they'Ve we'll 'tis don't it'\u017f rock'n'roll ''s 's' d'Artagnan",
    "control characters": "\x00\x01a\x1c\x1d b\x7f\u200b\u200dc\ufeff\ufffd\ue000",
    "decomposed": unicodedata.normalize("NFD", "Älteres Größenmaß, tiếng Việt, 한글, が"),
    "added tokens": "<|im_start|>user\n<|VIDEO|> hi<|im_end|>\n<tool_call>{}</tool_call> <|im_en",
    "nothing": "",
}


class Pair(NamedTuple):
    """The same vocabulary in our tokenizer and in the reference; folder holds its files."""

    ours: Tokenizer
    reference: tokenizers.Tokenizer
    folder: Path


def _reference(model: models.BPE) -> tokenizers.Tokenizer:
    """What transformers builds for Qwen2 (models/qwen2/tokenization_qwen2.py), without added tokens."""
    reference = tokenizers.Tokenizer(model)
    reference.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    reference.decoder = decoders.ByteLevel()
    return reference


def _add(reference: tokenizers.Tokenizer) -> None:
    reference.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in SPECIAL])
    reference.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in NOT_SPECIAL])


def _write_added_tokens(folder: Path, reference: tokenizers.Tokenizer) -> None:
    decoder = {
        str(reference.token_to_id(text)): {"content": text, "special": text in SPECIAL, "lstrip": False}
        for text in SPECIAL + NOT_SPECIAL
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("trained")
    reference = _reference(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    corpus = [text for name, text in TEXTS.items() if name != "added tokens"]
    reference.train_from_iterator([*corpus, "the cat sat on the mat and then there was " * 3], trainer)
    reference.model.save(str(folder))
    _add(reference)
    _write_added_tokens(folder, reference)
    return Pair(Tokenizer.from_folder(folder), reference, folder)


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if not PUBLIC.is_dir():
        pytest.skip(f"needs the public vocabulary in {PUBLIC}")
    folder = tmp_path_factory.mktemp("public")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((PUBLIC / name).read_bytes())
    reference = _reference(models.BPE.from_file(str(PUBLIC / "vocab.json"), str(PUBLIC / "merges.txt")))
    _add(reference)
    _write_added_tokens(folder, reference)
    return Pair(Tokenizer.from_folder(folder), reference, folder)


@pytest.fixture(scope="module", params=["trained", "public"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_the_reference_library(pair: Pair, name: str) -> None:
    """Ids of real text in a dozen scripts, code, emoji and white space are the library's."""
    assert pair.ours.encode(TEXTS[name]) == pair.reference.encode(TEXTS[name]).ids


def test_ids_of_source_files_equal_the_reference_library(pair: Pair) -> None:
    """Long documents agree too: this package's own source."""
    for file in sorted((Path(__file__).parents[3] / "omni").rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        assert pair.ours.encode(text) == pair.reference.encode(text).ids, file


# Marks are left to TEXTS: their canonical order differs between Unicode versions of Python and the library.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn", "Mn"]) | st.sampled_from("e\u0301\u0308\u0327"))
TRICKY_TEXT = st.text(st.sampled_from("aAsStTlL '\u017fé1٣\n\r\t\u00a0\u0085!.<|>日"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=ANY_TEXT | TRICKY_TEXT)
def test_ids_of_any_text_equal_the_reference_library(pair: Pair, text: str) -> None:
    """Random Unicode, and mixtures of what the split pattern tells apart."""
    assert pair.ours.encode(text) == pair.reference.encode(text).ids


def test_words_equal_the_reference_library_for_every_character() -> None:
    """The stand-ins put each assigned character of the basic plane in the pattern's class for it."""
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
    for char in map(chr, range(0x10000)):
        if unicodedata.category(char) not in ("Cs", "Cn", "Co"):
            text = f"a{char}b {char}1 '{char}{char}\n"
            assert split_words(text) == [word for word, _ in split.pre_tokenize_str(text)], ascii(char)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text())
def test_decoding_gives_the_normalised_text(pair: Pair, text: str) -> None:
    """decode(encode(x)) is NFC(x): no byte is lost, whatever the text."""
    assert pair.ours.decode(pair.ours.encode(text, split_special_tokens=True)) == unicodedata.normalize("NFC", text)


def _ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Any ids, out-of-vocabulary ones and (often) bytes and special tokens among them."""
    often = [tokenizer.token_to_id(token) for token in (*SPECIAL, *NOT_SPECIAL, "ð", "Ł", "ĺ", "Ģ", "â", "!", "Ŀ")]
    some_id = st.integers(0, tokenizer.vocab_size + 50) | st.sampled_from(often)
    return data.draw(st.lists(some_id, max_size=30))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), skip=st.booleans())
def test_decoding_any_ids_equals_the_reference_library(pair: Pair, data: st.DataObject, skip: bool) -> None:
    """Broken UTF-8, special tokens and ids without a token decode as in the library."""
    ids = _ids(data, pair.ours)
    assert pair.ours.decode(ids, skip_special_tokens=skip) == pair.reference.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_stream_adds_up_to_the_decoded_text(pair: Pair, data: st.DataObject) -> None:
    """Streaming loses, adds and repeats nothing."""
    ids = _ids(data, pair.ours)
    stream = TextStream(pair.ours)
    assert "".join([*map(stream.push, ids), stream.flush()]) == pair.ours.decode(ids)


def test_stream_never_splits_a_character(pair: Pair) -> None:
    """A character of several tokens comes with its last one; an unfinished one is U+FFFD at the end."""
    stream = TextStream(pair.ours)
    ids = [pair.ours.token_to_id(byte) for byte in "ðŁĺĢ"]  # The bytes of U+1F600.
    assert [stream.push(id) for id in ids] == ["", "", "", "😀"]
    assert stream.flush() == ""
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


def test_plain_text_never_yields_an_added_token(pair: Pair) -> None:
    """With split_special_tokens a written-out special token is text like any other."""
    text = "".join(SPECIAL + NOT_SPECIAL)
    added = {pair.ours.token_to_id(token) for token in SPECIAL + NOT_SPECIAL}
    assert set(pair.ours.encode(text)) == added
    plain = pair.ours.encode(text, split_special_tokens=True)
    assert not added & set(plain) and pair.ours.decode(plain) == text


def test_special_tokens_are_left_out_and_others_are_not(pair: Pair) -> None:
    """is_special, token_bytes and decode agree on which tokens are no part of an answer."""
    end, call = pair.ours.token_to_id("<|im_end|>"), pair.ours.token_to_id("<tool_call>")
    assert pair.ours.is_special(end) and not pair.ours.is_special(call)
    assert pair.ours.token_bytes(end) == b"" and pair.ours.token_bytes(call) == b"<tool_call>"
    assert pair.ours.decode([call, end]) == "<tool_call>"
    assert pair.ours.decode([call, end], skip_special_tokens=False) == "<tool_call><|im_end|>"
    assert pair.ours.vocab_size == pair.reference.get_vocab_size()


@pytest.mark.parametrize("unit", ["a", " ", "\n", "ab ", "日", "1", "!"])
def test_long_runs_take_linear_time(pair: Pair, unit: str) -> None:
    """100 kB of one thing is quick (quadratic work would take minutes) and has the library's ids."""
    text = unit * (100_000 // len(unit.encode()))
    start = time.process_time()
    ids = pair.ours.encode(text)
    assert time.process_time() - start < 3
    assert ids == pair.reference.encode(text).ids


def test_unknown_token_and_unencodable_text_are_named(trained: Pair) -> None:
    """A missing special token and half of a surrogate pair: one sentence that names it."""
    with pytest.raises(TokenizerError, match=r"no token '<\|nope\|>'"):
        trained.ours.token_to_id("<|nope|>")
    with pytest.raises(TokenizerError, match="surrogate"):
        trained.ours.encode("caf\udce9")


def test_longest_of_overlapping_added_tokens_wins(trained: Pair) -> None:
    """Where added tokens begin alike or interlock, the split is the library's."""
    vocab = trained.reference.get_vocab(with_added_tokens=False)
    texts = ["<a>", "<a>b", "b<a", "a><"]
    ours = Tokenizer(Vocabulary(vocab, [], [AddedToken(text, len(vocab) + i, False) for i, text in enumerate(texts)]))
    reference = _reference(models.BPE(vocab, []))
    reference.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in texts])
    for text in ("<a>b<a>", "b<a><a>bb<a", "a><a>b", "<<a>>"):
        assert ours.encode(text) == reference.encode(text).ids, text


@given(
    st.lists(st.sampled_from(["<e\u0301>", "<é>", "<|im_end|>", "<answer>", "<answer", ">", "a", " ", "e", "\u0301"]))
)
@settings(max_examples=100, deadline=None)
def test_added_tokens_that_are_normalized(trained: Pair, pieces: list[str]) -> None:
    """What `add_tokens` of transformers adds is looked for after NFC, in what the other added tokens leave."""
    vocab = trained.reference.get_vocab(with_added_tokens=False)
    texts = {"<answer>": True, "<é>": True, "<|im_end|>": False, "<answer><é>": True}
    added = [AddedToken(text, len(vocab) + i, False, normalized) for i, (text, normalized) in enumerate(texts.items())]
    ours = Tokenizer(Vocabulary(vocab, [], added))
    reference = _reference(models.BPE(vocab, []))
    reference.add_tokens([tokenizers.AddedToken(text, normalized=normalized) for text, normalized in texts.items()])
    text = "".join(pieces)
    assert ours.encode(text) == reference.encode(text).ids
    assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_have_their_names(trained: Pair, tmp_path: Path) -> None:
    """Chat templates name them: tokenizer_config.json says which, then special_tokens_map.json, then Qwen2's class."""
    for file in trained.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"content": "<|im_end|>"}, "extra_special_tokens": {"video_token": "<|VIDEO|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "x", "pad_token": "<|im_start|>"}))
    assert Tokenizer.from_folder(tmp_path).special_tokens == {
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_start|>",
        "unk_token": "<|endoftext|>",
        "video_token": "<|VIDEO|>",
    }


def _files(trained: Pair) -> dict[str, Any]:
    """The trained vocabulary in the form of tokenizer.json."""
    return json.loads(trained.reference.to_str())


@pytest.mark.parametrize("as_text", [True, False])
def test_tokenizer_json_says_the_same(trained: Pair, tmp_path: Path, as_text: bool) -> None:
    """tokenizer.json alone, in both spellings of merges, gives the tokenizer of vocab.json and merges.txt."""
    whole = _files(trained)
    if as_text:
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS.values():
        assert tokenizer.encode(text) == trained.ours.encode(text)
    assert tokenizer.is_special(tokenizer.token_to_id("<|im_end|>"))
    assert not tokenizer.is_special(tokenizer.token_to_id("<tool_call>"))


def test_bare_added_tokens_are_special_where_they_have_a_role(trained: Pair, tmp_path: Path) -> None:
    """added_tokens.json has no flags: special_tokens_map.json and the configuration say what is special."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((trained.folder / name).read_bytes())
    added = {text: trained.ours.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>", "<tool_call>")}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    roles = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.is_special(id) for id in added.values()] == [True, True, False]
    assert tokenizer.encode("<tool_call><|im_end|>") == [added["<tool_call>"], added["<|im_end|>"]]


DAMAGED_FILES = {
    "cut JSON": ("vocab.json", '{"!": 0, "\\"', "it is not JSON"),
    "a list": ("vocab.json", "[1, 2]", "not a JSON object"),
    "deep nesting": ("vocab.json", "[" * 100_000, "nested too deeply"),
    "one token twice": ("vocab.json", '{"!": 0, "!": 1}', "a name occurs twice"),
    "a number of a book's length": ("vocab.json", '{"!": ' + "9" * 5000 + "}", "it holds a number of 5000 digits"),
    "an id of a book's length": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"' + "9" * 5000 + '": {"content": "y"}}}',
        "without text or number",
    ),
    "no UTF-8": ("merges.txt", b"\xff\xfe a", "cannot be read"),
    "three parts": ("merges.txt", "#version: 0.2\na b c\n", "merge 1 is not a pair"),
    "one part": ("merges.txt", "a \n", "merge 1 is not a pair"),
    "unknown piece": ("merges.txt", "a 😀\n", "not in the vocabulary"),
    "config is text": ("tokenizer_config.json", '"x"', "not a JSON object"),
    "token without text": ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {}}}', "without text"),
    "id is a word": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "number"),
    "entry is text": ("tokenizer_config.json", '{"added_tokens_decoder": {"7": "y"}}', "where an object"),
    "strips": (
        "tokenizer_config.json",
        '{"added_tokens_decoder": {"9999": {"content": "<x>", "lstrip": true}}}',
        "lstrip, which is not supported",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_FILES)
def test_damaged_files_are_one_error(trained: Pair, tmp_path: Path, case: str) -> None:
    """A cut, mistyped or unsupported file is a TokenizerError that names the file or the entry."""
    for file in trained.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name, content, message = DAMAGED_FILES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_missing_files_are_named(trained: Pair, tmp_path: Path) -> None:
    """A folder without a tokenizer, or with half of one, says which files are needed."""
    with pytest.raises(TokenizerError, match=r"needs vocab\.json and merges\.txt, or tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_bytes((trained.folder / "vocab.json").read_bytes())
    with pytest.raises(TokenizerError, match=r"needs vocab\.json and merges\.txt, or tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


UNSUPPORTED = {
    "another model": ("model", "type", "Unigram"),
    "byte fallback": ("model", "byte_fallback", True),
    "no merges": ("model", "merges", None),
    "prefix": ("model", "continuing_subword_prefix", "##"),
    "no normaliser": (None, "normalizer", None),
    "no pre-tokenizer": (None, "pre_tokenizer", None),
    "another pattern": ("split", "pattern", {"Regex": r"\p{N}{1,3}"}),
    "prefix space": ("bytes", "add_prefix_space", True),
    "added tokens as object": (None, "added_tokens", {"a": 1}),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_other_kinds_of_tokenizer_are_refused(trained: Pair, tmp_path: Path, case: str) -> None:
    """A tokenizer.json that asks for something else is refused, not read as if it did not."""
    whole = _files(trained)
    split, byte_level = whole["pre_tokenizer"]["pretokenizers"]
    place, key, value = UNSUPPORTED[case]
    {None: whole, "model": whole["model"], "split": split, "bytes": byte_level}[place][key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(TokenizerError):
        Tokenizer.from_folder(tmp_path)


IDS = {char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
X, Y = AddedToken("<x>", 256, True), AddedToken("<y>", 256, True)
CONTRADICTIONS: dict[str, tuple[dict[str, Any], list[tuple[str, str]], list[AddedToken], str]] = {
    "negative id": ({**IDS, "zz": -1}, [], [], "ids count from 0"),
    "boolean id": ({**IDS, "zz": True}, [], [], "ids count from 0"),
    "id as text": ({**IDS, "zz": "7"}, [], [], "ids count from 0"),
    "one id for two": ({**IDS, "zz": IDS["a"]}, [], [], f"same id {IDS['a']}"),
    "missing byte": ({k: v for k, v in IDS.items() if k != "Ā"}, [], [], "1 of the 256 bytes, 0x00"),
    "no byte character": ({**IDS, "日": 256}, [], [], "not written in byte characters"),
    "empty token": ({**IDS, "": 256}, [], [], "not written in byte characters"),
    "merge makes unknown": (IDS, [("a", "q")], [], "'aq'"),
    "merge of unknown": ({**IDS, "aqq": 256}, [("a", "qq")], [], "'qq'"),
    "two merges": ({**IDS, "zzz": 256, "zz": 257}, [("z", "zz"), ("zz", "z")], [], "2 merges make 'zzz'"),
    "added is empty": (IDS, [], [AddedToken("", 256, True)], "cannot be"),
    "added is no UTF-8": (IDS, [], [AddedToken("<\ud800>", 256, True)], "cannot be"),
    "added is negative": (IDS, [], [AddedToken("<x>", -1, True)], "cannot be"),
    "added twice": (IDS, [], [X, AddedToken("<x>", 257, True)], "listed twice"),
    "added on a taken id": (IDS, [], [AddedToken("<x>", IDS["a"], True)], "same id"),
    "added share an id": (IDS, [], [X, Y], "same id"),
    "added with another id": ({**IDS, "<x>": 257}, [], [X], "257 in the vocabulary and 256 among"),
    "added is a byte": (IDS, [], [AddedToken("!", IDS["!"], True)], "comes out of plain text"),
    "added is merged": (
        {**IDS, "zz": 256},
        [("z", "z")],
        [AddedToken("zz", 256, True)],
        "comes out of plain",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_one_error(case: str) -> None:
    """Ids, merges and added tokens that cannot all be true are a TokenizerError that names the culprit."""
    ids, merges, added, message = CONTRADICTIONS[case]
    with pytest.raises(TokenizerError, match=message):
        Vocabulary(ids, merges, added)


def test_holes_and_unmerged_tokens_are_harmless() -> None:
    """Ids need not be consecutive, and a token that no merge makes is never produced but can be decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {char: 3 * id + 7 for id, char in enumerate(alphabet)}
    tokenizer = Tokenizer(Vocabulary({**ids, "Ġhi": 100_000, "hi": 50_000}, [("h", "i")]))
    assert tokenizer.encode(" hi") == [ids["Ġ"], 50_000]
    assert tokenizer.decode([100_000, 8, -3, 10**12]) == " hi"
    assert tokenizer.vocab_size == 100_001


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_files_of_another_folder_are_not_read(trained: Pair, tmp_path: Path, name: str) -> None:
    """Protects: a checkpoint cannot point at other files of the machine."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in trained.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(f"../{name}")
    with pytest.raises(TokenizerError, match=f"{name} cannot be read: it is a link that leaves the folder"):
        Tokenizer.from_folder(folder)


def test_messages_stay_short(trained: Pair, tmp_path: Path) -> None:
    """Protects: a damaged file does not print itself."""
    for file in trained.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "merges.txt").write_text("x" * 100_000 + " y\n")
    with pytest.raises(TokenizerError, match="is not in the vocabulary") as caught:
        Tokenizer.from_folder(tmp_path)
    assert len(str(caught.value)) < 300
