"""The whole examination, in the order in which one thing needs another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from phi3_lora_plugin.doctor.extras import extras
from phi3_lora_plugin.doctor.finding import Finding, Report
from phi3_lora_plugin.doctor.host_check import hosts
from phi3_lora_plugin.doctor.libraries import libraries
from phi3_lora_plugin.doctor.places import places
from phi3_lora_plugin.doctor.plugin_check import plugins
from phi3_lora_plugin.doctor.self_test import self_test
from phi3_lora_plugin.doctor.versions import versions
from phi3_lora_plugin.plugins.contain import describe

CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "libraries": libraries,
    "extras": extras,
    "machine": places,
    "plugins": plugins,
    "hosts": hosts,
    "self-test": self_test,
}


def examine(train: bool = True, say: Callable[[str], None] | None = None) -> Report:
    """Look at everything; a check that fails itself is a problem like any other.

    Args:
        train: run the self-test too.
        say: is called with the name of each check before it begins.
    """
    found: list[Finding] = []
    for name, check in CHECKS.items():
        if name == "self-test" and not train:
            continue
        if say is not None:
            say(name)
        try:
            found += check()
        except Exception as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            remedy = f"pip install {missing}" if missing else "report this output: the check itself should never fail"
            found.append(Finding(name, "check", f"could not be finished: {describe(error)}", "problem", remedy))
    return Report(tuple(found))
