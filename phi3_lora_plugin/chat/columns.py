"""Foreign column names -> those that a format reads, by `data.columns`; and what of a row no format reads."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from phi3_lora_plugin.chat.formats import OPTIONAL
from phi3_lora_plugin.chat.marks import LABELS, decisive, label_of
from phi3_lora_plugin.chat.row_error import RowError, named
from phi3_lora_plugin.chat.turns import KEYS
from phi3_lora_plugin.wording import nearest

# Keys of a single message, which `data.columns` may rename as well.
MESSAGE_KEYS = ("role", "content", "from", "value")


# Columns that hold messages, or may.
_LISTS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "chosen_messages",
          "rejected_messages", "preferred_output", "non_preferred_output")  # fmt: skip


def rename(row: Mapping[str, Any], columns: Mapping[str, str], ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return the row with foreign columns under their canonical names, by `{canonical: foreign}`.

    A foreign name may lead inwards by dots: `instances.0.output`. Keys of single messages are renamed too. A column
    that its format can do without may be missing. Columns, and keys of messages, that `ignore` names are not there.
    """
    if ignore:
        kept = {name: value for name, value in row.items() if name not in ignore}
        row = _changed(kept, lambda message: {key: value for key, value in message.items() if key not in ignore})
    inner = {foreign: name for name, foreign in columns.items() if name in MESSAGE_KEYS}
    outer = {name: foreign for name, foreign in columns.items() if name not in MESSAGE_KEYS}
    found = {}
    for name, foreign in outer.items():
        try:
            found[name] = lookup(row, foreign)
        except KeyError:
            if not any(name in optional for optional in OPTIONAL.values()):
                guess = nearest(foreign, [key for key in row if isinstance(key, str)])
                raise RowError(f"has no column {foreign!r} (data.columns.{name}), only {named(row)}{guess}") from None
    renamed = {name: value for name, value in row.items() if name not in outer.values()} | found
    if inner:
        return _changed(renamed, lambda message: {inner.get(key, key): value for key, value in message.items()})
    return renamed


def lookup(row: Any, path: str) -> Any:
    """Return `row[path]`, or the value at the end of a dotted path; raises `KeyError` where there is nothing."""
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


def unread_values(row: Mapping[str, Any], known: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield what is not read of a row whose `known` columns are, as (`column` or `column[].key`, value)."""
    for column, value in row.items():
        if column not in known:
            yield column, value
        elif column in LABELS and value is not None and label_of(row) is None:
            yield column, value
        elif isinstance(value, list) and column in _LISTS and column != "conversation":
            for item in value:
                if isinstance(item, Mapping):
                    for key, inner in item.items():
                        if key not in KEYS and inner is not None:
                            yield f"{column}[].{key}", inner


def refuse_decisive(unused: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the names of what is not read.

    Raises:
        RowError: one of them would change what is trained; says which, and how to say that it does not matter.
    """
    names = []
    for path, value in unused:
        key = path.rsplit("[].", 1)[-1]
        if reason := decisive(key, value):
            where = f" in a message of {path.split('[]')[0]}" if "[]" in path else ""
            raise RowError(f"{reason}{where}; if it does not matter, write data.ignore: [{key}]")
        names.append(path)
    return list(dict.fromkeys(names))


def _changed(row: dict[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The row with each message of its lists changed."""
    lists = {name: row[name] for name in _LISTS if isinstance(row.get(name), list)}
    return row | {
        name: [change(item) if isinstance(item, Mapping) else item for item in items] for name, items in lists.items()
    }
