"""`phi3-lora plugins`: which plugins are installed, what each registers, and what failed and why."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from importlib import metadata
from typing import Annotated, Any

import typer

from phi3_lora_plugin.cli.overrides import AsJson
from phi3_lora_plugin.hookspecs import NAME
from phi3_lora_plugin.plugins.discovery import Plugin, Plugins, PluginWarning, load_plugins
from phi3_lora_plugin.plugins.registry import BLOCK, KINDS
from phi3_lora_plugin.wording import nearest


def plugins_command(
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if anything failed.")] = False,
) -> None:
    """List installed plugins and what they register.

    Plugins that failed to load are listed with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)  # the listing reports the same, in its place
        plugins = load_plugins()
        offers = [(plugin, plugins.registered(plugin)) for plugin in plugins.plugins]
    for plugin, found in offers:
        if "trainer_callbacks" in plugin.hooks:
            found["callbacks"] = []  # which have no names
    if as_json:
        _print_json(plugins, offers)
    else:
        _print(plugins, offers)
    if strict and plugins.failures:
        raise typer.Exit(1)


def _print_json(plugins: Plugins, offers: list[tuple[Plugin, dict[str, list[str]]]]) -> None:
    rows: list[dict[str, Any]] = []
    for plugin, found in offers:
        row = asdict(plugin) | {"registers": {kind: found.get(kind, []) for kind in KINDS}}
        rows.append(row | {"callbacks": "callbacks" in found})
    failures = [
        {"name": failure.name, "distribution": failure.distribution, "problem": str(failure)}
        for failure in plugins.failures
    ]
    print(json.dumps({"plugins": rows, "failures": failures, "blocked": plugins.blocked}, ensure_ascii=False))


def _print(plugins: Plugins, offers: list[tuple[Plugin, dict[str, list[str]]]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Names and messages of plugins are never read as markup: `[qlora]` in a hint would vanish.
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if console.is_terminal:
        table = Table("plugin", "distribution", "version", "registers")
        for plugin, found in offers:
            cells = (plugin.name, plugin.distribution, plugin.version, "\n".join(_lines(found)))
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table, soft_wrap=False)
    else:
        for plugin, found in offers:
            console.print(f"{plugin.name}  {plugin.distribution} {plugin.version}  ({plugin.target})")
            for line in _lines(found):
                console.print(f"  {line}")
    for failure in plugins.failures:
        console.print(f"failed: {failure}", style="red")
    if plugins.blocked:
        console.print(f"blocked by {BLOCK}: {', '.join(plugins.blocked)}", style="yellow")
    there = {point.name for point in metadata.entry_points(group=NAME)}
    for name in plugins.blocked:
        if name not in there:
            console.print(f"{BLOCK}: no plugin is named {name!r}{nearest(name, there)}", style="yellow")


def _lines(found: dict[str, list[str]]) -> list[str]:
    return [f"{kind}: {', '.join(names)}" if names else kind for kind, names in found.items()] or ["nothing"]
