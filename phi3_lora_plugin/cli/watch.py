"""`phi3-lora watch`: the loss curve of a run in the terminal, while it runs."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from rich.console import Console

_LINES = 6  # of the log, below the curve


class WatchError(Phi3LoraError):
    """A folder that there is nothing to watch in."""


def watch_command(
    run: Annotated[Path, typer.Argument(help="Output folder of a run.")],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print the state and exit.")] = False,
) -> None:
    """Show the loss curve of a run in the terminal.

    Follows the run until it ends. Without a terminal, or with --once, prints what there is and exits.
    """
    from rich.console import Console
    from rich.live import Live

    from phi3_lora_plugin.store.run_file import RUNNING

    if isinstance(sys.stdout, io.TextIOWrapper):  # braille dots, which the terminal's encoding may not have
        sys.stdout.reconfigure(errors="replace")
    if not run.is_dir():
        raise WatchError(f"{run} is not a folder; pass the output folder of a run")
    console = Console(highlight=False, markup=False)
    status, lines = _look(run)
    if once or not console.is_terminal or status != RUNNING:
        _print_all(console, run, status, lines)
        return
    try:
        with Live(_view(console, run, status, lines), console=console, auto_refresh=False) as live:
            while status == RUNNING:
                time.sleep(every)
                status, lines = _look(run)
                live.update(_view(console, run, status, lines), refresh=True)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _look(run: Path) -> tuple[str, list[dict[str, Any]]]:
    from phi3_lora_plugin.small_file import BadFile
    from phi3_lora_plugin.store.metrics_file import METRICS, read_metrics
    from phi3_lora_plugin.store.run_file import RUN, read_run

    try:
        lines = read_metrics(run)
    except BadFile as error:
        raise WatchError(f"{run / METRICS} {error}") from error
    status = str(read_run(run).get("status") or "")
    if not lines and not status:
        raise WatchError(f"{run} has nothing of a run (no {RUN} or {METRICS}); pass the output folder of a run")
    return status or "status unknown", lines


def _view(console: Console, run: Path, status: str, lines: list[dict[str, Any]]) -> Any:
    """Curve and newest lines, no higher than the terminal."""
    from rich.console import Group
    from rich.text import Text

    from phi3_lora_plugin.report.terminal_chart import terminal_chart
    from phi3_lora_plugin.training.log_line import log_line, style_of

    # The name alone: the end of a long path would hide how the run is.
    head = Text(f"{run.resolve().name}: {status}", style="bold", no_wrap=True, overflow="ellipsis")
    room = console.height - 8  # the head, and what the axes take
    count = max(1, min(_LINES, room - 5))
    height = max(2, min(20, room - count))
    chart = terminal_chart(lines, console.width, height, colour=not console.no_color)
    newest = [Text(log_line(line), style=style_of(line), no_wrap=True) for line in lines[-count:]]
    curve = Text.from_ansi(chart, no_wrap=True, overflow="crop") if chart else Text("no step has been logged yet")
    return Group(head, curve, *newest)


def _print_all(console: Console, run: Path, status: str, lines: list[dict[str, Any]]) -> None:
    """Every line once, and the curve below them."""
    from phi3_lora_plugin.report.terminal_chart import terminal_chart
    from phi3_lora_plugin.training.log_line import log_line, style_of

    for line in lines:
        console.print(log_line(line), style=style_of(line) or None, soft_wrap=True)
    if chart := terminal_chart(lines, min(console.width, 100)):
        console.print(chart, soft_wrap=True)
    console.print(f"{run}: {status}" + ("" if lines else ", no step has been logged yet"), soft_wrap=True)
