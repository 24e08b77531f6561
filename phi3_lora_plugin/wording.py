"""The words that messages share: sizes, lists cut short, the nearest name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest(name: str, names: Any) -> str:
    """`; did you mean ...?` with the closest of `names`, or nothing."""
    close = get_close_matches(str(name), [str(known) for known in names], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first of `names`, by comma, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def shorten(value: Any, limit: int = 60) -> str:
    """The value as Python writes it, cut so that a message stays readable."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(value: Any) -> str:
    """The value with its kind where Python's way of writing it might be mistaken for another."""
    kind = "text " if isinstance(value, str) else "list " if isinstance(value, list) else ""
    return kind + shorten(value)


def human(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
