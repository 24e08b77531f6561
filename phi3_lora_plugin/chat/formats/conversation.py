"""Pairs of turns, as ms-swift and xtuner write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.format_parts import ANY, listed, whole
from phi3_lora_plugin.chat.marks import MARKS, decisive
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("conversation",)
OPTIONAL = ANY

_EXCHANGES = (("human", "assistant"), ("input", "output"), ("query", "response"), ("user", "assistant"))


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `conversation`: ms-swift's `{human, assistant}`, xtuner's `{system, input, output}`, or messages."""
    turns: list[Any] = []
    for number, item in enumerate(listed(row, "conversation"), 1):
        names = [pair for pair in _EXCHANGES if isinstance(item, Mapping) and all(name in item for name in pair)]
        if not names:
            turns.append(item)
            continue
        known = (*names[0], "system", *MARKS)
        for key, value in item.items():
            if key not in known and (reason := decisive(key, value)):
                raise RowError(f"conversation {number}: {reason}")
        if item.get("system"):
            turns.append({"role": "system", "content": item["system"]})
        turns.append({"role": "user", "content": item[names[0][0]]})
        marks = {name: item[name] for name in MARKS if name in item}
        turns.append({"role": "assistant", "content": item[names[0][1]]} | marks)
    return whole(row, list(read_turns(turns)))
