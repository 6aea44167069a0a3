"""Rows of a data set: questions read from JSON lines or Parquet, answers written a line at a time.

`omni.batch` says what a row is, and answers them.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import warnings
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from omni.arguments import settings_parser
from omni.inputs import InputError
from weights.files import fits_utf8, parse_object

COLUMNS = ("id", "media", "question")
SHAPING = ("fps", "max_frames", "max_pixels", "start", "end", "no_audio")
"""Settings by which media become tensors: rows that differ in one are not about the same."""
MOST_TOGETHER = 16
"""Rows about the same media that stay together. Where there are more, several processes share them out."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What systems and file systems without locks say."""
NO_ID = "the row has no id, which must be text or a whole number."


@dataclass(frozen=True)
class Groups:
    """The rows of a file, those about the same media one after another, where the first of them stands.

    order: their numbers. ends: for each group of `MOST_TOGETHER` rows at most, how far it goes in `order`.
    """

    order: np.ndarray[Any, np.dtype[np.int64]]
    ends: np.ndarray[Any, np.dtype[np.int64]]


class Source:
    """The file of questions. Of a row no more than some numbers is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.starts = array("q")
        """Of lines, not of Parquet: the first byte of each that can be read, once `scan` has been through them."""
        self.about = array("q")
        """What each row is about (`about`), of the same rows; of Parquet all."""
        self.media = array("q")
        """The same of each single medium, whichever row it is in."""
        if not path.is_file():
            raise InputError(f"{path} is not there.")
        self.is_parquet = kind_of(path) == ".parquet"

    def scan(self) -> tuple[list[Any], list[dict[str, Any]]]:
        """The ids of the rows, and answers to lines that are none. Raises InputError where two have one id."""
        ids = []
        numbers: dict[Any, int] = {}
        unreadable = []
        for number, found in enumerate(self._ids(), 1):
            id = f"line {number}" if isinstance(found, InputError) else found
            if id in numbers:
                raise InputError(f"{self.path}: rows {numbers[id]} and {number} have the same id {id!r:.80}.")
            numbers[id] = number
            if isinstance(found, InputError):
                unreadable.append({"id": id, "error": str(found)})
            else:
                ids.append(id)
        return ids, unreadable

    def _ids(self) -> Iterator[Any]:
        if self.is_parquet:
            import pyarrow.parquet

            try:
                with pyarrow.parquet.ParquetFile(self.path) as file:
                    names = set(file.schema_arrow.names)
                    if not set(COLUMNS) <= names:
                        raise InputError(f"{self.path} has no column {', '.join(sorted(set(COLUMNS) - names))}.")
                    for batch in file.iter_batches(
                        columns=[each for each in ("id", "media", *SHAPING) if each in names]
                    ):
                        for row in batch.to_pylist():
                            self._note(row)
                            yield row["id"] if is_id(row["id"]) else InputError(NO_ID)
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise InputError(f"{self.path} is no Parquet file: {error}") from None
        else:
            with self.path.open("rb") as lines:
                start = len(BOM_UTF8) if lines.read(len(BOM_UTF8)) == BOM_UTF8 else 0  # as Notepad begins a file
                lines.seek(start)
                for line in lines:
                    if line.strip():
                        try:
                            row = parse(line)
                            self.starts.append(start)
                            self._note(row)
                            yield row["id"]
                        except InputError as error:
                            yield error
                    start += len(line)

    @contextmanager
    def _as_parquet(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path} is no Parquet file: {error}") from None

    def _note(self, row: dict[str, Any]) -> None:
        self.about.append(about(row))
        sources = sources_of(row.get("media"))
        self.media.extend(about({**row, "media": source}) for source in sources)

    def repeats(self) -> bool:
        """Whether a medium is there twice, so that it is worth keeping, once `scan` has been through the rows."""
        media = np.sort(numbers_of(self.media))
        return bool((media[1:] == media[:-1]).any())

    def groups(self) -> Groups | None:
        """None where no two rows are about the same media, once `scan` has been through them."""
        kinds = numbers_of(self.about)
        _, first, kind = np.unique(kinds, return_index=True, return_inverse=True)
        rows = np.arange(len(kinds))
        place = np.where(kinds == NOTHING, rows, first[kind])  # of the first that is about the same
        if bool((place == rows).all()):
            return None
        order = np.argsort(place, kind="stable")
        begins = np.flatnonzero(np.diff(place[order], prepend=-1))
        within = rows - np.repeat(begins, np.diff(begins, append=len(rows)))
        return Groups(order, np.append(np.flatnonzero(within % MOST_TOGETHER == 0)[1:], len(rows)))

    def rows(self, data: Any, groups: Groups | None) -> Any:
        """As a dataset of Ray, after `scan`: of Parquet the rows, of lines where each begins; in groups a list of
        either to each.

        Ray's own reader of text also cuts lines at what JSON allows in a text, such as U+2028, and stops at the first
        byte that is no UTF-8.
        """
        import pyarrow

        if groups is None:
            if self.is_parquet:
                return data.read_parquet(str(self.path))
            return data.from_arrow(pyarrow.table({"start": numbers_of(self.starts)}))
        if self.is_parquet:
            name, found = "rows", self._known_columns(groups.order)
        else:
            name, found = "start", pyarrow.array(numbers_of(self.starts)[groups.order])
        offsets = pyarrow.array(np.concatenate(([0], groups.ends)), pyarrow.int64())
        return data.from_arrow(pyarrow.table({name: pyarrow.LargeListArray.from_arrays(offsets, found)}))

    def _known_columns(self, order: Any) -> Any:
        """The rows of a Parquet file in this order, without columns that are none of ours. It has no way to read a
        single row: these texts are held, by Ray, which moves to disk what is too much."""
        import pyarrow
        import pyarrow.parquet

        with self._as_parquet():
            names = set(pyarrow.parquet.read_schema(self.path).names)
            known = [*COLUMNS, *(name for name in vars(settings_parser().parse_args([])) if name in names)]
            table = pyarrow.parquet.read_table(self.path, columns=known)
            texts = pyarrow.schema(  # whose offsets may take more than 2 GiB
                [
                    each.with_type(pyarrow.large_string()) if each.type == pyarrow.string() else each
                    for each in table.schema
                ]
            )
            table = table.cast(texts).take(order)
            return pyarrow.StructArray.from_arrays([each.combine_chunks() for each in table.columns], known)


def sources_of(media: Any) -> list[Any]:
    return [] if media is None else media if isinstance(media, list) else [media]


NOTHING = 0
"""What a row without media is `about`."""


def about(row: dict[str, Any]) -> int:
    """A number that two rows share if they name the same media and would have them read alike."""
    sources = sources_of(row.get("media"))
    if not sources:
        return NOTHING
    told = json.dumps([sources, [row.get(name) for name in SHAPING]], default=repr)
    return int.from_bytes(blake2b(told.encode(), digest_size=8).digest(), "little", signed=True)


def numbers_of(held: array[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.frombuffer(held, dtype=np.int64) if held else np.zeros(0, np.int64)


def kind_of(path: Path) -> str:
    if path.suffix not in (".jsonl", ".parquet"):
        raise InputError(f"{path} must end with .jsonl or .parquet.")
    return path.suffix


def parse(line: str | bytes) -> dict[str, Any]:
    """A JSON object with an id. Raises InputError."""
    try:
        row = parse_object(line)
    except ValueError as error:
        raise InputError(f"the line cannot be read: {error}.") from None
    if not is_id(row.get("id")):
        raise InputError(NO_ID)
    return row


def is_id(value: Any) -> bool:
    """Whether an answer can be told by it: text that UTF-8 can hold, or a whole number."""
    return type(value) is int or (isinstance(value, str) and fits_utf8(value))


def written(answers: Path) -> list[Path]:
    """The files that a run writes: the answers; what they come into line by line; what becomes Parquet when all are."""
    if kind_of(answers) == ".jsonl":
        return [answers, answers, answers]
    return [answers, answers.with_suffix(".partial.jsonl"), answers.with_suffix(".partial.parquet")]


@contextmanager
def only_run(answers: Path) -> Iterator[None]:
    """Inside nobody else writes these answers. Makes their folder. Raises InputError where another run writes them, be
    it on another machine, or nobody can.

    It is the system's lock on a file beside them, which ends with the process, whatever ends that.
    """
    path = Path(os.path.realpath(written(answers)[1]))
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file: IO[str] | None = _locked(lock)
    except BlockingIOError:
        raise InputError(f"{answers} is being written by another run: wait for its end, or name another.") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{answers} cannot be written: {error.strerror}.") from None
        warnings.warn(f"there are no locks beside {answers}: start no other run into it.", stacklevel=3)
        file = None
    with file or nullcontext():
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """The file, locked. Raises BlockingIOError where another has it, OSError of `NO_LOCKS` where there are no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    return file
        except OSError:
            file.close()
            raise
        file.close()  # whoever had it before has removed it meanwhile


class Journal:
    """Answers as they come, a line each: the file of answers itself, or beside it one that Parquet is made from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.new = written(path)[-2:]
        if path.is_dir():
            raise InputError(f"{path} is a folder: name a file.")
        if path.is_file() and self.file != path and not self.file.is_file():
            raise InputError(f"{path} is there and whole: remove it to answer anew.")
        self.ids: set[Any] = set()
        self.commands: list[dict[str, Any]] = []
        """What rows say of the commands that they are from; those of 0.1 say nothing."""
        self.end: int | None = 0
        """Of what is whole, where the rest is still to be cut off: when the first answer is written."""
        if self.file.is_file():
            end = 0
            with self.file.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # it was being written when the run ended
                    try:
                        row = parse(line)
                    except InputError as error:
                        raise InputError(f"{self.file} is no file of answers: {error}") from None
                    if "question" in row and not row.keys() & {"text", "error"}:
                        raise InputError(f"{self.file} is no file of answers but of questions: name another.")
                    self.ids.add(row["id"])
                    if not isinstance(row.get("command", {}), dict):
                        raise InputError(f"{self.file} is no file of answers: its command is no object.")
                    if "command" in row and row["command"] not in self.commands:
                        self.commands.append(row["command"])
                    end += len(line)
            self.end = end

    def check(self, ids: list[Any]) -> None:
        """Raises InputError where two ids would be one: Parquet has a column of texts."""
        if self.file == self.path:
            return
        texts: dict[str, Any] = {}
        for id in ids:
            if texts.setdefault(str(id), id) != id:
                raise InputError(
                    f"the ids {texts[str(id)]!r:.80} and {id!r:.80} would be the same text in {self.path}: "
                    "answer into a .jsonl file."
                )

    def check_command(self, command: dict[str, Any]) -> None:
        """Raises InputError where answers that are there are those of another command."""
        usual = vars(settings_parser().parse_args([]))  # also of settings that there were none of then
        for other in self.commands:
            for name in [*command, *(name for name in other if name not in command)]:
                now, then = (each.get(name, usual.get(name)) for each in (command, other))
                if now != then:
                    was, is_now = ("not given" if value is None else f"{value!r:.80}" for value in (then, now))
                    raise InputError(
                        f"{self.file} has answers for which --{name.replace('_', '-')} was {was}, and now it is "
                        f"{is_now}: give the settings of then, or name another file."
                    )

    def _cut(self) -> None:
        if self.end is not None and self.file.is_file():
            os.truncate(self.file, self.end)
        self.end = None

    def write(self, lines: list[str]) -> None:
        if lines:
            try:
                self._cut()
                with self.file.open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in lines))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(
                    f"{self.file} cannot be written: {error.strerror}. Then the same command goes on where it was."
                ) from None

    def finish(self) -> None:
        """Makes Parquet of the lines, where that is wanted: whole or not at all. Raises InputError where it cannot be
        written."""
        if self.file == self.path or not self.file.is_file():
            return
        import pyarrow
        import pyarrow.parquet

        self._cut()
        names = ("id", "text", "thought", "thought_cut", "tokens", "stats", "error", "warnings", "command")
        kinds: dict[str, Any] = dict.fromkeys(names)
        with self.file.open(encoding="utf-8") as lines:
            rows = [kinds | json.loads(line) for line in lines]
        for row in rows:
            row["id"] = str(row["id"])
            for name in ("stats", "command"):
                row[name] = row[name] and json.dumps(row[name])
        types = {
            "tokens": pyarrow.list_(pyarrow.int64()),
            "thought_cut": pyarrow.bool_(),
            "warnings": pyarrow.list_(pyarrow.string()),
        }
        schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in kinds])
        table = pyarrow.Table.from_pylist(rows, schema)
        try:
            pyarrow.parquet.write_table(table, self.new)
            self.new.replace(self.path)
        except OSError as error:
            self.new.unlink(missing_ok=True)
            raise InputError(
                f"{self.path} cannot be written: {error.strerror or error}. The answers are in {self.file}: the same "
                "command makes it of them."
            ) from None
        self.file.unlink()


class RowSettings(argparse.ArgumentParser):
    """The command line's settings, in a row."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument --'):.300}.")


def row_options(row: dict[str, Any], options: argparse.Namespace) -> argparse.Namespace:
    """The settings of a row: its own, then the command line's. Raises InputError."""
    parser = settings_parser(RowSettings)
    known = vars(parser.parse_args([]))
    found, arguments = copy(options), []
    for name, value in row.items():
        if name not in known or value is None:
            continue
        flag = name.replace("_", "-")
        if isinstance(known[name], bool):  # a switch, which the row may also turn off
            if not isinstance(value, bool):
                raise InputError(f"{flag}: must be true or false, not {value!r:.80}.")
            setattr(found, name, value)
            continue
        if name == "system" and not isinstance(value, str):
            raise InputError(f"{flag}: must be text, not {value!r:.80}.")
        if isinstance(value, float) and value.is_integer():  # whole numbers with a gap between are such in Parquet
            value = int(value)
        arguments.append(f"--{flag}={value}")
    return parser.parse_args(arguments, found)
