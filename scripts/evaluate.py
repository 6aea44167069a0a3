"""What token selection costs in accuracy: questions about clips, asked with every token and with fewer.

    python scripts/world.py .world --split test --count 160
    python scripts/evaluate.py .world                         # the checkpoint tiny
    python scripts/evaluate.py clips/ --model Qwen/Qwen2.5-Omni-7B --retention 0.35 0.10

The folder has clips and questions.jsonl: on each line {"media", "prompt", "answer", "options", "kind"}, `options` empty
where the answer is free and else four, which the prompt letters A to D. An answer counts where its first letter is that
of the right option, or where its words are those of the answer. Results are saved, rendered in benchmarks/README.md and
drawn under benchmarks/figures.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accuracy_report import draw, share
from bench_report import write_readme
from torch import Tensor

import omni
import seats
from omni import stages
from omni.config import DTYPES
from omni.inputs import Inputs
from omni.model import Omni
from seats import SeatsConfig
from seats.budget import keep_counts
from seats.diversity import max_min_keep
from seats.selection import AUDIO, TEXT, VIDEO, rank_in_group

RETENTIONS = (0.35, 0.25, 0.15, 0.10)
ABLATIONS = ("stage I alone", "stage II alone", "stage III alone", "no windows", "no attention weights")


@dataclass(frozen=True)
class Setting:
    """One column of the comparison. method: "every token", "SEATS", "random", or one of ABLATIONS."""

    method: str
    retention: float = 1.0
    kv: str = "pruned"

    @property
    def name(self) -> str:
        kept = "" if self.retention == 1 else f" {self.retention:.0%}"
        return f"{self.method}{kept}{'' if self.kv == 'pruned' else ', layerwise'}"


def settings(retentions: Sequence[float], ablated: float) -> list[Setting]:
    """ablated: the retention that ablations are made at, 0 for none."""
    found = [Setting("every token"), Setting("every token, no video"), Setting("every token, no sound")]
    for retention in retentions:
        found += [Setting("SEATS", retention), Setting("SEATS", retention, "layerwise"), Setting("random", retention)]
    if ablated:
        found += [Setting(method, ablated) for method in ABLATIONS]
    return found


def config_of(setting: Setting, model: Omni) -> SeatsConfig | None:
    """The selection of a setting, None for every token."""
    if setting.method.startswith("every token"):
        return None
    config = seats.preset_for(model.config, setting.retention)
    if setting.method in ("stage I alone", "random"):
        # All of the reduction before the decoder: what stays stays to the end.
        return replace(config, encoder_ratio_scale=1.0, drop_layers=(), late_layer=None)
    everything = replace(config, encoder_ratio_scale=1 / min(config.video_ratio, config.audio_ratio))
    if setting.method == "stage II alone":
        return replace(everything, late_layer=None)
    if setting.method == "stage III alone":
        return replace(everything, drop_layers=())
    return config


@contextmanager
def as_set(setting: Setting, number: int) -> Iterator[None]:
    """Within it the model selects as a setting says that no configuration can."""
    with ExitStack() as stack:

        def swap(target: Any, name: str, value: Any) -> None:
            context: AbstractContextManager[Any] = patch.object(target, name, value)
            stack.enter_context(context)

        if setting.method == "random":
            draw = torch.Generator().manual_seed(number)
            swap(stages, "max_min_keep", lambda x, w, sizes, counts: random_keep(draw, sizes, counts, x.shape[1]))
        if setting.method == "no attention weights":
            swap(stages, "max_min_keep", lambda x, w, sizes, counts: max_min_keep(x, torch.ones_like(w), sizes, counts))
        if setting.method == "no windows":
            swap(stages, "select", most_relevant)
        yield


def random_keep(draw: torch.Generator, sizes: Tensor, counts: Tensor, width: int) -> Tensor:
    """(W, width) bool: as many of each window's tokens as Stage I alone would keep, any of them."""
    chance = torch.rand(len(sizes), width, generator=draw)
    chance[torch.arange(width) >= sizes.cpu()[:, None]] = -1
    return chance.argsort(descending=True).argsort().to(counts.device) < counts[:, None]


def most_relevant(
    scores: Tensor, kind: Tensor, video_keep: float, audio_keep: float, temperature: float, windows: int
) -> Tensor:
    """Stage II without windows: the most relevant of the whole sequence, of each modality its share."""
    limits = torch.zeros(len(kind), 4, dtype=torch.long)
    for medium, ratio in ((VIDEO, video_keep), (AUDIO, audio_keep)):
        limits[:, medium] = keep_counts((kind == medium).sum(-1), ratio)
    group = kind.long()
    return (kind == TEXT) | (rank_in_group(scores, group) < limits.gather(1, group))


def is_right(text: str, question: dict[str, Any]) -> bool:
    if question["options"]:
        found = re.search(r"\b[A-D]\b", text)
        return found is not None and question["options"]["ABCD".index(found[0])] == question["answer"]
    return words(text) == words(question["answer"])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def messages(question: dict[str, Any], folder: Path, media: str = "video") -> list[dict[str, Any]]:
    content = [
        {"type": media, media: str(folder / question["media"])},
        {"type": "text", "text": question["prompt"]},
    ]
    return [{"role": "user", "content": content}]


def ask(
    model: Omni, folder: Path, questions: list[dict[str, Any]], wanted: list[Setting], new: int
) -> Iterator[list[dict[str, Any]]]:
    """For each question, what each setting made of it."""
    encoded: dict[Any, Any] = {}
    encode = model.thinker.encode

    def remembered(inputs: Inputs, *, weigh: bool = False, call: Callable[..., Any]) -> Any:
        """Encoders once for a clip: only the words differ between its questions."""
        key = (clip, inputs.pixel_values_videos is None, inputs.input_features is None)
        if key not in encoded:
            encoded[key] = encode(inputs, weigh=True, call=call)
        features, received = encoded[key]
        return features, received if weigh else {}

    clip = None
    with patch.object(model.thinker, "encode", remembered):
        for number, question in enumerate(questions):
            if question["media"] != clip:
                clip = question["media"]
                encoded.clear()
            whole = model.prepare(messages(question, folder))
            found = []
            for setting in wanted:
                inputs = whole
                if setting.method.endswith("no video"):
                    inputs = model.prepare(messages(question, folder, "audio"))
                elif setting.method.endswith("no sound"):
                    inputs = model.prepare(messages(question, folder), use_audio_in_video=False)
                with as_set(setting, number):
                    answer = model.generate(inputs, seats=config_of(setting, model), kv=setting.kv, max_new_tokens=new)
                stats = answer.stats
                found.append(
                    {
                        "text": answer.text,
                        "right": is_right(answer.text, question),
                        "macs": stats.macs,
                        "full_macs": stats.full_macs,
                        "seconds": stats.prefill_seconds,
                        "tokens": stats.tokens,
                    }
                )
            yield found


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


def summarise(questions: list[dict[str, Any]], answers: list[list[dict[str, Any]]], wanted: list[Setting]) -> Any:
    """A row for every setting: accuracy by kind, over multiple choice, over free answers; cost; against the others."""
    clips: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        clips.setdefault(question["media"], []).append(number)
    rows = []

    def accuracy(values: Callable[[int], float], chosen: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        groups = [[values(n) for n in numbers if chosen(questions[n])] for numbers in clips.values()]
        groups = [group for group in groups if group]
        return estimate(groups) if groups else None

    for column, setting in enumerate(wanted):
        mine = [answer[column] for answer in answers]

        def right(number: int, mine: list[Any] = mine) -> float:
            return float(mine[number]["right"])

        row: dict[str, Any] = {**asdict(setting), "name": setting.name}
        row["choice"] = accuracy(right, lambda question: bool(question["options"]))
        row["free"] = accuracy(right, lambda question: not question["options"])
        row["kinds"] = {
            kind: accuracy(right, lambda question, kind=kind: question["kind"] == kind)
            for kind in dict.fromkeys(question["kind"] for question in questions)
        }
        seconds = torch.tensor([answer["seconds"] for answer in mine])
        row["prefill_seconds"] = seconds.median().item()
        row["macs"] = sum(answer["macs"] for answer in mine) / len(mine)
        row["full_macs"] = sum(answer["full_macs"] for answer in mine) / len(mine)
        if setting.method == "SEATS":
            other = next(
                n for n, each in enumerate(wanted) if (each.method, each.retention) == ("random", setting.retention)
            )
            row["above_random"] = accuracy(
                lambda n, other=other, mine=mine: float(mine[n]["right"]) - float(answers[n][other]["right"]),
                lambda question: bool(question["options"]),
            )
        rows.append(row)
    return rows


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
    parser.add_argument("--retention", type=float, nargs="+", default=list(RETENTIONS))
    parser.add_argument("--ablate", type=float, default=0.10, help="retention of the ablations, 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    questions = read_questions(options.folder)[: options.limit]
    model = load(options)
    wanted = settings(options.retention, options.ablate)
    asked = ask(model, options.folder, questions, wanted, options.max_new_tokens)
    answers = list(tqdm(asked, total=len(questions), unit="question"))
    rows = summarise(questions, answers, wanted)
    for row in rows:
        print(f"{row['name']:32} choice {share(row['choice'])} free {share(row['free'])}")
    name = Path(options.model).name
    result = {
        "model": name,
        "date": datetime.date.today().isoformat(),
        "machine": f"{torch.get_num_threads()} threads of a CPU" if model.device.type == "cpu" else "GPU",
        "versions": {"torch": importlib.metadata.version("torch")},
        "clips": len({question["media"] for question in questions}),
        "questions": len(questions),
        "rows": rows,
        "answers": [
            {"media": question["media"], "kind": question["kind"], "texts": [found["text"] for found in answer]}
            for question, answer in zip(questions, answers, strict=True)
        ],
    }
    save(options.results, name, result)


if __name__ == "__main__":
    main()
