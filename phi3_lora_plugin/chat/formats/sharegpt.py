"""Chats as ShareGPT has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.format_parts import ANY, listed, whole
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("conversations",)
OPTIONAL = ANY


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `conversations`: a list of `{from, value}`, next to the columns `system` and `tools` if given."""
    return whole(row, list(read_turns(listed(row, "conversations"))))
