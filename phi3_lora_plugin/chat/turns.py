"""Messages as data sets write them -> canonical turns: one vocabulary of roles, text only, a sensible order.

A canonical message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. `"train": False` stands on
one that is never trained, `"tools"` (text) on a system message that declares tools. Nothing else is carried over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError

Message = dict[str, Any]

# How data sets in the wild call the four roles. A `function_call` is a turn of the assistant that holds a call.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_CALLS = ("function_call", "tool_call")
# Every key of a message that is read; others (`id`, `name`, `timestamp`) are counted by the report.
KEYS = ("role", "content", "from", "value", "train", "weight", "tools", "tool_calls", "function_call")


class RowError(Phi3LoraError):
    """One row that is not what its format says; the message is a sentence without the row's number."""


def read_turns(items: Sequence[Any], what: str = "message") -> Iterator[Message]:
    """Yield canonical messages, one for one, except that a call right behind what the assistant said joins it."""
    held: Message | None = None
    for number, item in enumerate(items, 1):
        turn, is_call = _turn(item, f"{what} {number}")
        if held is not None and is_call and held["role"] == "assistant" and held.get("train") == turn.get("train"):
            held["content"] = "\n".join(filter(None, (held["content"], turn["content"])))
            continue
        if held is not None:
            yield held
        held = turn
    if held is not None:
        yield held


def complete(turns: list[Message], system: Any = None, tools: Any = None) -> list[Message]:
    """Put a row's own system prompt and tools in front of its turns, and check their order.

    A system message stands first and once; the assistant may open (a greeting); nobody speaks twice in a row; a tool
    answers a call; the assistant speaks at least once.
    """
    if system is not None and (system := read_text(system, "system")):
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"] != system:
                raise RowError("has a system column and a system message that differ; keep one")
        else:
            turns = [{"role": "system", "content": system}, *turns]
    if (declared := _tools(tools, "row")) is not None:
        if not turns or turns[0]["role"] != "system":
            turns = [{"role": "system", "content": ""}, *turns]
        if turns[0].get("tools", declared) != declared:
            raise RowError("declares tools twice, in a column and in the system message, and they differ; keep one")
        turns = [turns[0] | {"tools": declared}, *turns[1:]]
    before = None
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number > 1:
            raise RowError(f"turn {number} is a system message; it can only stand first, and once")
        if role == before and role in ("user", "assistant"):
            raise RowError(f"turns {number - 1} and {number} are both of role {role}; join them, or skip the row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"turn {number} is a tool's answer, but no turn of the assistant stands before it")
        before = role
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("has no turn of the assistant, so there is nothing to learn from it")
    return turns


def read_text(value: Any, what: str) -> str:
    """Return text as it is, and text parts (`[{type: text, text: ...}]`) joined as they stand."""
    if isinstance(value, list) and value:
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowError(f"{what} has a part that is not text: {shown(part)}")
            parts.append(part["text"])
        value = "".join(parts)
    if value is None:
        raise RowError(f"{what} is null or missing; expected text")
    if not isinstance(value, str):
        raise RowError(f"{what} is {shown(value)}; expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"{what} holds {value[error.start]!r}, half of a surrogate pair and no character") from None
    return value


def shown(value: Any) -> str:
    """Name a value for an error: its kind and the beginning of it, on one line and without control characters."""
    if value is None:
        return "null"
    kind = {str: "text", bool: "a switch", int: "a number", float: "a number", list: "a list", dict: "an object"}
    text = repr(value)
    return f"{kind.get(type(value), type(value).__name__)} ({text if len(text) <= 60 else text[:57] + '...'})"


def named(row: Mapping[str, Any]) -> str:
    """List the columns or keys that there are, for an error."""
    return ", ".join(map(str, row)) or "nothing"


def _turn(item: Any, what: str) -> tuple[Message, bool]:
    """Return one canonical message, and whether it holds a call."""
    if not isinstance(item, Mapping):
        raise RowError(f"{what} is {shown(item)}; expected an object with role and content")
    name = item.get("role") if item.get("role") is not None else item.get("from")
    if name is None:
        raise RowError(f"{what} has no role, only {named(item)}")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{what} has the unknown role {shown(name)}; known are {', '.join(ROLES)}")
    what = f"{what} ({name})"
    content = item.get("content") if item.get("content") is not None else item.get("value")
    calls = _calls(item, what)
    if calls is not None and role != "assistant":
        raise RowError(f"{what} has tool calls, which only the assistant makes")
    if content is None and calls is not None:
        text = calls
    else:
        text = read_text(content, f"content of {what}")
        text = "\n".join(filter(None, (text, calls))) if calls is not None else text
    turn: Message = {"role": role, "content": text}
    if _untrained(item, what, role):
        turn["train"] = False
    if (tools := _tools(item.get("tools"), what)) is not None:
        if role != "system":
            raise RowError(f"{what} declares tools, which only a system message does")
        turn["tools"] = tools
    return turn, calls is not None or name.lower() in _CALLS


def _calls(item: Mapping[str, Any], what: str) -> str | None:
    """Return the tool calls of a message as JSON text, `{"name": ..., "arguments": {...}}` or a list of them."""
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:
        calls = [item["function_call"]]
    if calls is None or calls == []:
        return None
    if not isinstance(calls, list):
        raise RowError(f"tool_calls of {what} is {shown(calls)}; expected a list")
    read = []
    for call in calls:
        inner = call.get("function") if isinstance(call, Mapping) else None
        function = inner if isinstance(inner, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} calls a tool without a name: {shown(call)}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise RowError(f"{what} calls a tool with arguments that are not JSON: {shown(arguments)}") from None
        read.append({"name": function["name"], "arguments": {} if arguments is None else arguments})
    return _json(read[0] if len(read) == 1 else read, what)


def _untrained(item: Mapping[str, Any], what: str, role: str) -> bool:
    """Say whether a message is marked as never trained, by `train: false` or `weight: 0`."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"train of {what} is {shown(train)}; expected true or false")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"weight of {what} is {shown(weight)}; expected 0 or 1")
    if train is not None and weight is not None and train != bool(weight):
        raise RowError(f"{what} says train: {str(train).lower()} and weight: {weight}; leave one out")
    if (train or weight) and role != "assistant":
        raise RowError(f"{what} is marked as trained, which only the assistant's turns are (see data.train_on)")
    return train is False or weight == 0


def _tools(value: Any, what: str) -> str | None:
    """Return declared tools as the text the author wrote, or as JSON; None where there are none."""
    if value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]")):
        return None
    if isinstance(value, str):
        return read_text(value, f"tools of {what}")
    if not isinstance(value, list):
        raise RowError(f"tools of {what} is {shown(value)}; expected a list, or its JSON text")
    return _json(value, what)


def _json(value: Any, what: str) -> str:
    """Return JSON text; values from Parquet may be dates or bytes, which JSON has no form for."""
    try:
        return read_text(json.dumps(value, ensure_ascii=False), what)
    except TypeError as error:
        raise RowError(f"tools or calls of {what} cannot be written as JSON: {error}") from None
