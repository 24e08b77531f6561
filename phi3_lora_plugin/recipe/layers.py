"""A recipe's file, its parents and the overrides as layers, each under our names, laid over one another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from phi3_lora_plugin.recipe.sections import PEFT_NAMES
from phi3_lora_plugin.recipe.training import translate
from phi3_lora_plugin.recipe.yaml_file import Key, Layer, Problem, parse_value, read_file
from phi3_lora_plugin.shipped import shipped
from phi3_lora_plugin.wording import nearest, shorten

Find = Callable[[str], Path | Traversable | str | None]

#: Share that is held out where rows replace the embedded ones.
HELD_OUT = 0.1

SECTIONS = ("model", "data", "lora", "training", "preference", "grpo", "checkpoint", "about")
_NAME = re.compile(r"[^\W_][\w.+-]*")  # as discovery has it: never a path
_YAML = re.compile(r"\.ya?ml$", re.IGNORECASE)
_DATA = re.compile(r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|txt)(\.gz|\.zst|\.xz)?$", re.IGNORECASE)
#: Parents in a chain; each is a file that people have to read to know what a run does.
MAX_PARENTS = 16


@dataclass
class Chain:
    """A recipe's file and its parents', youngest first; `problems` are about finding them."""

    name: str
    layers: list[Layer] = field(default_factory=list)
    files: list[Path | Traversable] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def shipped_preset(name: str) -> Traversable | None:
    """The preset of that name among those in this package, or None."""
    file = shipped("recipes") / f"{name}.yaml"
    return file if file.is_file() else None


def shipped_names() -> list[str]:
    """Names of the presets in this package."""
    found = shipped("recipes").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in found if file.name.endswith(".yaml"))


def read_chain(wanted: str | Path, find: Find) -> Chain:
    """Read `wanted` and follow `extends`; everything that is wrong on the way is in the chain's problems.

    A file may extend another by a path relative to itself, ending in .yaml; a preset of any package, only by name.
    """
    chain = Chain(Path(wanted).stem if _is_path(wanted) else str(wanted))
    names = [chain.name]
    by_path = _is_path(wanted)
    try:
        if isinstance(wanted, str) and _DATA.search(wanted):
            raise ValueError(f"{shorten(wanted)} is data; name a recipe, then the data: RECIPE data.path={wanted}")
        if by_path and Path(wanted).expanduser().is_dir():
            raise ValueError(f"{wanted} is a folder; a recipe is a YAML file, and data is data.path={wanted}")
        file = Path(wanted).expanduser() if by_path else _find(str(wanted), find)
    except ValueError as error:
        chain.problems.append(Problem("", "", str(error)))
        return chain
    while True:
        layer = read_file(file)
        chain.files.append(file)
        chain.layers.append(layer)
        parent, where = layer.data.pop("extends", None), layer.where(("extends",))
        layer.origin.pop(("extends",), None)
        if parent is None:
            return chain
        names.append(str(parent))
        try:
            if not isinstance(parent, str):
                raise ValueError(f"expected the name of one recipe, found {shorten(parent)}")
            by_path = by_path and bool(_YAML.search(parent))
            file = Path(str(file)).parent / Path(parent).expanduser() if by_path else _find(parent, find)
            if _identity(file) in map(_identity, chain.files):
                raise ValueError("recipes extend each other in a circle")
            if len(chain.files) > MAX_PARENTS:
                raise ValueError(f"more than {MAX_PARENTS} parents")
        except ValueError as error:
            shown = names if len(names) <= 8 else [*names[:4], "...", *names[-3:]]
            chain.problems.append(Problem(where, "extends", f"{' -> '.join(shown)}: {error}"))
            return chain


def _is_path(wanted: str | Path) -> bool:
    return isinstance(wanted, Path) or "/" in wanted or "\\" in wanted or bool(_YAML.search(wanted))


def _identity(file: Path | Traversable) -> str:
    return str(file.resolve()) if isinstance(file, Path) else str(file)


def _find(name: str, find: Find) -> Path | Traversable:
    """The file of a preset; raises ValueError with a sentence."""
    if not _NAME.fullmatch(name):
        rule = "a preset's name has only letters, digits and any of . _ + -"
        raise ValueError(f"{shorten(name)} is not a recipe name: {rule}")
    try:
        found = find(name)
    except LookupError as error:  # str() of a KeyError would put the whole sentence in quotes
        raise ValueError(error.args[0] if error.args else f"no recipe named {name!r}") from None
    if found is None:
        raise ValueError(f"no recipe named {name!r}{_instead(name)}")
    return Path(found) if isinstance(found, str) else found


def _instead(name: str) -> str:
    for ending in (".yaml", ".yml"):
        if Path(name + ending).is_file():
            return f"; for the file here write ./{name}{ending}"
    return nearest(name, shipped_names()) or "; `phi3-lora recipes` lists them"


def read_overrides(overrides: str | Iterable[str]) -> list[Layer]:
    """Each `section.key=value` as a layer of its own, so that a later one wins."""
    return [_override(text) for text in ([overrides] if isinstance(overrides, str) else overrides)]


def _override(text: str) -> Layer:
    path, equals, value = text.partition("=")
    keys = tuple(part.strip() for part in path.split("."))
    where = f"override {shorten(text)[1:-1]}"
    layer = Layer()
    if keys[0].startswith("-"):
        layer.problems.append(Problem(where, "", f"write it without dashes: {text.lstrip('-')}"))
    elif not equals or not all(keys):
        layer.problems.append(Problem(where, "", f"expected section.key=value, {_meant(text)}"))
    elif keys == ("extends",):
        layer.problems.append(Problem(where, "extends", "is for files; name that recipe instead of this one"))
    else:
        try:
            data: Any = parse_value(value)
        except ValueError as error:
            layer.problems.append(Problem(where, path.strip(), str(error)))
            return layer
        layer.origin = {keys[:depth]: where for depth in range(1, len(keys) + 1)}
        for key in reversed(keys):
            data = {key: data}
        layer.data = data
    return layer


def _meant(text: str) -> str:
    """What a word without `=`, or without a key before it, may have been meant as."""
    if _DATA.search(text) or Path(text).exists():
        return f"such as data.path={text.lstrip('=')}"
    if text in shipped_names() or _YAML.search(text):
        return f"and {text} is a recipe; the recipe comes first"
    return "such as lora.r=8"


def normalise(layer: Layer) -> None:
    """Bring a layer's names to ours, before merging, so that a child may use another name than its parent did."""
    if isinstance(lora := layer.data.get("lora"), dict):
        for theirs, ours in PEFT_NAMES.items():
            if theirs not in lora:
                continue
            where, value = layer.where(("lora", theirs)), lora.pop(theirs)
            if ours in lora:
                message = f"is PEFT's name for lora.{ours}, which is given too; keep one of them"
                layer.problems.append(Problem(where, f"lora.{theirs}", message))
                continue
            if ours == "init" and isinstance(value, bool):
                value = "default" if value else "random"
            lora[ours] = value
            layer.origin[("lora", ours)] = where
    if isinstance(training := layer.data.get("training"), dict):
        translated = translate(training)
        for key, message in translated.problems:
            layer.problems.append(Problem(layer.where(("training", key)), f"training.{key}", message))
        for key, message in translated.notes:
            layer.notes.append(f"{layer.where(('training', key))}: training.{key}: {message}")
        for new, old in translated.was.items():
            layer.origin[("training", new)] = layer.where(("training", old))
        layer.data["training"] = translated.values


def merge(layers: Sequence[Layer]) -> Layer:
    """Lay each layer over those before it: mappings merge, all else replaces, null takes the default back."""
    base = Layer()

    def forget(key: Key) -> None:
        for known in [known for known in base.origin if known[: len(key)] == key]:
            del base.origin[known]

    def lay(below: dict[str, Any], above: Mapping[str, Any], at: Key, top: Layer) -> None:
        for name, value in above.items():
            key = (*at, name)
            if value is None:
                if key[0] in SECTIONS and len(key) == 1:
                    continue  # a section's heading with nothing below it
                if name in below:
                    del below[name]
                    forget(key)
                continue
            if not (isinstance(value, dict) and isinstance(below.get(name), dict)):
                if name in below:
                    forget(key)
                below[name] = {} if isinstance(value, dict) else value
                base.origin[key] = top.where(key)
            if isinstance(value, dict):
                lay(below[name], value, key, top)

    for layer in layers:
        lay(base.data, layer.data, (), layer)
    return base


def leave_embedded_evaluation(layers: Sequence[Layer], merged: Layer) -> None:
    """If a demonstration's training rows were replaced by others, replace its evaluation rows as well.

    The embedded chats belong together; evaluating other data on them means nothing, and mostly cannot be done. Only
    these are replaced: a user's own evaluation file, in a parent, may well serve many children.
    """
    data = merged.data.get("data")
    if not isinstance(data, dict) or _embedded(data.get("path")) or not _embedded(data.get("eval_path")):
        return
    given = [{"path", "eval_path"} & _section(layer, "data").keys() for layer in layers]
    if data.get("path") is None or "eval_path" in next(keys for keys in reversed(given) if keys):
        return
    said = any({"eval_fraction", "eval_split"} & _section(layer, "data").keys() for layer in layers)
    where = merged.where(("data", "path"))
    del data["eval_path"]
    merged.origin.pop(("data", "eval_path"), None)
    text = f"{where}: data.eval_path: the embedded chats are not evaluated on, because data.path is other data"
    if not said:
        data["eval_fraction"] = HELD_OUT
        merged.origin[("data", "eval_fraction")] = where
        text += f"; data.eval_fraction={HELD_OUT} of it is held out instead"
    merged.notes.append(text)


def _embedded(path: Any) -> bool:
    paths = path if isinstance(path, list) else [path]
    return any(isinstance(one, str) and one.startswith("embedded:") for one in paths)


def _section(layer: Layer, name: str) -> Mapping[str, Any]:
    section = layer.data.get(name)
    return section if isinstance(section, dict) else {}
