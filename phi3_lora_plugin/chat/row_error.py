"""What is wrong with one row, and how values are named in such a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import listed


class RowError(Phi3LoraError):
    """One row that is not what its format says; the message is a sentence without the row's number."""


@contextmanager
def not_too_deep() -> Iterator[None]:
    """Around what reads a row, also as a decorator: one that is nested beyond Python's limit is a `RowError`."""
    try:
        yield
    except RecursionError:
        raise RowError("is nested too deeply to be a chat") from None


def shown(value: Any) -> str:
    """Name a value for an error: its kind and the beginning of it, on one line and without control characters."""
    if value is None:
        return "null"
    kind = {str: "text", bool: "a switch", int: "a number", float: "a number", list: "a list", dict: "an object"}
    text = repr(value[:60] if isinstance(value, str) else value)
    return f"{kind.get(type(value), type(value).__name__)} ({text if len(text) <= 60 else text[:57] + '...'})"


def named(row: Mapping[str, Any]) -> str:
    """List the columns or keys that there are, for an error."""
    names = [str(name)[:60] for name in row]
    return listed(names, 20) or "nothing"
