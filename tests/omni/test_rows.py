"""Rows of a data set: each is read or named, and its answer written once, whole."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni.batch import argument_parser
from omni.inputs import InputError
from omni.rows import Journal, Source, only_run, row_options

pyarrow = pytest.importorskip("pyarrow")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> dict[Any, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows), "an answer stands twice"
    return {row["id"]: row for row in rows}


def test_rows_go_before_the_command_line() -> None:
    given = argument_parser().parse_args(["--retention", "0.25", "--fps", "1", "q.jsonl", "a.jsonl"])
    row = {"id": 1, "retention": 0.1, "max_new_tokens": 3, "no_audio": True, "fps": None, "answer": "left alone"}
    found = row_options(row, given)
    assert (found.retention, found.max_new_tokens, found.no_audio, found.fps) == (0.1, 3, True, 1)
    assert given.retention == 0.25 and not given.no_audio
    with pytest.raises(InputError, match=r"retention: must be above 0 and at most 1"):
        row_options({"retention": 2}, given)
    with pytest.raises(InputError, match=r"kv: invalid choice"):
        row_options({"kv": "all"}, given)
    with pytest.raises(InputError, match=r"max-new-tokens: must be a whole number, not 'x{79}\.$"):
        row_options({"max_new_tokens": "x" * 1000}, given)
    with pytest.raises(InputError, match=r"retention: must be a number, not 'half'"):
        row_options({"retention": "half"}, given)
    with pytest.raises(InputError, match=r"retention: must be a number, not 'False'"):
        row_options({"retention": False}, given)
    with pytest.raises(InputError) as caught:
        row_options({"kv": "x" * 10_000}, given)
    assert len(str(caught.value)) < 400


def test_a_row_turns_off_what_the_command_line_turns_on() -> None:
    """Protects: a row's false goes before the command line's true; what is neither is refused."""
    given = argument_parser().parse_args(["--no-audio", "q.jsonl", "a.jsonl"])
    assert [row_options({"no_audio": value}, given).no_audio for value in (False, True, None)] == [False, True, True]
    assert given.no_audio
    for value in ("false", 0, 1.0, []):
        with pytest.raises(InputError, match=rf"no-audio: must be true or false, not {re.escape(repr(value))}\.$"):
            row_options({"no_audio": value}, given)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 3, True])
def test_a_system_message_is_text(value: Any) -> None:
    """Protects: no Python's spelling of a list is asked."""
    given = argument_parser().parse_args(["q.jsonl", "a.jsonl"])
    assert row_options({"system": "--be brief"}, given).system == "--be brief"
    with pytest.raises(InputError, match=rf"system: must be text, not {re.escape(repr(value))}\.$"):
        row_options({"system": value}, given)


def test_whole_numbers_with_a_gap_between(tmp_path: Path) -> None:
    """Protects: pandas writes such a column as floats, of which those that are whole are the numbers that were meant;
    no other is rounded."""
    from pyarrow import parquet

    given = argument_parser().parse_args(["--max-new-tokens", "7", "q.jsonl", "a.jsonl"])
    columns = {"max_new_tokens": [32.0, None], "seed": [2.0**40, 0.0], "fps": [2.0, 0.5], "retention": [1.0, 0.25]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    for row, expected in zip(
        parquet.read_table(tmp_path / "q.parquet").to_pylist(), ((32, 2**40, 2.0, 1.0), (7, 0, 0.5, 0.25)), strict=True
    ):
        found = row_options(row, given)
        assert (found.max_new_tokens, found.seed, found.fps, found.retention) == expected
    for value in (32.5, math.nan, math.inf):
        with pytest.raises(InputError, match=rf"max-new-tokens: must be a whole number, not '{value}'"):
            row_options({"max_new_tokens": value}, given)


def test_rows_without_an_id_are_answers_with_an_error(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", {"id": "a"}, "{broken", "", {"question": "?"}, "[1]", {"id": 2})
    ids, unreadable = Source(questions).scan()
    assert ids == ["a", 2]
    assert [row["id"] for row in unreadable] == ["line 2", "line 3", "line 4"]
    assert "it is not JSON" in unreadable[0]["error"] and "has no id" in unreadable[1]["error"]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """Protects: what Windows' editors begin a file with costs no row; within a file it is what it is."""
    path = tmp_path / "q.jsonl"
    lines = [b'{"id": 0}\r\n', b'{"id": 1}\n', b"\xef\xbb\xbf" + b'{"id": 2}\n']
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(lines))
    source = Source(path)
    ids, unreadable = source.scan()
    assert ids == [0, 1] and [row["id"] for row in unreadable] == ["line 3"]
    data = path.read_bytes()
    assert [data[start:].partition(b"\n")[0].strip() for start in source.starts] == [b'{"id": 0}', b'{"id": 1}']
    path.write_bytes(b"\xef\xbb\xbf")
    assert Source(path).scan() == ([], [])


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        "9" * 5000,
        '{"id": 1, "id": 2}',
        '{"id": true}',
        '{"id": 1.5}',
        '{"id": "\\ud800"}',
        '{"id": null}',
        "\x80",
    ],
)
def test_a_line_that_is_no_row_is_only_that(tmp_path: Path, line: str) -> None:
    """Protects: deep nesting, endless numbers, ids that no answer can be told by or written with, no UTF-8."""
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + line.encode("latin-1") + b"\n")
    ids, unreadable = Source(path).scan()
    assert ids == ["a"]
    assert [row["id"] for row in unreadable] == ["line 2"]


def test_a_row_may_not_be_called_as_a_broken_one_is(tmp_path: Path) -> None:
    """Protects: its answer would be missing, as if it were there already."""
    with pytest.raises(InputError, match="rows 1 and 2 have the same id 'line 2'"):
        Source(write(tmp_path / "q.jsonl", {"id": "line 2"}, "{broken")).scan()


@pytest.mark.parametrize("damage", ["cut", "no UTF-8", "no Parquet"])
def test_damaged_parquet_is_named(tmp_path: Path, damage: str) -> None:
    """Protects: whatever is wrong with the file, one sentence with its name."""
    from pyarrow import parquet

    path = tmp_path / "q.parquet"
    ids = pyarrow.array([b"\xff"] if damage == "no UTF-8" else [b"a"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ids, "media": ["a.png"], "question": ["?"]}), path)
    if damage != "no UTF-8":
        path.write_bytes(b"PAR1" if damage == "no Parquet" else path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"q\.parquet is no Parquet file"):
        Source(path).scan()


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: what was answered so far is whole, and the run ends in a sentence."""
    journal = Journal(tmp_path / "a.jsonl")
    journal.write(['{"id": 1}'])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a\.jsonl cannot be written: No space left on device"):
        journal.write(['{"id": 2}'])
    assert 1 in Journal(tmp_path / "a.jsonl").ids


def test_a_disk_too_full_for_parquet_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: nothing half-written is left, the answers are, and with room again Parquet is made of them."""
    from pyarrow import parquet

    def full(_: Any, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Journal(tmp_path / "a.parquet").write(['{"id": "1", "text": "x"}'])
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", full)
        with pytest.raises(InputError, match=r"a\.parquet cannot be written: No space left .* in .*a\.partial\.jsonl"):
            Journal(tmp_path / "a.parquet").finish()
    assert [each.name for each in tmp_path.iterdir()] == ["a.partial.jsonl"]
    Journal(tmp_path / "a.parquet").finish()
    assert parquet.read_table(tmp_path / "a.parquet")["text"].to_pylist() == ["x"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_answers_are_a_file(tmp_path: Path, name: str) -> None:
    """Protects: that is known before anything is asked."""
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} is a folder: name a file"):
        Journal(tmp_path / name)


def test_answers_that_are_none_are_named(tmp_path: Path) -> None:
    """Protects: a damaged file of answers is not overwritten, and it is said which file it is."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n{"id": \n')
    with pytest.raises(InputError, match=r"a\.jsonl is no file of answers: the line cannot be read: it is not JSON"):
        Journal(path)


def test_ids_must_differ(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows 1 and 3 have the same id 'a'"):
        Source(write(tmp_path / "q.jsonl", {"id": "a"}, {"id": "b"}, {"id": "a"})).scan()


@pytest.mark.parametrize("name", ["q.csv", "gone.jsonl"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "q.csv").write_text("id\n1\n")
    with pytest.raises(InputError, match=r"must end with \.jsonl or \.parquet|is not there"):
        Source(tmp_path / name)


def test_a_line_that_was_cut_is_written_again(tmp_path: Path) -> None:
    """What a killed run left half-written is no answer."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "one", "text": "x"}\n{"id": "two", "te')
    journal = Journal(path)
    assert journal.ids == {"one"}
    journal.write(['{"id": "two", "text": "y"}'])
    assert read(path).keys() == {"one", "two"}
    assert Journal(path).ids == {"one", "two"}


def test_parquet_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    journal = Journal(path)
    journal.write(['{"id": 7, "text": "x", "thought": "", "tokens": [1, 2], "stats": {"macs": 3}}'])
    assert not path.exists()
    assert Journal(path).ids == {7}
    journal.write(['{"id": "b", "error": "no"}'])
    journal.finish()
    rows = parquet.read_table(path).to_pylist()
    assert [row["id"] for row in rows] == ["7", "b"]
    assert rows[0]["tokens"] == [1, 2] and json.loads(rows[0]["stats"]) == {"macs": 3}
    assert rows[1]["error"] == "no" and rows[1]["text"] is None
    assert [each.name for each in tmp_path.iterdir()] == ["a.parquet"]
    with pytest.raises(InputError, match="is there and whole"):
        Journal(path)


@pytest.mark.parametrize(("first", "second"), [("a.jsonl", "a.jsonl"), ("a.parquet", "a.partial.jsonl")])
def test_one_run_at_a_time(tmp_path: Path, first: str, second: str) -> None:
    """Protects: no answer is cut off or written twice by a second run, whatever it calls the file."""
    (tmp_path / "linked").symlink_to(tmp_path)
    with only_run(tmp_path / first):
        with pytest.raises(InputError, match=rf"{second} is being written by another run"):
            only_run(tmp_path / "linked" / second).__enter__()
        with only_run(tmp_path / "b.jsonl"):
            pass
    with only_run(tmp_path / second):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["linked"]


def test_a_run_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    code = f"import sys; from pathlib import Path; from omni.rows import only_run; l = only_run(Path({str(path)!r}))\n"
    code += "l.__enter__(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.read(1)
        with pytest.raises(InputError, match="another run"), only_run(path):
            pass
        run.kill()
    assert (tmp_path / ".a.jsonl.lock").exists()
    with only_run(path):
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, and on file systems that have none."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(UserWarning, match="start no other run into it"), only_run(tmp_path / "new" / "a.jsonl"):
        assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("folder", ["file", "file/below", "loop"])
def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (
        pytest.raises(InputError, match=rf"{folder}/a\.jsonl cannot be written: "),
        only_run(tmp_path / folder / "a.jsonl"),
    ):
        pass


def test_answers_of_another_command_are_not_gone_on_with(tmp_path: Path) -> None:
    """Protects: one file has answers of one model with the same settings; those of 0.1 say nothing of theirs."""
    then = {"model": "tiny", "retention": 0.35, "fps": 2.0}
    path = write(tmp_path / "a.jsonl", {"id": 1, "text": "x"}, {"id": 2, "text": "x", "command": then})
    journal = Journal(path)
    for now in (then, {**then, "kv": "layerwise"}, {"model": "tiny", "retention": 0.35}):  # what is usual is not said
        journal.check_command(now)
    for changed, said in (
        ({"retention": 0.1}, "--retention was 0.35, and now it is 0.1"),
        ({"max_pixels": 3136}, "--max-pixels was not given, and now it is 3136"),
        ({"model": "other"}, "--model was 'tiny', and now it is 'other'"),
        ({"kv": "pruned"}, "--kv was 'layerwise', and now it is 'pruned'"),
    ):
        with pytest.raises(InputError, match=rf"a\.jsonl has answers for which {said}: give the settings of then"):
            journal.check_command({**then, **changed})
    Journal(write(tmp_path / "b.jsonl", {"id": 1, "text": "x"})).check_command(then)
    with pytest.raises(InputError, match=r"b\.jsonl is no file of answers: its command is no object"):
        Journal(write(tmp_path / "b.jsonl", {"id": 1, "text": "x", "command": "tiny"}))


def test_other_questions_are_no_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"id": 1, "question": "?"})
    with pytest.raises(InputError, match="no file of answers but of questions"):
        Journal(path)


def test_nothing_is_cut_before_the_first_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "one", "text": "x"}\n{"id": "two", "te')
    before = path.read_bytes()
    journal = Journal(path)
    journal.write([])
    assert path.read_bytes() == before
    journal.write(['{"id": "two", "text": "y"}'])
    journal.write(['{"id": "three", "text": "z"}'])
    assert read(path).keys() == {"one", "two", "three"}


def test_ids_that_a_column_cannot_tell_apart(tmp_path: Path) -> None:
    """Protects: 1 and "1" do not become one in Parquet."""
    Journal(tmp_path / "a.jsonl").check([1, "1"])
    journal = Journal(tmp_path / "a.parquet")
    journal.check([1, 2, "a"])
    with pytest.raises(InputError, match=r"the ids 1 and '1' would be the same text in .*a\.parquet"):
        journal.check([1, "1"])
