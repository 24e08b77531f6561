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
    """Runs jobs in order, at once or on a thread of its own. A job deals with its own errors.

    What is left is done before the interpreter exits, also after Ctrl-C; with `catch_sigterm` before SIGTERM ends the
    process, where nothing else handles that.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lora-checkpoint") if background else None
        self._jobs: list[Future[Any]] = []
        self._process = os.getpid()
        self._previous: Any = None

    def submit(self, job: Callable[[], Any]) -> None:
        """Run a job, or queue it after those that wait."""
        if self._pool is None:
            job()
            return
        self._jobs = [done for done in self._jobs if not done.done()]
        for waiting in self._jobs[: len(self._jobs) - _WAITING + 1]:
            waiting.result()
        self._jobs.append(self._pool.submit(job))

    def drain(self) -> None:
        """Wait until everything is written."""
        for job in self._jobs:
            job.result()
        self._jobs = []

    def close(self) -> None:
        """`drain`, and give thread and signal back."""
        self.drain()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def catch_sigterm(self) -> None:
        """Drain before SIGTERM ends the process, if that is what it would do and there is something to drain."""
        main = threading.current_thread() is threading.main_thread()
        if self._pool is not None and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._previous = signal.signal(signal.SIGTERM, self._leave)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() == self._process:  # a forked worker has the handler, but not the thread
            for job in self._jobs:
                job.exception()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
