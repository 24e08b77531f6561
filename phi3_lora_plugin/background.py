"""Writes that training does not wait for: one after the other, in order, none lost when the process ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import FrameType
from typing import Any

_WAITING = 2  # states in memory that are not written yet, before training waits after all


class Writer:
    """Runs jobs in order, at once or on a thread of its own.

    What is left is done before the interpreter exits, also after Ctrl-C; with `catch_sigterm` before SIGTERM ends the
    process, where nobody else handles that.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lora-checkpoint") if background else None
        self._jobs: list[Future[Any]] = []
        self._previous: Any = None

    def submit(self, job: Callable[[], Any]) -> list[BaseException]:
        """Run a job, or put it behind those that wait; the errors of jobs that have come to their end since."""
        if self._pool is None:
            try:
                job()
            except Exception as error:  # a caller gets it like one from a thread: to judge, not to unwind
                return [error]
            return []
        while len(waiting := [done for done in self._jobs if not done.done()]) >= _WAITING:
            waiting[0].exception()
        self._jobs.append(self._pool.submit(job))
        return self._ended()

    def drain(self) -> list[BaseException]:
        """Wait until everything is written; the errors."""
        for job in self._jobs:
            job.exception()
        return self._ended()

    def close(self) -> list[BaseException]:
        """`drain`, and give thread and signal back."""
        errors = self.drain()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None
        return errors

    def catch_sigterm(self) -> None:
        """Drain before SIGTERM ends the process, if that is what it would do and there is something to drain."""
        main = threading.current_thread() is threading.main_thread()
        if self._pool is not None and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous = signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        for job in self._jobs:
            job.exception()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _ended(self) -> list[BaseException]:
        ended = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        return [error for job in ended if (error := job.exception()) is not None]
