"""`phi3-lora run` and `phi3-lora trl`: other people's scripts, in a process where Phi-3 works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

#: Everything after the command is the script's, options too.
AS_IT_IS = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
Given = Annotated[list[str] | None, typer.Argument(metavar="[ARG]...", help="Options and arguments, as they are.")]


def run_command(arguments: Given = None) -> None:
    """Run a training script, unedited, with Phi-3 support.

    Usage: run [--recipe R] [--callbacks C,C] script.py args...
    """
    from phi3_lora_plugin.run import main

    main(arguments or ["--help"], prog="phi3-lora run")


def trl_command(arguments: Given = None) -> None:
    """Run a command of TRL with Phi-3 support.

    For example: trl sft --config x.yaml ...
    """
    from phi3_lora_plugin.hosts.script import SCRIPTS, run_script

    given = arguments or ["--help"]
    if given[0] in ("-h", "--help"):
        print(f"usage: phi3-lora trl {{{','.join(SCRIPTS)}}} [what `trl` takes]...")
        return
    run_script(given[0], given[1:])


def directly(arguments: Sequence[str]) -> bool:
    """Whether these are for another script, whose exceptions and exit code are its own, and then run it."""
    if not arguments or arguments[0] not in ("run", "trl"):
        return False
    command = run_command if arguments[0] == "run" else trl_command
    command(list(arguments[1:]))
    return True
