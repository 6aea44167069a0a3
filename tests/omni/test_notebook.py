"""A notebook, run as Jupyter runs it: what its cells show."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.omni.pairs import ENVIRONMENT

pytest.importorskip("nbconvert", reason="no Jupyter here: pip install nbconvert ipykernel")
pytest.importorskip("ipykernel", reason="no kernel for Jupyter here: pip install ipykernel")

CELLS = [
    """import omni
from omni.arguments import CLIP, QUESTION
model = omni.load("tiny", device="cpu")
content = [{"type": "video", "video": str(CLIP)}, {"type": "text", "text": QUESTION}]
inputs = model.prepare([{"role": "user", "content": content}])
inputs""",
    "prefill = model.prefill(inputs, seats=0.35)\nprefill",
    "answer = model.generate(inputs, seats=0.35, max_new_tokens=4)\nanswer",
    "omni.show(inputs, prefill, question=QUESTION, answer=answer.text)",
]


def run_notebook(folder: Path) -> list[dict[str, str]]:
    """What each cell's value is shown as, by type."""
    cells = [
        {"cell_type": "code", "id": f"cell-{number}", "metadata": {}, "source": source, "outputs": []}
        | {"execution_count": None}
        for number, source in enumerate(CELLS)
    ]
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    (folder / "shown.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace", "shown.ipynb"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=ENVIRONMENT)
    shown = []
    for cell in json.loads((folder / "shown.ipynb").read_text())["cells"]:
        found = [output["data"] for output in cell["outputs"] if output["output_type"] == "execute_result"]
        shown.append({kind: "".join(lines) for kind, lines in found[-1].items()})
    return shown


def test_cells_show_counts_text_and_the_page(tmp_path: Path) -> None:
    inputs, prefill, answer, page = run_notebook(tmp_path)
    assert inputs["text/plain"] == "Inputs(583 tokens, 1 clip, 1 sound)"
    assert prefill["text/plain"].startswith("Prefill(90 text, 192 video, 301 audio tokens, kept ")
    assert answer["text/plain"].startswith("Generation('D', ")
    frame = page["text/html"]
    assert frame.startswith('<iframe srcdoc="') and 'sandbox="allow-scripts"' in frame
    inside = html.unescape(frame[len('<iframe srcdoc="') :].partition('" sandbox=')[0])
    assert inside.startswith("<!doctype html>")
    assert "What was on screen when the low tone sounded?" in inside
    assert page["text/plain"] == "Page()"
