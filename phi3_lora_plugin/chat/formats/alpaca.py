"""Instructions as Alpaca has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import ANY, column, exchange, history, whole
from phi3_lora_plugin.chat.thoughts import THOUGHTS
from phi3_lora_plugin.chat.turns import Message

REQUIRED = ("instruction", "output")
OPTIONAL = ("input", "history", *THOUGHTS, *ANY)


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `instruction`, `input` (put on a line below it) and `output`, with `system` and `history` if given."""
    question = read_text(column(row, "instruction"), "instruction")
    if row.get("input") is not None and (extra := read_text(row["input"], "input")):
        question = f"{question}\n{extra}" if question else extra
    answer = read_text(column(row, "output"), "output")
    return whole(row, [*history(row), *exchange(question, answer, row)])
