"""Rows with a chosen and a rejected answer -> canonical messages: the prompt that both share, and each answer.

Read are the shapes in which chats come too: lists of messages (`role`, `content` or `from`, `value`), one message, or
text; the prompt as `prompt`, `messages`, `conversations` or Alpaca's `instruction` and `input`; or no prompt at all,
where `chosen` and `rejected` are whole chats that begin alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.chat.formats import alpaca
from phi3_lora_plugin.chat.turns import Message, RowError, complete, named, read_text, read_turns, shown

#: Every column that is read.
COLUMNS = ("chosen", "rejected", "prompt", "messages", "conversations", "instruction", "input", "history", "system",
           "tools")  # fmt: skip
_PROMPTS = ("prompt", "messages", "conversations", "instruction")


@dataclass(frozen=True)
class Pair:
    """Two chats that differ in their last turn, the assistant's; every turn before it is `train: False`."""

    chosen: list[Message]
    rejected: list[Message]


def preference(row: Mapping[str, Any]) -> Pair:
    """Read one row.

    Raises:
        RowError: what is wrong with it, in one sentence.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise RowError(f"has no column {name!r}, only {named(row)}")
    prompts = [name for name in _PROMPTS if row.get(name) is not None]
    if len(prompts) > 1:
        raise RowError(f"has its prompt twice, as {' and '.join(prompts)}; keep one")
    chosen, rejected = (_turns(row[name], name, bool(prompts)) for name in ("chosen", "rejected"))
    if prompts:
        prompt = _prompt(row, prompts[0])
    else:
        count = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:count], chosen[count:], rejected[count:]
        if not prompt:
            raise RowError("has no prompt: chosen and rejected do not begin alike; add a column `prompt`")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if [turn["role"] for turn in answer] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in answer) or "nothing"
            raise RowError(f"{name} is {roles} behind the prompt; expected one turn of the assistant")
    if chosen[0]["content"] == rejected[0]["content"]:
        raise RowError("chosen and rejected are the same, so there is nothing to prefer")
    before = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in prompt]
    system, tools = row.get("system"), row.get("tools")
    whole = [complete([*before, *answer], system=system, tools=tools) for answer in (chosen, rejected)]
    return Pair(*whole)


def _prompt(row: Mapping[str, Any], name: str) -> list[Message]:
    if name == "instruction":
        without_answer = {key: row[key] for key in ("instruction", "input", "history") if key in row}
        return alpaca(without_answer | {"output": "-"})[:-1]
    return _turns(row[name], name, False)


def _turns(value: Any, name: str, answers: bool) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "assistant" if answers else "user", "content": read_text(value, name)}]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} is {shown(value)}; expected text, a message or a list of messages")
    return list(read_turns(value, f"message of {name}"))
