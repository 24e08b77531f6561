"""Rows of the four common shapes -> canonical messages (see `turns`); an adapter says in one sentence what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from phi3_lora_plugin.chat.turns import Message, RowError, complete, named, read_text, read_turns, shown

Adapter = Callable[[Mapping[str, Any]], list[Message]]

# Column names of each format: those it is recognised by, and those that it also reads.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}
OPTIONAL = {
    "messages": ("system", "tools"),
    "sharegpt": ("system", "tools"),
    "alpaca": ("input", "history", "system", "tools"),
    "prompt_completion": ("system", "tools"),
}


def messages(row: Mapping[str, Any]) -> list[Message]:
    """Read `messages`: a list of `{role, content}` as OpenAI and mistral write it, with `weight` or `train`."""
    return _whole(row, list(read_turns(_listed(row, "messages"))))


def sharegpt(row: Mapping[str, Any]) -> list[Message]:
    """Read `conversations`: a list of `{from, value}`, beside the columns `system` and `tools` if given."""
    return _whole(row, list(read_turns(_listed(row, "conversations"))))


def alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Read `instruction`, `input` (put on a line below it) and `output`, with `system` and `history` if given."""
    turns: list[Message] = []
    for number, pair in enumerate(_listed(row, "history") if row.get("history") is not None else (), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {number} is {shown(pair)}; expected a pair [question, answer]")
        turns.append({"role": "user", "content": read_text(pair[0], f"question of history {number}")})
        turns.append({"role": "assistant", "content": read_text(pair[1], f"answer of history {number}")})
    question = read_text(_column(row, "instruction"), "instruction")
    if row.get("input") is not None and (extra := read_text(row["input"], "input")):
        question = f"{question}\n{extra}" if question else extra
    answer = read_text(_column(row, "output"), "output")
    return _whole(row, [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    """Read `prompt` and `completion`, each a text or a list of messages; nothing in the prompt is trained."""
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if isinstance(prompt, list | tuple):
        turns = list(read_turns(_listed(row, "prompt"), "message of prompt"))
        turns = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in turns]
    else:
        turns = [{"role": "user", "content": read_text(prompt, "prompt")}]
    if isinstance(completion, list | tuple):
        turns += read_turns(_listed(row, "completion"), "message of completion")
    else:
        turns.append({"role": "assistant", "content": read_text(completion, "completion")})
    return _whole(row, turns)


ADAPTERS: dict[str, Adapter] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
}


def detect(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the formats whose columns the row has; more than one is for the caller to refuse."""
    return [name for name, columns in REQUIRED.items() if all(row.get(column) is not None for column in columns)]


def _whole(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    return complete(turns, system=row.get("system"), tools=row.get("tools"))


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        near = get_close_matches(name, [key for key in row if isinstance(key, str)], 1)
        advice = f"; write data.columns: {{{name}: {near[0]}}} if that is it" if near else ""
        raise RowError(f"has no column {name!r}, only {named(row)}{advice}")
    return row[name]


def _listed(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a column that holds a list, or its JSON text as in a CSV file; never an empty one, but for `history`."""
    value = _column(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError(f"{name} is {shown(value)}; expected a list, or its JSON text") from None
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {shown(value)}; expected a list")
    if not value and name != "history":
        raise RowError(f"{name} is empty")
    return value
