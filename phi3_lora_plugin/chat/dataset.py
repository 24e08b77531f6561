"""The recipe's `data` section -> encoded rows to train and to evaluate on, and a report of every row's fate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.adapt import Reading, conversations
from phi3_lora_plugin.chat.cache import find_entry, read_entry, write_entry
from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_batch
from phi3_lora_plugin.chat.formats import Adapter
from phi3_lora_plugin.chat.pairs import encode_pairs, read_pairs
from phi3_lora_plugin.chat.preferences import Pair
from phi3_lora_plugin.chat.readers import Place, Problem, SourceError
from phi3_lora_plugin.chat.report import DataReport, Left, SourceReport, describe
from phi3_lora_plugin.chat.rows import Rows, duplicates, split, to_table
from phi3_lora_plugin.chat.sources import Found, find_sources
from phi3_lora_plugin.chat.templates import TemplateError, template_for
from phi3_lora_plugin.chat.tool_formats import lost_by, tool_format
from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from phi3_lora_plugin.recipe import Recipe
    from phi3_lora_plugin.recipe.sections import DataSection

_BATCH = 256  # conversations rendered and tokenised in one go; more keep the garbage collector busier
_CHARACTERS = 20_000_000  # of one batch at most, so that a few long rows do not fill the memory
_LISTED = 50  # problems that an error spells out; `problems` has them all
_PLACES = 8  # rows that an error names for one and the same problem


class DataError(Phi3LoraError):
    """Data that cannot be trained on as it is; `problems` has a line for everything that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        more = len(self.problems) - _LISTED
        lines = self.problems[:_LISTED] + ([f"... and {more:,} more"] if more > 0 else [])
        super().__init__("\n  ".join(["the data cannot be used as it is:", *lines]) if len(lines) > 1 else lines[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True)
class Data:
    """Rows of `input_ids` and `labels` (-100 where untrained), unpadded, and what became of all that was read."""

    train: Dataset
    eval: Dataset | None
    report: DataReport
    cached: Path | None = None  # the entry that it was read from, if it was encoded before


@dataclass(frozen=True)
class _Part:
    """Where the rows to train on, or those to evaluate on, come from."""

    key: str  # of the recipe, for errors
    found: Found
    most: int | None  # rows to read


@dataclass
class _Fate:
    """What happened to rows that are not used as they stand, and how the sources were read."""

    problems: list[Problem] = field(default_factory=list)
    dropped: list[Left] = field(default_factory=list)
    truncated: list[Left] = field(default_factory=list)
    empty: list[Left] = field(default_factory=list)
    unreadable: list[Left] = field(default_factory=list)
    calls: int = 0
    sources: list[SourceReport] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    read: int = 0


def load_data(
    recipe: Recipe,
    tokenizer: Any,
    adapters: Mapping[str, Adapter],
    max_length: int | None = None,
    cache: bool = False,
) -> Data:
    """Read, check, encode and split the rows of a recipe.

    Args:
        tokenizer: of the base model, from `load_tokenizer`.
        adapters: registered formats by name; the package's own are always there.
        max_length: longest row in tokens if `data.max_length` says nothing; None: no limit.
        cache: keep the encoded rows of local files, and take them from where they were kept (see `cache`).

    Raises:
        DataError: nothing to read, malformed rows (unless `data.on_error: skip`), or no row with a trained token left.
    """
    data = recipe.data
    if data.path is None:
        raise DataError(["data.path: the recipe names no data; add data.path=FILE (or a folder, a glob, a hub id)"])
    limit = data.max_length or max_length
    try:
        template = template_for(tokenizer, data.template).name
    except TemplateError as error:
        text = str(error)
        raise DataError([text if text.startswith("data.template") else f"data.template: {text}"]) from error
    wanted: list[tuple[str, Any, str | None, int | None]] = [("data.path", data.path, data.split, data.max_rows)]
    if data.eval_path is not None:
        wanted.append(("data.eval_path", data.eval_path, data.eval_split, None))
    elif data.eval_split is not None:
        wanted.append(("data.eval_split", data.path, data.eval_split, None))
    parts: list[_Part] = []
    unreadable: list[str] = []
    for key, path, which, most in wanted:
        try:
            parts.append(_Part(key, find_sources(path, which, key), most))
        except SourceError as error:
            unreadable += error.problems
    found = [part.found for part in parts]
    entry = find_entry(recipe, tokenizer, adapters, limit, found) if cache and not unreadable else None
    if entry is not None and (kept := read_entry(entry)) is not None:
        tables, report = kept
        return _data(tables, report, entry)
    tables, report = _encode_all(recipe, parts, unreadable, tokenizer, adapters, template, limit)
    if entry is not None:
        write_entry(entry, tables, report)
    return _data(tables, report)


def _encode_all(
    recipe: Recipe,
    parts: Sequence[_Part],
    unreadable: list[str],
    tokenizer: Any,
    adapters: Mapping[str, Adapter],
    template: str,
    limit: int | None,
) -> tuple[dict[str, pyarrow.Table], DataReport]:
    """Tables by part ("train", "eval") and the report; raises with all that is wrong, `unreadable` included."""
    data, fate = recipe.data, _Fate()
    encoded: list[Rows] = []
    for part in parts:
        try:
            read = _read(part, data, adapters, fate, recipe.preference.on)
            encoded.append(_encoded(read, tokenizer, data, limit, fate))
        except SourceError as error:
            if part.key == "data.path":
                unreadable += error.problems
                continue
            unreadable += [f"{part.key}: {text}" for text in error.problems]
            unreadable.append(
                "rows to evaluate on are read with the same data.format and data.columns; data.eval_path=null goes "
                "without them"
            )
    # What cannot be read is found before what cannot be encoded: back into the order of the files and their rows.
    files = {source.name: number for number, source in enumerate(fate.sources)}
    fate.problems.sort(key=lambda problem: (files[problem.place.file], problem.place.number))
    if unreadable or (fate.problems and data.on_error == "stop"):
        advice = ["repair them, or leave them out with data.on_error: skip"] if fate.problems else []
        raise DataError([*unreadable, *_grouped(fate.problems), *advice])
    for part, rows in zip(parts, encoded, strict=True):
        if not rows.about:
            raise DataError([f"{part.key}: no row is left to use", *_why_none(fate, limit)])
    train = encoded[0]
    held_out = encoded[1] if len(encoded) > 1 else None
    if data.eval_fraction:
        halves = split(train, data.eval_fraction, recipe.seed)
        if halves is None:
            raise DataError(["data.eval_fraction: all rows are the same conversation, so there is nothing to hold out"])
        train, held_out = halves
    known = set(train.digests)
    leaked = (
        [
            Left(about[0], "the same conversation is trained on")
            for about, digest in zip(held_out.about, held_out.digests, strict=True)
            if digest in known
        ]
        if held_out
        else []
    )
    report = DataReport(
        sources=tuple(fate.sources),
        files_left_out=tuple(fate.left_out),
        template=template,
        max_length=limit,
        rows_read=fate.read,
        train=describe(train.about),
        eval=None if held_out is None else describe(held_out.about),
        skipped=tuple(Left(str(problem.place), problem.text) for problem in fate.problems),
        dropped=tuple(fate.dropped),
        truncated=tuple(fate.truncated),
        empty=tuple(fate.empty),
        unreadable=tuple(fate.unreadable),
        calls=fate.calls,
        tool_format=tool_format(data.tool_format, template).name if fate.calls else None,
        duplicates=tuple(duplicates(train)),
        leaked=tuple(leaked),
        unread=dict(fate.unread),
    )
    return {"train": to_table(train)} | ({} if held_out is None else {"eval": to_table(held_out)}), report


def _read(
    part: _Part, data: DataSection, adapters: Mapping[str, Adapter], fate: _Fate, pairs: bool
) -> Iterator[tuple[Place, Any]]:
    """Conversations of one part, or pairs of them, from the top; what is wrong with rows goes into `fate`."""
    fate.left_out += part.found.left_out
    left = part.most
    broken: list[str] = []
    for source in part.found.sources:
        reading = Reading(source.name)
        try:
            items: Iterator[Any] = (
                read_pairs(source, reading, data.columns, data.ignore)
                if pairs
                else conversations(source, reading, data.format, data.columns, adapters, data.ignore)
            )
            for item in islice(items, left):
                if isinstance(item, Problem):
                    fate.problems.append(item)
                else:
                    yield item
        except SourceError as error:
            broken += error.problems
        fate.sources.append(SourceReport(reading.name, reading.format, reading.because, reading.rows))
        fate.unread.update(reading.unread)
        fate.read += reading.rows
        left = None if left is None else left - reading.rows
        if left is not None and left <= 0:
            break
    if broken:
        raise SourceError(broken)


def _encoded(
    read: Iterator[tuple[Place, Any]], tokenizer: Any, data: DataSection, limit: int | None, fate: _Fate
) -> Rows:
    policy = Policy(data.train_on, data.system, data.tools, data.control_tokens, data.tool_format, data.thoughts)
    how = tool_format(data.tool_format, template_for(tokenizer, data.template).name)
    rows = Rows()
    for batch in _batches(read):
        both = isinstance(batch[0][1], Pair)
        encode_all = encode_pairs if both else encode_batch
        encoded = encode_all([chat for _, chat in batch], tokenizer, limit, policy, data.template)
        for (place, chat), row in zip(batch, encoded, strict=True):
            if isinstance(row, EncodeError):
                if row.reason in ("untrained", "truncated"):
                    fate.dropped.append(Left(str(place), str(row)))
                else:
                    fate.problems.append(Problem(place, str(row)))
                continue
            for turn in chat.chosen if both else chat:
                if turn.get("calls"):
                    fate.calls += len(turn["calls"])
                    if turn.get("train", True) and (servers := lost_by(turn["calls"], how)):
                        why = f"{', '.join(servers)} stops at the first ], so it loses a call with a list or a bracket"
                        fate.unreadable.append(Left(str(place), why))
            if (empty := _empty(chat.chosen if both else chat, both)) is not None:
                fate.empty.append(Left(str(place), empty))
            if row["truncated"]:
                fate.truncated.append(Left(str(place), f"longer than {limit} tokens; its end was cut off"))
            rows.add(str(place), row, tuple(message["role"] for message in (chat.chosen if both else chat)))
    return rows


def _batches(read: Iterator[tuple[Place, Any]]) -> Iterator[list[tuple[Place, Any]]]:
    """Batches of conversations or pairs, of so many and, where they are long, of so many characters."""
    batch: list[tuple[Place, Any]] = []
    size = 0
    for item in read:
        chats = (item[1].chosen, item[1].rejected) if isinstance(item[1], Pair) else (item[1],)
        batch.append(item)
        size += sum(len(turn["content"]) for chat in chats for turn in chat)
        if len(batch) == _BATCH or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _empty(chat: Sequence[Mapping[str, Any]], last_only: bool) -> str | None:
    """Say which trained turns of the assistant are empty, if any."""
    turns = [(number, turn) for number, turn in enumerate(chat, 1) if turn["role"] in ("assistant", "text")]
    for number, turn in turns[-1:] if last_only else turns:
        if turn.get("train", True) and not turn["content"].strip() and not turn.get("calls"):
            return f"turn {number}, the assistant's, is empty: it is trained to say nothing"
    return None


def _grouped(problems: Sequence[Problem]) -> list[str]:
    """A line for each kind of problem with the rows that have it, in the order of the first of them."""
    kinds: dict[str, list[Place]] = {}
    for problem in problems:
        kinds.setdefault(problem.text, []).append(problem.place)
    lines = []
    for text, places in kinds.items():
        named = [str(places[0])] + [
            str(place.number if before.file == place.file else place) for before, place in pairwise(places[:_PLACES])
        ]
        more = f" and {len(places) - _PLACES:,} more" if len(places) > _PLACES else ""
        lines.append(f"{', '.join(named)}{more}: {text}")
    return lines


def _why_none(fate: _Fate, limit: int | None) -> list[str]:
    counts = []
    if fate.problems:
        counts.append(f"{len(fate.problems):,} malformed: {fate.problems[0]}")
    if fate.dropped:
        counts.append(f"{len(fate.dropped):,} without a trained token: {fate.dropped[0].place}: {fate.dropped[0].why}")
    if fate.dropped and limit is not None:
        counts.append(f"rows are cut to {limit:,} tokens; give a larger data.max_length if that is why")
    return counts or ["there are no rows"]


def _data(tables: Mapping[str, pyarrow.Table], report: DataReport, cached: Path | None = None) -> Data:
    from datasets import Dataset

    return Data(Dataset(tables["train"]), Dataset(tables["eval"]) if "eval" in tables else None, report, cached)
