"""Glaive's function-calling chats (version 2): texts of `USER:`, `ASSISTANT:` and `FUNCTION RESPONSE:` turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import ANY, column, whole
from phi3_lora_plugin.chat.row_error import RowError, shown
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("system", "chat")
OPTIONAL = ANY
_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ \n]?")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_CALL = re.compile(r"<functioncall>\s*(.*?)\s*$", re.DOTALL)
#: A call in JSON, but for its arguments, which are JSON between single quotes.
_QUOTED = re.compile(r"\{\s*\"name\"\s*:\s*\"([^\"]+)\"\s*,\s*\"arguments\"\s*:\s*'(.*)'\s*\}", re.DOTALL)
_END = "<|endoftext|>"


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `system`, with the functions as JSON after its text, and `chat`."""
    chat, system = column(row, "chat"), read_text(column(row, "system"), "system")
    if not isinstance(chat, str):
        raise RowError(f"chat is {shown(chat)}; expected a text of USER: and ASSISTANT: turns; lists of messages are "
                       "read with data.columns: {messages: chat}")  # fmt: skip
    found = list(_TURN.finditer(chat))
    if not found or chat[: found[0].start()].strip():
        raise RowError("chat does not begin with USER: or ASSISTANT:")
    ends = [*(match.start() for match in found[1:]), len(chat)]
    items = [_item(_ROLES[match[1]], chat[match.end() : end]) for match, end in zip(found, ends, strict=True)]
    text, tools = _declared(system.strip().removeprefix("SYSTEM:").strip())
    changed = {**row, "system": text} | ({"tools": tools} if tools else {})
    return whole(changed, list(read_turns([item for item in items if item], "turn")))


def _item(role: str, said: str) -> dict[str, Any] | None:
    said = said.strip().removesuffix(_END).strip()
    if role == "assistant" and (call := _CALL.search(said)):
        quoted = _QUOTED.fullmatch(call[1])
        made: Any = {"name": quoted[1], "arguments": quoted[2].replace("\\'", "'")} if quoted else call[1]
        return {"role": role, "content": said[: call.start()].strip(), "tool_calls": [made]}
    return {"role": role, "content": said}


def _declared(system: str) -> tuple[str, list[Any]]:
    """The text of a system prompt, and the functions after it; all of it as text where they are not JSON."""
    start, tools = system.find("{"), []
    if start < 0:
        return system, []
    at = start
    while at < len(system):
        try:
            tool, at = json.JSONDecoder().raw_decode(system, at)
        except (ValueError, RecursionError):
            return system, []
        tools.append(tool)
        at += len(system[at:]) - len(system[at:].lstrip())
    return system[:start].strip(), tools
