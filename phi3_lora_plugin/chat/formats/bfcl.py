"""Questions, functions and the calls that are right, as the Berkeley Function-Calling Leaderboard has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.format_parts import ANY, listed, whole
from phi3_lora_plugin.chat.row_error import RowError, shown
from phi3_lora_plugin.chat.turns import Message, read_turns

REQUIRED = ("question", "function", "ground_truth")
OPTIONAL = ANY


def adapt(row: Mapping[str, Any]) -> list[Message]:
    """Read `question` (messages, maybe in a list of one), `function` (declarations) and `ground_truth`.

    Of the values that an argument may have, the first is taken; one that may be missing (`""` first) is left out.
    """
    turns = listed(row, "question")
    if isinstance(turns[0], list) and len(turns) > 1:
        raise RowError(f"question has {len(turns)} rounds, but ground_truth has the calls of one")
    turns = turns[0] if isinstance(turns[0], list) else turns
    calls = [_call(one) for one in listed(row, "ground_truth")]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    return whole({**row, "tools": row["function"]}, list(read_turns([*turns, answer])))


def _call(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) or len(given) != 1:
        raise RowError(f"ground_truth has {shown(given)}; expected {{name: {{argument: [values]}}}}")
    ((name, arguments),) = given.items()
    if not isinstance(arguments, Mapping):
        raise RowError(f"ground_truth of {name} is {shown(arguments)}; expected {{argument: [values]}}")
    chosen = {key: _first(values) for key, values in arguments.items() if not _may_be_missing(values)}
    return {"name": name, "arguments": chosen}


def _may_be_missing(values: Any) -> bool:
    return isinstance(values, list) and (not values or values[0] == "")


def _first(values: Any) -> Any:
    """The first of the values that are right; of an object, in each of its keys."""
    first = values[0] if isinstance(values, list) else values
    if isinstance(first, Mapping):
        return {key: _first(inner) for key, inner in first.items() if not _may_be_missing(inner)}
    return first
