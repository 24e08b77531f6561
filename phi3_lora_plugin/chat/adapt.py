"""The rows of one source -> canonical messages: one format a source, by its columns unless the recipe names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar

from phi3_lora_plugin.chat.columns import MESSAGE_KEYS, lookup, refuse_decisive, rename, unread_values
from phi3_lora_plugin.chat.formats import ADAPTERS, OPTIONAL, REQUIRED, Adapter, detect
from phi3_lora_plugin.chat.propose import propose
from phi3_lora_plugin.chat.readers import Place, Problem, Row, SourceError
from phi3_lora_plugin.chat.row_error import RowError, named, not_too_deep, shown
from phi3_lora_plugin.chat.sources import Source
from phi3_lora_plugin.chat.turns import Message, complete, read_turns
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.recipe.sections import ChatSection
from phi3_lora_plugin.wording import nearest

_Read = TypeVar("_Read")
_LOOK_AT = 100  # rows from the top that decide how a source is read


@dataclass
class Reading:
    """What became known of one source while it was read; whole once `conversations` has come to its end."""

    name: str
    format: str = ""
    because: str = ""  # how the format was chosen
    rows: int = 0  # read so far, good and bad
    unread: Counter[str] = field(default_factory=Counter)  # columns and keys that the format does not read


def conversations(
    source: Source, reading: Reading, data: ChatSection, adapters: Mapping[str, Adapter]
) -> Iterator[tuple[Place, list[Message]] | Problem]:
    """Yield the messages of each row, or what is wrong with it, in order; `reading` is filled on the way.

    Args:
        source: from `find_sources`.
        reading: a fresh one.
        data: how it is read: `format`, `columns` and `ignore`.
        adapters: every registered format by name.

    Raises `SourceError` where the source as a whole cannot be read that way.
    """
    items = source.rows()
    top: list[Row | Problem] = []
    looked = 0
    for item in items:
        top.append(item)
        looked += isinstance(item, Row)
        if looked == _LOOK_AT:
            break
    rows = [item for item in top if isinstance(item, Row)]
    if rows:
        reading.format, reading.because = _choose(source.name, rows, data.format, data.columns, adapters)
    adapt = adapters.get(reading.format) or ADAPTERS.get(reading.format)

    def read(values: Mapping[str, Any]) -> list[Message]:
        if adapt is None:
            raise RowError("comes after rows that fit no format")
        try:
            return adapted(adapt, rename(values, data.columns, data.ignore), reading.format, reading.unread)
        except RowError as error:
            others = [name for name in detect(values) if name != reading.format]
            guessed = others and data.format == "auto"
            hint = f"; it looks like {others[0]}, but one source has one format" if guessed else ""
            raise RowError(f"{error}{hint}") from error

    yield from each(replace(source, rows=lambda: chain(top, items)), reading, read)


def each(
    source: Source, reading: Reading, read: Callable[[Mapping[str, Any]], _Read]
) -> Iterator[tuple[Place, _Read] | Problem]:
    """Yield what `read` makes of each row, or what is wrong with it, in order; `reading` counts the rows.

    Raises `SourceError` for a source without rows.
    """
    for item in source.rows():
        reading.rows += 1
        if isinstance(item, Problem):
            yield item
            continue
        try:
            yield item.place, read(item.values)
        except RowError as error:
            yield Problem(item.place, str(error))
    if not reading.rows:
        raise SourceError([f"{source.name}: has no rows"])


@not_too_deep()
def adapted(adapt: Adapter, row: Mapping[str, Any], name: str, unused: Counter[str] | None = None) -> list[Message]:
    """Return the messages of a row; whatever another plugin's data format raises or gives wrongly is a `RowError`.

    Columns that a format of ours does not read are counted in `unused`; one that would change what is trained is a
    `RowError` as well.
    """
    if ADAPTERS.get(name) is not adapt:
        return _of_stranger(adapt, row, name)
    made = adapt(row)
    names = refuse_decisive(unread_values(row, (*REQUIRED[name], *OPTIONAL[name])))
    if unused is not None:
        unused.update(names)
    return made


def _of_stranger(adapt: Adapter, row: Mapping[str, Any], name: str) -> list[Message]:
    # Whatever it raises is about this row; what it gives is checked like a row's own messages.
    try:
        made = adapt(row)
    except RowError:
        raise
    except Exception as error:
        alone = type(error) is ValueError or isinstance(error, Phi3LoraError)
        said = str(error) if alone else f"{type(error).__name__}: {error}"
        raise RowError(f"data format {name!r}: {said}") from error
    if not isinstance(made, list):
        raise RowError(f"data format {name!r} gave {shown(made)}; expected a list of messages")
    return complete(list(read_turns(made)))


def _choose(
    source: str, rows: list[Row], wanted: str, columns: Mapping[str, str], adapters: Mapping[str, Adapter]
) -> tuple[str, str]:
    """Return the format of a source, and the reason for it; raises `SourceError` if there is none, or two."""
    if wanted != "auto" and wanted not in adapters and wanted not in ADAPTERS:
        known = sorted({*adapters, *ADAPTERS})
        raise SourceError([f"data.format: {wanted!r} is not one of auto, {', '.join(known)}{nearest(wanted, known)}"])
    _check_columns(source, rows, wanted, columns)
    if wanted == "auto":
        return _recognise(source, rows, columns)
    missing = [name for name in REQUIRED.get(wanted, ()) if name not in columns]
    if not any(all(name in row.values for name in missing) for row in rows):
        raise SourceError([f"{rows[0].place}: {_no_column(missing, rows[0], wanted)}"])
    return wanted, "as data.format says"


def _recognise(source: str, rows: list[Row], columns: Mapping[str, str]) -> tuple[str, str]:
    renamed: list[tuple[Row, dict[str, Any]]] = []
    for row in rows:
        try:
            renamed.append((row, rename(row.values, columns)))
        except RowError:
            continue
    # A column that is there and null in every row is for the adapter to tell, row by row.
    there = [(row, dict.fromkeys(values, "")) for row, values in renamed]
    for row, values in [*renamed, *there]:
        # Columns that the recipe names decide, if they make a format by themselves.
        fits = detect({name: values[name] for name in columns if name in values}) or detect(values)
        if len(fits) > 1:
            both = " and ".join(f"{name} ({', '.join(REQUIRED[name])})" for name in fits)
            raise SourceError([f"{row.place}: fits {both}; choose one with data.format"])
        if fits:
            found = ", ".join(
                f"{name} (from {columns[name]})" if name in columns else name for name in REQUIRED[fits[0]]
            )
            return fits[0], f"by its column{'s' if ',' in found else ''} {found}"
    given = propose([row.values for row in rows])
    advice = "Name the columns with data.columns, as in data.columns='{prompt: question, completion: answer}'"
    if given is not None:
        advice = f"If that is what they mean, write {given}"
    formats = "; ".join(f"{name} has {', '.join(required)}" for name, required in REQUIRED.items())
    found = f"its columns are {named(rows[0].values)}, while {formats}"
    raise SourceError([f"{rows[0].place}: fits no format; {found}. {advice}"])


def _check_columns(source: str, rows: list[Row], wanted: str, columns: Mapping[str, str]) -> None:
    """Refuse names in `data.columns` that no format has, or that no row has."""
    if wanted in REQUIRED:
        names = [*REQUIRED[wanted], *OPTIONAL[wanted], *MESSAGE_KEYS]
    else:
        names = sorted({name for table in (REQUIRED, OPTIONAL) for some in table.values() for name in some})
        names += MESSAGE_KEYS
    problems = []
    for name, foreign in columns.items():
        if name not in names and (wanted == "auto" or wanted in REQUIRED):
            guess = nearest(name, names, f", only {', '.join(names)}")
            problems.append(f"data.columns: format {wanted} has no column {name!r}{guess}")
        elif name not in MESSAGE_KEYS and not any(_has(row.values, foreign) for row in rows):
            present = list(dict.fromkeys(key for row in rows for key in row.values))
            guess = nearest(foreign, present)
            none = "no row" if len(rows) < _LOOK_AT else f"none of the first {len(rows)} rows"
            problems.append(
                f"data.columns.{name}: {none} of {source} has a column {foreign!r}, only {', '.join(present)}{guess}"
            )
    if problems:
        raise SourceError(problems)


def _has(row: Mapping[str, Any], foreign: str) -> bool:
    try:
        lookup(row, foreign)
    except KeyError:
        return False
    return True


def _no_column(missing: list[str], row: Row, wanted: str) -> str:
    absent = [name for name in missing if name not in row.values]
    others = detect(row.values)
    hint = f"it looks like {others[0]}" if others else "name the columns with data.columns"
    return f"format {wanted} needs {', '.join(absent)}; the columns are {named(row.values)}; {hint}"
