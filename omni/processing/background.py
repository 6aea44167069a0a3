"""Work in another thread, for as long as a block lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """with BackgroundTask(task) as running: … running.wait()

    task(stopped) → what `wait` returns; it should look at `stopped()` now and then, which tells that nobody waits any
    more: the block was left. Where both fail, the error of the task is raised, as if it had been done first. The task
    sees the context variables of whoever starts it.
    """

    def __init__(self, task: Callable[[Callable[[], bool]], T]) -> None:
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        self.job = self.pool.submit(copy_context().run, task, self.stop.is_set)

    def wait(self) -> T:
        return self.job.result()

    def __enter__(self) -> BackgroundTask[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # An interrupt does not wait.
            first = self.job.exception() if isinstance(error, Exception) else None
        finally:
            self.stop.set()
            self.pool.shutdown()
        if first is not None and first is not error:
            raise first
