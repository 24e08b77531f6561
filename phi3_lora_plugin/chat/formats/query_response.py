"""A query and its response, as ms-swift has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import ANY, column, exchange, history, whole
from phi3_lora_plugin.chat.thoughts import THOUGHTS
from phi3_lora_plugin.chat.turns import Message

REQUIRED = ("query", "response")
OPTIONAL = ("history", *THOUGHTS, *ANY)


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read ms-swift's `query` and `response`, with `system` and `history` if given."""
    question, answer = (read_text(column(row, name), name) for name in ("query", "response"))
    return whole(row, [*history(row), *exchange(question, answer, row)])
