"""`phi3-lora doctor`: what works here, what does not, and what to do."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from phi3_lora_plugin.cli.overrides import AsJson

if TYPE_CHECKING:
    from phi3_lora_plugin.doctor.finding import Report

_MARKS = {"ok": " ", "note": "~", "problem": "!"}


def doctor_command(
    as_json: AsJson = False,
    train: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Train, save and reload something tiny.")
    ] = True,
) -> None:
    """Check this machine, and print what an issue report needs.

    Exit code 1: something will fail; each problem has its remedy next to it.
    """
    from rich.console import Console

    from phi3_lora_plugin.doctor.examine import examine

    console = Console(stderr=True, highlight=False, markup=False)
    with console.status("looking") as status:
        report = examine(train, lambda name: status.update(f"looking at {name}"))
    print(report.to_json() if as_json else _text(report))
    if report.problems:
        raise typer.Exit(1)


def _text(report: Report) -> str:
    """Findings under their headings, 80 columns wide; `!` is a problem and `~` a note."""
    lines: list[str] = []
    area = ""
    for finding in report.findings:
        if finding.area != area:
            lines += ["", finding.area]
            area = finding.area
        mark = _MARKS[finding.state]
        lines += _wrapped(f"{mark} {finding.name}: {finding.text}")
        if finding.remedy and finding.state != "ok":
            lines += _wrapped(f"    -> {finding.remedy}")
    count = len(report.problems)
    lines += ["", f"{count} problem{'s'[: count != 1]}" if count else "no problems"]
    return "\n".join(lines).lstrip("\n")


def _wrapped(text: str) -> list[str]:
    # Paths and commands stay whole, to be copied.
    return textwrap.wrap(text, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
