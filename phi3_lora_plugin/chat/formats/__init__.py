"""Data formats, one module each, named as `data.format` names them: rows -> canonical messages (see `chat.turns`).

A module has `REQUIRED`, the columns by which a row is recognised, `OPTIONAL`, those that it also reads, and
`adapt(row)`, which says in one sentence what is wrong with a row. To add a format, add a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from phi3_lora_plugin.chat.turns import Message

Adapter = Callable[[Mapping[str, Any]], list[Message]]

_MODULES: dict[str, Any] = {
    found.name: import_module(f"{__name__}.{found.name}")
    for found in sorted(iter_modules(__path__), key=lambda each: each.name)
}
ADAPTERS: dict[str, Adapter] = {name: module.adapt for name, module in _MODULES.items()}
REQUIRED: dict[str, tuple[str, ...]] = {name: module.REQUIRED for name, module in _MODULES.items()}
OPTIONAL: dict[str, tuple[str, ...]] = {name: module.OPTIONAL for name, module in _MODULES.items()}


def detect(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the formats whose columns the row has; more than one is for the caller to refuse."""
    found = [name for name, columns in REQUIRED.items() if all(row.get(column) is not None for column in columns)]
    return [name for name in found if not hasattr(_MODULES[name], "LAST")] or found[:1]
