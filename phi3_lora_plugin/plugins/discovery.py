"""Find every installed plugin by entry point, load those that can be loaded, and remember what became of the rest."""

from __future__ import annotations

import os
import re
import sys
import warnings
from contextlib import suppress
from importlib import metadata

import pluggy

from phi3_lora_plugin import hookspecs
from phi3_lora_plugin.hookspecs import NAME
from phi3_lora_plugin.plugins.contain import add_note, clean, describe, prints_on_stderr, shown
from phi3_lora_plugin.plugins.registry import BLOCK, KINDS, Failure, Plugin, PluginError, Plugins, PluginWarning
from phi3_lora_plugin.wording import nearest

__all__ = ["Failure", "Plugin", "PluginError", "PluginWarning", "Plugins", "load_plugins"]


def load_plugins(strict: bool = False) -> Plugins:
    """Load every plugin of entry-point group `phi3_lora_plugin`, sorted by name; each call starts over.

    A plugin that cannot be loaded, or tries to end the process, is skipped with one `PluginWarning` and remembered in
    `.failures`; only Ctrl-C leaves. What plugins print goes to stderr. Names in the environment variable
    `PHI3_LORA_BLOCK_PLUGINS` (split at commas or blanks) are never imported.

    Args:
        strict: Raise the first failure as it is, and call the `register_*` hooks at once, so that clashes and hooks
            that fail are found too. For CI and for authors of plugins.
    """
    manager = pluggy.PluginManager(NAME)
    manager.add_hookspecs(hookspecs)
    blocked = tuple(sorted({name for name in re.split(r"[\s,]+", os.environ.get(BLOCK, "")) if name}))
    loaded: list[Plugin] = []
    failures: list[Failure] = []
    for name, claims in sorted(_claims(failures, strict).items()):
        if name in blocked:
            continue
        where = " and ".join(f"{claim.distribution} {claim.version}, {claim.target}" for claim, _ in claims)
        try:
            if len(claims) > 1:
                raise PluginError("this entry-point name is claimed twice; uninstall one of the two")
            plugin, entry_point = claims[0]
            loaded.append(_load(manager, plugin, entry_point))
        except KeyboardInterrupt:
            print(f"interrupted while plugin {name!r} was imported; {BLOCK}={name} skips it", file=sys.stderr)
            raise
        except BaseException as error:
            with suppress(Exception):
                manager.unregister(name=name)  # older pluggy leaves a plugin half registered
            if strict:
                add_note(error, f"raised by plugin {name!r} ({where})")
                raise error if isinstance(error, Exception) else PluginError(describe(error)) from None
            failures.append(Failure(name, where, "was skipped", error))
    for failure in failures:
        warnings.warn(str(failure), PluginWarning, stacklevel=2)
    plugins = Plugins(manager, tuple(loaded), failures, blocked, strict)
    if strict:
        for kind in KINDS:
            plugins.named(kind)
    return plugins


def _claims(failures: list[Failure], strict: bool) -> dict[str, list[tuple[Plugin, metadata.EntryPoint]]]:
    """Return the entry points of our group by name, read from disk in one scan without importing anything.

    `importlib.metadata.entry_points` would do, but it raises for all when one package's file is malformed, and drops
    distributions whose folder names agree up to the first `-`.
    """
    claims: dict[str, list[tuple[Plugin, metadata.EntryPoint]]] = {}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        try:
            if NAME not in (distribution.read_text("entry_points.txt") or ""):
                continue
            owner, version = _name_and_version(distribution)
            # The first one on the path is the one that Python imports; a checkout often sits next to its install.
            canonical = re.sub(r"[-_.]+", "-", owner).lower()
            if owner != "unknown" and canonical in seen:
                continue
            seen.add(canonical)
            for entry_point in distribution.entry_points.select(group=NAME):
                name, target = clean(entry_point.name, 100), clean(entry_point.value)
                claim = Plugin(name, clean(owner, 100), clean(version, 100), target), entry_point
                if claim not in claims.setdefault(name, []):
                    claims[name].append(claim)
        except Exception as error:
            if strict:
                raise
            where = clean(
                str(getattr(distribution, "_path", distribution.locate_file("")))
            )  # its name may be unreadable too
            failures.append(Failure("?", where, "has an entry_points.txt that cannot be read", error))
    return claims


def _name_and_version(distribution: metadata.Distribution) -> tuple[str, str]:
    """Of a distribution, "unknown" where its metadata is missing.

    importlib.metadata then has an empty message; the backport importlib_metadata, whose distributions take the place of
    Python's own in every process that imports it, raises.
    """
    try:
        about = distribution.metadata
    except FileNotFoundError:
        return "unknown", "unknown"
    return about["Name"] or "unknown", about["Version"] or "unknown"


def _load(manager: pluggy.PluginManager, plugin: Plugin, entry_point: metadata.EntryPoint) -> Plugin:
    """Import and register one plugin; raise for everything that pluggy would let pass or find only at the call."""
    with prints_on_stderr():
        target = entry_point.load()
    # pluggy keeps plugins in sets, and compares each new one with all the others.
    if hash(target) != hash(target) or target == object() or object() == target:
        raise PluginError(f"{shown(target)} equals any other object; remove its __eq__ and __hash__")
    for name, other in manager.list_name_plugin():
        if other is target:
            raise PluginError(f"the same object is loaded already, as plugin {name!r}")
    manager.register(target, name=plugin.name)
    callers = manager.get_hookcallers(target) or []
    if not callers:
        raise PluginError(f"{shown(target)} has no hook; expected functions marked with phi3_lora_plugin.hookimpl")
    known = sorted(name for name in vars(hookspecs) if hasattr(getattr(hookspecs, name), f"{NAME}_spec"))
    for caller in callers:
        for implementation in (i for i in caller.get_hookimpls() if i.plugin is target):
            if caller.spec is None:
                if not implementation.optionalhook:
                    guess = nearest(caller.name, known, f"; available: {', '.join(known)}")
                    raise PluginError(f"implements unknown hook {caller.name!r}{guess}")
            elif switched_off := sorted(set(implementation.kwargnames) & set(caller.spec.argnames)):
                raise PluginError(
                    f"{caller.name} gives argument {switched_off[0]!r} a default, so pluggy never passes it; "
                    "remove the default"
                )
    return Plugin(plugin.name, plugin.distribution, plugin.version, plugin.target, tuple(c.name for c in callers))
