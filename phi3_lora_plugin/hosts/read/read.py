"""Any host's config as a recipe: which host it is, its reader, and what `render` has written down beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from phi3_lora_plugin.hosts.read import __path__
from phi3_lora_plugin.hosts.read.common import ImportConfigError, Reading, nested
from phi3_lora_plugin.recipe.yaml_file import dump

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

#: Each module next to `common` and this one reads the host that it is named after.
HOSTS = tuple(sorted({found.name for found in iter_modules(__path__)} - {"common", "read"}))
_MADE_FROM = re.compile(r"^# recipe: (\{.*\})$", re.MULTILINE)


@dataclass(frozen=True)
class Imported:
    """A host's config as a recipe.

    Attributes:
        host: whose config it was.
        text: the recipe's YAML, the notes among it as comments.
        notes: a sentence for each key that has no equal or means something else.
        recipe: loaded from the text, so that it is known to be whole.
    """

    host: str
    text: str
    notes: tuple[str, ...]
    recipe: Recipe


def import_config(path: Path, host: str = "") -> Imported:
    """Read a host's config (YAML or JSON) into a recipe.

    Args:
        host: of `HOSTS`; recognised by the config's keys if not given.

    Raises:
        ImportConfigError: not a config, of an unknown host, for another model, for another kind of training, or
            with values that a recipe refuses; names each.
    """
    config, text = _load(path)
    host = host or recognise_host(config, path)
    if host not in HOSTS:
        raise ImportConfigError(f"--host: {host!r} is not one of {', '.join(HOSTS)}")
    reader = import_module(f"phi3_lora_plugin.hosts.read.{host}")
    made_from = _made_from(text, host, config)
    given = dict(config) if made_from is None else made_from[1] | _base(config)
    reading = Reading(given, path.parent, partial=made_from is not None)
    reader.read(reading)
    reading.leave(reading.given)
    if made_from is None:
        reading.fill(reader.DEFAULTS)
        sections = nested(reading.recipe)
    else:
        sections = made_from[0]
        new_base = {"base_model", "model_name_or_path"} & set(made_from[1])
        kept = {key: value for key, value in reading.recipe.items() if key != "model.path" or new_base}
        for section, value in nested(kept if made_from[1] else {}).items():
            merged = isinstance(value, dict) and isinstance(sections.get(section), dict)
            sections[section] = sections[section] | value if merged else value
    return _whole(host, path, sections, reading.notes)


def _base(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys without which a reader reads nothing."""
    needed = ("base_model", "adapter", "model_name_or_path", "use_peft", "finetuning_type")
    return {key: config[key] for key in needed if key in config}


def recognise_host(config: Mapping[str, Any], path: Path) -> str:
    """The host whose keys these are.

    Raises:
        ImportConfigError: nobody's, or several hosts' alike.
    """
    signs = {host: import_module(f"phi3_lora_plugin.hosts.read.{host}").SIGNS for host in HOSTS}
    counts = {host: sum(sign in config for sign in found) for host, found in signs.items()}
    best = max(counts.values())
    named = [host for host, count in counts.items() if count == best]
    if best == 0 or len(named) > 1:
        why = "its keys are nobody's" if best == 0 else f"its keys could be {' or '.join(named)}'s"
        raise ImportConfigError(f"{path}: {why}; name the host: --host {{{','.join(HOSTS)}}}")
    return named[0]


def _load(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ImportConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ImportConfigError(f"{path} is not YAML or JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ImportConfigError(f"{path}: expected a mapping of settings, found {type(config).__name__}")
    return config, text


def _made_from(text: str, host: str, config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(settings of the recipe that `render` made the config of, keys changed since); None if it is not one of ours."""
    found = _MADE_FROM.search(text)
    if found is None:
        return None
    from phi3_lora_plugin.hosts.render.render import HOSTS as RENDERED
    from phi3_lora_plugin.hosts.render.render import render

    if host not in RENDERED:
        return None
    settings = yaml.safe_load(found[1])
    was = yaml.safe_load(render(_loaded(settings, settings.get("name", "recipe")), host).text)
    settings.pop("name", None)
    return settings, {key: value for key, value in config.items() if was.get(key) != value}


def _loaded(settings: Mapping[str, Any], name: str) -> Recipe:
    from phi3_lora_plugin.recipe import load_recipe

    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(dump({key: value for key, value in settings.items() if key != "name"}), encoding="utf-8")
        return load_recipe(file)


def _whole(host: str, path: Path, sections: dict[str, Any], notes: list[str]) -> Imported:
    from phi3_lora_plugin.recipe import RecipeError

    try:
        recipe = _loaded(sections, path.stem)
    except RecipeError as error:
        wrong = "".join(f"\n  {problem.key}: {problem.message}" for problem in error.problems)
        raise ImportConfigError(f"{path} asks for what a recipe refuses:{wrong}") from error
    head = [f"# From the {host} config {path.name}, by phi3-lora import."]
    head += [f"#   {note}" for note in notes]
    return Imported(host, "\n".join(head) + "\n" + dump(sections), tuple(notes), recipe)
