"""What the data is and what became of it, as numbers: JSON for machines; `report_view` shows it to people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SourceReport:
    """One file or data set: how it was read, and why so."""

    name: str
    format: str
    because: str
    rows: int


@dataclass(frozen=True)
class MixtureReport:
    """One source of a mixture: the rows that could be used, and those that were taken."""

    path: str
    weight: float | None
    rows: int
    taken: int
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Left:
    """A row that is not as it was, or not there at all: where it stands and what happened."""

    place: str
    why: str


@dataclass(frozen=True)
class Part:
    """The rows to train on, or those to evaluate on. Lengths are in tokens."""

    rows: int
    tokens: int
    trained_tokens: int
    median_length: int
    longest: tuple[tuple[str, int], ...]  # (place, tokens), longest first
    histogram: tuple[tuple[int, int], ...]  # (at most so many tokens, rows)
    turns: tuple[int, int, int]  # fewest, median, most in one row
    roles: Mapping[str, int]

    @property
    def share_trained(self) -> float:
        """Share of tokens that carry loss."""
        return self.trained_tokens / max(1, self.tokens)


@dataclass(frozen=True)
class DataReport:
    """What was read, what was kept, and the fate of every row that was not used as it stands."""

    sources: tuple[SourceReport, ...]
    files_left_out: tuple[str, ...]
    template: str
    max_length: int | None
    rows_read: int
    train: Part
    eval: Part | None
    skipped: tuple[Left, ...]  # malformed
    dropped: tuple[Left, ...]  # without a single trained token
    truncated: tuple[Left, ...]
    duplicates: tuple[Left, ...]
    leaked: tuple[Left, ...]  # rows of eval that are also in train
    mixture: tuple[MixtureReport, ...] = ()
    empty: tuple[Left, ...] = ()  # with a trained turn that says nothing
    unreadable: tuple[Left, ...] = ()  # with a trained call that a server's own reader loses
    weighed: int = 0  # rows with tokens that count more or less than others
    prompts: bool = False  # whether rows are answered, and not learned
    good: int | None = None  # of judged answers to train on, how many are good
    calls: int = 0
    tool_format: str | None = None  # of `tool_formats`, how calls are written
    unread: Mapping[str, int] = field(default_factory=dict)  # columns and message keys that nothing was made of

    def to_json(self) -> str:
        """One line of JSON with every field, and the share of trained tokens."""
        value = asdict(self)
        for name, part in (("train", self.train), ("eval", self.eval)):
            if part is not None:
                value[name]["share_trained"] = round(part.share_trained, 6)
        return json.dumps(value, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """Return the report that `to_json` wrote; raises `ValueError` for anything else."""
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)

    def render(self, console: Console) -> None:
        """Print the report for a person."""
        from phi3_lora_plugin.chat.report_view import render

        render(self, console)


def describe(rows: Sequence[tuple[str, int, int, Sequence[str]]]) -> Part:
    """Sum up rows of (place, tokens, trained tokens, roles of the turns)."""
    lengths = sorted(length for _, length, _, _ in rows)
    turns = sorted(len(roles) for _, _, _, roles in rows)
    bins: Counter[int] = Counter(max(16, 1 << (length - 1).bit_length()) for length in lengths)
    return Part(
        rows=len(rows),
        tokens=sum(lengths),
        trained_tokens=sum(trained for _, _, trained, _ in rows),
        median_length=lengths[len(lengths) // 2] if lengths else 0,
        longest=tuple((place, length) for place, length, _, _ in sorted(rows, key=lambda row: -row[1])[:5]),
        histogram=tuple(sorted(bins.items())),
        turns=(turns[0], turns[len(turns) // 2], turns[-1]) if turns else (0, 0, 0),
        roles=dict(Counter(role for _, _, _, roles in rows for role in roles)),
    )
