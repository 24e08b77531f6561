"""Ctrl-C and SIGTERM finish the step and end training normally, so that the last state is saved."""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback  # noqa: TID253


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Ends training after the step during which SIGINT or SIGTERM came; a second signal ends it at once.

    A context manager around `trainer.train()`. Outside the main thread, where Python takes no signals, it does nothing.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        print(f"\n{self.received.name}: finishing this step and saving; press again to stop now", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Ask the Trainer to stop if a signal has come."""
        if self.received is not None:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Skip an evaluation that only the early end of the epoch causes; the resumed run makes it in its place."""
        within = not float(state.epoch or 0.0).is_integer() and state.global_step < state.max_steps
        if self.received is not None and within:
            control.should_evaluate = False
        return control
