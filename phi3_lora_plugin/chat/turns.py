"""Messages as data sets write them -> canonical turns: one vocabulary of roles, text only, a sensible order.

A canonical message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. `"train": False` stands on
one that is never trained, `"spans"` (see `marks`) on one of the assistant of which only a part is, `"thoughts"` (text)
on one that the assistant thought before, `"tools"` (text) on a system message that declares tools. Nothing else is
carried over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.content import Content, checked_text, read_content, read_text, with_details
from phi3_lora_plugin.chat.marks import MESSAGE_MARKS, label_of, weight_of
from phi3_lora_plugin.chat.row_error import RowError, named, shown

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
# What the assistant thought before it spoke, as OpenAI-compatible servers and Anthropic's files call it.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Every key of a message that is read; others (`id`, `name`, `timestamp`) are counted by the report.
KEYS = ("role", "content", "from", "value", "tools", "functions", "tool_calls", "function_call", *THOUGHTS,
        *MESSAGE_MARKS)  # fmt: skip


def read_turns(items: Sequence[Any], what: str = "message") -> Iterator[Message]:
    """Yield canonical messages, one for one, except that a call right behind what the assistant said joins it."""
    held: Message | None = None
    for number, item in enumerate(items, 1):
        turn, is_call = _turn(item, f"{what} {number}")
        if held is not None and is_call and _joins(held, turn):
            before = held["content"]
            held["content"] = "\n".join(filter(None, (before, turn["content"])))
            if "spans" in held:
                held["spans"] = [*held["spans"], (len(before), len(held["content"]), 1.0)]
            continue
        if held is not None:
            yield held
        held = turn
    if held is not None:
        yield held


def _joins(held: Message, turn: Message) -> bool:
    same = held.get("train") == turn.get("train") and "spans" not in turn and "thoughts" not in turn
    return bool(held["role"] == "assistant" and same)


def weighed(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Turns of a row that may say as a whole whether it is learned, by the marks of `marks`.

    Raises:
        RowError: KTO's `label: false`, or a mark that cannot be honoured.
    """
    if row.get("label") is not None and label_of(row) is False:
        raise RowError(
            "has label: false, an answer that is not to be learned (KTO); leave such rows out with data.on_error: skip"
        )
    if weight_of(row, "row") != 0:
        return turns
    return [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in turns]


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
    value = item.get("content") if item.get("content") is not None else item.get("value")
    raw = item.get("tool_calls")
    content = Content() if value is None else read_content(value, f"content of {what}")
    calls = _calls([*content.calls, *_listed_calls(item, raw, what)], what)
    if calls is not None and role != "assistant":
        raise RowError(f"{what} has tool calls, which only the assistant makes")
    if value is None and calls is None:
        checked_text(value, f"content of {what}")
    content = with_details(content, item, what)
    turn: Message = {"role": role, "content": "\n".join(filter(None, (content.text, calls)))}
    turn |= _learning(item, content, what, role, len(turn["content"]))
    if (thoughts := _thoughts(item, content, what)) is not None:
        if role != "assistant":
            raise RowError(f"{what} has thoughts, which only the assistant's turns have")
        turn["thoughts"] = thoughts
    declared = item.get("tools") if item.get("tools") is not None else item.get("functions")
    if (tools := _tools(declared, what)) is not None:
        if role != "system":
            raise RowError(f"{what} declares tools, which only a system message does")
        turn["tools"] = tools
    return turn, calls is not None or name.lower() in _CALLS


def _listed_calls(item: Mapping[str, Any], calls: Any, what: str) -> list[Any]:
    if calls is None and item.get("function_call") is not None:
        calls = [item["function_call"]]
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"tool_calls of {what} is {shown(calls)}; expected a list")
    return calls or []


def _calls(calls: list[Any], what: str) -> str | None:
    """Return tool calls as JSON text, `{"name": ..., "arguments": {...}}` or a list of them; None for none."""
    read = []
    for call in calls:
        if isinstance(call, str):
            call = _from_json(call, f"{what} calls a tool with text that is not JSON")
        inner = call.get("function") if isinstance(call, Mapping) else None
        function = inner if isinstance(inner, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} calls a tool without a name: {shown(call)}")
        arguments = function.get("arguments") if "arguments" in function else function.get("input")
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{what} calls a tool with arguments that are not JSON")
        read.append({"name": function["name"], "arguments": {} if arguments is None else arguments})
    return _json(read[0] if len(read) == 1 else read, what) if read else None


def _from_json(text: str, wrong: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RowError(f"{wrong}: {shown(text)}") from None


def _learning(item: Mapping[str, Any], content: Content, what: str, role: str, length: int) -> Message:
    """`train` and `spans` of a canonical message, where it is not learned as a whole."""
    weight = weight_of(item, what)
    spans = content.spans
    if role != "assistant":
        if weight or any(learned for _, _, learned in spans or ()):
            raise RowError(f"{what} is marked as trained, which only the assistant's turns are (see data.train_on)")
        return {} if weight is None and spans is None else {"train": False}
    if weight == 0 or (spans and not any(learned for _, _, learned in spans)):
        return {"train": False}
    if spans is None or all(learned == 1 for _, _, learned in spans):
        return {}
    rest = [(len(content.text), length, 1.0)] if length > len(content.text) else []
    return {"spans": [*spans, *rest]}


def _thoughts(item: Mapping[str, Any], content: Content, what: str) -> str | None:
    """What was thought, under whichever name; the same text may stand under several."""
    found = [content.thoughts] if content.thoughts is not None else []
    found += [read_text(item[key], f"{key} of {what}") for key in THOUGHTS if item.get(key) not in (None, "", [])]
    if len(set(found)) > 1:
        raise RowError(f"{what} has thoughts twice, and they differ; keep one")
    return found[0] if found else None


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
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RowError(f"tools or calls of {what} cannot be written as JSON: {error}") from None
    return checked_text(text, what)
