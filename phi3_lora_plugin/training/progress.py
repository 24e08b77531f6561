"""What a person sees during a run: one live line on a terminal, one plain line a log elsewhere."""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback  # noqa: TID253


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """Steps, loss, tokens a second (padding not counted) and time left, on rank zero.

    Needs `include_num_input_tokens_seen="non_padding"` in the training arguments for the tokens.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.loss: float | None = None
        self._progress: Progress | None = None
        self._task: Any = None
        self._started = 0.0
        self._tokens_before = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and, on a terminal, the live line."""
        self._started, self._tokens_before = time.monotonic(), state.num_input_tokens_seen
        if state.is_world_process_zero and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, text="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the live line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step, text=self._text(state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the loss; print a line if none is live."""
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        if self._progress is None and state.is_world_process_zero:
            self.console.out(f"step {state.global_step}/{state.max_steps}  {self._text(state)}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the live line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _text(self, state: Any) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        tokens = state.num_input_tokens_seen - self._tokens_before
        loss = "" if self.loss is None else f"loss {self.loss:.4f}  "
        return f"{loss}{tokens / seconds:,.0f} tokens/s"
