"""python -m omni.batch questions.jsonl answers.jsonl: a data set of questions, answered on Ray Data.

A row is {"id", "media", "question"} and any setting of `omni.generate` under its long name with underscores, which
goes before the command line's. media: a path, a list of them, or null; paths are relative to the questions' folder.
Addresses on the network are fetched where the command line says so, never because a row does. question: a text, which
may be empty beside media: Qwen3-Omni's Captioner takes sound without any.
Files are JSON lines, or Parquet with these columns. An answer is {"id", "text", "thought", "thought_cut", "tokens",
"stats"}, or {"id", "error"}, with "warnings" where there are any of its media, and "command", the model and the
settings of the command line; they come as they are ready. What is written already is not asked again: a run that was
stopped goes on when started anew, with the same settings.
Rows about the same media, wherever they stand, go through one process that reads media and one replica after another:
what was read, encoded and prefilled for the first is there for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import omni
import weights
from omni.answer import ERRORS, messages, method_of, report_of, sampling_of
from omni.arguments import OUT_OF_MEMORY, model_parser, open_streams, settings_parser
from omni.config import DTYPES, OmniConfig, read_config, read_sampling
from omni.inputs import InputError, Inputs
from omni.model import Generation, load, usable_device
from omni.processing.frames import Pixels, VisionSizes
from omni.processing.media import fetched
from omni.processing.media.addresses import scheme_of
from omni.processing.media.files import noting
from omni.processing.processor import Processor
from omni.reuse import REUSE_BYTES
from omni.rows import Journal, Source, only_run, parse, row_options, sources_of, written

READ_BYTES = 2**30
"""Of media that a process keeps while rows about them follow; the longest clip that a model sees takes 540 MB."""
READERS = 2
"""Cores for reading the questions, which Ray does with tasks of its own."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, 1 for a bad request, 130 when interrupted. A row's error is no error of the run."""
    open_streams()
    options = argument_parser().parse_args(arguments)
    try:
        run(options)
    except ERRORS as error:
        print(f"omni-batch: {error}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError):
        print(f"omni-batch: {OUT_OF_MEMORY}", file=sys.stderr)
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
    if ray.is_initialized():
        raise InputError("Ray runs in this process already, and a run starts its own: call ray.shutdown() before.")
    check_device(options.device, elsewhere=options.address is not None)
    sampling_of(options)
    # Processes on other nodes have other working directories.
    options.questions = options.questions.resolve()
    source = Source(options.questions)
    with only_run(options.answers):
        complete(ray, options, source)


def complete(ray: Any, options: argparse.Namespace, source: Source) -> None:
    """Answers what is not answered yet, as the only run into these answers."""
    for path in written(options.answers):
        if path.exists() and path.samefile(options.questions):
            raise InputError(f"{options.answers} would be written over {options.questions}: name another file.")
    journal = Journal(options.answers)
    folder = weights.locate(options.model, revision=options.revision, shards=False)
    if folder == Path(options.model):
        options.model = str(folder.resolve())
    if options.adapter is not None:
        folder_of_adapter = weights.locate_adapter(options.adapter)
        if folder_of_adapter == Path(options.adapter):
            options.adapter = str(folder_of_adapter.resolve())
    method_of(options, read_config(folder))  # a setting that fits no row is said before anything starts
    if options.temperature == "checkpoint":
        read_sampling(folder)
    command = command_of(options)
    journal.check_command(command)
    ids, unreadable = source.scan()
    journal.check([*ids, *(row["id"] for row in unreadable)])
    started = time.perf_counter()
    journal.write([json.dumps({**row, "command": command}) for row in unreadable if row["id"] not in journal.ids])
    found = Counter(error=sum(row["id"] not in journal.ids for row in unreadable))
    left = [each for each in ids if each not in journal.ids]
    if left:
        found += answer(ray, options, source, journal)
    seconds = time.perf_counter() - started
    new = len(left) + sum(row["id"] not in journal.ids for row in unreadable)
    journal.finish()
    print(
        f"{new} rows in {seconds:.1f} s ({new / max(seconds, 1e-9):.2f} a second), {found['error']} of them errors, "
        f"{found['warnings']} with warnings; {len(ids) + len(unreadable) - new} were there before: {options.answers}",
        file=sys.stderr,
    )


def command_of(options: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on of a command; a row's own settings go before it. What is not set is left out."""
    names = ("model", "revision", "adapter", "dtype", *vars(settings_parser().parse_args([])))
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def answer(ray: Any, options: argparse.Namespace, source: Source, journal: Journal) -> Counter[str]:
    """Answers what is left and returns in how many rows each column is."""
    from ray.data import ActorPoolStrategy

    try:
        pool = start(ray, options)
        groups = source.groups()
        options.repeats = source.repeats()
        some = options.batch if groups is None else max(1, round(options.batch * len(groups.ends) / len(groups.order)))
        rows = source.rows(ray.data, groups).repartition(target_num_rows_per_block=some)
        prepared = rows.map_batches(
            PrepareWorker,
            fn_constructor_args=(options, pool, ray.put(journal.ids)),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.decoders),
            num_cpus=1,
        )
        answered = prepared.map_batches(
            ModelReplica,
            fn_constructor_args=(options, pool),
            batch_size=2 * some,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=pool.replicas),
            num_cpus=pool.reserved,
            num_gpus=int(pool.device.startswith("cuda")),
        )
        found: Counter[str] = Counter()
        for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            lines = batch["answer"].to_pylist()
            for row in map(json.loads, lines):
                if UNUSABLE in row:
                    raise InputError(row[UNUSABLE])
                found.update(row.keys())
            journal.write(lines)
        return found
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
    if on_gpu and (replicas == 0 or (options.address is None and replicas > gpus)):  # a cluster may grow
        raise InputError(f"each replica takes a GPU, and there are {gpus}: lower --replicas, or try --device cpu.")
    decoders = options.decoders or max(1, cores // 2 - READERS)
    threads = options.cores or (1 if on_gpu else max(1, (cores if options.address is None else cores // 2) // replicas))
    if options.address is not None:
        return Pool(decoders, replicas, threads, reserved=threads, device=device)
    # On one machine decoders and replicas take turns on the same cores, so Ray is told of more than there are.
    promised = decoders + replicas + READERS
    ray.init(address="local", num_cpus=promised, include_dashboard=False, log_to_driver=False, logging_level="warning")
    return Pool(decoders, replicas, threads, reserved=1, device=device)


def check_device(name: str | None, *, elsewhere: bool) -> None:
    """Raises InputError for a device that no replica can have. elsewhere: in a cluster, not on this machine."""
    # GPUs are counted: to use one here takes memory of it.
    device = usable_device(name or "cpu", tried=not elsewhere and not (name or "").startswith("cuda"))
    if device.type == "cuda" and device.index:
        raise InputError(f"a replica sees one GPU, which is cuda, not {name}: choose GPUs by CUDA_VISIBLE_DEVICES.")


UNUSABLE = "unusable"
"""The column in which a process tells the run, instead of answers, why it cannot do anything. What Ray makes of an
error when a process starts is a traceback as text."""


class PrepareWorker:
    """Reads media and makes tensors: one of the processes on CPUs."""

    def __init__(self, options: argparse.Namespace, pool: Pool, done: Any) -> None:
        """done: ids that are answered, a set or Ray's reference to one."""
        torch.set_num_threads(1)
        if not isinstance(done, set):
            import ray

            done = ray.get(done)
        self.options, self.done = options, done
        self.folder = options.questions.parent
        self.files = ExitStack()
        self.fetched: dict[str, Any] = {}
        """By address on the network, what it is read from, as long as its group is."""
        self.unusable: str | None = None
        try:
            checkpoint = weights.locate(options.model, revision=options.revision, shards=False)
            self.config = read_config(checkpoint)
            self.processor = Processor(checkpoint, self.config, reuse=READ_BYTES if options.repeats else 0)
            self.dtype = pool.dtype(options, self.config)
        except ERRORS as error:
            self.unusable = str(error)

    def __call__(self, table: Any) -> Any:
        """A row, or a group of them → packs: ids and settings as a list in JSON, tensors as safetensors. Nothing of one
        that is answered or unreadable. A group is one pack, unless its files change meanwhile."""
        if self.unusable:
            return {"row": [json.dumps([{UNUSABLE: self.unusable}])], "tensors": [b""]}
        packs: list[tuple[list[dict[str, Any]], list[Inputs]]] = []
        with self.files:
            self.fetched.clear()
            for row in self.rows(*table.to_pylist()):
                if row["id"] is None or row["id"] in self.done:
                    continue
                inputs = None
                with noting() as notes:
                    try:
                        made, inputs = self.prepared(row)
                    except Exception as error:  # whatever a file can do, it is this row's alone
                        made = failed(row, error)
                if notes:
                    made["warnings"] = [writable(note) for note in dict.fromkeys(notes)]
                first = next(iter(packs[-1][1]), None) if packs else None
                shared = inputs if inputs is None or first is None else with_media_of(first, inputs)
                if not packs or (shared is None and inputs is not None):
                    packs.append(([], []))
                    shared = inputs
                packs[-1][0].append(made)
                if shared is not None:
                    packs[-1][1].append(shared)
        packed = [self.packed(*each) for each in packs]
        return {"row": [json.dumps(told) for told, _ in packed], "tensors": [tensors for _, tensors in packed]}

    def packed(self, told: list[dict[str, Any]], requests: list[Inputs]) -> tuple[list[dict[str, Any]], bytes]:
        """A pack's rows and its tensors; where these cannot be packed, every row of it is an error."""
        try:
            return told, pack(requests, self.dtype) if requests else b""
        except Exception as error:
            return [one if "error" in one else failed(one, error) for one in told], b""

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
        if not sources and not row["question"].strip():
            raise InputError("the row has neither media nor a question: only beside media a question may be empty.")
        options.question = row["question"]
        sources = [source if scheme_of(source) else str(self.folder / source) for source in sources]
        started = time.perf_counter()
        for source in sources:
            if scheme_of(source) in ("http", "https") and source not in self.fetched:
                self.fetched[source] = self.files.enter_context(fetched(source, urls=self.options.urls))
        options.media = [self.fetched.get(source, source) for source in sources]
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
    return one.with_ids(other.input_ids)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Pixels) and isinstance(other, Pixels):
        frames = one.frames, other.frames
        return len(one.frames) == len(other.frames) and one.sizes == other.sizes and all(map(torch.equal, *frames))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return bool(one == other)


def pack(requests: list[Inputs], dtype: torch.dtype) -> bytes:
    """Requests with the same media as safetensors, the media once: of pictures and clips the bytes that patches are
    made of, a quarter of them, a clip that a request names twice once; sounds in the dtype that the encoders see."""
    from safetensors.torch import save

    tensors = {f"input_ids.{number}": inputs.input_ids for number, inputs in enumerate(requests)}
    metadata = {}
    for name, value in media_in(requests[0]).items():
        if isinstance(value, Pixels):
            numbers: dict[int, int] = {}
            order = [numbers.setdefault(id(frames), len(numbers)) for frames in value.frames]
            metadata[name] = json.dumps({"sizes": asdict(value.sizes), "of_clip": value.of_clip, "order": order})
            tensors |= {f"{name}.{number}": frames for number, frames in zip(order, value.frames, strict=True)}
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
            frames = tuple(parts[name][number] for number in value["order"])
            value = Pixels(frames, VisionSizes(**sizes), value["of_clip"])
        media[name] = value
    return [Inputs(ids, **media) for ids in parts["input_ids"]]


def failed(told: dict[str, Any], error: Exception) -> dict[str, Any]:
    """What is written of a row instead of an answer: in words where the error is one of ours."""
    ours = isinstance(error, (*ERRORS, MemoryError, ValueError))
    said = writable(str(error) if ours else f"{type(error).__name__}: {error}")
    return {"id": told["id"], "error": said, **warned(told)}


def warned(told: dict[str, Any]) -> dict[str, Any]:
    return {"warnings": told["warnings"]} if "warnings" in told else {}


def writable(message: str) -> str:
    """Names of files that are no UTF-8 have characters that it cannot hold."""
    return message.encode(errors="backslashreplace").decode()


class ModelReplica:
    """Answers with a model of its own: one of the processes on a GPU, or on cores set aside."""

    def __init__(self, options: argparse.Namespace, pool: Pool) -> None:
        torch.set_num_threads(pool.threads)
        self.most, self.command = options.batch, command_of(options)
        self.unusable: str | None = None
        try:
            self.model = load(
                options.model,
                device=pool.device,
                dtype=options.dtype,
                revision=options.revision,
                adapter=options.adapter,
                compile=options.compile,
                reuse=REUSE_BYTES if options.repeats else 0,  # nothing is digested or held that nobody asks for again
            )
        except ERRORS as error:
            self.unusable = str(error)
        except (torch.OutOfMemoryError, MemoryError):
            self.unusable = OUT_OF_MEMORY

    def __call__(self, table: Any) -> dict[str, Any]:
        """Packs of `PrepareWorker` → answers as lines of JSON. Rows of one plan and the same settings run together:
        first those of each pack, then those that are alone in theirs."""
        if self.unusable:
            return {"answer": [json.dumps({UNUSABLE: self.unusable})]}
        answers: list[dict[str, Any]] = []
        alone: dict[Any, list[tuple[dict[str, Any], Inputs]]] = {}
        for rows, tensors in zip(table["row"].to_pylist(), table["tensors"].to_pylist(), strict=True):
            told = json.loads(rows)
            answers += [one for one in told if "settings" not in one]
            told = [one for one in told if "settings" in one]
            groups = alone if len(told) == 1 else {}
            for one, inputs in zip(told, unpack(tensors) if told else [], strict=True):
                try:
                    settings = argparse.Namespace(**one["settings"])
                    plan = self.model.engine.plan(inputs, method_of(settings, self.model.config))
                except Exception as error:
                    answers.append(failed(one, error))
                    continue
                # What is drawn at random depends on who is asked beside it.
                drawn = one["id"] if settings.temperature else None
                key = plan, json.dumps(one["settings"]), drawn
                groups.setdefault(key, []).append((one, inputs))
            if groups is not alone:
                answers += self.asked(groups)
        answers += self.asked(alone)
        return {"answer": [json.dumps({**one, "command": self.command}, ensure_ascii=False) for one in answers]}

    def asked(self, groups: dict[Any, list[tuple[dict[str, Any], Inputs]]]) -> list[dict[str, Any]]:
        found = []
        for group in groups.values():
            for start in range(0, len(group), self.most):
                found += self.answers(group[start : start + self.most])
        return found

    def answers(self, group: list[tuple[dict[str, Any], Inputs]]) -> list[dict[str, Any]]:
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
                return [alone for one in group for alone in self.answers([one])]
            return [failed(group[0][0], error)]
        return [answered(told, generation) for (told, _), generation in zip(group, found, strict=True)]


def answered(told: dict[str, Any], generation: Generation) -> dict[str, Any]:
    stats = {**asdict(generation.stats), "media_seconds": told["media_seconds"]}
    return {"id": told["id"], **report_of(generation), "stats": stats, **warned(told)}


if __name__ == "__main__":
    sys.exit(main())
