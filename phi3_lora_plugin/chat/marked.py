"""Encoded rows as text that knows what of it is trained, thought, or a tool call: what reports show in colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.report_view import KINDS, pieces

_LOOKED_AT = 100  # rows, for one with a thought and one with a call
_LONGEST = 4000  # characters of one piece; the middle of a longer one is left out
_ROW = 20_000  # characters of one row; the rest is left out


@dataclass(frozen=True)
class Piece:
    """Text that is alike: `kind` is "text", "thoughts" or "tool calls"; a `weight` of 0 is context."""

    text: str
    weight: float
    kind: str


@dataclass(frozen=True)
class MarkedRow:
    """One row, or one of the two answers of a pair (`name` says which). Lengths are in tokens."""

    number: int  # from 1
    name: str
    tokens: int
    trained: int
    pieces: tuple[Piece, ...]


def marked_rows(rows: Any, tokenizer: Any, count: int = 3) -> list[MarkedRow]:
    """The first `count` rows, and the first with a thought and with a tool call if they are not among those."""
    chosen = list(range(min(count, len(rows))))
    seen = "".join(_text(rows[index], tokenizer) for index in chosen)
    missing = {name: pattern for name, _, pattern in KINDS if not pattern.search(seen)}
    for index in range(len(chosen), min(_LOOKED_AT, len(rows))) if count else ():
        if not missing:
            break
        text = _text(rows[index], tokenizer)
        if found := [name for name, pattern in missing.items() if pattern.search(text)]:
            chosen.append(index)
            for name in found:
                del missing[name]
    return [marked for index in chosen for marked in mark(rows[index], tokenizer, index + 1)]


def mark(row: Mapping[str, Any], tokenizer: Any, number: int) -> Iterator[MarkedRow]:
    """A row in pieces; of a pair of answers, two."""
    cut = row.get("cut")
    halves = [("", slice(None))] if cut is None else [("chosen", slice(cut)), ("rejected", slice(cut, None))]
    for name, part in halves:
        ids, labels = row["input_ids"][part], row["labels"][part]
        weights = row["weights"][part] if row.get("weights") is not None else None
        runs = pieces(ids, labels, tokenizer, weights)
        trained = sum(label != IGNORE for label in labels)
        yield MarkedRow(number, name, len(ids), trained, tuple(_shortened(_split(runs))))


def _split(runs: list[tuple[float, str]]) -> Iterator[Piece]:
    """Cut runs that are trained alike where thoughts and calls begin and end; these may span several runs."""
    whole = "".join(text for _, text in runs)
    kinds = [(found.start(), found.end(), name) for name, _, pattern in KINDS for found in pattern.finditer(whole)]
    start = 0
    for weight, text in runs:
        end = start + len(text)
        edges = {start, end} | {edge for place in kinds for edge in place[:2] if start < edge < end}
        for left, right in pairwise(sorted(edges)):
            kind = next((name for first, last, name in kinds if first <= left and right <= last), "text")
            yield Piece(_clipped(whole[left:right]), weight, kind)
        start = end


def _shortened(found: Iterator[Piece]) -> Iterator[Piece]:
    """The first pieces of a row, and how many more it has."""
    size = 0
    for piece in found:
        yield piece
        size += len(piece.text)
        if size > _ROW:
            break
    if more := sum(len(piece.text) for piece in found):
        yield Piece(f" [... {more:,} more characters]", 0, "text")


def _text(row: Mapping[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode(row["input_ids"]))


def _clipped(text: str) -> str:
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} [... {len(text) - 2 * half:,} ...] {text[-half:]}"
