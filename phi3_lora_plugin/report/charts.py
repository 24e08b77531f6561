"""Curves and bars as inline SVG, drawn by pygal; colours come from the page, so that light and dark are its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.store.metrics_file import EVAL, TRAIN

if TYPE_CHECKING:
    from phi3_lora_plugin.report.run_folder import RunFolder

_POINTS = 240  # of one curve, at most; of many curves together ten times as many
_ROWS = 60  # of a chart's table; less where it has many columns
_DOTS = 30  # a curve of more points has no dots
_WITH_DOTS = 8  # nor have more curves than this in one chart
_WIDTH, _HEIGHT = 500, 230


@dataclass(frozen=True)
class Curve:
    """Points of (step, value) in order; `dots` for single points that no line joins."""

    name: str
    points: tuple[tuple[float, float], ...]
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure: inline SVG, what it shows in words, and its numbers for those who do not see it."""

    title: str
    svg: str
    summary: str
    names: tuple[str, ...]
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


#: Title, and for each curve (its name, kind of line, key in it).
_CHARTS: tuple[tuple[str, tuple[tuple[str, str, str], ...], str], ...] = (
    ("Reward", (("training", TRAIN, "reward"), ("held-out", EVAL, "eval_reward")), ".3g"),
    ("Loss", (("training", TRAIN, "loss"), ("held-out", EVAL, "eval_loss")), ".4g"),
    (
        "Preferred answers",
        (("training", TRAIN, "rewards/accuracies"), ("held-out", EVAL, "eval_rewards/accuracies")),
        ".0%",
    ),
    ("Reward margin", (("training", TRAIN, "rewards/margins"), ("held-out", EVAL, "eval_rewards/margins")), ".3g"),
    ("Length of answers (tokens)", (("training", TRAIN, "completions/mean_length"),), ",.0f"),
    ("Learning rate", (("learning rate", TRAIN, "learning_rate"),), ".2g"),
    ("Tokens a second", (("tokens a second", TRAIN, "tokens_per_second"),), ",.0f"),
    ("Peak memory (GB)", (("peak memory", TRAIN, "peak_memory_gb"),), ".4g"),
    ("Gradient norm", (("gradient norm", TRAIN, "grad_norm"),), ".3g"),
)


def charts_of(runs: Sequence[RunFolder], labels: Sequence[str]) -> list[Chart]:
    """A chart for everything that the runs measured; with several runs, each curve bears its run's label."""
    made = []
    for title, wanted, form in _CHARTS:
        curves = []
        for run, label in zip(runs, labels, strict=True):
            for name, kind, key in wanted:
                points = points_of(run.of(kind), key)
                parts = [name] if len(runs) == 1 else [label] if len(wanted) == 1 else [label, name]
                if points:
                    curves.append(Curve(", ".join(parts), points))
            if title == "Loss" and (spikes := points_of([x for x in run.of(TRAIN) if "spike" in _marks(x)], "loss")):
                curves.append(Curve(", ".join([*([label] if len(runs) > 1 else []), "spikes"]), spikes, dots=True))
        if curves:
            made.append(line_chart(title, curves, form))
    return made


def line_chart(title: str, curves: Sequence[Curve], form: str) -> Chart:
    """Curves over steps."""
    import pygal

    def number(value: float) -> str:
        return format(value, form)

    largest = max(x for curve in curves for x, _ in curve.points)
    tick = _tick([y for curve in curves for _, y in curve.points], form)
    chart = _chart(pygal.XY, tick, x_value_formatter=lambda x: f"{x:,.0f}")
    chart.x_labels = _ticks(largest)
    if len({y for curve in curves for _, y in curve.points}) == 1:
        level = curves[0].points[0][1]
        chart.range = (level - abs(level or 1) * 0.5, level + abs(level or 1) * 0.5)
    for curve in curves:
        shown = thin(curve.points, max(24, min(_POINTS, 10 * _POINTS // len(curves))))
        dots = curve.dots or (len(curve.points) <= _DOTS and len(curves) <= _WITH_DOTS)
        points = (
            [{"value": point, "label": f"{curve.name}, step {point[0]:,.0f}: {number(point[1])}"} for point in shown]
            if dots
            else shown
        )
        chart.add(curve.name, points, show_dots=dots, stroke=not curve.dots, dots_size=4 if curve.dots else 2.5)
    said = "; ".join(
        f"{curve.name} from {number(curve.points[0][1])} at step {curve.points[0][0]:,.0f} "
        f"to {number(curve.points[-1][1])} at step {curve.points[-1][0]:,.0f}"
        for curve in curves
        if not curve.dots
    )
    steps = sorted({x for curve in curves for x, _ in curve.points})
    steps = [x for x, _ in thin(tuple((x, 0.0) for x in steps), max(8, min(_ROWS, 10 * _ROWS // len(curves))))]
    values = [dict(curve.points) for curve in curves]
    rows = [(f"{x:,.0f}", *(number(one[x]) if x in one else "" for one in values)) for x in steps]
    names = tuple(curve.name for curve in curves)
    return Chart(title, _svg(chart, title, said), said, names, ("step", *names), tuple(rows))


def bar_chart(title: str, name: str, bars: Sequence[tuple[str, int]]) -> Chart:
    """Counts by label."""
    import pygal

    chart = _chart(pygal.Bar, lambda value: f"{value:,.0f}")
    chart.x_labels = [label for label, _ in bars]
    chart.add(name, [count for _, count in bars])
    said = "; ".join(f"{label}: {count:,}" for label, count in bars)
    rows = tuple((label, f"{count:,}") for label, count in bars)
    return Chart(title, _svg(chart, title, said), said, (), ("tokens", name), rows)


def thin(points: Sequence[tuple[float, float]], most: int = _POINTS) -> list[tuple[float, float]]:
    """At most about `most` of the points: the first, the last, and of each stretch the lowest and the highest."""
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    size = 2 * len(points) / most  # two of each stretch
    for stretch in range(most // 2):
        part = range(int(stretch * size), min(int((stretch + 1) * size), len(points)))
        if part:
            kept |= {min(part, key=lambda at: points[at][1]), max(part, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def points_of(lines: Iterable[Mapping[str, Any]], key: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of the lines that have a finite number under a key."""
    found = ((line["step"], line.get(key)) for line in lines)
    return tuple((x, float(y)) for x, y in found if isinstance(y, int | float) and math.isfinite(y))


def _marks(line: Mapping[str, Any]) -> Sequence[str]:
    marks = line.get("marks")
    return marks if isinstance(marks, list) else ()


def _ticks(largest: float) -> list[int]:
    """Round numbers of steps from 0, five at most."""
    step = 10 ** max(0, math.floor(math.log10(max(largest, 1))))
    size = next((step * part for part in (0.2, 0.25, 0.5, 1) if largest / (step * part) <= 5), step * 2)
    size = max(1, int(size))
    return list(range(0, int(largest) + size, size))


def _tick(values: Sequence[float], form: str) -> Callable[[float], str]:
    """How ticks are written: with as many digits as tell them from each other."""
    largest, span = max(map(abs, values)), max(values) - min(values)
    if form[-1] != "g" or span <= 0:
        return lambda value: format(value, form)
    digits = min(9, max(3, math.ceil(math.log10(max(largest, 1e-300) / span)) + 2))
    return lambda value: f"{value:.{digits}g}"


def _chart(kind: Any, number: Callable[[float], str], **options: Any) -> Any:
    from pygal.style import Style

    style = Style(label_font_size=15, major_label_font_size=15)  # the largest that the page's style has
    return kind(
        title=None, style=style, width=_WIDTH, height=_HEIGHT, explicit_size=False, show_legend=False, js=(),
        no_prefix=True, margin=6, spacing=6, value_formatter=number, show_x_guides=False, max_scale=6, min_scale=3,
        **options,
    )  # fmt: skip


def _svg(chart: Any, title: str, said: str) -> str:
    """The drawing without pygal's script and colours, with a title and a description."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(chart.render(disable_xml_declaration=True))
    space = "{http://www.w3.org/2000/svg}"
    for name in (f"{space}defs", f"{space}title"):
        for found in root.findall(name):
            root.remove(found)
    for parent in list(root.iter()):
        for tip in [child for child in parent if child.tag == f"{space}title"]:
            parent.remove(tip)  # of ticks, whose text stands there already
        texts = [child for child in parent if child.tag == f"{space}desc"]
        said_by = {child.get("class"): child.text for child in texts}
        for child in texts:
            parent.remove(child)
        if "value" in said_by:  # what a pointer over a dot shows
            tip = ElementTree.Element(f"{space}title")
            tip.text = said_by.get("x_label") or f"{said_by.get('label', '')} {said_by['value']}".strip()
            parent.insert(0, tip)
    for name in ("id", "class"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", f"{title}: {said}"[:600])
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    return ElementTree.tostring(root, encoding="unicode")
