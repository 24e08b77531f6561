"""LLaMA-Factory's v1 (`USE_V1=1`): rows of Phi chats rendered here, whatever `template:` names.

v1 is not a Trainer host; it has a registry of plugins by name, and of its models' templates ours is one more.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.encode import IGNORE, EncodeError, encode, prompt_ids
from phi3_lora_plugin.chat.marks import weight_of
from phi3_lora_plugin.hosts.base import family_template
from phi3_lora_plugin.hosts.llamafactory import TEMPLATE
from phi3_lora_plugin.hosts.pairs import conversation
from phi3_lora_plugin.seams import look_up

log = logging.getLogger(__name__)
#: v1 has no place for settings of ours; this loses nothing of a row.
_HOW: dict[str, Any] = {"system": "fold", "tools": "text", "thoughts": "train"}


def take_over(renderer: Any) -> None:
    """Register `template: phi3_lora`, and have `renderer`, v1's class, use it for tokenizers of the family."""
    look_up("llamafactory.v1_known").add(TEMPLATE)  # else v1 warns that its own package has no such file
    look_up("llamafactory.v1_rendering")(TEMPLATE).register("render_messages")(render)
    stock = renderer.__init__

    def init(self: Any, template: str, processor: Any) -> None:
        stock(self, template, processor)
        if template != TEMPLATE and family_template(_tokenizer(processor)) is not None:
            log.warning("template: %s instead of %s, which renders and masks as published", TEMPLATE, template)
            self.template = TEMPLATE

    renderer.__init__ = init


def render(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: str | None = None,
    is_generate: bool = False,
    enable_thinking: bool = False,
) -> dict[str, Any]:
    """v1's messages, whose content is a list of `{"type", "value"}`, as its `ModelInput`.

    Raises:
        EncodeError: a part that is not text, reasoning or a tool call, or text that contains control tokens.
    """
    tokenizer = _tokenizer(processor)
    turns = conversation([_turn(message) for message in messages], None, tools, {})
    if is_generate:
        ids = prompt_ids(turns, tokenizer, **_HOW)
        row: dict[str, Any] = {"input_ids": ids, "labels": [IGNORE] * len(ids)}
    else:
        row = encode(turns, tokenizer, **_HOW)
    ids, labels = row["input_ids"], row["labels"]
    weights = row.get("weights") or [float(label != IGNORE) for label in labels]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "loss_weights": weights}


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message["role"], "content": ""}
    calls = []
    for part in message["content"]:
        kind, value = part["type"], part["value"]
        if kind == "text":
            turn["content"] += value
        elif kind == "reasoning":
            turn["reasoning_content"] = turn.get("reasoning_content", "") + value
        elif kind == "tool_call":
            calls.append(json.loads(value))
        else:
            raise EncodeError("messages", f"has a part of type {kind}; expected text, reasoning or tool_call")
    if calls:
        turn["tool_calls"] = calls
    weight = weight_of(message, "a message")
    if weight is not None and turn["role"] == "assistant":
        turn |= {"train": False} if weight == 0 else {"weight": weight}
    return turn


def _tokenizer(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)
