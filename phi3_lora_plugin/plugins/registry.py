"""What the loaded plugins offer: models, dataset adapters and recipes by name, callbacks for a run, and what failed.

A plugin that was only found may fail softly: one warning, remembered. A thing that was asked for by name fails hard,
and its error repeats what failed to load.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from phi3_lora_plugin.recipe import Recipe

BLOCK = "PHI3_LORA_BLOCK_PLUGINS"
KINDS = {"models": "model loader", "dataset_adapters": "dataset adapter", "recipes": "recipe"}
_NAME_PATTERN = re.compile(r"[^\W_][\w.+-]*")  # never a path: `a/b`, `..` and `` are refused
_EVENTS = ("on_init_end", "on_train_begin", "on_step_end", "on_save")  # what every TrainerCallback inherits


class PluginError(Phi3LoraError):
    """A plugin, a clash between two, or a name that nobody registered; the message says whose and what to do."""


class PluginWarning(UserWarning):
    """A plugin that was found but cannot be used; the others go on without it."""


@dataclass(frozen=True)
class Plugin:
    """A plugin that loaded: its entry point, the distribution that brought it, and the hooks it implements."""

    name: str
    distribution: str
    version: str
    target: str
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Failure:
    """A plugin, or one hook of it, that failed: who, at what, and the exception as it was raised."""

    name: str
    distribution: str
    doing: str
    error: Exception

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution}) {self.doing}: {_describe(self.error)}{_hint(self)}"


@dataclass(frozen=True)
class _Found:
    """What all plugins together registered of one kind."""

    values: dict[str, Any] = field(default_factory=dict)
    owners: dict[str, Plugin] = field(default_factory=dict)
    clashes: dict[str, PluginError] = field(default_factory=dict)


@dataclass(frozen=True)
class Plugins:
    """The plugins of one `load_plugins()`: what loaded, what failed, and what they register once it is asked for."""

    manager: pluggy.PluginManager
    plugins: tuple[Plugin, ...]
    failures: list[Failure]
    blocked: tuple[str, ...] = ()
    strict: bool = False
    _found: dict[str, _Found] = field(default_factory=dict, repr=False)

    def named(self, kind: str) -> dict[str, Any]:
        """Return everything registered of `kind` ("models", "dataset_adapters" or "recipes") by name.

        Raises `PluginError` when any name of that kind has two owners.
        """
        found = self._collect(kind)
        if found.clashes:
            raise PluginError("\n".join(str(clash) for clash in found.clashes.values()))
        return dict(found.values)

    def pick(self, kind: str, name: str) -> Any:
        """Return the one value registered as `name`; raise `PluginError` where there is none, or two."""
        found = self._collect(kind)
        if name in found.clashes:
            raise found.clashes[name]
        if name in found.values:
            return found.values[name]
        lowered = {known.lower(): known for known in found.values}
        near = get_close_matches(name.lower(), lowered, 1)
        lines = [
            f"no {KINDS[kind]} is named {name!r}" + (f"; did you mean {lowered[near[0]]!r}?" if near else ""),
            f"there is: {', '.join(sorted(found.values)) or 'none'}",
            *(f"failed: {failure}" for failure in self.failures),
        ]
        if self.blocked:
            lines.append(f"blocked by {BLOCK}: {', '.join(self.blocked)}")
        raise PluginError("\n".join(lines))

    def owner(self, kind: str, name: str) -> Plugin:
        """Return the plugin that registered `name`; raises as `pick` does."""
        self.pick(kind, name)
        return self._collect(kind).owners[name]

    def registered(self, plugin: Plugin) -> dict[str, list[str]]:
        """Return the names that `plugin` owns, by kind; kinds of which it owns nothing are left out."""
        names = {kind: [n for n, owner in self._collect(kind).owners.items() if owner == plugin] for kind in KINDS}
        return {kind: sorted(owned) for kind, owned in names.items() if owned}

    def callbacks(self, recipe: Recipe, only: str | None = None) -> list[TrainerCallback]:
        """Ask every plugin (or the one named `only`) for its callbacks; one list, each instance once, by plugin name.

        A training run must not go on without a callback that someone relies on, so an exception here is not
        isolated: it leaves as `PluginError`, naming the plugin.
        """
        found: list[TrainerCallback] = []
        for plugin in (plugin for plugin in self.plugins if only in (None, plugin.name)):
            for callback in self._callbacks_of(plugin, recipe):
                if not any(callback is known for known in found):
                    found.append(callback)
        return found

    def _callbacks_of(self, plugin: Plugin, recipe: Recipe) -> Iterator[TrainerCallback]:
        try:
            answers = [_as_list(answer) for answer in self._call("trainer_callbacks", plugin, recipe=recipe)]
        except Exception as error:
            raise PluginError(f"{plugin}: trainer_callbacks failed: {_describe(error)}") from error
        for callback in (callback for answer in answers for callback in answer):
            if isinstance(callback, type) or not all(callable(getattr(callback, event, None)) for event in _EVENTS):
                raise PluginError(
                    f"{plugin}: trainer_callbacks gave {callback!r}; "
                    "expected instances of classes derived from transformers.TrainerCallback"
                )
            yield callback

    def _call(self, hook: str, plugin: Plugin, **arguments: Any) -> list[Any]:
        """Call one plugin's `hook`, so that what comes back has an owner; hook wrappers of the others still apply."""
        if hook not in plugin.hooks:
            return []
        mine = self.manager.get_plugin(plugin.name)
        implementations = getattr(self.manager.hook, hook).get_hookimpls()
        others = [i.plugin for i in implementations if i.plugin is not mine and not (i.wrapper or i.hookwrapper)]
        answers: list[Any] = self.manager.subset_hook_caller(hook, others)(**arguments)
        return answers

    def _collect(self, kind: str) -> _Found:
        """Run `register_<kind>` of each plugin, on first request and never again."""
        if kind not in KINDS:
            raise PluginError(f"no kind of thing is named {kind!r}; there is: {', '.join(KINDS)}")
        if kind in self._found:
            return self._found[kind]
        found = _Found()
        for plugin in self.plugins:
            mine: dict[str, Any] = {}
            clashes = len(found.clashes)
            try:
                self._call(f"register_{kind}", plugin, register=_registrar(kind, plugin, mine, found))
                if len(found.clashes) > clashes:  # the plugin swallowed what `register` raised
                    raise list(found.clashes.values())[-1]
            except Exception as error:
                # All or nothing: which names came before the failing line is chance, and must not matter.
                if self.strict:
                    error.add_note(f"raised by register_{kind} of {plugin}")
                    raise
                where = f"{plugin.distribution} {plugin.version}"
                failure = Failure(plugin.name, where, f"registers none of its {kind}", error)
                self.failures.append(failure)
                warnings.warn(str(failure), PluginWarning, stacklevel=3)
            else:
                found.values.update(mine)
                found.owners.update(dict.fromkeys(mine, plugin))
        self._found[kind] = found
        return found


def _registrar(kind: str, plugin: Plugin, mine: dict[str, Any], found: _Found) -> Callable[[str, Any], None]:
    """Return the `register` that one plugin is called with: it fills `mine` and raises in that plugin's own line."""

    def register(name: str, value: Any) -> None:
        if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name):
            raise PluginError(f"{name!r} cannot name a {KINDS[kind]}; expected letters, digits and any of . _ + -")
        if kind == "recipes":
            if isinstance(value, str | os.PathLike):
                value = Path(value)
            elif not hasattr(value, "read_text"):
                raise PluginError(f"recipe {name!r} is {value!r}; expected the path of a YAML file")
        elif not callable(value):
            raise PluginError(f"{KINDS[kind]} {name!r} is {value!r}; expected something that can be called")
        owner = plugin if name in mine else found.owners.get(name)
        if owner == plugin and mine[name] == value:
            return  # saying the same thing twice is harmless
        if owner is not None:
            advice = f"uninstall one, rename, or block one with {BLOCK}={plugin.name} (or ={owner.name})"
            if owner == plugin:
                advice = "it has to rename one of the two"
            clash = PluginError(f"{KINDS[kind]} {name!r} is claimed twice: by {owner} and by {plugin}; {advice}")
            found.clashes[name] = clash
            raise clash
        mine[name] = value

    return register


def _as_list(answer: Any) -> list[Any]:
    """Return what `trainer_callbacks` answered as a list; it may be any iterable, a generator too."""
    if isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
        raise TypeError(f"it returned {answer!r}; expected a list of callbacks, or None")
    return list(answer)


def _describe(error: Exception) -> str:
    """Return type, message and, where the plugin's own code raised, the line."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    last = traceback.extract_tb(error.__traceback__)[-1:]
    foreign = (__file__, "<", os.path.dirname(pluggy.__file__), os.path.dirname(os.path.dirname(metadata.__file__)))
    if last and not last[0].filename.startswith(foreign):
        text += f" ({last[0].filename}:{last[0].lineno})"
    return text


def _hint(failure: Failure) -> str:
    """Return how to install what a plugin failed to import, naming the extra of its distribution that holds it."""
    missing = (getattr(failure.error, "name", None) or "").split(".")[0]
    if not isinstance(failure.error, ModuleNotFoundError) or not missing or missing in sys.modules:
        return ""
    distribution = failure.distribution.split()[0]
    package = re.escape(missing).replace("_", "[-_.]")
    try:
        requirements = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        extra = re.match(rf"{package}\b.*\bextra *== *['\"]([^'\"]+)", requirement, re.IGNORECASE)
        if extra:
            return f"; pip install '{distribution}[{extra[1]}]'"
    return f"; {distribution} needs {missing!r}, which is not installed"
