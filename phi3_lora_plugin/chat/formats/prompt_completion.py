"""A prompt and its completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.format_parts import ANY, column, exchange, listed, whole
from phi3_lora_plugin.chat.thoughts import THOUGHTS
from phi3_lora_plugin.chat.turns import Message, context, read_turns

REQUIRED = ("prompt", "completion")
OPTIONAL = (*THOUGHTS, *ANY)


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `prompt` and `completion`, each a text or a list of messages; nothing in the prompt is trained."""
    prompt, completion = column(row, "prompt"), column(row, "completion")
    if isinstance(prompt, list | tuple):
        turns = context(list(read_turns(listed(row, "prompt"), "message of prompt")))
    else:
        turns = [*read_turns([{"role": "user", "content": read_text(prompt, "prompt")}])]
    if isinstance(completion, list | tuple):
        turns += read_turns(listed(row, "completion"), "message of completion")
    else:
        turns += exchange("", read_text(completion, "completion"), row)[1:]
    return whole(row, turns)
