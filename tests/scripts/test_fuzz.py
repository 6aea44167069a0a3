"""Damaged files of every kind: each ends in a right answer or in one of the library's errors.

A short, seeded run of `scripts/stress/fuzz.py`, which goes on for as long as wanted and survives crashes and hangs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

ROOT = Path(__file__).parents[2]
INPUTS = {"safetensors": 60, "index": 60, "config": 25, "tokenizer": 60, "template": 8, "media": 150, "rows": 25}


@pytest.mark.parametrize("name", INPUTS)
def test_damaged_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: no exception of another kind, no wrong answer, and no error without words, whatever the damage."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    import fuzz
    from fuzz_targets import TARGETS

    target = TARGETS[name]
    files = {file: (tmp_path / file).read_bytes() for file in target.make(tmp_path)}
    for file, data in files.items():
        assert fuzz.examine(target, tmp_path, file, data) == ("right", "")
    kinds = set()
    tries = settings(
        max_examples=INPUTS[name],
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @seed(1)
    @tries
    @given(fuzz.inputs(files))
    def damaged(case: tuple[str, bytes]) -> None:
        kind, text = fuzz.examine(target, tmp_path, *case)
        assert kind != "unexpected", text
        kinds.add(kind)

    damaged()
    assert "error" in kinds
    for module in ("fuzz", "fuzz_damage", "fuzz_targets"):
        sys.modules.pop(module)


def test_a_finding_is_kept_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Protects: a crash, a hang and a foreign exception are counted, and the input that led to them can be read."""
    import fuzz
    from fuzz_targets import TARGETS, Target

    class Child:
        peak = 0

        def __init__(self, *_: object) -> None:
            pass

        def read(self, file: str, data: bytes) -> tuple[str, str]:
            return ("right", "") if data == b"[1]" else ("crash", "exit status -11")

        def stop(self) -> None:
            pass

    def make(folder: Path) -> list[str]:
        (folder / "a.json").write_bytes(b"[1]")
        return ["a.json"]

    monkeypatch.setattr(fuzz, "Child", Child)
    monkeypatch.setitem(TARGETS, "index", Target(make, lambda *_: None, (ValueError,)))
    assert fuzz.fuzz("index", 0.005, 0, tmp_path) > 0
    assert (tmp_path / "index-1/a.json").is_file()
    assert (tmp_path / "index-1/what.txt").read_text() == "crash\nexit status -11\n"
    assert " crashes, 0 hangs, 0 unexpected" in capsys.readouterr().out
    for module in ("fuzz", "fuzz_damage", "fuzz_targets"):
        sys.modules.pop(module)
