"""What the data is and what became of it: numbers for people, JSON for machines, rows with their mask in colour."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SHOWN = 10  # lines of a list that go to the screen; the JSON has them all


@dataclass(frozen=True)
class SourceReport:
    """One file or data set: how it was read, and why so."""

    name: str
    format: str
    because: str
    rows: int


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
    unread: Mapping[str, int] = field(default_factory=dict)  # columns and message keys that nothing was made of

    def to_json(self) -> str:
        """One line of JSON with every field, and the share of trained tokens."""
        value = asdict(self)
        for name, part in (("train", self.train), ("eval", self.eval)):
            if part is not None:
                value[name]["share_trained"] = round(part.share_trained, 6)
        return json.dumps(value, ensure_ascii=False)

    def render(self, console: Console) -> None:
        """Print the report for a person."""
        from rich.table import Table

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for source in self.sources:
            read = f"{source.rows:,} rows as {source.format or 'nothing'}" + (
                f", {source.because}" * bool(source.because)
            )
            table.add_row("data", printable(f"{source.name}: {read}"))
        for name in self.files_left_out:
            table.add_row("left out", printable(f"{name}: belongs to another split"))
        limit = f"at most {self.max_length:,} tokens a row" if self.max_length else "rows of any length"
        table.add_row("template", f"{self.template}, {limit}")
        for name, part in (("train", self.train), ("eval", self.eval)):
            if part is not None:
                for title, value in _figures(name, part):
                    table.add_row(title, printable(value))
        if self.unread:
            names = ", ".join(f"{name} ({count:,})" for name, count in self.unread.items())
            table.add_row("not used", printable(names))
        console.print(table)
        for title, rows in self._fates():
            if rows:
                console.print(f"{len(rows):,} {title}", style="yellow", highlight=False)
                for row in rows[:_SHOWN]:
                    console.print(f"  {printable(row.place)}: {printable(row.why)}", markup=False, highlight=False)
                if len(rows) > _SHOWN:
                    console.print(f"  ... and {len(rows) - _SHOWN:,} more", highlight=False)

    def _fates(self) -> list[tuple[str, Sequence[Left]]]:
        return [
            ("malformed, left out:", self.skipped),
            ("without a trained token, left out:", self.dropped),
            ("cut to the longest length:", self.truncated),
            ("given more than once:", self.duplicates),
            ("to evaluate on, but also trained on:", self.leaked),
        ]


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


def _figures(name: str, part: Part) -> list[tuple[str, str]]:
    fewest, median, most = part.turns
    roles = ", ".join(f"{count:,} {role}" for role, count in part.roles.items())
    share = f"{100 * part.share_trained:.1f}% of them trained"
    figures = [
        (name, f"{part.rows:,} rows, {part.tokens:,} tokens, {share}"),
        ("", f"{fewest} to {most} turns a row, {median} in the middle: {roles}"),
        ("", f"median {part.median_length:,} tokens, longest {'; '.join(f'{n:,} ({p})' for p, n in part.longest[:3])}"),
    ]
    most_rows = max((count for _, count in part.histogram), default=1)
    for limit, count in part.histogram:
        bar = "█" * max(1, round(30 * count / most_rows))
        figures.append(("", f"≤ {limit:>6,}  {bar} {count:,}"))
    return figures


def show_rows(console: Console, rows: Any, tokenizer: Any, count: int = 3) -> None:
    """Print the first `count` encoded rows: trained tokens stand out, in colour or between ⟦ and ⟧."""
    from rich.text import Text

    plain = not console.is_terminal or console.no_color
    for index in range(min(count, len(rows))):
        row = rows[index]
        text = Text()
        for trained, piece in pieces(row["input_ids"], row["labels"], tokenizer):
            if trained:
                text.append(f"⟦{piece}⟧" if plain else piece, style="bold green")
            else:
                text.append(piece, style="dim")
        trained = len(row["labels"]) - row["labels"].count(-100)
        console.print(
            f"row {index + 1}: {len(row['labels']):,} tokens, {trained:,} trained", style="bold", highlight=False
        )
        console.print(_indented(text), highlight=False)


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> list[tuple[bool, str]]:
    """Return the text of a row in runs of tokens that are trained, or not."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        trained = label != -100
        if not runs or runs[-1][0] != trained:
            runs.append((trained, []))
        runs[-1][1].append(token)
    return [(trained, printable(tokenizer.decode(run, skip_special_tokens=False))) for trained, run in runs]


def _indented(text: Text) -> Text:
    from rich.text import Text

    lines = [Text("  ").append_text(line) for line in text.split("\n", allow_blank=True)]
    return Text("\n").join(lines)


def printable(text: str) -> str:
    """Return text in which control characters are spelled out: a row must not be able to command the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
