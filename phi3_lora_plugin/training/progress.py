"""What a person sees during a run: a line that stays for each log and evaluation, and on a terminal a bar below."""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback  # noqa: TID253

from phi3_lora_plugin.training.log_line import log_line, style_of
from phi3_lora_plugin.training.metrics_log import MetricsLog


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """Shows on rank zero what `metrics` measured, which has to be called before this is."""

    def __init__(self, console: Console, metrics: MetricsLog) -> None:
        self.console, self.metrics = console, metrics
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On a terminal, start the bar."""
        if state.is_world_process_zero and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step, loss="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._progress is not None:
            loss = "" if self.metrics.loss is None else f"loss {self.metrics.loss:.4f}"
            self._progress.update(self._task, completed=state.global_step, loss=loss)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print the line."""
        line = self.metrics.newest
        if line is not None and state.max_steps and state.is_world_process_zero:  # 0: before training
            self.console.print(
                log_line(line, state.max_steps), style=style_of(line) or None, markup=False, highlight=False,
                soft_wrap=True,
            )  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
