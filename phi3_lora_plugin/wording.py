"""The words that messages share: sizes, lists cut short, the nearest name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def closest(name: Any, names: Iterable[Any], cutoff: float = 0.6) -> str | None:
    """The one of `names` that is most like `name`, whatever its case; None if none is."""
    lowered = {str(known).lower(): str(known) for known in names}
    close = get_close_matches(str(name).lower(), lowered, n=1, cutoff=cutoff)
    return lowered[close[0]] if close else None


def nearest(name: Any, names: Iterable[Any], otherwise: str = "") -> str:
    """`; did you mean ...?` with the closest of `names`, or `otherwise`."""
    close = closest(name, names)
    return f"; did you mean {close!r}?" if close else otherwise


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first of `names`, by comma, and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def first_lines(lines: Sequence[Any], most: int) -> list[str]:
    """The first of `lines`, and one with how many more there are."""
    more = len(lines) - most
    return [str(line) for line in lines[:most]] + ([f"... and {more:,} more"] if more > 0 else [])


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def named_line(error: BaseException, most: int = 120) -> str:
    """The name of an error and the first line of what it says, cut after `most` characters."""
    name = type(error).__name__
    return f"{name}: {first_line(error)[:most]}" if str(error).strip() else name


def shorten(value: Any, limit: int = 60) -> str:
    """The value as Python writes it, cut so that a message stays readable."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def describe(value: Any) -> str:
    """The value with its kind where Python's way of writing it might be mistaken for another."""
    kind = "text " if isinstance(value, str) else "list " if isinstance(value, list) else ""
    return kind + shorten(value)


def read_size(text: str | int) -> int | None:
    """Bytes of `24GB`, `24 GiB`, `500MB` or a plain number; None of anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(text).lower())
    unit = _UNITS.get(found[2]) if found else None
    return int(float(found[1]) * unit) or None if found and unit else None


def human(count: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
