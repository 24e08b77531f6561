"""Plugins that were found, and what failed in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata

from phi3_lora_plugin.doctor.child import run, teller
from phi3_lora_plugin.doctor.finding import Finding
from phi3_lora_plugin.doctor.versions import NAME
from phi3_lora_plugin.hookspecs import NAME as GROUP
from phi3_lora_plugin.plugins.discovery import PluginWarning, load_plugins
from phi3_lora_plugin.plugins.registry import BLOCK, KINDS

AREA = "plugins"
SECONDS = 120


def plugins() -> Iterator[Finding]:
    """Each plugin with what it registers, then each failure; read in a child, which a plugin may end."""
    outcome = run("phi3_lora_plugin.doctor.plugin_check", seconds=SECONDS)
    for line in outcome.lines:
        if "area" in line:
            yield Finding(**line)
    if outcome.ended is not None:
        names = sorted({point.name for point in metadata.entry_points(group=GROUP)} - {"phi3"})
        remedy = f"find the one by {BLOCK}=NAME; there are {', '.join(names) or 'none'}"
        yield Finding(AREA, "loading", f"the process that loaded plugins {outcome.ended}", "problem", remedy)


def look() -> Iterator[Finding]:
    """What loading all plugins in this process finds; one that is missing is ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PluginWarning)
        found = load_plugins()
        offers = [(plugin, found.registered(plugin)) for plugin in found.plugins]
    for plugin, names in offers:
        what = ", ".join(f"{len(some)} {KINDS[kind]}{'s' if len(some) > 1 else ''}" for kind, some in names.items())
        yield Finding(AREA, plugin.name, f"{plugin.distribution} {plugin.version}: {what or 'callbacks'}")
    for failure in found.failures:
        remedy = f"update or uninstall {failure.distribution.split()[0]}, or skip it: {BLOCK}={failure.name}"
        yield Finding(AREA, failure.name, str(failure), "problem", remedy)
    if found.blocked:
        yield Finding(AREA, "blocked", f"{', '.join(found.blocked)}, by {BLOCK}", "note", f"unset {BLOCK}")
    if "phi3" not in found.blocked and not any(plugin.is_ours for plugin, _ in offers):
        remedy = f"pip install --force-reinstall --no-deps {NAME}"
        yield Finding(AREA, "phi3", "the entry point of this package is missing", "problem", remedy)


def main() -> None:
    """Print a finding a line."""
    tell = teller()
    for finding in look():
        tell(asdict(finding))


if __name__ == "__main__":
    main()
