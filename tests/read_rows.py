"""Rows of data, as they are read by their format, and the text of encoded ones that is trained."""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.chat.adapt import adapted
from phi3_lora_plugin.chat.columns import rename
from phi3_lora_plugin.chat.formats import ADAPTERS, detect


def read(row: dict[str, Any], *ignore: str) -> list[dict[str, Any]]:
    """The messages of a row, by the one data format that its columns fit."""
    row = rename(row, {}, ignore)
    (name,) = detect(row)
    return adapted(ADAPTERS[name], row, name)


def trained(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of an encoded row that is trained, with `|` where a turn ends."""
    ids = [label for label in row["labels"] if label != -100]
    return str(tokenizer.decode(ids, skip_special_tokens=False)).replace("<|end|>", "|")
