"""One line of `metrics.jsonl` as people read it, within 80 columns where nothing is unusual."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from phi3_lora_plugin.store.metrics_file import EVAL

#: What `marks` of a line can hold.
BEST, RISING, SPIKE, NOT_FINITE = "best", "rising", "spike", "not finite"
#: How `rich` shows a line with such a mark.
STYLES = {NOT_FINITE: "bold red", SPIKE: "yellow", RISING: "yellow", BEST: "green"}


def log_line(line: Mapping[str, Any], steps: int | None = None) -> str:
    """The text of a line; `steps` is how many the run has, if known."""
    evaluated = line["kind"] == EVAL
    kind = "eval_" if evaluated else ""
    marks = line.get("marks") or ()
    # Where answers earn rewards, the loss says little: it compares them with each other.
    name = f"{kind}reward" if f"{kind}reward" in line else f"{kind}loss"
    parts = [f"step {line['step']}" + (f"/{steps}" if steps else "")]
    parts.append(f"{name.replace('_', ' ')} {_number(line.get(name))}")
    parts += ["NOT FINITE"] if NOT_FINITE in marks else []
    parts += ["SPIKE"] if SPIKE in marks else []
    if (accuracy := line.get(f"{kind}rewards/accuracies")) is not None:
        parts.append(f"accuracy {accuracy:.2f}")
    return "  ".join([*parts, *(_standing(line, marks, name) if evaluated else _pace(line))])


def style_of(line: Mapping[str, Any]) -> str:
    """The style of the first of `STYLES` that a line is marked with; empty if it is not."""
    return next((style for mark, style in STYLES.items() if mark in (line.get("marks") or ())), "")


def duration(seconds: float) -> str:
    """As a clock shows it."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _pace(line: Mapping[str, Any]) -> list[str]:
    """How a step of training went along."""
    parts = []
    if (rate := line.get("learning_rate")) is not None:
        parts.append(f"lr {rate:.1e}")
    if (speed := line.get("tokens_per_second")) is not None:
        parts.append(f"{speed:,.0f} tokens/s")
    if (memory := line.get("peak_memory_gb")) is not None:
        parts.append(f"{memory:.{1 if memory < 10 else 0}f} GB")
    if (left := line.get("seconds_left")) is not None:
        parts.append(f"ETA {duration(left)}")
    return parts


def _standing(line: Mapping[str, Any], marks: Collection[str], name: str) -> list[str]:
    """How an evaluation compares with those before it."""
    parts = []
    if line["step"] == 0:
        parts.append("before training")
    elif BEST in marks:
        parts.append("best so far")
    elif (best := line.get("best")) is not None:
        parts.append(f"best {_number(best)} at step {line.get('best_step')}")
    if RISING in marks:
        parts.append(f"{'FALLING' if name == 'eval_reward' else 'RISING'}: train less")
    return parts


def _number(value: Any) -> str:
    return "not a number" if value is None else f"{value:.4f}"
