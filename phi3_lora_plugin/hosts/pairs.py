"""One conversation of a host, encoded here, in the shapes that hosts want it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.calls import read_calls
from phi3_lora_plugin.chat.encode import IGNORE, EncodeError, encode
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.thoughts import inline
from phi3_lora_plugin.recipe.sections import ChatSection


def conversation(
    messages: Sequence[Mapping[str, Any]], system: str | None, tools: str | None, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Messages of a host as `encode` takes them.

    Args:
        messages: `{"role", "content"}`, and what else `encode` reads (`train`).
        system, tools: text, or nothing.
        roles: the host's names for roles to ours, where they differ.
    """
    turns: list[dict[str, Any]] = []
    if system or tools:
        turns.append({"role": "system", "content": system or ""} | ({"tools": tools} if tools else {}))
    for message in messages:
        turn = dict(message) | {"role": roles.get(message["role"], message["role"])}
        if message["role"] != turn["role"] == "assistant":  # a turn that holds calls, as JSON text
            block, text = inline(str(message["content"]))
            turn |= {"content": "", "calls": _calls(text)} | ({} if block is None else {"thoughts": block})
        turns.append(turn)
    return turns


def _calls(text: str) -> list[dict[str, Any]]:
    """Calls that a host has as JSON text; a host's own check has let them through."""
    try:
        return read_calls([text], "it")
    except RowError as error:
        raise EncodeError("messages", f"a turn of the role function: {error}") from error


def encoded(turns: Sequence[Mapping[str, Any]], tokenizer: Any, data: ChatSection, train_on: str | None = None) -> Any:
    """`{"input_ids", "labels"}` as configured by `phi3_lora.data`; `train_on`, if given, wins over it."""
    row = unweighted(encode(turns, tokenizer, train_on=train_on or data.train_on, **data.rendering))
    if isinstance(row, EncodeError):
        raise row
    return row


def unweighted(row: Any) -> Any:
    """An encoded row, or an error in place of one whose weights a host's loss does not honour."""
    if isinstance(row, dict) and "weights" in row:
        return EncodeError("messages", "has a weight between 0 and 1, which the loss of this host does not honour")
    return row


def pairs(input_ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The row cut into (untrained, trained) stretches; put together again they are the row.

    The last has nothing trained where the row ends untrained, as Phi-3-mini's does on `<|endoftext|>`.
    """
    cut: list[tuple[list[int], list[int]]] = []
    source: list[int] = []
    target: list[int] = []
    for token, label in zip(input_ids, labels, strict=True):
        if label == IGNORE and target:
            cut.append((source, target))
            source, target = [], []
        (source if label == IGNORE else target).append(token)
    return [*cut, (source, target)]
