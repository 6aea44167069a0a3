"""What the tasks in this folder ask lmms-eval for: the clip, the prompt, and whether an answer is right."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
from answers import is_right

WORLD = Path(".world/test")
"""Clips and questions of `world.py`, as small_world.yaml has it."""
HUB = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()


def world_clip(question: dict[str, Any]) -> list[str]:
    return [str(WORLD / question["media"])]


def world_prompt(question: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return question["prompt"]


def world_result(question: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(is_right(results[0], question))}


def mean(scores: list[float]) -> float:
    """In percent, as the public tables give it."""
    return 100 * sum(scores) / len(scores)


def options(listed: Any) -> list[str]:
    """Options that carry their letters already: a list, or one written out as text, perhaps with commas amiss."""
    if not isinstance(listed, str):
        return [str(option).strip() for option in listed]
    try:
        return [str(option).strip() for option in ast.literal_eval(re.sub(r"(['\"])\s+(['\"])", r"\1, \2", listed))]
    except (SyntaxError, ValueError):
        parts = re.split(r"(?<![A-Za-z])(?=[A-D]\. )", listed.strip("[] "))
        return [part.strip(" ,'\"\n") for part in parts if part.strip(" ,'\"\n")]


def letter(text: str) -> str:
    """The first letter of an option in an answer, "" where there is none; one that stands by itself goes first."""
    found = re.search(r"\b[A-D]\b", text) or re.search(r"[A-D]", text)
    return found[0] if found else ""


def clip(folder: str, *parts: str) -> list[str]:
    """Where lmms-eval unpacks a benchmark's clips. Raises FileNotFoundError where it did not."""
    path = HUB.joinpath(folder, *parts)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: unpack the benchmark's clips so, or set HF_HOME.")
    return [str(path)]


# WorldSense (arXiv 2502.04326): prompt as the comparison of arXiv 2605.20035 asks it; the first letter counts.
def world_sense_clip(row: dict[str, Any]) -> list[str]:
    return clip("WorldSense", row["video_path"])


def world_sense_prompt(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    listed = "\n".join(options(row["candidates"]))
    return f"{row['question']}\nOptions:\n{listed}\nAnswer with the option's letter from the given choices directly."


def world_sense_result(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(results[0].strip()[:1].upper() == row["answer"])}


# Daily-Omni (arXiv 2505.17862): prompt of its test script.
def daily_omni_clip(row: dict[str, Any]) -> list[str]:
    return clip("DailyOmni", "videos", row["video_id"], f"{row['video_id']}_video.mp4")


def daily_omni_prompt(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    choices = "\n".join(options(row["Choice"]))
    return (
        "Your task is to accurately answer multiple-choice questions based on the given video.\n"
        "Select the single most accurate answer from the given choices.\n"
        f"Question: {row['Question']}\nChoices: {choices}\n"
        "Your answer should be a capital letter representing your choice: A, B, C, or D. "
        "Don't generate any other text.\n"
    )


def daily_omni_result(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(letter(results[0]) == row["Answer"])}


# OmniVideoBench (arXiv 2510.10689) and LVOmniBench: prompts as the comparison of arXiv 2605.20035 asks them.
def omni_video_bench_clip(row: dict[str, Any]) -> list[str]:
    return clip("OmniVideoBench", row["video"])


def omni_video_bench_prompt(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    listed = "\n".join(options(row["options"]))
    return (
        "You are given a video. Based on the content of the video, answer the following question:\n\n"
        f"Question:\n{row['question']}\n\nOptions:\n{listed}\n\n"
        "Answer with the option's letter directly(e.g., A, B, C, or D)."
        "If your access to the video content is limited, at least one option that is more likely than the others must "
        "be chosen.Mustn't give any other reason for can not choose!"
    )


def omni_video_bench_result(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(letter(results[0]) == row["correct_option"])}


def lv_omni_bench_clip(row: dict[str, Any]) -> list[str]:
    return clip("lvomnibench", "videos", f"{row['video_id']}.mp4")


def lv_omni_bench_prompt(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    listed = "\n".join(options(row["options"]))
    return (
        f"Question: {row['question']}\nOptions: {listed}\nSelect the best answer from the options above. "
        "Directly provide the letter representing your choice (A/B/C/D) and nothing else. "
        "Do not include the full text of the option; do not provide any explanation."
    )


def lv_omni_bench_result(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"accuracy": float(letter(results[0]) == row["answer"])}
