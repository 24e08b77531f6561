"""The data report as people read it: short names, lines that break between things, rows with their mask in colour."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.tool_formats import TOOL_FORMATS

if TYPE_CHECKING:
    from rich.console import Console

    from phi3_lora_plugin.chat.near_duplicates import Near
    from phi3_lora_plugin.chat.report import DataReport, Left, Part

_SHOWN = 10  # of a list that go to the screen; the JSON has them all
_INDENT = 10  # columns before the text of a line, for its title
_LONGEST = 1500  # characters of a run of tokens; the middle of a longer one is left out


def render(report: DataReport, console: Console) -> None:
    """Print what was read, what is trained on, and what happened to rows that are not used as they stand."""
    shorten = _shortener([source.name for source in report.sources], report.files_left_out)

    def line(title: str, pieces: Sequence[str]) -> None:
        packed = _packed([shorten(piece) for piece in pieces], console.width - _INDENT)
        for head, text in zip(chain([title], repeat("")), packed, strict=False):
            console.print(f"{head:{_INDENT}}{printable(text)}", markup=False, highlight=False, soft_wrap=True)

    for source in report.sources[:_SHOWN]:
        read = f"{source.rows:,} rows as {source.format or 'nothing'}" + f", {source.because}" * bool(source.because)
        line("data", [f"{source.name}:", *read.split()])
    if more := report.sources[_SHOWN:]:
        line("", [f"and {sum(source.rows for source in more):,} rows", f"from {len(more):,} more sources"])
    trained = max(1, sum(part.trained_tokens for part in report.mixture))
    for title, part in zip(chain(["mixture"], repeat("")), report.mixture, strict=False):
        share = f"{100 * part.trained_tokens / trained:.1f}% of what is trained"
        line(title, [f"{part.path}:", f"{part.taken:,} of {part.rows:,} rows,", f"{part.tokens:,} tokens,", share])
    if report.files_left_out:
        line("left out", [*_listed(report.files_left_out), "(of another split)"])
    limit = f"at most {report.max_length:,} tokens a row" if report.max_length else "rows of any length"
    # The one that is chosen for want of any other, and which no runtime knows of.
    why = "plain (roles as text: the base has no role tokens)" if report.template == "plain" else report.template
    line("template", [f"{why},", limit])
    if report.tool_format is not None:
        how = TOOL_FORMATS[report.tool_format]
        read = f"read by {', '.join(how.readers)}" if how.readers else "which no server's strict parser reads"
        line(
            "tools",
            [f"{report.calls:,} calls as {how.name}", f"({how.before or 'JSON'}...{how.after}),", *read.split()],
        )
    for name, some in (("train", report.train), ("eval", report.eval)):
        if some is not None:
            for title, pieces in _figures(name, some, report.prompts):
                line(title, pieces)
    if report.weighed:
        line("weights", [f"{report.weighed:,} rows to train on have weights other than 0 and 1"])
    if report.good is not None:
        line("labels", _balance(report.good, report.train.rows - report.good))
    if report.unread:
        line("not used", _listed([f"{name} ({count:,})" for name, count in report.unread.items()]))
    for title, rows in fates(report):
        if rows:
            _print_fate(console, f"{len(rows):,} of {report.rows_read:,} rows {title}", rows, shorten)


# What stands out in a row next to what is trained; the model's own text is looked at, as only the screen needs it.
_CALLS = re.compile(
    r"<\|tool_call\|>.*?(?:<\|/tool_call\|>|$)|"
    r'(?:functools\[|\[?\{"name": "[^"]*", "arguments": ).*?(?=<\||$)',
    re.DOTALL,
)
KINDS = (("thoughts", "blue", re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)), ("tool calls", "magenta", _CALLS))


def _balance(good: int, bad: int) -> list[str]:
    """How many answers are good and bad, and the weights that the KTO paper advises where that differs much."""
    pieces = [f"{good:,} good,", f"{bad:,} bad"]
    if max(good, bad) > 4 / 3 * min(good, bad):  # its equation 8
        name, weight = ("undesirable", good / bad) if good > bad else ("desirable", bad / good)
        pieces[-1] += ";"
        pieces += [f"preference.{name}_weight: {weight:.3g}", "makes both count alike"]
    return pieces


def show_rows(console: Console, rows: Any, tokenizer: Any, count: int = 3) -> None:
    """Print the first `count` encoded rows: trained tokens stand out, in colour or between ⟦ and ⟧.

    Thoughts and tool calls have colours of their own; before text that counts more or less stands its weight.
    """
    from rich.padding import Padding
    from rich.text import Text

    plain = not console.is_terminal or console.no_color
    count = min(count, len(rows))
    if count:
        some = "the first row as the model sees it" if count == 1 else f"the first {count} rows as the model sees them"
        shown = "".join(tokenizer.decode(rows[index]["input_ids"]) for index in range(count))
        others = [f"{name} in {colour}" for name, colour, pattern in KINDS if pattern.search(shown)]
        marked = "between ⟦ and ⟧" if plain else ", ".join(["in green", *others])
        console.print(f"\n{some}, trained tokens {marked}:", highlight=False)
    for index in range(count):
        row = rows[index]
        text = Text()
        for weight, piece in pieces(row["input_ids"], row["labels"], tokenizer, row.get("weights")):
            said = _clipped(piece)
            much = "" if weight in (0, 1) else f"{weight:g}× "
            start = len(text)
            text.append(f"⟦{much}{said}⟧" if plain and weight else f"{much}{said}", "bold green" if weight else "dim")
            for _, colour, pattern in KINDS:
                for found in () if plain else pattern.finditer(text.plain, start):
                    text.stylize(f"bold {colour}" if weight else f"dim {colour}", *found.span())
        trained = len(row["labels"]) - row["labels"].count(-100)
        console.print(f"row {index + 1}: {len(row['labels']):,} tokens, {trained:,} trained", style="bold")
        console.print(Padding(text, (0, 0, 0, 2), expand=False), highlight=False)


def show_near(console: Console, alike: tuple[Sequence[Near], Sequence[Near]]) -> None:
    """Print rows that are nearly the same, by their numbers among the encoded rows."""
    titles = ("rows to train on are nearly an earlier one", "rows to evaluate on are nearly one that is trained on")
    for title, found in zip(titles, alike, strict=True):
        told = [f"{one.row} like {one.like} ({100 * one.similarity:.0f}%)" for one in found]
        line = f"{len(found):,} {title}" + (f": {' '.join(_listed(told))}" if told else "")
        console.print(line, style="yellow" if told else None, markup=False, highlight=False, soft_wrap=True)


def pieces(
    ids: Sequence[int], labels: Sequence[int], tokenizer: Any, weights: Sequence[float] | None = None
) -> list[tuple[float, str]]:
    """Return the text of a row in runs of tokens that are trained alike: 0 for not at all, 1 unless weighed."""
    runs: list[tuple[float, list[int]]] = []
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        weight = 0.0 if label == -100 else 1.0 if weights is None else round(float(weights[place]), 6)
        if not runs or runs[-1][0] != weight:
            runs.append((weight, []))
        runs[-1][1].append(token)
    return [(weight, printable(tokenizer.decode(run, skip_special_tokens=False))) for weight, run in runs]


def printable(text: str) -> str:
    """Return text in which control characters are spelled out: a row must not be able to command the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return what to call absolute paths on the screen: as much of their end as makes them different."""
    paths = {name: Path(name).parts for name in dict.fromkeys(names)}
    short = {}
    for name, parts in paths.items():
        others = [other for other in paths.values() if other != parts]
        lengths = range(1, len(parts)) if Path(name).is_absolute() else ()
        alone = (length for length in lengths if all(other[-length:] != parts[-length:] for other in others))
        if (length := next(alone, None)) is not None:
            short[name] = str(Path(*parts[-length:]))
    return short


def _figures(name: str, part: Part, prompts: bool) -> Iterator[tuple[str, list[str]]]:
    fewest, median, most = part.turns
    share = "to be answered" if prompts else f"{100 * part.share_trained:.1f}% of them trained"
    yield name, [f"{part.rows:,} {'prompts' if prompts else 'rows'},", f"{part.tokens:,} tokens,", share]
    turns = f"{fewest} turns a row" if fewest == most else f"{fewest} to {most} turns a row (median {median})"
    yield "", [f"{turns}:", *_commas([f"{count:,} {role}" for role, count in part.roles.items()])]
    longest = [f"{length:,} ({place})" for place, length in part.longest[:3]]
    yield "", [f"median {part.median_length:,} tokens,", "longest", *_commas(longest)]
    most_rows = max((count for _, count in part.histogram), default=1)
    for limit, count in part.histogram:
        yield "", [f"≤ {limit:>6,}  {'█' * max(1, round(30 * count / most_rows))} {count:,}"]


def fates(report: DataReport) -> list[tuple[str, Sequence[Left]]]:
    """(what happened to rows, these rows) for everything that can happen to one."""
    return [
        ("malformed, left out", report.skipped),
        ("without a trained token, left out", report.dropped),
        ("cut to the longest length", report.truncated),
        ("with an empty answer", report.empty),
        ("with a tool call that a server cannot read", report.unreadable),
        ("given more than once and used each time", report.duplicates),
        ("to evaluate on, but also trained on", report.leaked),
    ]


def _print_fate(console: Console, title: str, rows: Sequence[Left], shorten: Callable[[str], str]) -> None:
    """One line a row, or where the reason is the same for all of them, the reason once and the places after it."""
    same = len({row.why for row in rows}) == 1
    head = shorten(f"{title} ({rows[0].why}):" if same else f"{title}:")
    shown = [shorten(row.place if same else f"{row.place}: {row.why}") for row in rows[:_SHOWN]]
    more = len(rows) - len(shown)
    entries = [[*_commas(shown), *([f"and {more:,} more"] if more else [])]] if same else [e.split() for e in shown]
    for text in _packed(head.split(), console.width, 2):
        console.print(printable(text), style="yellow", markup=False, highlight=False, soft_wrap=True)
    for entry in entries:
        for text in _packed(entry, console.width - 2, 0 if same else 2):
            console.print("  " + printable(text), markup=False, highlight=False, soft_wrap=True)
    if more and not same:
        console.print(f"  ... and {more:,} more", highlight=False)


def _packed(pieces: Sequence[str], width: int, hanging: int = 0) -> Iterator[str]:
    """Join pieces with blanks into lines of at most `width` columns; a longer piece has a line of its own.

    Lines after the first begin with `hanging` blanks.
    """
    line = ""
    for piece in pieces:
        if line.strip() and len(line) + 1 + len(piece) > width:
            yield line
            line = " " * hanging + piece
        else:
            line = f"{line} {piece}" if line else piece
    yield line


def _commas(items: Sequence[str]) -> list[str]:
    return [f"{item}," for item in items[:-1]] + list(items[-1:])


def _listed(items: Sequence[str]) -> list[str]:
    """Return the first few items with commas, and how many more there are."""
    more = len(items) - min(len(items), _SHOWN)
    return [*_commas(items[:_SHOWN]), *([f"and {more:,} more"] if more else [])]


def _shortener(sources: Sequence[str], others: Sequence[str]) -> Callable[[str], str]:
    """Return what gives files in a text their short names, and places in the only file no name at all."""
    names = short_names([*sources, *others])
    place = re.compile(rf"(?<![\w/]){re.escape(sources[0])}(?:(:)(?=\d)| (?=row \d))") if len(sources) == 1 else None

    def shorten(text: str) -> str:
        if place is not None:
            text = place.sub(lambda match: "line " if match.group(1) else "", text)
        for name in sorted(names, key=len, reverse=True):
            text = text.replace(name, names[name])
        return text

    return shorten


def _clipped(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
