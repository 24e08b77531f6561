"""Columns of a file that fits no format -> the `data.columns` that would make it fit, from the file's own names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.turns import ROLES

# Words that people's columns have in their names, the likelier ones first.
_ASKED = "prompt question instruction query problem request input user human task source".split()
_ANSWERED = "completion answer response output solution reply assistant target bot gpt".split()
_CONTEXT = "context input passage".split()
_BETTER = "chosen preferred accepted better winner good".split()
_WORSE = "rejected dispreferred worse loser bad".split()
_ABOUT = "id uuid hash source category system lang language url title type split topic name date author model".split()
_TEXTS = ("content", "value", "text", "message", "utterance")


def propose(rows: Sequence[Mapping[str, Any]], pairs: bool = False) -> str | None:
    """Return `data.columns='{...}'` for the rows at the top of a file; None if nothing in them looks like a chat.

    Args:
        rows: as they were read, not yet renamed.
        pairs: whether the recipe is about two answers to a prompt.
    """
    for row in rows:
        texts = [path for path, value in _columns(row) if isinstance(value, str)]
        found = _pair(row, texts) if pairs else _dialog(row) or _exchange(texts)
        if found:
            return f"data.columns='{{{', '.join(f'{name}: {_quoted(path)}' for name, path in found.items())}}}'"
    return None


def _columns(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Columns, and what is one level inside them, by the dotted path that `data.columns` takes."""
    for name, value in row.items():
        yield str(name), value
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from ((f"{name}.0.{key}", inner) for key, inner in value[0].items())
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())


def _dialog(row: Mapping[str, Any]) -> dict[str, str]:
    """A list of turns under a foreign name, or whose keys have foreign names."""
    for path, value in _columns(row):
        if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
            continue
        speaker = next((key for key in value[0] if all(_role(turn.get(key)) for turn in value)), None)
        said = next((key for key in _TEXTS if key in value[0] and key != speaker), None)
        if speaker is not None and said is not None:
            inner = {"role": speaker, "content": said}
            return {"messages": path} | {ours: theirs for ours, theirs in inner.items() if ours != theirs}
    return {}


def _exchange(texts: Sequence[str]) -> dict[str, str]:
    asked, answered = _named(texts, _ASKED), _named(texts, _ANSWERED)
    if asked is None or answered is None or asked == answered:
        two = [path for path in texts if path not in _ABOUT]
        return {"prompt": two[0], "completion": two[1]} if len(two) == 2 else {}
    context = _named([name for name in texts if name not in (asked, answered)], _CONTEXT)
    if context is not None:
        return {"instruction": asked, "input": context, "output": answered}
    return {"prompt": asked, "completion": answered}


def _pair(row: Mapping[str, Any], texts: Sequence[str]) -> dict[str, str]:
    names = [path for path, value in _columns(row) if isinstance(value, str | list)]
    worse = _named(names, _WORSE)
    better = _named([name for name in names if name != worse], _BETTER)
    asked = _named([name for name in texts if name not in (better, worse)], _ASKED)
    if better is None or worse is None or asked is None:
        return {}
    return {"prompt": asked, "chosen": better, "rejected": worse}


def _named(names: Sequence[str], words: Sequence[str]) -> str | None:
    """The name that one of the words is, or else the first that has one of them among its own."""
    for word in words:
        if word in names:
            return word
    for word in words:
        for name in names:
            if word in re.findall(r"[a-z]+", name.lower()):
                return name
    return None


def _role(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in ROLES


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z][\w.-]*", name) else json.dumps(name, ensure_ascii=False)
