"""Signs that a run has silently gone wrong: values that are not finite, a loss stuck at exactly zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError


class HealthError(Phi3LoraError, RuntimeError):
    """A run that went wrong and was stopped; nothing of what was wrong has been saved."""


def sick_log(logs: Mapping[str, Any], step: int) -> str | None:
    """Why one line of a Trainer's log shows that the run has gone wrong; None if it does not."""
    for name in ("loss", "grad_norm"):
        value = logs.get(name)
        if value is not None and not math.isfinite(float(value)):
            return (
                f"{name} is {float(value)} at step {step}: the learning rate is too high, a batch has no trained "
                "token, or float16 overflowed; the last good checkpoint is kept"
            )
    return None


def is_zero_loss(logs: Mapping[str, Any]) -> bool:
    """Whether a line of a Trainer's log shows that the training loss was exactly 0, and not just very small.

    Trainers that learn from rewards (GRPO, RLOO, preferences) log them; there a loss of 0.0 is a batch whose answers
    were all equally good, or different enough, and does not show that anything is wrong.
    """
    if any(name.startswith("reward") for name in logs):
        return False
    norm = float(logs.get("grad_norm") or 0.0)
    return "loss" in logs and float(logs["loss"]) == 0.0 and not (math.isfinite(norm) and norm > 0.0)


def zero_loss(times: int, step: int) -> str:
    """The reason to stop after this many logs of a loss of exactly 0."""
    return (
        f"the loss was exactly 0.0 in the last {times} logs, up to step {step}: nothing is trained; look at the labels "
        "(phi3-lora data check), and whether logging_nan_inf_filter hides a loss that is not a number"
    )


#: Earlier losses that a new one is compared with, and how many there have to be.
_WINDOW, _ENOUGH = 20, 5


def is_spike(loss: float, earlier: Sequence[float]) -> bool:
    """Whether a loss stands out from the ones before it.

    It does if it is above their median by more than six times what their own distance to it is (the median absolute
    deviation, which one earlier spike does not move) and by a quarter. Of the last 20; fewer than 5 say nothing.
    """
    window = [value for value in earlier[-_WINDOW:] if math.isfinite(value)]
    if len(window) < _ENOUGH:
        return False
    usual = median(window)
    spread = 1.4826 * median(abs(value - usual) for value in window)  # as a standard deviation, of a normal one
    return loss > usual + max(6 * spread, 0.25 * abs(usual))
