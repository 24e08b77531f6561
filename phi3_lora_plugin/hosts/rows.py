"""Rows that a host has read -> ids and labels, for hosts that let others encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from phi3_lora_plugin.chat.adapt import adapted
from phi3_lora_plugin.chat.columns import rename
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.formats import ADAPTERS, REQUIRED, detect
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.turns import Message
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts.pairs import unweighted
from phi3_lora_plugin.plugins.discovery import load_plugins
from phi3_lora_plugin.recipe.sections import ChatSection
from phi3_lora_plugin.wording import first_lines

_LISTED = 20


class RowsError(Phi3LoraError):
    """Rows that cannot be encoded; the message lists them with reasons, and how to skip them."""


def encode_rows(rows: Sequence[Mapping[str, Any]], tokenizer: Any, data: ChatSection) -> list[dict[str, list[int]]]:
    """`{"input_ids", "labels"}` of each row, labels -100 where nothing is trained; skipped rows are left out.

    Raises:
        RowsError: rows that are not chats or contain control tokens, unless `data.on_error` is skip.
    """
    # A column that another row has is there and empty in this one: hosts read rows into tables.
    present = [{name: value for name, value in row.items() if value is not None} for row in rows]
    read = [_messages(row, data) for row in present]
    good = [messages for messages in read if not isinstance(messages, RowError)]
    policy = Policy.of(data)
    encoded = iter(encode_batch(good, tokenizer, policy=policy, template=data.template))
    results = [one if isinstance(one, RowError) else unweighted(next(encoded)) for one in read]
    wrong = [(number, one) for number, one in enumerate(results, 1) if isinstance(one, (RowError, EncodeError))]
    if wrong and data.on_error == "stop":
        lines = first_lines([f"row {number} of {len(rows)}: {error}" for number, error in wrong], _LISTED)
        raise RowsError("\n  ".join(["rows cannot be encoded; phi3_lora.data.on_error: skip drops them:", *lines]))
    return [
        {"input_ids": one["input_ids"], "labels": one["labels"]}
        for one in results
        if not isinstance(one, (RowError, EncodeError))
    ]


def _messages(row: Mapping[str, Any], data: ChatSection) -> list[Message] | RowError:
    try:
        renamed = rename(row, data.columns, data.ignore)
        name = data.format
        if name == "auto":
            # A host's rows are chats: plain text among them would be trained without a template, unless asked for.
            fits = [fit for fit in detect(renamed) if fit not in ("text", "segments")]
            if len(fits) != 1:
                known = "; ".join(f"{kind} has {', '.join(columns)}" for kind, columns in REQUIRED.items())
                raise RowError(f"its columns {', '.join(row)} fit {' and '.join(fits) or 'no format'}: {known}")
            name = fits[0]
        return adapted(ADAPTERS.get(name) or _strangers(name), renamed, name)
    except RowError as error:
        return error


@cache
def _strangers(name: str) -> Any:
    plugins = load_plugins()
    plugins.pick("dataset_adapters", name)
    return plugins.adapters(name)[name]
