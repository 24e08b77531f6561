"""What a run measures of itself and the Trainer does not: kept in `metrics.jsonl`, and sent to trackers."""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback  # noqa: TID253

from phi3_lora_plugin.model.device import peak_memory
from phi3_lora_plugin.store.metrics_file import EVAL, TRAIN, MetricsFile, kind_of
from phi3_lora_plugin.training.health import is_spike
from phi3_lora_plugin.training.log_line import BEST, NOT_FINITE, RISING, SPIKE

log = logging.getLogger(__name__)
_RISES = 2  # evaluations in a row that are worse than the best before a warning


class MetricsLog(TrainerCallback):  # type: ignore[misc]
    """Writes a line for each log and each evaluation, on rank zero; the last step of a run is always logged.

    It has to be called before other callbacks that are to get its figures: it adds them to the Trainer's logs.
    `tokens_per_second` counts no padding (with `include_num_input_tokens_seen="non_padding"`) and no time of
    evaluations, `peak_memory_gb` is in 1e9 bytes, `seconds_left` as long as the run goes on as it did.

    Attributes:
        newest: the line of the newest log; None for a log that gave none.
        loss: the newest training loss.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.newest: dict[str, Any] | None = None
        self.loss: float | None = None
        self._file: MetricsFile | None = None
        self._early: list[dict[str, Any]] = []  # from before training, when it is not known where it starts
        self._losses: list[float] = []
        self._best: tuple[float, int] | None = None
        self._worse = 0
        self._started = self._logged = 0.0
        self._began_at = self._tokens = 0
        self._evaluated = 0.0  # seconds of evaluations since the last log
        self._failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; continue the file where the run is resumed."""
        self._started = self._logged = time.monotonic()
        self._began_at, self._tokens, self._evaluated = state.global_step, state.num_input_tokens_seen, 0.0
        if not state.is_world_process_zero:
            return
        self._file = self._write(MetricsFile, self.folder, state.global_step)
        for line in self._file.lines if self._file else ():
            self._remember(line, args)
        early, self._early = self._early, []
        for line in early:
            self._keep(line)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step logged, whatever `logging_steps` is."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the last step of a run logged that was stopped early."""
        if control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add our figures to the logs, and write the line."""
        self.newest = None
        kind = kind_of(logs or {})
        if kind is None or logs is None:
            return
        if kind == TRAIN:
            self.loss = float(logs["loss"])
        if not state.is_world_process_zero or (self._file is not None and self._file.has(state.global_step, kind)):
            return  # the evaluation after the last step is often that of the last epoch
        if kind == TRAIN:
            logs.update(self._figures(args, state))
        line = {"step": state.global_step, "kind": kind, "time": round(time.time(), 3)}
        line |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if kind == TRAIN and state.max_steps > state.global_step > self._began_at:
            each = (time.monotonic() - self._started) / (state.global_step - self._began_at)
            line["seconds_left"] = round(each * (state.max_steps - state.global_step), 1)
        marks = self._remember(line, args)
        self.newest = line | ({"marks": marks} if marks else {})
        if kind == EVAL:
            self._evaluated += float(logs.get("eval_runtime", 0.0))
            if self._best is not None:
                self.newest |= {"best": self._best[0], "best_step": self._best[1]}
        self._keep(self.newest)

    def _figures(self, args: Any, state: Any) -> dict[str, float]:
        now, seen = time.monotonic(), state.num_input_tokens_seen
        seconds = max(now - self._logged - self._evaluated, 1e-9)
        figures = {}
        if seen > self._tokens:
            figures["tokens_per_second"] = round((seen - self._tokens) / seconds, 1)
        if (memory := peak_memory(args.device)) is not None:
            figures["peak_memory_gb"] = round(memory / 1e9, 3)
        self._logged, self._tokens, self._evaluated = now, seen, 0.0
        return figures

    def _remember(self, line: dict[str, Any], args: Any) -> list[str]:
        """Take a line into what later ones are compared with; what to mark it with."""
        value = line.get("loss" if line["kind"] == TRAIN else _metric(args, line))
        if value is None or not math.isfinite(value):
            return [NOT_FINITE]
        if line["kind"] == TRAIN:
            # A loss that compares answers with each other is about 0, whatever they earn.
            spike = "reward" not in line and is_spike(value, self._losses)
            self._losses.append(value)
            norm = line.get("grad_norm")
            return [SPIKE] * spike + [NOT_FINITE] * (norm is not None and not math.isfinite(norm))
        sign = -1 if _greater_is_better(args, _metric(args, line)) else 1
        if self._best is None or sign * value < sign * self._best[0]:
            self._best, self._worse = (value, line["step"]), 0
            return [BEST]
        self._worse += line["step"] > self._best[1]
        return [RISING] if self._worse >= _RISES else []

    def _keep(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._write(self._file.append, line)
        elif not self._failed:
            self._early.append(line)

    def _write(self, function: Any, *given: Any) -> Any:
        """A log that cannot be written does not end the run: a warning is given once."""
        try:
            return function(*given)
        except Exception as error:
            if not self._failed:
                log.warning("metrics.jsonl is incomplete: %s", error)
            self._failed = True
            return None


def _metric(args: Any, line: dict[str, Any]) -> str:
    """The name of the metric that evaluations are compared by; the loss where the line does not have it."""
    name = str(getattr(args, "metric_for_best_model", None) or "loss")
    name = name if name.startswith("eval_") else f"eval_{name}"
    return name if name in line else "eval_loss"


def _greater_is_better(args: Any, name: str) -> bool:
    greater = getattr(args, "greater_is_better", None)
    return not name.endswith("loss") if greater is None or name == "eval_loss" else bool(greater)
