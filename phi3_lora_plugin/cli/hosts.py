"""`phi3-lora render`, `import` and `host-path`: recipes as other hosts' files, their files as recipes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from phi3_lora_plugin.cli.overrides import Overrides, RecipeName


def render_command(
    recipe: RecipeName,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option("--host", help="axolotl, llamafactory, trl or swift.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Output file; related files go next to it.")] = None,
) -> None:
    """Print a recipe as another host's config.

    Comments name each choice and each setting without a counterpart.
    """
    from phi3_lora_plugin.hosts.render.render import render
    from phi3_lora_plugin.plugins.discovery import load_plugins
    from phi3_lora_plugin.recipe import load_recipe

    plugins = load_plugins()
    made = render(load_recipe(recipe, overrides or (), find=lambda name: plugins.pick("recipes", name)), host)
    if out is None:
        print(made.text, end="")
        if made.beside:
            print(f"--out FILE also writes {', '.join(made.beside)} next to it", file=sys.stderr)
        return
    files = {out: made.text} | {out.parent / name: text for name, text in made.beside.items()}
    _write(files)
    print(f"wrote {', '.join(map(str, files))}", file=sys.stderr)


def import_command(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file of another host.")],
    host: Annotated[str, typer.Option("--host", help="axolotl, llamafactory, trl, torchtune or mlx.")] = "",
    out: Annotated[Path | None, typer.Option("--out", help="Recipe to write.")] = None,
) -> None:
    """Print another host's config as a recipe.

    Each key without an equal is named on stderr, and in a comment of the recipe.
    """
    from phi3_lora_plugin.hosts.read.read import import_config

    made = import_config(config, host)
    for note in made.notes:
        print(f"{made.host}: {note}", file=sys.stderr)
    if out is None:
        print(made.text, end="")
        return
    _write({out: made.text})
    print(f"wrote {out}; check it with: phi3-lora validate {out}", file=sys.stderr)


def _write(files: Mapping[Path, str]) -> None:
    """Write all files, or none where one of them exists."""
    if taken := [str(file) for file in files if file.exists()]:
        print(f"{', '.join(taken)}: already exists; nothing was written", file=sys.stderr)
        raise typer.Exit(2)
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def host_path_command(host: Annotated[str, typer.Argument(help="swift or startup")]) -> None:
    """Print the path of a plugin file or folder for a host.

    For example: swift sft --external_plugins $(phi3-lora host-path swift) ...
    or PYTHONPATH=$(phi3-lora host-path startup) PHI3_LORA_ACTIVATE=1 trl sft ...
    """
    if host == "startup":
        from phi3_lora_plugin.hosts.startup import folder

        print(folder())
        return
    if host != "swift":
        print(f"{host}: available: swift, startup; axolotl needs no path: phi3-lora docs hosts", file=sys.stderr)
        raise typer.Exit(2)
    from phi3_lora_plugin.hosts.swift import plugin_file

    print(plugin_file())
