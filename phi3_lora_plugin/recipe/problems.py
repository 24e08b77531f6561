"""Pydantic's complaints about a recipe in the reader's words: where, what was expected, what was found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from phi3_lora_plugin.recipe.near_keys import other_word
from phi3_lora_plugin.recipe.sections import PEFT_NAMES, Conflicts, Section
from phi3_lora_plugin.recipe.training import installed_fields
from phi3_lora_plugin.recipe.yaml_file import Key, Layer, Problem
from phi3_lora_plugin.wording import describe, nearest


def explain(error: ValidationError, model: type[Section], merged: Layer) -> list[Problem]:
    """Every complaint once, with its place.

    Args:
        error: what validating `merged` against `model` raised.
        model: the class of the whole recipe.
        merged: the data that was validated and the origin of each key.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for complaint in error.errors(include_url=False):
        for key, message in _said(complaint, model, merged.data):
            problem = Problem(merged.where(key), ".".join(key), message)
            problems.setdefault((problem.where, problem.key), problem)
    return list(problems.values())


def _said(complaint: Any, model: type[Section], data: Any) -> Iterator[tuple[Key, str]]:
    """(key, what is wrong with it)."""
    location: Key = tuple(str(part) for part in complaint["loc"])
    conflicts = complaint.get("ctx", {}).get("error")
    if isinstance(conflicts, Conflicts):
        for name, message in conflicts.found:
            yield (*location, *name.split(".")), message
    elif complaint["type"] == "missing":
        yield location, "is required, here or in a recipe that this one extends"
    elif complaint["type"] == "extra_forbidden":
        yield location, f"unknown key{_did_you_mean(location, model)}"
    else:
        key, value, info = _field(location, model, data)
        yield key, _wrong_value(value, info)


def _field(location: Key, model: type[Section], data: Any) -> tuple[Key, Any, FieldInfo | None]:
    """The field that pydantic's location belongs to (it names union members too), its value and definition."""
    fields: Mapping[str, FieldInfo] = model.model_fields
    info: FieldInfo | None = None
    for depth, part in enumerate(location):
        if part not in fields:
            return location[:depth], data, info
        info, data = fields[part], data[part]
        inner = info.annotation
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return location[: depth + 1], data, info
        fields = inner.model_fields
    return location, data, info


def _wrong_value(value: Any, info: FieldInfo | None) -> str:
    expected = "a mapping"
    if info is not None:
        expected = " or ".join(dict.fromkeys(_words(info.annotation, tuple(info.metadata))))
    message = f"expected {expected}, found {describe(value)}"
    if isinstance(value, str) and info is not None:
        message += nearest(value, _choices(expected))
        if "number" in expected and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value):
            message += "; write it without quotes"
    elif isinstance(value, int | float) and not isinstance(value, bool) and expected.startswith("text"):
        message += "; quote it"
    return message


def _choices(expected: str) -> list[str]:
    return expected.removeprefix("one of ").partition(" or ")[0].split(", ") if expected.startswith("one of ") else []


def _did_you_mean(location: Key, model: type[Section]) -> str:
    """The nearest key of this section, or the same key in another."""
    *parents, name = location
    known: dict[str, list[str]] = {section: _keys(info) for section, info in model.model_fields.items()}
    near = nearest(name, known.get(parents[0], ()) if parents else [*known, "extends"])
    elsewhere = [f"{section}.{name}" for section, keys in known.items() if name in keys]
    elsewhere += [f"training.{name}"] if name in installed_fields() else []
    elsewhere += [name] if parents and name in known else []
    if near or elsewhere:
        return near or f"; did you mean {elsewhere[0]!r}?"
    if other := other_word(name):
        return f"; did you mean {other!r}?"
    names = [key for key in known.get(parents[0], []) if key not in PEFT_NAMES] if parents else ["extends", *known]
    return f"; available: {', '.join(names)}" if names else ""


def _keys(info: FieldInfo) -> list[str]:
    section = info.annotation
    if not (isinstance(section, type) and issubclass(section, Section)):
        return []
    return [*section.model_fields, *(name for name, ours in PEFT_NAMES.items() if ours in section.model_fields)]


def _words(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[str]:
    """What an annotation takes, in words, one for each member of a union."""
    if hasattr(annotation, "__metadata__"):
        yield from _words(annotation.__origin__, (*metadata, *annotation.__metadata__))
        return
    limits = [limit for item in metadata for limit in (getattr(item, "metadata", None) or [item])]
    origin = getattr(annotation, "__origin__", annotation)
    if origin is Literal:
        yield "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    elif annotation in (int, float):
        yield ("a whole number" if annotation is int else "a number") + _range(limits)
    elif annotation is str:
        pattern = next((limit.pattern for limit in limits if getattr(limit, "pattern", None)), None)
        names = pattern.strip("^$()").replace("|", ", ").replace(r"[1-9]\d*", "N") if pattern else ""
        yield f"one of {names}" if names else "text"
    elif annotation is bool:
        yield "true or false"
    elif origin is list:
        yield "a list of " + " or ".join(_words(get_args(annotation)[0]))
    elif origin is dict:
        name, value = (" or ".join(_words(part)) for part in get_args(annotation))
        name = name.replace("text", "names")
        yield f"a mapping of {name.replace('one of ', '')} to {value}" if value else "a mapping"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield "a mapping"
    elif annotation is not type(None):
        for member in get_args(annotation):
            yield from _words(member, metadata)


def _range(limits: Sequence[Any]) -> str:
    named = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    words = [f"{said} {getattr(one, name)}" for one in limits for name, said in named.items() if hasattr(one, name)]
    return " " + " and ".join(words) if words else ""
