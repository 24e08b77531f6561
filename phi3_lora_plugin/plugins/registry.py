"""What the loaded plugins offer: models, data formats and recipes by name, callbacks for a run, and what failed.

A plugin that was only found may fail softly: one warning, remembered. A thing that was asked for by name fails hard,
and its error repeats what failed to load.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.plugins.contain import add_note, clean, describe, prints_on_stderr, shown
from phi3_lora_plugin.wording import nearest

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from phi3_lora_plugin.recipe import Recipe

BLOCK = "PHI3_LORA_BLOCK_PLUGINS"
KINDS = {"models": "model loader", "dataset_adapters": "data format", "recipes": "recipe", "exporters": "export target"}
OURS = "phi3-lora-plugin"  # our own distribution, whose errors are not wrapped
_NAME_PATTERN = re.compile(r"[^\W_][\w.+-]{0,99}")  # never a path: `a/b`, `..` and `` are refused
_LISTED = 12  # names in a message
_EVENTS = ("on_init_end", "on_train_begin", "on_step_end", "on_save")  # what every TrainerCallback inherits


class PluginError(Phi3LoraError):
    """A plugin, a clash between two, or a name that is not registered; the message names the plugin and the fix."""


class PluginWarning(UserWarning):
    """A plugin that was found but cannot be used; the others continue without it."""


@dataclass(frozen=True)
class Plugin:
    """A plugin that loaded: its entry point, the distribution that brought it, and the hooks it implements."""

    name: str
    distribution: str
    version: str
    target: str
    hooks: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether this package brought it."""
        return re.sub(r"[-_.]+", "-", self.distribution).lower() == OURS

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution} {self.version})"


@dataclass(frozen=True)
class Failure:
    """A plugin, or one hook of it, that failed: who, at what, and the exception as it was raised."""

    name: str
    distribution: str
    doing: str
    error: BaseException

    def __str__(self) -> str:
        return f"plugin {self.name!r} ({self.distribution}) {self.doing}: {describe(self.error)}{_hint(self)}"


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
        """Return everything registered of `kind` ("models", "dataset_adapters", "recipes" or "exporters") by name.

        A name that two plugins claim is left out: `pick` explains why.
        """
        return dict(self._collect(kind).values)

    def load_model(self, recipe: Recipe) -> tuple[Any, Any]:
        """Load model and tokenizer by the loader that the recipe names.

        Raises:
            PluginError: no plugin has such a loader, or another package's loader raised; names the plugin.
            Phi3LoraError: what is wrong with the model or the recipe.
        """
        name = recipe.model.loader
        load, owner = self.pick("models", name), self.owner("models", name)
        if not owner.is_ours:
            load = _contained(owner, f"model loader {name!r} failed", load)
        made = load(recipe)
        if not isinstance(made, tuple | list) or len(made) != 2:
            raise PluginError(f"{owner}: model loader {name!r} gave {shown(made)}; expected (model, tokenizer)")
        return made[0], made[1]

    def adapters(self, wanted: str = "auto") -> dict[str, Any]:
        """Return the data formats' readers by name; an error raised by another package's names its plugin.

        Raises `PluginError` where two plugins claim the name `wanted`.
        """
        found = self._collect("dataset_adapters")
        if wanted in found.clashes:
            raise found.clashes[wanted]
        return {
            name: adapt if found.owners[name].is_ours else _contained(found.owners[name], "", adapt)
            for name, adapt in found.values.items()
        }

    def pick(self, kind: str, name: str) -> Any:
        """Return the one value registered as `name`; raise `PluginError` where there is none, or two."""
        found = self._collect(kind)
        if name in found.clashes:
            raise found.clashes[name]
        if name in found.values:
            return found.values[name]
        lines = [
            f"no {KINDS[kind]} is named {name!r}{nearest(name, found.values)}",
            f"available: {_available(kind, found.values)}",
            *(f"failed: {failure}" for failure in self.failures),
        ]
        if self.blocked:
            lines.append(f"blocked by {BLOCK}: {', '.join(self.blocked)}")
        raise PluginError("\n".join(lines))

    def owner(self, kind: str, name: str) -> Plugin:
        """Return the plugin that registered `name`; raises as `pick` does."""
        self.pick(kind, name)
        return self._collect(kind).owners[name]

    def contested(self, kind: str) -> dict[str, str]:
        """Return the names of `kind` that more than one plugin claims, each with who does and what to do about it."""
        return {name: str(clash) for name, clash in self._collect(kind).clashes.items()}

    def registered(self, plugin: Plugin) -> dict[str, list[str]]:
        """Return the names that `plugin` owns, by kind; kinds without any are left out."""
        names = {kind: [n for n, owner in self._collect(kind).owners.items() if owner == plugin] for kind in KINDS}
        return {kind: sorted(owned) for kind, owned in names.items() if owned}

    def callbacks(self, recipe: Recipe, only: str | None = None) -> list[TrainerCallback]:
        """Ask every plugin (or the one named `only`) for its callbacks; one list, each instance once, by plugin name.

        A training run must not continue without a callback that someone relies on, so an exception here is not
        isolated: it leaves as `PluginError`, naming the plugin.
        """
        found: list[TrainerCallback] = []
        for plugin in (plugin for plugin in self.plugins if only in (None, plugin.name)):
            for callback in self._callbacks_of(plugin, recipe):
                if not any(callback is known for known in found):
                    found.append(callback)
        return found

    def _callbacks_of(self, plugin: Plugin, recipe: Recipe) -> list[TrainerCallback]:
        def answered() -> list[Any]:
            answers = self._call("trainer_callbacks", plugin, recipe=recipe)
            found = [callback for answer in answers for callback in _as_list(answer)]
            for callback in found:
                if isinstance(callback, type) or not all(callable(getattr(callback, event, None)) for event in _EVENTS):
                    raise PluginError(
                        f"{plugin}: trainer_callbacks gave {shown(callback)}; "
                        "expected instances of classes derived from transformers.TrainerCallback"
                    )
            return found

        made: list[TrainerCallback] = _contained(plugin, "trainer_callbacks failed", answered)()
        return made

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
            raise PluginError(f"no kind of plugin is named {kind!r}; available: {', '.join(KINDS)}")
        if kind in self._found:
            return self._found[kind]
        found = _Found()
        for plugin in self.plugins:
            mine: dict[str, Any] = {}
            clashes = set(found.clashes)
            failures: list[tuple[str, BaseException]] = []
            try:
                with prints_on_stderr():
                    self._call(f"register_{kind}", plugin, register=_registrar(kind, plugin, mine, found, self.strict))
                new = [found.clashes[name] for name in found.clashes if name not in clashes]
                if new and self.strict:  # the plugin swallowed what `register` raised
                    raise new[-1]
                failures += [("cannot have a name", clash) for clash in new]
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                # All or nothing: which names came before the failing line is chance, and must not matter.
                mine = {}
                if self.strict:
                    add_note(error, f"raised by register_{kind} of {plugin}")
                    raise error if isinstance(error, Exception) else PluginError(describe(error)) from None
                failures.append((f"registers none of its {kind}", error))
            found.values.update(mine)
            found.owners.update(dict.fromkeys(mine, plugin))
            for name in found.clashes:
                found.values.pop(name, None)
            for doing, problem in failures:
                failure = Failure(plugin.name, f"{plugin.distribution} {plugin.version}", doing, problem)
                self.failures.append(failure)
                warnings.warn(str(failure), PluginWarning, stacklevel=3)
        for name in found.clashes:
            found.owners.pop(name, None)
        self._found[kind] = found
        return found


def _available(kind: str, values: Mapping[str, Any]) -> str:
    """The names, or the command that lists them where they would fill a screen."""
    if len(values) > _LISTED:
        return f"{len(values)} of them; `phi3-lora {'recipes' if kind == 'recipes' else 'plugins'}` lists them"
    return ", ".join(sorted(values)) or "none"


def _contained(plugin: Plugin, doing: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, but what a plugin raises leaves as `PluginError`, and what it prints goes to stderr."""

    @functools.wraps(call, updated=())
    def contained(*arguments: Any, **named: Any) -> Any:
        try:
            with prints_on_stderr():
                return call(*arguments, **named)
        except (KeyboardInterrupt, Phi3LoraError):
            raise
        except BaseException as error:
            raise PluginError(f"{plugin}: {doing + ': ' if doing else ''}{describe(error)}") from error

    return contained


def _registrar(
    kind: str, plugin: Plugin, mine: dict[str, Any], found: _Found, strict: bool
) -> Callable[[str, Any], None]:
    """Return the `register` that one plugin is called with: it fills `mine` and raises in that plugin's own line.

    A name that is already taken loses only that name; it raises only if `strict`.
    """

    def register(name: str, value: Any) -> None:
        if not isinstance(name, str) or not _NAME_PATTERN.fullmatch(name):
            raise PluginError(f"{shown(name)} cannot name a {KINDS[kind]}; expected letters, digits and any of . _ + -")
        if kind == "recipes":
            if isinstance(value, str | os.PathLike):
                value = Path(value)
            elif not hasattr(value, "read_text"):
                raise PluginError(f"recipe {name!r} is {shown(value)}; expected the path of a YAML file")
        elif not callable(value):
            raise PluginError(f"{KINDS[kind]} {name!r} is {shown(value)}; expected something that can be called")
        owner = plugin if name in mine else found.owners.get(name)
        if owner == plugin and (mine[name] is value or (kind == "recipes" and mine[name] == value)):
            return  # registering the same thing twice is harmless
        if owner is not None:
            advice = f"uninstall one, rename, or block one with {BLOCK}={plugin.name} (or ={owner.name})"
            if owner == plugin:
                advice = "rename one of the two"
            clash = PluginError(f"{KINDS[kind]} {name!r} is claimed twice: by {owner} and by {plugin}; {advice}")
            found.clashes[name] = clash
            if strict:
                raise clash
            return
        mine[name] = value

    return register


def _as_list(answer: Any) -> list[Any]:
    """Return what `trainer_callbacks` answered as a list; it may be any iterable, a generator too."""
    if isinstance(answer, str | bytes) or not hasattr(answer, "__iter__"):
        raise TypeError(f"it returned {shown(answer)}; expected a list of callbacks, or None")
    return list(answer)


def _hint(failure: Failure) -> str:
    """Return how to install what a plugin failed to import, naming the extra of its distribution that has it."""
    if not isinstance(failure.error, ModuleNotFoundError):
        return ""
    name = vars(ImportError)["name"].__get__(failure.error)  # a class of theirs may have any attribute of that name
    missing = clean(name, 100).split(".")[0] if isinstance(name, str) else ""
    if not missing or missing in sys.modules:
        return ""
    distribution = failure.distribution.split()[0]
    package = re.escape(missing).replace("_", "[-_.]")
    try:
        requirements = metadata.requires(distribution) or []
    except Exception:  # not installed, or with a METADATA that cannot be read
        requirements = []
    for requirement in requirements:
        extra = re.match(rf"{package}\b.*\bextra *== *['\"]([^'\"]+)", requirement, re.IGNORECASE)
        if extra:
            return f"; pip install '{distribution}[{extra[1]}]'"
    return f"; {distribution} needs {missing!r}, which is not installed"
