"""Plain text, which is not a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import column
from phi3_lora_plugin.chat.marks import ROW_MARKS
from phi3_lora_plugin.chat.turns import Message, weighed

REQUIRED = ("text",)
OPTIONAL = ROW_MARKS
#: Many files have such a column next to the ones of another format, which then comes first.
LAST = True


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `text`: no chat, and nothing is put around it; all of it is trained, and the token that ends a text."""
    return weighed(row, [{"role": "text", "content": read_text(column(row, "text"), "text")}])
