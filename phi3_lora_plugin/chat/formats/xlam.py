"""Queries with the calls that answer them, as Salesforce's xLAM data sets have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import ANY, column, listed, whole
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("query", "answers")
OPTIONAL = ANY


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `query` and `answers`: a list of `{name, arguments}`, or its JSON text; `tools` declares them."""
    asked = {"role": "user", "content": read_text(column(row, "query"), "query")}
    called = {"role": "assistant", "content": None, "tool_calls": list(listed(row, "answers"))}
    return whole(row, list(read_turns([asked, called])))
