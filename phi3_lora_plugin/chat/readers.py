"""One file -> its rows, each with its place; what is wrong with a row is a `Problem`, with a file a `SourceError`."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from phi3_lora_plugin.chat.json_keys import Keys
from phi3_lora_plugin.chat.opened import ERRORS, LONGEST_LINE, PACKED, TooLong, impostor, lines, open_file, read_whole
from phi3_lora_plugin.chat.row_error import shown
from phi3_lora_plugin.error import Phi3LoraError

_DATA = re.compile(rb"\{\s*\"data\"\s*:\s*\[")
_GIVE_UP = 100  # so many bad lines at the top, and no good one: the whole file is something else


class Place(NamedTuple):
    """Where a row stands: its line in a text file, its number (from 1) in anything else."""

    file: str
    unit: str  # "line" or "row"
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file} row {self.number}"


class Row(NamedTuple):
    """The columns of one row, and its place."""

    values: dict[str, Any]
    place: Place


class Problem(NamedTuple):
    """What is wrong with one row, in a sentence."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


Rows = Iterator[Row | Problem]


class SourceError(Phi3LoraError):
    """Data that cannot be found or read at all; `problems` holds a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


def reader(path: Path, name: str) -> Callable[[], Rows]:
    """Return what reads a file, after a look at its first bytes; `name` is what errors call it.

    Raises `SourceError` for a file that is unreadable, empty, or plainly not what its ending says.
    """
    endings = [ending.lower() for ending in path.suffixes]
    kind = endings[-2] if len(endings) > 1 and endings[-1] in PACKED else endings[-1] if endings else ""
    if kind not in READERS:
        known = ", ".join(sorted(READERS))
        raise SourceError(
            [f"{name}: cannot read {kind or 'a file without ending'}; expected {known} (text also as .gz and .zst)"]
        )
    try:
        with open_file(path) as file:
            head = file.read(4096)
    except ERRORS as error:
        raise SourceError([f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
    if wrong := impostor(head, kind):
        raise SourceError([f"{name}: {wrong}"])
    return lambda: READERS[kind](path, name)


def _lines(file: IO[bytes], name: str) -> Iterator[bytes]:
    """Yield lines; a disk or an archive that cannot be read to its end is a `SourceError`."""
    try:
        yield from lines(file)
    except ERRORS as error:
        raise SourceError([f"{name}: cannot be read to its end: {error}"]) from None


def read_json(path: Path, name: str) -> Rows:
    """Read JSON of any layout: an array, `{"data": [...]}`, one object a line, or objects over several lines each.

    Only one object a line is read line by line, in constant memory; the file's ending does not decide.
    """
    with open_file(path) as file:
        filled = (line for line in (raw.lstrip(b"\xef\xbb\xbf \t\r\n").rstrip() for raw in _lines(file, name)) if line)
        first, second = next(filled, b""), next(filled, b"")
    whole = first.startswith(b"[")
    if first.startswith(b"{"):
        value = _parsed(first)
        alone = not second and (isinstance(value.get("data"), list) if value else _DATA.match(first) is not None)
        whole = alone or (value is None and bool(second) and not second.startswith(b"{"))
    return _json_whole(path, name) if whole else _json_lines(path, name)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object that a line is; None if it is none by itself."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path, name: str) -> Rows:
    good = bad = 0
    keys = Keys()
    decode = json.JSONDecoder(object_pairs_hook=keys).decode
    with open_file(path) as file:
        for number, raw in enumerate(_lines(file, name), 1):
            line = raw.strip()
            if not line:
                continue
            place = Place(name, "line", number)
            if isinstance(raw, TooLong):
                yield Problem(place, _too_long(raw))
                continue
            try:
                value = decode(line.removeprefix(b"\xef\xbb\xbf").decode())
            except (ValueError, RecursionError) as error:
                bad += 1
                if bad == _GIVE_UP and not good:
                    raise SourceError([f"{place}: {_why(error, raw)}, like every line before it"]) from None
                yield Problem(place, _why(error, raw))
            else:
                good += 1
                yield _row(value, place, keys)
                keys.twice.clear()


def _too_long(line: TooLong) -> str:
    return f"has {line.length:,} bytes; a row may have {LONGEST_LINE:,}"


def _why(error: Exception, raw: bytes) -> str:
    """Say why a line of JSON could not be read."""
    if b"\0" in raw:
        return "holds NUL bytes; the file is damaged"
    if isinstance(error, UnicodeDecodeError):
        byte = raw.strip()[error.start]
        return f"is not UTF-8 (byte 0x{byte:02x} at column {error.start + 1}); save the file as UTF-8"
    if isinstance(error, json.JSONDecodeError):
        end = "" if raw.endswith(b"\n") else "; the file ends here, was it cut off?"
        return f"is not JSON: {error.msg}, column {error.colno}{end}"
    return f"is not JSON: {error}"


def _row(value: Any, place: Place, keys: Keys) -> Row | Problem:
    if twice := keys.within(value):
        return Problem(place, twice)
    if isinstance(value, dict):
        return Row(value, place)
    return Problem(place, f"is {shown(value)}; expected an object with columns")


def _json_whole(path: Path, name: str) -> Rows:
    """Read a file that has to be parsed as a whole: its rows have numbers, a syntax error in it ends the reading."""
    try:
        read = read_whole(path)
    except ERRORS as error:
        raise SourceError([f"{name}: cannot be read to its end: {error}"]) from None
    if isinstance(read, int):
        raise SourceError(
            [f"{name}: is one JSON value of more than {read // 1024**2:,} MiB; write one object a line (.jsonl)"]
        )
    data = read.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SourceError([f"{name}:{line}: is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"]) from None
    keys = Keys()
    decoder, blank, values = json.JSONDecoder(object_pairs_hook=keys), re.compile(r"\s*"), []
    end = len(text.rstrip())
    at = len(text) - len(text.lstrip())
    while at < end:
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            cut = "; the file ends here, was it cut off?" if error.pos >= end else ""
            raise SourceError([f"{name}:{error.lineno}: is not JSON: {error.msg}, column {error.colno}{cut}"]) from None
        except (ValueError, RecursionError) as error:
            raise SourceError([f"{name}: is not JSON that can be read: {error}"]) from None
        values.append(value)
        at = cast("re.Match[str]", blank.match(text, at)).end()
    if len(values) == 1 and isinstance(values[0], dict) and isinstance(values[0].get("data"), list):
        if any(made is values[0] for made, _ in keys.twice):
            raise SourceError([f"{name}: {keys.within(values[0])}"])
        values = values[0]["data"]
    elif len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    for number, value in enumerate(values, 1):
        yield _row(value, Place(name, "row", number), keys)


def read_table(path: Path, name: str) -> Rows:
    """Read CSV or TSV with a header line; a CSV whose header has no comma may be split at semicolons or tabs."""
    csv.field_size_limit(LONGEST_LINE)  # the library's own limit is 128 KiB, less than some chats
    with open_file(path) as file:
        decoded = _TableLines(_lines(file, name))
        first = next(decoded, "").removeprefix("\ufeff")
        delimiter = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
        if delimiter not in first:
            delimiter = next((other for other in ";\t" if other in first), delimiter)
        table = csv.reader(chain([first], decoded), delimiter=delimiter, strict=True)
        try:
            header = next(table)
        except (StopIteration, csv.Error) as error:
            raise SourceError([f"{name}:1: has no header that can be read ({error})"]) from None
        if twice := sorted({column for column in header if header.count(column) > 1}):
            raise SourceError([f"{name}:1: has more than one column named {', '.join(map(repr, twice))}"])
        while True:
            place = Place(name, "line", decoded.number + 1)
            try:
                fields = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                end = "a quote that opens here is never closed" if "end of data" in str(error) else str(error)
                yield Problem(place, f"is not a row of the table: {end}")
                continue
            if fields:
                wrong = _bad_fields(header, fields)
                yield Problem(place, wrong) if wrong else Row(dict(zip(header, fields, strict=True)), place)


class _TableLines:
    """Lines as text, with their number; bytes that are not UTF-8 come through as surrogates, to be told row by row.

    No generator, which would be at its end after the first line that is too long.
    """

    def __init__(self, read: Iterator[bytes]) -> None:
        self.read, self.number = read, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self.read)
        self.number += 1
        if isinstance(raw, TooLong):
            raise csv.Error(_too_long(raw))
        return raw.decode("utf-8", "surrogateescape")


def _bad_fields(header: list[str], fields: list[str]) -> str | None:
    if len(fields) != len(header):
        return f"has {len(fields)} fields, the header has {len(header)}: {', '.join(header)}"
    for column, value in zip(header, fields, strict=True):
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return f"column {column!r} is not UTF-8; save the file as UTF-8"
        if "\0" in value:
            return f"column {column!r} holds NUL bytes; the file is damaged"
    return None


def read_parquet(path: Path, name: str) -> Rows:
    """Read Parquet by batches of rows, so that memory does not grow with the file."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for number, values in enumerate(batch.to_pylist(), number + 1):  # noqa: B020
                    yield Row(values, Place(name, "row", number))
    except UnicodeDecodeError as error:
        raise SourceError([f"{name}: holds text that is not UTF-8 after row {number:,}: {error}"]) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError([f"{name}: cannot be read as Parquet: {str(error).splitlines()[0]}"]) from None


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
}
