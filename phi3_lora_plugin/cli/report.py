"""`phi3-lora report`: a page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from rich.console import Console

#: What a page about several runs is called, in the working directory.
_COMPARISON = "comparison.html"


class OutputError(Phi3LoraError):
    """A page that cannot be written where it was to go."""


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs.")],
    output: Annotated[
        Path | None, typer.Option(help=f"HTML file; default: RUN/report.html, of several runs {_COMPARISON}.")
    ] = None,
) -> None:
    """Write a page about a run, or about several side by side.

    The page is one HTML file that needs no network.
    """
    from phi3_lora_plugin.report.page import REPORT, render_runs
    from phi3_lora_plugin.report.run_folder import read_run_folder

    found = [read_run_folder(run) for run in runs]
    path = output or (runs[0] / REPORT if len(runs) == 1 else Path(_COMPARISON))
    write_page(path, render_runs(found))


def write_page(path: Path, page: str, console: Console | None = None) -> None:
    """Write a page and say where it is.

    Raises:
        OutputError: it cannot be written.
    """
    from rich.console import Console

    from phi3_lora_plugin.store.layout import replace_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page.encode("utf-8"))
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}; pass --output FILE") from error
    (console or Console(highlight=False)).print(f"wrote {path}", markup=False, soft_wrap=True)
