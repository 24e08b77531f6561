"""Messages as data sets write them -> canonical turns: one vocabulary of roles, text only, a sensible order.

A canonical message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. `"train": False` stands
on one that is never trained, `"weight"` on one that is trained more or less, `"spans"` (see `marks`) on one of the
assistant of which only a part is, `"thoughts"` (see `thoughts`) on one before which it thought, `"calls"` (see
`calls`) on one that calls tools, `"tools"` (text) on a system message that declares them. Nothing else is carried
over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from phi3_lora_plugin.chat.calls import calls_in, in_order, read_calls, split_results
from phi3_lora_plugin.chat.content import Content, checked_text, read_content, read_text, with_details
from phi3_lora_plugin.chat.marks import MARKS, MESSAGE_MARKS, label_of, weight_of
from phi3_lora_plugin.chat.row_error import RowError, named, shown
from phi3_lora_plugin.chat.thoughts import THOUGHTS, inline, tagged

Message = dict[str, Any]

# How data sets in the wild call the four roles. A `function_call` is a turn of the assistant that holds a call.
_NAMES = {
    "system": "system developer",
    "user": "user human",
    "assistant": "assistant gpt chatgpt model function_call tool_call",
    "tool": "tool observation function function_response tool_response ipython",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_CALLS = ("function_call", "tool_call")
# Every key of a message that is read; others (`id`, `name`, `timestamp`) are counted by the report.
KEYS = ("role", "content", "from", "value", "tools", "functions", "tool_calls", "function_call", "tool_call_id",
        *THOUGHTS, *MESSAGE_MARKS)  # fmt: skip


def read_turns(items: Sequence[Any], what: str = "message") -> Iterator[Message]:
    """Yield canonical messages, one for one, except that a call right after the assistant's text joins it."""
    held: Message | None = None
    whole = ((number, part) for number, item in enumerate(items, 1) for part in split_results(item))
    for number, item in whole:
        turn, is_call = _turn(item, f"{what} {number}")
        if held is not None and is_call and _joins(held, turn):
            held["calls"] = [*held.get("calls", ()), *turn["calls"]]
            continue
        if held is not None:
            yield held
        held = turn
    if held is not None:
        yield held


def _joins(held: Message, turn: Message) -> bool:
    alike = all(held.get(mark) == turn.get(mark) for mark in ("train", "weight"))
    return bool(held["role"] == "assistant" and alike and not turn["content"] and "thoughts" not in turn)


def context(turns: Sequence[Message]) -> list[Message]:
    """Turns before what is learned: those of the assistant are not trained."""
    return [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in turns]


def weighed(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """Turns of a row that may say as a whole whether it is learned, by the marks of `marks`.

    Raises:
        RowError: KTO's `label: false`, or a mark that cannot be honoured.
    """
    if label_of(row) is False:
        raise RowError(
            "has label: false, an answer that is not to be learned; set preference.loss: kto to learn from it, or "
            "skip such rows with data.on_error: skip"
        )
    try:
        weight = weight_of(row, "row")
    except RowError as error:
        marks = ", ".join(name for name in MARKS if row.get(name) is not None)
        raise RowError(f"{error}; if it does not matter, write data.ignore: [{marks}]") from None
    if weight is None or weight == 1:
        return turns
    changed = []
    for turn in turns:
        if turn["role"] in ("assistant", "text") and turn.get("train", True):
            turn = turn | ({"train": False} if weight == 0 else {"weight": weight * turn.get("weight", 1.0)})
        changed.append(turn)
    return changed


def complete(turns: list[Message], row: Mapping[str, Any] | None = None) -> list[Message]:
    """Put the system prompt and the tools of a row's own columns in front of its turns, and check their order.

    A system message stands first and once; the assistant may open (a greeting); no role comes twice in a row; a tool
    answers a call; the assistant speaks at least once.
    """
    row = row or {}
    system = _either(row, "system", "system_prompt")
    if system is not None and (system := read_text(system, "system")):
        if turns and turns[0]["role"] == "system":
            if turns[0]["content"] != system:
                raise RowError("has a system column and a system message that differ; keep one")
        else:
            turns = [{"role": "system", "content": system}, *turns]
    if (declared := read_tools(_either(row, "tools", "functions"), "row")) is not None:
        if not turns or turns[0]["role"] != "system":
            turns = [{"role": "system", "content": ""}, *turns]
        if turns[0].get("tools", declared) != declared:
            raise RowError("declares tools twice, in a column and in the system message, and they differ; keep one")
        turns = [turns[0] | {"tools": declared}, *turns[1:]]
    turns = _matched(turns)
    before = None
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number > 1:
            raise RowError(f"turn {number} is a system message; it must come first, and only once")
        if role == before and role in ("user", "assistant"):
            raise RowError(f"turns {number - 1} and {number} are both of role {role}; join them, or skip the row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"turn {number} is a tool's answer, but no assistant turn comes before it")
        before = role
    if not any(turn["role"] == "assistant" for turn in turns):
        raise RowError("has no turn of the assistant, so there is nothing to learn from it")
    return turns


def _matched(turns: list[Message]) -> list[Message]:
    """Results in the order of the calls they answer, and no ids, which no template renders."""
    made: list[Message] = []
    for number, turn in enumerate(turns):
        if turn["role"] == "tool" and number and turns[number - 1]["role"] == "tool":
            continue  # with the first of them
        if turn["role"] == "tool":
            results = [*takewhile(lambda other: other["role"] == "tool", turns[number:])]
            calls = made[-1].get("calls", []) if made else []
            made += in_order(calls, results, f"turn {number}")
        else:
            made.append(turn)
    return [_without_ids(turn) for turn in made]


def _without_ids(turn: Message) -> Message:
    turn = {key: value for key, value in turn.items() if key != "id"}
    if "calls" in turn:
        turn["calls"] = [{key: value for key, value in call.items() if key != "id"} for call in turn["calls"]]
    return turn


def _turn(item: Any, what: str) -> tuple[Message, bool]:
    """Return one canonical message, and whether it holds a call."""
    if not isinstance(item, Mapping):
        raise RowError(f"{what} is {shown(item)}; expected an object with role and content")
    name = _either(item, "role", "from")
    if name is None:
        raise RowError(f"{what} has no role, only {named(item)}")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{what} has the unknown role {shown(name)}; known are {', '.join(ROLES)}")
    what = f"{what} ({name})"
    value = _either(item, "content", "value")
    content = Content() if value is None else read_content(value, f"content of {what}")
    calls = read_calls([*content.calls, *_listed_calls(item, what)], what)
    if value is None and not calls:
        checked_text(value, f"content of {what}")
    content = with_details(content, item, what)
    block = _thoughts(item, content, what)
    if role == "assistant" and content.spans is None:
        if block is None:
            block, content.text = inline(content.text)
        if name.lower() in _CALLS:
            calls += read_calls([content.text], what)
            content.text = ""
        elif not calls:
            content.text, calls = calls_in(content.text)
    if role != "assistant" and (calls or block is not None):
        raise RowError(f"{what} has {'tool calls' if calls else 'thoughts'}, which only the assistant has")
    turn: Message = {"role": role, "content": content.text} | _learning(item, content, what, role)
    turn |= ({"thoughts": block} if block is not None else {}) | ({"calls": calls} if calls else {})
    if role == "tool" and isinstance(item.get("tool_call_id"), str):
        turn["id"] = item["tool_call_id"]
    if (tools := read_tools(_either(item, "tools", "functions"), what)) is not None:
        if role != "system":
            raise RowError(f"{what} declares tools, which only a system message does")
        turn["tools"] = tools
    return turn, bool(calls)


def _either(item: Mapping[str, Any], name: str, other: str) -> Any:
    return item.get(name) if item.get(name) is not None else item.get(other)


def _listed_calls(item: Mapping[str, Any], what: str) -> list[Any]:
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:
        calls = [item["function_call"]]
    if calls is not None and not isinstance(calls, list):
        raise RowError(f"tool_calls of {what} is {shown(calls)}; expected a list")
    return calls or []


def _learning(item: Mapping[str, Any], content: Content, what: str, role: str) -> Message:
    """`train` and `spans` of a canonical message, where it is not learned as a whole."""
    weight = weight_of(item, what)
    spans = content.spans
    if role != "assistant":
        if weight or any(learned for _, _, learned in spans or ()):
            raise RowError(f"{what} is marked as trained, which only the assistant's turns are (see data.train_on)")
        return {} if weight is None and spans is None else {"train": False}
    if weight == 0 or (spans and not any(learned for _, _, learned in spans)):
        return {"train": False}
    made: Message = {} if weight in (None, 1) else {"weight": weight}
    if spans is not None and any(learned != 1 for _, _, learned in spans):
        made["spans"] = spans
    return made


def _thoughts(item: Mapping[str, Any], content: Content, what: str) -> str | None:
    """What was thought, under whichever name, with its tags; the same text may stand under several."""
    found = [content.thoughts] if content.thoughts is not None else []
    found += [read_text(item[key], f"{key} of {what}") for key in THOUGHTS if item.get(key) not in (None, "", [])]
    if len(set(found)) > 1:
        raise RowError(f"{what} has thoughts twice, and they differ; keep one")
    return tagged(found[0]) if found else None


def read_tools(value: Any, what: str) -> str | None:
    """Return declared tools as the text the author wrote, or as JSON; None where there are none.

    Raises:
        RowError: neither.
    """
    if value is None or value == [] or (isinstance(value, str) and value.strip() in ("", "[]")):
        return None
    if isinstance(value, str):
        return read_text(value, f"tools of {what}")
    if not isinstance(value, list):
        raise RowError(f"tools of {what} is {shown(value)}; expected a list, or its JSON text")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # Parquet may hold dates or bytes
        raise RowError(f"tools or calls of {what} cannot be written as JSON: {error}") from None
    return checked_text(text, what)
