"""The loss curve of a run as text, drawn by plotille in braille dots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.report.charts import points_of, thin
from phi3_lora_plugin.store.metrics_file import EVAL, TRAIN

_TICKS = 12  # columns that plotille puts before the drawing


def terminal_chart(lines: Sequence[Mapping[str, Any]], width: int = 80, height: int = 16, colour: bool = False) -> str:
    """Training loss as a line and held-out loss as `o`, of runs that earn rewards those; "" where there is nothing yet.

    Args:
        lines: of `metrics.jsonl`.
        width: columns of the longest line at most.
        height: of the drawing; its axes take 4 lines more.
        colour: with ANSI colours.
    """
    import plotille

    name = "reward" if any("reward" in line for line in lines) else "loss"
    train, held_out = (
        points_of((line for line in lines if line["kind"] == kind), key)
        for kind, key in ((TRAIN, name), (EVAL, f"eval_{name}"))
    )
    if not train and not held_out:
        return ""
    figure = plotille.Figure()
    figure.width, figure.height = max(20, width - _TICKS - 12), height
    figure.color_mode = "names"
    figure.with_colors = colour
    figure.x_label, figure.y_label = "step", name
    figure.register_label_formatter(float, _label)
    figure.register_label_formatter(int, _label)
    every = [*train, *held_out]
    low, high = min(y for _, y in every), max(y for _, y in every)
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    figure.set_x_limits(min_=0, max_=max(1.0, max(x for x, _ in every)))
    figure.set_y_limits(min_=low - margin, max_=high + margin)
    if train:
        figure.plot(*_columns(train), lc="blue" if colour else None)
    if held_out:
        figure.scatter(*_columns(held_out), lc="red" if colour else None, marker="o")
    figure.origin = False
    drawn = str(figure.show())
    if not colour:
        drawn = "\n".join(line[:width].rstrip(" \u2800") for line in drawn.rstrip().splitlines())
    return drawn + (f"\n{'':{_TICKS}}line: training {name}, o: held-out {name}" if held_out and train else "")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    kept = thin(points)
    return [x for x, _ in kept], [y for _, y in kept]


def _label(value: float, chars: int, delta: float, left: bool = False) -> str:
    """A tick: steps are whole, losses have four digits."""
    text = f"{value:,.0f}" if left or abs(value) >= 100 else f"{value:.4g}"
    return text.ljust(chars) if left else text.rjust(chars)
