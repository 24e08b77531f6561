"""The page itself: what a run's folder says, or what data is, as one HTML file."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.report_view import fates, printable, short_names
from phi3_lora_plugin.lora.plan import ranges
from phi3_lora_plugin.report.charts import Chart, bar_chart, charts_of
from phi3_lora_plugin.report.run_folder import RunFolder, figures, read_run_folder
from phi3_lora_plugin.store.layout import replace_file
from phi3_lora_plugin.store.metrics_file import TRAIN
from phi3_lora_plugin.store.run_file import DONE, FAILED, INTERRUPTED, KILLED, RUNNING
from phi3_lora_plugin.wording import human

if TYPE_CHECKING:
    import jinja2

    from phi3_lora_plugin.chat.marked import MarkedRow
    from phi3_lora_plugin.chat.report import DataReport

REPORT = "report.html"
_SHOWN = 20  # of a list; the files of the run have the rest
_CHECKPOINTS = 60
_DETAILED = 8  # runs side by side that have their own sections; of more, their own pages have them
_TEXT = 2000  # characters of a prompt, an answer, a value or an error
_ROWS = 300_000  # characters of all rows in colour, so that a page stays below 2 MB
#: What a status means to a reader, by the status in run.json.
_STATUS = {DONE: "finished", INTERRUPTED: "interrupted", FAILED: "failed", KILLED: "killed", RUNNING: "still running"}


def write_report(run: Path) -> Path:
    """Write `report.html` into a run's folder; its path.

    Raises:
        ReportError: nothing in the folder is of a run.
        OSError: it cannot be written.
    """
    path = run / REPORT
    replace_file(path, render_runs([read_run_folder(run)]).encode("utf-8"))
    return path


def try_report(run: Path) -> str | None:
    """`write_report` for the end of a run, which no report may fail: why there is none, or None."""
    try:
        write_report(run)
    except Exception as error:
        return f"{run / REPORT} was not written: {type(error).__name__}: {error}"
    return None


def render_runs(runs: Sequence[RunFolder]) -> str:
    """The page of one run, or of several side by side."""
    labels = _labels(runs)
    all_figures = [figures(run) for run in runs]
    names = list(dict.fromkeys(name for found in all_figures for name in found))
    return _template("run.html.jinja").render(
        title=labels[0] if len(runs) == 1 else f"{len(runs)} runs side by side",
        detailed=len(runs) <= _DETAILED,
        runs=[
            _view(run, label, len(runs) == 1, len(runs) <= _DETAILED) for run, label in zip(runs, labels, strict=True)
        ],
        figures=[(name, [found.get(name, "") for found in all_figures]) for name in names],
        charts=charts_of(runs, labels),
        differences=_differences(runs) if len(runs) > 1 else [],
    )


def render_data(report: DataReport, rows: Sequence[MarkedRow], title: str) -> str:
    """The page about data alone."""
    return _template("data.html.jinja").render(
        title=title, data=_data_view(report), rows=_fitting([asdict(row) for row in rows])
    )


def _view(run: RunFolder, label: str, alone: bool, detailed: bool) -> dict[str, Any]:
    """One run as the template shows it: rows if it is the only one, its data unless there are many."""
    coverage = run.part("coverage")
    largest = max((update.norm for update in run.updates), default=0.0)
    return {
        "label": label,
        "folder": str(run.folder),
        "status": _STATUS.get(run.status, "unknown"),
        "good": run.status == DONE,
        "error": _clipped(str(run.facts.get("error") or "")),
        "marks": _what_happened(run),
        "about": _about(run),
        "samples": _samples(run),
        "interrupted": run.status in (INTERRUPTED, FAILED, KILLED),
        "data": _data_view(run.data) if run.data is not None and detailed else None,
        "rows": _fitting(run.part("rows")) if alone else [],
        "settings": [replace(one, value=_clipped(one.value)) for one in run.settings],
        "notes": _texts(run.facts.get("notes")),
        "coverage": coverage,
        "trained": sum(row["parameters"] for row in coverage),
        "speed": run.part("speed"),
        "updates": [(update, 100 * update.norm / largest if largest else 0) for update in run.updates],
        "checkpoints": run.checkpoints[:_CHECKPOINTS],
        "more_checkpoints": len(run.checkpoints) - _CHECKPOINTS,
        "torn": run.torn[:_CHECKPOINTS],
        "commands": _commands(run),
        "versions": versions if isinstance(versions := run.facts.get("versions"), dict) else {},
    }


def _what_happened(run: RunFolder) -> list[str]:
    """Sentences about steps that a reader should look at."""
    said = []
    for mark, words in (("not finite", "loss or gradient not finite"), ("spike", "loss spiked")):
        steps = [f"{line['step']:,}" for line in run.of(TRAIN) if mark in (line.get("marks") or ())]
        if steps:
            more = f" and {len(steps) - 10:,} more" if len(steps) > 10 else ""
            said.append(f"{words} at step {', '.join(steps[:10])}{more}")
    evaluated = [line for line in run.lines if line.get("eval_loss") is not None]
    if evaluated and "rising" in (evaluated[-1].get("marks") or ()):
        said.append(
            f"the held-out {'reward falls' if 'eval_reward' in evaluated[-1] else 'loss rises'} since step "
            f"{evaluated[-1].get('best_step')}: "
            "fewer epochs may give a better adapter"
        )
    sessions = run.part("sessions")
    if len(sessions) > 1:
        said.append(f"resumed {len(sessions) - 1} time{'s'[: len(sessions) > 2]}")
    return said


def _about(run: RunFolder) -> list[tuple[str, str]]:
    """What, where and when, as far as it is known."""
    from datetime import datetime

    settings = {one.key: one.value.strip("'\"") for one in run.settings}
    found = [("base", settings.get("model.path", "")), ("data", settings.get("data.path", ""))]
    found.append(("folder", str(run.folder)))
    if run.facts.get("device"):
        processes = run.facts.get("processes") or 1
        found.append(("device", f"{run.facts['device']}" + (f", {processes} processes" if processes != 1 else "")))
    sessions = run.part("sessions")
    times = (("started", sessions[0]["started"]), ("ended", sessions[-1].get("ended"))) if sessions else ()
    for name, value in times:
        if value is not None and 0 < value < 1e11:
            found.append((name, datetime.fromtimestamp(value).astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return [(name, value) for name, value in found if value]


def _samples(run: RunFolder) -> list[dict[str, str]]:
    return [
        {name: _clipped(sample[name]) for name in ("prompt", "before", "after", "expected")}
        for sample in run.result.get("samples", ())[:_SHOWN]
    ]


def _commands(run: RunFolder) -> list[tuple[str, str]]:
    """(what it does, the command) for what one may do next."""
    folder, adapter = str(run.folder), str(run.adapter)
    wanted: list[tuple[str, list[str]]] = []
    if run.status in (INTERRUPTED, FAILED, KILLED) and run.settings and run.adapter:
        recipe = os.path.join(folder, "recipe.yaml")
        wanted.append(("Resume the run", ["train", recipe, f"output_dir={folder}", "--resume"]))
    if run.status == RUNNING:
        wanted.append(("Watch the run", ["watch", folder]))
    if run.adapter is not None:
        wanted += [
            ("Talk to the model", ["chat", adapter]),
            ("Measure it", ["eval", adapter]),
            ("Take it to Ollama", ["export", adapter, "--to", "ollama"]),
            ("Check its files", ["verify", folder]),
        ]
    wanted.append(("Make this page again", ["report", folder]))
    return [(title, shlex.join(["phi3-lora", *words])) for title, words in wanted]


def _data_view(report: DataReport) -> dict[str, Any]:
    """A data report as the template shows it."""
    names = short_names([source.name for source in report.sources])
    parts = [("training", report.train), *([("held-out", report.eval)] if report.eval else [])]
    return {
        "report": report,
        "sources": [(names.get(source.name, source.name), source) for source in report.sources[:_SHOWN]],
        "more_sources": len(report.sources) - _SHOWN,
        "mixture": report.mixture[:_SHOWN],
        "unread": list(report.unread.items())[:_SHOWN],
        "parts": parts,
        "charts": [_histogram(name, part.histogram) for name, part in parts if part.histogram],
        "fates": [(title, rows[:_SHOWN], len(rows) - _SHOWN, len(rows)) for title, rows in fates(report) if rows],
    }


def _histogram(name: str, bins: Sequence[tuple[int, int]]) -> Chart:
    return bar_chart(f"Length of {name} rows (tokens)", "rows", [(f"≤ {limit:,}", count) for limit, count in bins])


def _differences(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; `output_dir` never is."""
    values = [{setting.key: setting.value for setting in run.settings} for run in runs]
    keys = dict.fromkeys(key for one in values for key in one if key != "output_dir")
    rows = [(key, [one.get(key, "") for one in values]) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def _labels(runs: Sequence[RunFolder]) -> list[str]:
    """A name for each run that no other has: its recipe's, else as much of the end of its path as it takes."""
    names = [run.name for run in runs]
    if len(runs) == 1:
        return names
    paths = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        ends = ["/".join(parts[-length:]) for parts in paths]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{number}: {name}" for number, name in enumerate(names, 1)]  # one run given twice


def _fitting(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first rows, as many as fit on a page."""
    kept: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        size += 200 + sum(len(piece["text"]) + 40 for piece in row["pieces"])
        if size > _ROWS and kept:
            break
        kept.append(row)
    return kept


def _texts(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _clipped(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} [... {len(text) - _TEXT:,} more characters]"


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    folder = files(__package__) / "templates"
    found = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()}
    environment = jinja2.Environment(
        loader=jinja2.DictLoader(found),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        # Control characters and what turns the direction of text are spelled out, as on the terminal.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"bytes": human, "span": ranges, "svg": Markup}
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)
