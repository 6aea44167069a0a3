"""python -m omni.batch questions.jsonl answers.jsonl: a data set of questions, answered on Ray Data.

A row is {"id", "media", "question"} and any setting of `omni.generate` under its long name with underscores, which
goes before the command line's. media: a path, a list of them, or null; paths are relative to the questions' folder.
Addresses on the network are fetched where the command line says so, never because a row does.
Files are JSON lines, or Parquet with these columns. An answer is {"id", "text", "thought", "thought_cut", "tokens",
"stats"}, or {"id", "error"}; they come as they are ready. What is written already is not asked again: a run that was
stopped goes on when started anew.
Rows about the same media, wherever they stand, go through one process that reads media and one replica after another:
what was read, encoded and prefilled for the first is there for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import asdict, dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

import omni
import weights
from omni.answer import ERRORS, messages, method_of, report_of, sampling_of
from omni.arguments import model_parser, settings_parser
from omni.config import DTYPES, OmniConfig, read_config
from omni.inputs import InputError, Inputs
from omni.model import Generation, load
from omni.processing.frames import Pixels, VisionSizes
from omni.processing.media import fetched
from omni.processing.media.addresses import scheme_of
from omni.processing.processor import Processor
from omni.reuse import REUSE_BYTES
from weights.files import fits_utf8, parse_object

COLUMNS = ("id", "media", "question")
SHAPING = ("fps", "max_frames", "max_pixels", "start", "end", "no_audio")
"""Settings by which media become tensors: rows that differ in one are not about the same."""
MOST_TOGETHER = 16
"""Rows about the same media that stay together. Where there are more, several processes share them out."""
READ_BYTES = 2**30
"""Of media that a process keeps while rows about them follow; the longest clip that a model sees takes 540 MB."""
READERS = 2
"""Cores for reading the questions, which Ray does with tasks of its own."""
NO_ID = "the row has no id, which must be text or a whole number."


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a bad request, 130 when interrupted. A row's error is no error of the run."""
    options = argument_parser().parse_args(arguments)
    try:
        run(options)
    except ERRORS as error:
        print(f"omni-batch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("omni-batch: stopped; the same command goes on where it was.", file=sys.stderr)
        return 130
    return 0


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="omni-batch",
        description="Answer a data set of questions about clips, pictures and sounds.",
        parents=[model_parser(), settings_parser()],
    )
    parser.add_argument("--version", action="version", version=f"seats-omni {omni.__version__}")
    parser.add_argument("questions", type=Path, help="JSON lines or Parquet: id, media, question, settings")
    parser.add_argument("answers", type=Path, help="JSON lines or Parquet; one that is there is completed")
    parser.add_argument("--urls", action="store_true", help="fetch media that are http:// or https:// addresses")
    parser.add_argument("--address", help="of a Ray cluster, or auto (default: this machine)")
    parser.add_argument("--replicas", type=int, help="of the model (default: one to a GPU, or to four cores)")
    parser.add_argument("--cores", type=int, help="of each replica on a CPU (default: all, shared out)")
    parser.add_argument("--decoders", type=int, help="processes that read media (default: half of the cores)")
    parser.set_defaults(repeats=True)  # whether there are media that several rows are about: `Source.repeats`
    parser.add_argument("--batch", type=int, default=8, help="questions asked together (default: %(default)s)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Raises InputError for files and settings that no row can be answered with."""
    try:
        import ray
    except ImportError:
        raise InputError("data sets need Ray: pip install 'seats-omni[ray]'.") from None
    for name in ("replicas", "cores", "decoders", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1.")
    # Processes on other nodes have other working directories.
    options.questions = options.questions.resolve()
    source = Source(options.questions)
    for path in written(options.answers):
        if path.exists() and path.samefile(options.questions):
            raise InputError(f"{options.answers} would be written over {options.questions}: name another file.")
    journal = Journal(options.answers)
    folder = weights.locate(options.model, revision=options.revision, shards=False)
    if folder == Path(options.model):
        options.model = str(folder.resolve())
    if options.adapter is not None and Path(options.adapter).is_dir():
        options.adapter = str(Path(options.adapter).resolve())
    method_of(options, read_config(folder))  # a setting that fits no row is said before anything starts
    ids, unreadable = source.scan()
    journal.check([*ids, *(row["id"] for row in unreadable)])
    started = time.perf_counter()
    journal.write([json.dumps(row) for row in unreadable if row["id"] not in journal.ids])
    errors = sum(row["id"] not in journal.ids for row in unreadable)
    left = [each for each in ids if each not in journal.ids]
    if left:
        errors += answer(ray, options, source, journal)
    seconds = time.perf_counter() - started
    new = len(left) + sum(row["id"] not in journal.ids for row in unreadable)
    journal.finish()
    print(
        f"{new} rows in {seconds:.1f} s ({new / max(seconds, 1e-9):.2f} a second), {errors} of them errors; "
        f"{len(ids) + len(unreadable) - new} were there before: {options.answers}",
        file=sys.stderr,
    )


def answer(ray: Any, options: argparse.Namespace, source: Source, journal: Journal) -> int:
    """Answers what is left and returns how many errors there were."""
    from ray.data import ActorPoolStrategy

    pool = start(ray, options)
    try:
        groups = source.groups()
        options.repeats = source.repeats()
        some = options.batch if groups is None else max(1, round(options.batch * len(groups.ends) / len(groups.order)))
        rows = source.rows(ray.data, groups).repartition(target_num_rows_per_block=some)
        prepared = rows.map_batches(
            Prepare,
            fn_constructor_args=(options, pool, ray.put(journal.ids)),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.decoders),
            num_cpus=1,
        )
        answered = prepared.map_batches(
            Answer,
            fn_constructor_args=(options, pool),
            batch_size=2 * some,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.replicas),
            num_cpus=pool.reserved,
            num_gpus=int(pool.device.startswith("cuda")),
        )
        errors = 0
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            lines = batch["answer"].to_pylist()
            journal.write(lines)
            errors += sum("error" in json.loads(line) for line in lines)
        return errors
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Pool:
    """Processes that read media, and replicas of the model, each with so many threads. reserved: cores that Ray sets
    aside for one."""

    decoders: int
    replicas: int
    threads: int
    reserved: int
    device: str

    def dtype(self, options: argparse.Namespace, config: OmniConfig) -> torch.dtype:
        """As `omni.load` chooses."""
        if options.dtype:
            return DTYPES[options.dtype]
        return torch.float32 if self.device == "cpu" else config.dtype


def start(ray: Any, options: argparse.Namespace) -> Pool:
    """Ray on this machine or in a cluster, and how its cores and GPUs are shared out."""
    if options.address is None:
        cores, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    else:
        try:
            ray.init(address=options.address, logging_level="warning")
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            why = f"{error}".split("\n", 1)[0].rstrip(".")
            raise InputError(
                f"no Ray cluster at {options.address} ({why:.160}). Start one (ray start --head) or omit --address."
            ) from None
        found = ray.cluster_resources()
        cores, gpus = int(found.get("CPU", 1)), int(found.get("GPU", 0))
    device = options.device or ("cuda" if gpus else "cpu")
    on_gpu = device.startswith("cuda")
    replicas = options.replicas or (gpus if on_gpu else max(1, cores // 4))
    decoders = options.decoders or max(1, cores // 2 - READERS)
    threads = options.cores or (1 if on_gpu else max(1, (cores if options.address is None else cores // 2) // replicas))
    if options.address is not None:
        return Pool(decoders, replicas, threads, reserved=threads, device=device)
    # On one machine decoders and replicas take turns on the same cores, so Ray is told of more than there are.
    promised = decoders + replicas + READERS
    ray.init(address="local", num_cpus=promised, include_dashboard=False, log_to_driver=False, logging_level="warning")
    return Pool(decoders, replicas, threads, reserved=1, device=device)


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
            start = 0
            with self.path.open("rb") as lines:
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


class Journal:
    """Answers as they come, a line each: the file of answers itself, or beside it one that Parquet is made from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.new = written(path)[-2:]
        if path.is_file() and self.file != path and not self.file.is_file():
            raise InputError(f"{path} is there and whole: remove it to answer anew.")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.ids: set[Any] = set()
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
        """Makes Parquet of the lines, where that is wanted: whole or not at all."""
        if self.file == self.path or not self.file.is_file():
            return
        import pyarrow
        import pyarrow.parquet

        self._cut()
        names = ("id", "text", "thought", "thought_cut", "tokens", "stats", "error")
        kinds: dict[str, Any] = dict.fromkeys(names)
        with self.file.open(encoding="utf-8") as lines:
            rows = [kinds | json.loads(line) for line in lines]
        for row in rows:
            row["id"] = str(row["id"])
            row["stats"] = row["stats"] and json.dumps(row["stats"])
        types = {"tokens": pyarrow.list_(pyarrow.int64()), "thought_cut": pyarrow.bool_()}
        schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in kinds])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), self.new)
        self.new.replace(self.path)
        self.file.unlink()


class RowSettings(argparse.ArgumentParser):
    """The command line's settings, in a row."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument --'):.300}.")


def row_options(row: dict[str, Any], options: argparse.Namespace) -> argparse.Namespace:
    """The settings of a row: its own, then the command line's. Raises InputError."""
    parser = settings_parser(RowSettings)
    known = vars(parser.parse_args([]))
    arguments = []
    for name, value in row.items():
        if name in known and value is not None:
            flag = f"--{name.replace('_', '-')}"
            switch = isinstance(value, bool) and isinstance(known[name], bool)
            arguments += [flag] * value if switch else [f"{flag}={value}"]
    return parser.parse_args(arguments, copy(options))


class Prepare:
    """Reads media and makes tensors: one of the processes on CPUs."""

    def __init__(self, options: argparse.Namespace, pool: Pool, done: Any) -> None:
        """done: ids that are answered, a set or Ray's reference to one."""
        torch.set_num_threads(1)
        if not isinstance(done, set):
            import ray

            done = ray.get(done)
        self.options, self.done = options, done
        self.folder = options.questions.parent
        checkpoint = weights.locate(options.model, revision=options.revision, shards=False)
        self.config = read_config(checkpoint)
        self.processor = Processor(checkpoint, self.config, reuse=READ_BYTES if options.repeats else 0)
        self.dtype = pool.dtype(options, self.config)

    def __call__(self, table: Any) -> Any:
        """A row, or a group of them → packs: ids and settings as a list in JSON, tensors as safetensors. Nothing of one
        that is answered or unreadable. A group is one pack, unless its files change meanwhile."""
        packs: list[tuple[list[dict[str, Any]], list[Inputs]]] = []
        for row in self.rows(*table.to_pylist()):
            if row["id"] is None or row["id"] in self.done:
                continue
            inputs = None
            try:
                made, inputs = self.prepared(row)
            except Exception as error:  # whatever a file can do, it is this row's alone
                made = {"id": row["id"], "error": reason(error)}
            first = next(iter(packs[-1][1]), None) if packs else None
            shared = inputs if inputs is None or first is None else with_media_of(first, inputs)
            if not packs or (shared is None and inputs is not None):
                packs.append(([], []))
                shared = inputs
            packs[-1][0].append(made)
            if shared is not None:
                packs[-1][1].append(shared)
        return {
            "row": [json.dumps(told) for told, _ in packs],
            "tensors": [pack(requests, self.dtype) if requests else b"" for _, requests in packs],
        }

    def rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What `Source.rows` tells of a row or a group."""
        if "rows" in row:
            return list(row["rows"])
        if set(row) != {"start"}:
            return [row]
        starts = row["start"] if isinstance(row["start"], list) else [row["start"]]
        found = []
        with self.options.questions.open("rb") as lines:
            for start in starts:
                lines.seek(start)
                found.append(parse(lines.readline()))
        return found

    def prepared(self, row: dict[str, Any]) -> tuple[dict[str, Any], Inputs]:
        options = row_options(row, self.options)
        if not isinstance(row.get("question"), str):
            raise InputError("the row has no question.")
        sources = sources_of(row.get("media"))
        if not all(isinstance(source, str) for source in sources):
            raise InputError("the row's media must be a path, a list of paths, or null.")
        options.question = row["question"]
        sources = [source if scheme_of(source) else str(self.folder / source) for source in sources]
        started = time.perf_counter()
        with ExitStack() as files:
            options.media = [files.enter_context(fetched(source, urls=self.options.urls)) for source in sources]
            inputs = self.processor.prepare(
                messages(options),
                use_audio_in_video=not options.no_audio,
                fps=options.fps,
                max_frames=options.max_frames,
                max_pixels=options.max_pixels,
            )
        seconds = time.perf_counter() - started
        settings = {name: getattr(options, name) for name in vars(settings_parser().parse_args([]))}
        settings |= {"start": None, "end": None}  # they are done with: rows that differ in them may run together
        return {"id": row["id"], "settings": settings, "media_seconds": seconds}, inputs


def media_in(inputs: Inputs) -> dict[str, Any]:
    """What a request holds beside its ids: pictures and clips as bytes, `Pixels`."""
    names = (field.name for field in fields(inputs) if field.name != "input_ids")
    return {name: inputs.held(name) for name in names if inputs.held(name) is not None}


def with_media_of(one: Inputs, other: Inputs) -> Inputs | None:
    """`other` with the tensors of `one`, which are held once then, where they are the same; else None."""
    mine, theirs = media_in(one), media_in(other)
    if mine.keys() != theirs.keys() or not all(_same(mine[name], theirs[name]) for name in mine):
        return None
    return Inputs(other.input_ids, **mine)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Pixels) and isinstance(other, Pixels):
        frames = one.frames, other.frames
        return len(one.frames) == len(other.frames) and one.sizes == other.sizes and all(map(torch.equal, *frames))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


def pack(requests: list[Inputs], dtype: torch.dtype) -> bytes:
    """Requests with the same media as safetensors, the media once: of pictures and clips the bytes that patches are
    made of, a quarter of them; sounds in the dtype that the encoders see."""
    from safetensors.torch import save

    tensors = {f"input_ids.{number}": inputs.input_ids for number, inputs in enumerate(requests)}
    metadata = {}
    for name, value in media_in(requests[0]).items():
        if isinstance(value, Pixels):
            metadata[name] = json.dumps({"sizes": asdict(value.sizes), "of_clip": value.of_clip})
            tensors |= {f"{name}.{number}": frames for number, frames in enumerate(value.frames)}
        elif isinstance(value, Tensor):
            tensors[name] = value.to(dtype) if name == "input_features" else value
        else:
            metadata[name] = json.dumps(value)
    return save({name: value.contiguous() for name, value in tensors.items()}, metadata)


def unpack(packed: bytes) -> list[Inputs]:
    """What `pack` was given. The requests share their media."""
    from safetensors.torch import load

    length = int.from_bytes(packed[:8], "little")
    metadata = json.loads(packed[8 : 8 + length])["__metadata__"]
    found = load(packed)
    parts: dict[str, list[Tensor]] = {}
    media: dict[str, Any] = {}
    for name in sorted(found, key=lambda name: int(name.partition(".")[2] or 0)):
        whole, dot, _ = name.partition(".")
        if dot:
            parts.setdefault(whole, []).append(found[name])
        else:
            media[whole] = found[name]
    for name, told in metadata.items():
        value = json.loads(told)
        if name in parts:
            sizes: dict[str, Any] = {
                key: tuple(each) if isinstance(each, list) else each for key, each in value["sizes"].items()
            }
            value = Pixels(tuple(parts[name]), VisionSizes(**sizes), value["of_clip"])
        media[name] = value
    return [Inputs(ids, **media) for ids in parts["input_ids"]]


def reason(error: Exception) -> str:
    """In words where it is one of ours."""
    return str(error) if isinstance(error, (*ERRORS, MemoryError, ValueError)) else f"{type(error).__name__}: {error}"


class Answer:
    """A replica of the model."""

    def __init__(self, options: argparse.Namespace, pool: Pool) -> None:
        torch.set_num_threads(pool.threads)
        self.most = options.batch
        self.model = load(
            options.model,
            device=pool.device,
            dtype=DTYPES[options.dtype] if options.dtype else None,
            revision=options.revision,
            adapter=options.adapter,
            compile=options.compile,
            reuse=REUSE_BYTES if options.repeats else 0,  # nothing is digested or held that nobody asks for again
        )

    def __call__(self, table: Any) -> dict[str, Any]:
        """Packs of `Prepare` → answers as lines of JSON. Rows of one plan and the same settings run together: first
        those of each pack, then those that are alone in theirs."""
        lines: list[str] = []
        alone: dict[Any, list[tuple[dict[str, Any], Inputs]]] = {}
        for rows, tensors in zip(table["row"].to_pylist(), table["tensors"].to_pylist(), strict=True):
            told = json.loads(rows)
            lines += [json.dumps(one) for one in told if "error" in one]
            told = [one for one in told if "error" not in one]
            groups = alone if len(told) == 1 else {}
            for one, inputs in zip(told, unpack(tensors) if told else [], strict=True):
                try:
                    settings = argparse.Namespace(**one["settings"])
                    plan = self.model.engine.plan(inputs, method_of(settings, self.model.config))
                except Exception as error:
                    lines.append(json.dumps({"id": one["id"], "error": reason(error)}))
                    continue
                # What is drawn at random depends on who is asked beside it.
                drawn = one["id"] if settings.temperature else None
                key = plan, json.dumps(one["settings"]), drawn
                groups.setdefault(key, []).append((one, inputs))
            if groups is not alone:
                lines += self.asked(groups)
        return {"answer": lines + self.asked(alone)}

    def asked(self, groups: dict[Any, list[tuple[dict[str, Any], Inputs]]]) -> list[str]:
        found = []
        for group in groups.values():
            for start in range(0, len(group), self.most):
                found += self.answers(group[start : start + self.most])
        return found

    def answers(self, group: list[tuple[dict[str, Any], Inputs]]) -> list[str]:
        settings = argparse.Namespace(**group[0][0]["settings"])
        try:
            found = self.model.generate(
                [inputs for _, inputs in group],
                seats=method_of(settings, self.model.config),
                kv=settings.kv,
                max_new_tokens=settings.max_new_tokens,
                **sampling_of(settings),
            )
        except Exception as error:
            if len(group) > 1:  # whose fault it is shows when each is asked alone
                return [line for one in group for line in self.answers([one])]
            return [json.dumps({"id": group[0][0]["id"], "error": reason(error)})]
        return [line_of(told, generation) for (told, _), generation in zip(group, found, strict=True)]


def line_of(told: dict[str, Any], generation: Generation) -> str:
    stats = {**asdict(generation.stats), "media_seconds": told["media_seconds"]}
    return json.dumps({"id": told["id"], **report_of(generation), "stats": stats}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
