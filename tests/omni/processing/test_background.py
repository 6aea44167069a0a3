"""Work in another thread: its result, its errors, its end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from omni.processing.background import BackgroundTask
from omni.processing.media.files import noting, warn


def until_stopped(stopped: Callable[[], bool]) -> str:
    deadline = time.monotonic() + 60
    while not stopped() and time.monotonic() < deadline:
        time.sleep(0.001)
    return "stopped" if stopped() else "forgotten"


def test_it_runs_beside_the_block() -> None:
    """Protects: both go on at the same time; what the task returns is what `wait` returns."""
    other = threading.Event()

    def task(_: Callable[[], bool]) -> int:
        assert other.wait(60)
        return threading.get_ident()

    with BackgroundTask(task) as running:
        other.set()
        assert running.wait() != threading.get_ident()


def test_it_warns_to_whoever_started_it() -> None:
    """Protects: what there is to warn of sound is noted beside what there is of pictures."""
    with noting() as notes, BackgroundTask(lambda _: warn("of the task")) as running:
        running.wait()
    assert notes == ["of the task"]


def test_its_error_goes_first() -> None:
    """Protects: which of two errors a user sees does not depend on which came sooner."""

    def fail(_: Callable[[], bool]) -> None:
        time.sleep(0.05)
        raise ValueError("of the task")

    with pytest.raises(ValueError, match="of the task"), BackgroundTask(fail):
        raise KeyError("of the block")
    with pytest.raises(ValueError, match="of the task"), BackgroundTask(fail) as running:
        running.wait()
    with pytest.raises(KeyError), BackgroundTask(lambda _: 1):
        raise KeyError("of the block")


def test_an_interrupt_stops_it() -> None:
    """Protects: nobody who interrupts waits for hours of sound."""
    running = BackgroundTask(until_stopped)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), running:
        raise KeyboardInterrupt
    assert running.wait() == "stopped"
    assert threading.active_count() == before - 1
