"""Foreign column names -> those that a format reads, by `data.columns`; and what of a row no format reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from phi3_lora_plugin.chat.formats import OPTIONAL, REQUIRED
from phi3_lora_plugin.chat.turns import KEYS, RowError, named

# Keys of a single message, which `data.columns` may rename as well.
MESSAGE_KEYS = ("role", "content", "from", "value")


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with foreign columns under their canonical names, by `{canonical: foreign}`.

    A foreign name may lead inwards by dots: `instances.0.output`. Keys of single messages are renamed too. A column
    that its format can do without may be missing.
    """
    inner = {foreign: name for name, foreign in columns.items() if name in MESSAGE_KEYS}
    outer = {name: foreign for name, foreign in columns.items() if name not in MESSAGE_KEYS}
    found = {}
    for name, foreign in outer.items():
        try:
            found[name] = lookup(row, foreign)
        except KeyError:
            if not any(name in optional for optional in OPTIONAL.values()):
                near = get_close_matches(foreign, [key for key in row if isinstance(key, str)], 1)
                guess = f"; did you mean {near[0]!r}?" if near else ""
                raise RowError(f"has no column {foreign!r} (data.columns.{name}), only {named(row)}{guess}") from None
    renamed = {name: value for name, value in row.items() if name not in outer.values()} | found
    for name in ("messages", "conversations", "prompt", "completion", "chosen", "rejected") if inner else ():
        if isinstance(renamed.get(name), list):
            renamed[name] = [
                {inner.get(key, key): value for key, value in item.items()} if isinstance(item, Mapping) else item
                for item in renamed[name]
            ]
    return renamed


def lookup(row: Any, path: str) -> Any:
    """Return `row[path]`, or what lies at the end of a dotted path; raises `KeyError` where there is nothing."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    if isinstance(row, list) and head.isdecimal() and int(head) < len(row):
        inner = row[int(head)]
    elif isinstance(row, Mapping) and dot and head in row:
        inner = row[head]
    else:
        raise KeyError(path)
    return lookup(inner, rest) if dot else inner


def unread(row: Mapping[str, Any], name: str) -> Iterator[str]:
    """Yield the columns of the row, and the keys of its messages, that format `name` makes nothing of."""
    if name not in REQUIRED:
        return  # a stranger's adapter; only it knows
    for column, value in row.items():
        if column not in (*REQUIRED[name], *OPTIONAL[name]):
            yield column
        elif isinstance(value, list):
            yield from {
                f"{column}[].{key}"
                for item in value
                if isinstance(item, Mapping)
                for key, inner in item.items()
                if key not in KEYS and inner is not None
            }
