"""Scripts are imported by their names, as they import each other."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (SCRIPTS, *sorted(SCRIPTS.glob("[a-z]*/"))):
        monkeypatch.syspath_prepend(str(room))
