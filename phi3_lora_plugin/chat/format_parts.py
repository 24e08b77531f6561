"""What data formats share: a column or its list, with an error that names it, and questions with their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.json_keys import TwiceError, loads
from phi3_lora_plugin.chat.marks import ROW_MARKS
from phi3_lora_plugin.chat.row_error import RowError, named, shown
from phi3_lora_plugin.chat.thoughts import THOUGHTS
from phi3_lora_plugin.chat.turns import Message, complete, read_turns, weighed
from phi3_lora_plugin.wording import closest

#: Columns that every format of chats also reads.
ANY = ("system", "system_prompt", "tools", "functions", *ROW_MARKS)


def exchange(question: str, answer: str, row: Mapping[str, Any] | None = None) -> list[Message]:
    """A question and its answer, with the thoughts that have a column of their own."""
    thoughts = {name: row[name] for name in THOUGHTS if isinstance(row.get(name), str)} if row else {}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | thoughts]
    return list(read_turns(messages))


def history(row: Mapping[str, Any]) -> list[Message]:
    """The exchanges of a column `history`: pairs of a question and its answer."""
    turns: list[Message] = []
    for number, pair in enumerate(listed(row, "history") if row.get("history") is not None else (), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {number} is {shown(pair)}; expected a pair [question, answer]")
        question, answer = (read_text(one, f"{name} of history {number}")
                            for one, name in zip(pair, ("question", "answer"), strict=True))  # fmt: skip
        turns += exchange(question, answer)
    return turns


def whole(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    """All turns of a row, with its system message, its tools and its weight."""
    return weighed(row, complete(turns, row))


def column(row: Mapping[str, Any], name: str) -> Any:
    """A column that has to be there; the error names one that looks like it."""
    if name not in row:
        near = closest(name, [key for key in row if isinstance(key, str)])
        advice = f"; write data.columns: {{{name}: {near}}} if that is it" if near else ""
        raise RowError(f"has no column {name!r}, only {named(row)}{advice}")
    return row[name]


def listed(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a column that holds a list, or its JSON text as in a CSV file; never an empty one, but for `history`."""
    value = column(row, name)
    if isinstance(value, str):
        try:
            value = loads(value)
        except TwiceError as error:
            raise RowError(f"{name} {error}") from None
        except (ValueError, RecursionError):
            raise RowError(f"{name} is {shown(value)}; expected a list, or its JSON text") from None
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {shown(value)}; expected a list")
    if not value and name != "history":
        raise RowError(f"{name} is empty")
    return value
