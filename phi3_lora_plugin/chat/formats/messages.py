"""Chats as OpenAI and Mistral write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.format_parts import ANY, listed, whole
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("messages",)
OPTIONAL = ANY


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `messages`: a list of `{role, content}` as OpenAI and mistral write it, with `weight` or `train`."""
    return whole(row, list(read_turns(listed(row, "messages"))))
