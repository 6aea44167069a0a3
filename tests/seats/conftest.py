"""Golden data of the parts, where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

UNIT = Path(__file__).parents[3] / "shared" / "golden" / "unit"

# The same examples on every run, and no time limit on a busy machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def golden() -> Path:
    if not UNIT.is_dir():
        pytest.skip(f"no golden data at {UNIT}")
    return UNIT
