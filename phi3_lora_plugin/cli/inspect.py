"""`phi3-lora inspect`: what a folder is, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from phi3_lora_plugin.cli.overrides import AsJson


def inspect_command(
    path: Annotated[str, typer.Argument(help="Model, tokenizer or adapter folder, or hub id.")], as_json: AsJson = False
) -> None:
    """Show what a folder holds, and its problems.

    Names the family, what each preset would train, and a fix for every problem. Exits with 1 where
    something is damaged.
    """
    from phi3_lora_plugin.inspect.inspect import inspect, lines

    found = inspect(path)
    print(json.dumps(asdict(found), indent=2, default=list) if as_json else "\n".join(lines(found)))
    if any(problem.damage for problem in found.problems):
        raise typer.Exit(1)
