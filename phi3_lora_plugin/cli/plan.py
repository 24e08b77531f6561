"""`phi3-lora plan`: what a run would take, and whether it fits, before anything is loaded."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from phi3_lora_plugin.cli.overrides import AsJson, Overrides, RecipeName, or_demonstration
from phi3_lora_plugin.wording import human


def plan_command(
    recipe: RecipeName = "tiny-cpu",
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Memory limit, for example 24GB; default: this machine's.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda (need not be present) or auto.")] = "auto",
    config: Annotated[Path | None, typer.Option(help="Model config.json, if model.path is missing.")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Print overrides for the fastest settings that fit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Estimate memory, steps and time before training.

    Exit code 1: it does not fit.
    """
    from rich.console import Console

    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import Recipe, load_recipe

    recipe, overrides = or_demonstration(recipe, overrides)
    plugins = load_plugins()

    def read(more: Sequence[str] = ()) -> Recipe:
        return load_recipe(recipe, [*(overrides), *more], find=lambda name: plugins.pick("recipes", name))

    run = read()

    # On a terminal one line says what is being done; elsewhere only the tries of --fit, which take a second each.
    console = Console(stderr=True, highlight=False, markup=False)
    tried = 0
    with console.status(f"planning {run.name}: starting") as status:
        from phi3_lora_plugin.model.config import read_config
        from phi3_lora_plugin.model.published import read_planning_config
        from phi3_lora_plugin.plan.feed import encoded_lengths
        from phi3_lora_plugin.plan.fit import fit as find_fit
        from phi3_lora_plugin.plan.machine import size
        from phi3_lora_plugin.plan.plan import Plan, plan
        from phi3_lora_plugin.plan.view import lines

        room = size(memory) if memory is not None else None
        native = read_config(config) if config else read_planning_config(run.model.path, run.model.revision)
        lengths = None
        if run.data.path is not None:
            status.update(f"planning {run.name}: encoding rows")
            lengths = encoded_lengths(run, plugins.adapters(run.data.format), native)
        status.update(f"planning {run.name}: one step, on tensors without storage")
        made = plan(run, room, device, native, lengths)

        def replan(more: Sequence[str]) -> Plan:
            nonlocal tried
            tried += 1
            status.update(f"planning {run.name}: settings {tried}, {' '.join(more)}")
            other = plan(read(more), made.memory, made.device, native, lengths, made.program)
            console.print(f"tried {' '.join(more)}: {human(other.peak)}", soft_wrap=True)
            return other

        found = find_fit(made, replan, made.memory) if fit and made.memory is not None else None

    if not fit:
        print(made.to_json() if as_json else "\n".join(lines(made)))
        raise typer.Exit(1 if made.fits is False else 0)
    if made.memory is None:
        print("--fit needs a memory limit: pass --memory", file=sys.stderr)
        raise typer.Exit(2)
    if as_json:
        shown = None if found is None else {"overrides": list(found.overrides), "plan": asdict(found.plan)}
        print(json.dumps({"plan": asdict(made), "fit": shown}))
    elif found is None:
        print("\n".join(lines(made)))
        print("does not fit, even at batch size 1 in 4-bit: lower data.max_length or use a smaller model")
    else:
        print("\n".join(lines(found.plan)))
        print(
            "the fastest settings that fit:" if found.overrides else "these settings are already the fastest that fit:"
        )
        print(f"  {shlex.join(['phi3-lora', 'train', recipe, *(overrides), *found.overrides])}")
    raise typer.Exit(1 if found is None else 0)
