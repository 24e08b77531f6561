"""Pieces of text that are trained or not, as axolotl's input_output has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.content import checked_text
from phi3_lora_plugin.chat.format_parts import listed
from phi3_lora_plugin.chat.marks import ROW_MARKS
from phi3_lora_plugin.chat.row_error import RowError, shown
from phi3_lora_plugin.chat.turns import Message, weighed

REQUIRED = ("segments",)
OPTIONAL = ROW_MARKS
#: Many files have such a column next to the ones of another format, which then comes first.
LAST = True


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read axolotl's `segments`, `{label, text}`: texts that stand as they are, trained where `label` is true."""
    whole = ""
    spans = []
    for number, item in enumerate(listed(row, "segments"), 1):
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), bool) or "text" not in item:
            raise RowError(f"segment {number} is {shown(item)}; expected an object with label (true or false) and text")
        part = checked_text(item["text"], f"text of segment {number}")
        if part:
            spans.append((len(whole), len(whole) + len(part), float(item["label"])))
        whole += part
    return weighed(row, [{"role": "text", "content": whole, "spans": spans, "as_it_is": True}])
