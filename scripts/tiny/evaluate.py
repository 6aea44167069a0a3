"""What token selection costs in accuracy: questions about clips, asked with every token and with fewer.

    python scripts/tiny/world.py .world --split test --count 137
    python scripts/tiny/evaluate.py .world                         # the checkpoint tiny, SEATS
    python scripts/tiny/evaluate.py .world --methods all --workers 16        # on a machine with as many cores
    python scripts/tiny/evaluate.py clips/ --model Qwen/Qwen2.5-Omni-7B --retention 0.35 0.10
    python scripts/tiny/evaluate.py .world --merge elsewhere/accuracy/tiny.json      # rows of another run's result

The folder has clips and questions.jsonl: on each line {"media", "prompt", "answer", "options", "kind"}, `options` empty
where the answer is free and else four, which the prompt letters A to D. An answer counts where its first letter is that
of the right option, or where its words are those of the answer. Answers are kept clip by clip, so that the same command
goes on where it was stopped. Results are saved, rendered in benchmarks/pages/accuracy.md and drawn under
benchmarks/figures. `settings.py` has what is compared.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from answers import is_right
from settings import ABLATIONS, EVERY, NO_SOUND, NO_VIDEO, Setting, method_of, settings

import omni
from omni.config import DTYPES
from omni.inputs import Inputs
from omni.model import Omni
from seats.methods import names

sys.path.append(str(Path(__file__).parents[1] / "report"))
from accuracy_report import code_of, draw, share
from bench_report import write_readme

RETENTIONS = (0.35, 0.25, 0.15, 0.10)


def messages(question: dict[str, Any], folder: Path, media: str = "video") -> list[dict[str, Any]]:
    content = [
        {"type": media, media: str(folder / question["media"])},
        {"type": "text", "text": question["prompt"]},
    ]
    return [{"role": "user", "content": content}]


def ask(
    model: Omni, folder: Path, questions: list[dict[str, Any]], wanted: list[Setting], new: int
) -> Iterator[list[list[dict[str, Any]]]]:
    """For each clip, for each of its questions, what each setting made of it: an answer, or why there is none.

    All questions about a clip go through together, what they share once; how long a prefill takes is measured with the
    first alone, by a model that keeps nothing.
    """
    forgetful = Omni(model.thinker, model.folder, reuse=0)
    for _, group in groupby(questions, key=lambda question: question["media"]):
        asked = list(group)
        prepared = {
            EVERY: [model.prepare(messages(question, folder)) for question in asked],
            NO_VIDEO: [model.prepare(messages(question, folder, "audio")) for question in asked],
            NO_SOUND: [model.prepare(messages(question, folder), use_audio_in_video=False) for question in asked],
        }
        columns = []
        for setting in wanted:
            inputs = prepared.get(setting.method, prepared[EVERY])
            try:
                columns.append(answers(model, forgetful, inputs, asked, setting, new))
            except ValueError as error:  # the method cannot run at that retention
                columns.append([{"error": str(error)}] * len(asked))
        yield [list(row) for row in zip(*columns, strict=True)]


def answers(
    model: Omni, forgetful: Omni, inputs: list[Inputs], asked: list[dict[str, Any]], setting: Setting, new: int
) -> list[dict[str, Any]]:
    method = method_of(setting, model)
    alone = forgetful.prefill(inputs[0], seats=method, kv=setting.kv)
    found = model.generate(inputs, seats=method, kv=setting.kv, max_new_tokens=new)
    return [
        {
            "text": answer.text,
            "right": is_right(answer.text, question),
            "macs": answer.stats.macs,
            "full_macs": answer.stats.full_macs,
            "seconds": alone.prefill_seconds,
            "ratios": None if method is None else (method.video_ratio, method.audio_ratio),
        }
        for question, answer in zip(asked, found, strict=True)
    ]


Answers = list[list[dict[str, Any]]]
"""Of each question about a clip, what each setting made of it."""


def threads(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


def codes_of(wanted: Sequence[Setting]) -> dict[str, str]:
    """What each setting's method does now, by a name (`accuracy_report.code_of`)."""
    return {setting.name: code_of(setting.method) for setting in wanted}


def read_partial(path: Path, wanted: Sequence[Setting]) -> dict[str, Answers]:
    """What an earlier run left, by clip."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    if any(row["settings"] != [setting.name for setting in wanted] for row in rows):
        raise SystemExit(f"{path} has answers of other settings: remove it, or ask for the same.")
    stale = {name for row in rows for name, code in codes_of(wanted).items() if row.get("code", {}).get(name) != code}
    if stale:
        raise SystemExit(
            f"{path} has answers of methods whose code has changed since, {', '.join(sorted(stale))}: remove it and "
            "ask again."
        )
    return {row["media"]: row["answers"] for row in rows}


def asked_by(
    options: argparse.Namespace, clips: list[list[dict[str, Any]]], wanted: list[Setting]
) -> Iterator[tuple[str, Answers]]:
    """The answers about each clip, as they come, by one process or several."""
    if options.workers == 1:
        begin(options, wanted, threads(1))
        yield from map(ask_about, clips)
        return
    arguments = (options, wanted, threads(options.workers))
    with get_context("spawn").Pool(options.workers, initializer=begin, initargs=arguments) as pool:
        yield from pool.imap_unordered(ask_about, clips)
        pool.close()
        pool.join()


def begin(options: argparse.Namespace, wanted: list[Setting], cores: int) -> None:
    """In every process that asks: `ask_about` has what it needs."""
    global ask_about_with
    torch.set_num_threads(cores)
    ask_about_with = load(options), options.folder, wanted, options.max_new_tokens


ask_about_with: tuple[Omni, Path, list[Setting], int]


def ask_about(clip: list[dict[str, Any]]) -> tuple[str, Answers]:
    model, folder, wanted, new = ask_about_with
    return clip[0]["media"], next(ask(model, folder, clip, wanted, new))


def interval(right: list[list[float]], draws: int = 2000) -> tuple[float, float]:
    """95 % of the means of clips drawn anew: questions about one clip stand and fall together."""
    sums, sizes = (torch.tensor([f(clip) for clip in right], dtype=torch.float64) for f in (sum, len))
    picks = torch.randint(len(right), (draws, len(right)), generator=torch.Generator().manual_seed(0))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def estimate(groups: list[list[float]]) -> dict[str, Any]:
    """The mean of what each clip's questions gave, with its interval."""
    total = sum(map(len, groups))
    low, high = interval(groups)
    return {"mean": sum(map(sum, groups)) / total, "low": low, "high": high, "questions": total}


def accuracy(
    questions: list[dict[str, Any]], values: Callable[[int], float], chosen: Callable[[dict[str, Any]], bool]
) -> dict[str, Any] | None:
    """The mean of values(number) over the chosen questions, with its interval; None where none is chosen."""
    clips: dict[str, list[float]] = {}
    for number, question in enumerate(questions):
        if chosen(question):
            clips.setdefault(question["media"], []).append(values(number))
    return estimate(list(clips.values())) if clips else None


def summarise(questions: list[dict[str, Any]], answers: list[list[dict[str, Any]]], wanted: list[Setting]) -> Any:
    """A row for every setting: accuracy by kind, over multiple choice, over free answers; cost; against the others."""
    rows = []
    for column, setting in enumerate(wanted):
        mine = [answer[column] for answer in answers]
        row: dict[str, Any] = {**asdict(setting), "name": setting.name, "code": code_of(setting.method)}
        rows.append(row)
        failed = next((answer["error"] for answer in mine if "error" in answer), None)
        if failed is not None:
            row["error"] = failed
            continue

        def right(number: int, mine: list[Any] = mine) -> float:
            return float(mine[number]["right"])

        row["choice"] = accuracy(questions, right, is_choice)
        row["free"] = accuracy(questions, right, lambda question: not is_choice(question))
        row["kinds"] = {
            kind: accuracy(questions, right, lambda question, kind=kind: question["kind"] == kind)
            for kind in dict.fromkeys(question["kind"] for question in questions)
        }
        row["prefill_seconds"] = statistics.median(answer["seconds"] for answer in mine)
        row["macs"] = sum(answer["macs"] for answer in mine) / len(mine)
        row["full_macs"] = sum(answer["full_macs"] for answer in mine) / len(mine)
        row["ratios"] = mine[0]["ratios"]
        others = [n for n, each in enumerate(wanted) if each == Setting("random", setting.retention)]
        if others and setting.method != "random":
            row["above_random"] = accuracy(
                questions,
                lambda n, other=others[0], mine=mine: float(mine[n]["right"]) - float(answers[n][other]["right"]),
                is_choice,
            )
    return rows


def is_choice(question: dict[str, Any]) -> bool:
    return bool(question["options"])


def merge(result: dict[str, Any], other: dict[str, Any], questions: list[dict[str, Any]]) -> list[str]:
    """Takes the rows of another run about the same questions into a result, and says which.

    Not those of every token, which each run has; and no prefill times, which say something in one run alone.
    """
    asked = [(question["media"], question["kind"]) for question in questions]
    for each in (result, other):
        if each["model"] != result["model"] or [(one["media"], one["kind"]) for one in each["answers"]] != asked:
            raise SystemExit("these are results of other models or other questions, which are not to be merged.")
    texts = {row["name"]: [one["texts"][n] for one in result["answers"]] for n, row in enumerate(result["rows"])}
    rows = {row["name"]: row for row in result["rows"]}
    taken = []
    for column, row in enumerate(other["rows"]):
        if row["method"] in (EVERY, NO_VIDEO, NO_SOUND):
            continue
        name = row["name"]
        row = {key: value for key, value in row.items() if key != "prefill_seconds"}
        rows[name] = row | {"run": {key: other[key] for key in ("date", "machine", "versions")}}
        texts[name] = mine = [one["texts"][column] for one in other["answers"]]
        random = texts.get(Setting("random", row["retention"]).name)
        if random is not None and "error" not in row and row["method"] != "random":

            def above(number: int, mine: list[str] = mine, random: list[str] = random) -> float:
                found, by_chance = (is_right(said[number], questions[number]) for said in (mine, random))
                return float(found) - float(by_chance)

            rows[name]["above_random"] = accuracy(questions, above, is_choice)
        taken.append(name)
    methods = [EVERY, NO_VIDEO, NO_SOUND, *names(), *ABLATIONS]
    methods += [row["method"] for row in rows.values() if row["method"] not in methods]  # registered elsewhere

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["method"] in ABLATIONS, -row["retention"], methods.index(row["method"]), row["kv"]

    result["rows"] = sorted(rows.values(), key=place)
    for number, one in enumerate(result["answers"]):
        one["texts"] = [texts[row["name"]][number] for row in result["rows"]]
    return taken


def arguments(description: str) -> argparse.ArgumentParser:
    """The command line of whatever asks a model about clips."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path, help="clips and questions.jsonl")
    parser.add_argument("--model", default="tiny", help="name, hub id or folder (default: %(default)s)")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--limit", type=int, help="ask so many questions at most")
    parser.add_argument("--results", type=Path, default=Path("benchmarks"))
    return parser


def load(options: argparse.Namespace) -> Omni:
    return omni.load(options.model, device=options.device, dtype=DTYPES[options.dtype] if options.dtype else None)


def read_questions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


def save(results: Path, name: str, result: dict[str, Any]) -> None:
    """Writes a result, and from all of them the figures and README.md."""
    (results / "accuracy").mkdir(parents=True, exist_ok=True)
    (results / "accuracy" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(results)
    write_readme(results)


def main() -> None:
    from tqdm import tqdm

    parser = arguments("Accuracy with every token and with fewer.")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=("all", *names()),
        default=["seats", "random"],
        metavar="NAME",
        help=f"all, or some of {', '.join(names())} (default: seats random)",
    )
    parser.add_argument("--retention", type=float, nargs="+", default=list(RETENTIONS))
    parser.add_argument("--ablate", type=float, default=0.10, help="retention of the ablations, 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes that ask, cores shared out between them")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="take the rows of other runs' results")
    options = parser.parse_args()
    questions = read_questions(options.folder)[: options.limit]
    if options.merge:
        name = Path(options.model).name
        result = json.loads((options.results / "accuracy" / f"{name}.json").read_text(encoding="utf-8"))
        for path in options.merge:
            taken = merge(result, json.loads(path.read_text(encoding="utf-8")), questions)
            print(f"{path}: {len(taken)} rows: {', '.join(taken)}")
        save(options.results, name, result)
        return
    methods = names() if "all" in options.methods else options.methods
    wanted = settings(methods, options.retention, options.ablate)
    name = Path(options.model).name
    partial = options.results / "accuracy" / f"{name}.partial.jsonl"
    partial.parent.mkdir(parents=True, exist_ok=True)
    by_clip = [list(group) for _, group in groupby(questions, key=lambda question: question["media"])]
    done = read_partial(partial, wanted)
    left = [clip for clip in by_clip if len(done.get(clip[0]["media"], [])) != len(clip)]
    with tqdm(total=len(questions), unit="question") as bar, partial.open("a", encoding="utf-8") as written:
        bar.update(len(questions) - sum(map(len, left)))
        for media, answers in asked_by(options, left, wanted):
            done[media] = answers
            line = {
                "settings": [setting.name for setting in wanted],
                "code": codes_of(wanted),
                "media": media,
                "answers": answers,
            }
            written.write(json.dumps(line) + "\n")
            written.flush()
            bar.update(len(answers))
    found = [answer for clip in by_clip for answer in done[clip[0]["media"]]]
    rows = summarise(questions, found, wanted)
    for row in rows:
        print(row["name"], row.get("error") or f"choice {share(row['choice'])} free {share(row['free'])}", sep=": ")
    on_gpu = torch.cuda.is_available() if options.device is None else options.device != "cpu"
    result = {
        "model": name,
        "date": datetime.date.today().isoformat(),
        "machine": "GPU" if on_gpu else f"{options.workers} x {threads(options.workers)} threads of a CPU",
        "versions": {"torch": importlib.metadata.version("torch")},
        "clips": len({question["media"] for question in questions}),
        "questions": len(questions),
        "rows": rows,
        "answers": [
            {"media": question["media"], "kind": question["kind"], "texts": [each.get("text") for each in answer]}
            for question, answer in zip(questions, found, strict=True)
        ],
    }
    save(options.results, name, result)
    partial.unlink()


if __name__ == "__main__":
    main()
