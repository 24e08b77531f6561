"""The recipe's `data` section -> encoded rows to train and to evaluate on, and a report of every row's fate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.cache import find_entry, read_entry, write_entry
from phi3_lora_plugin.chat.formats import Adapter
from phi3_lora_plugin.chat.mixture import counts, draw, sources_of
from phi3_lora_plugin.chat.parts import Fate, Part, encoded, read_part
from phi3_lora_plugin.chat.readers import Place, Problem, SourceError
from phi3_lora_plugin.chat.report import DataReport, Left, MixtureReport, describe
from phi3_lora_plugin.chat.rows import Rows, duplicates, joined, leaked, split, to_table
from phi3_lora_plugin.chat.sources import find_sources, named_twice
from phi3_lora_plugin.chat.templates import TemplateError, template_for
from phi3_lora_plugin.chat.tool_formats import tool_format
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.wording import first_lines

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

    from phi3_lora_plugin.recipe import Recipe
    from phi3_lora_plugin.recipe.sections import DataSection

_LISTED = 50  # problems that an error spells out; `problems` has them all
_PLACES = 8  # rows that an error names for one and the same problem


class DataError(Phi3LoraError):
    """Data that cannot be trained on as it is; `problems` has a line for everything that is wrong with it."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = first_lines(self.problems, _LISTED)
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


def load_data(
    recipe: Recipe, tokenizer: Any, adapters: Mapping[str, Adapter], max_length: int | None = None, cache: bool = False
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
    if recipe.reward and limit is not None:
        limit -= recipe.grpo.max_completion_length  # a prompt is never cut: it has to leave room for an answer
    try:
        template = template_for(tokenizer, data.template).name
    except TemplateError as error:
        text = str(error)
        raise DataError([text if text.startswith("data.template") else f"data.template: {text}"]) from error
    parts: list[Part] = []
    unreadable: list[str] = []

    def want(key: str, path: Any, settings: DataSection, which: str | None, most: int | None, source: Any) -> None:
        try:
            parts.append(Part(key, find_sources(path, which, key), settings, most, source))
        except SourceError as error:
            unreadable.extend(error.problems)

    for path, settings, source in sources_of(data):
        want("data.path", path, settings, settings.split, data.max_rows, source)
    if data.eval_path is not None:
        want("data.eval_path", data.eval_path, data, data.eval_split, None, None)
    elif data.eval_split is not None:
        for path, settings, _ in sources_of(data):
            want("data.eval_split", path, settings, data.eval_split, None, None)
    trained = [source for part in parts if part.key == "data.path" for source in part.found.sources]
    unreadable += [f"data.path: {problem}" for problem in named_twice(trained)]
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
    parts: Sequence[Part],
    unreadable: list[str],
    tokenizer: Any,
    adapters: Mapping[str, Adapter],
    template: str,
    limit: int | None,
) -> tuple[dict[str, pyarrow.Table], DataReport]:
    """Tables by part ("train", "eval") and the report; raises with all that is wrong, `unreadable` included."""
    data, fate = recipe.data, Fate()
    rows: dict[str, list[tuple[Part, Rows]]] = {part.key: [] for part in parts}
    for part in parts:
        try:
            read = read_part(part, adapters, fate, recipe)
            rows[part.key].append((part, encoded(read, tokenizer, data, limit, fate)))
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
        advice = ["fix them, or skip them with data.on_error: skip"] if fate.problems else []
        raise DataError([*unreadable, *_grouped(fate.problems), *advice])
    for key, some in rows.items():
        for part, found in some:
            if not found.about and (part.source is not None or len(some) == 1):
                of = f" of {part.source.path}" if part.source is not None else ""
                raise DataError([f"{key}: no row{of} is left to use", *_why_none(fate, limit)])
    train, mixture = _mixed(rows.pop("data.path"), recipe.seed)
    held_out = next((joined([found for _, found in some]) for some in rows.values()), None)
    if data.eval_fraction:
        halves = split(train, data.eval_fraction, recipe.seed)
        if halves is None:
            raise DataError(["data.eval_fraction: all rows are the same conversation, so there is nothing to hold out"])
        train, held_out = halves
    if len(set(train.good)) == 1:
        raise DataError([
            f"{len(train.good):,} rows to train on, all with label: {str(train.good[0]).lower()}; preference.loss: kto "
            "learns from good and bad answers, so it needs rows of both"
        ])  # fmt: skip
    report = DataReport(
        sources=tuple(fate.sources),
        mixture=mixture,
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
        weighed=len(train.weights),
        prompts=bool(train.tasks),
        good=sum(train.good) if train.good else None,
        calls=fate.calls,
        tool_format=tool_format(data.tool_format, template).name if fate.calls else None,
        duplicates=tuple(duplicates(train)),
        leaked=() if held_out is None else tuple(leaked(held_out, train)),
        unread=dict(fate.unread),
    )
    return {"train": to_table(train)} | ({} if held_out is None else {"eval": to_table(held_out)}), report


def _mixed(parts: Sequence[tuple[Part, Rows]], seed: int) -> tuple[Rows, tuple[MixtureReport, ...]]:
    """The rows to train on, of a mixture as much of each source as it says, and what that is."""
    sources = [part.source for part, _ in parts if part.source is not None]
    if not sources:
        return joined([rows for _, rows in parts]) if len(parts) > 1 else parts[0][1], ()
    taken = counts([len(rows.about) for _, rows in parts], sources)
    drawn = [draw(rows, count, seed, number)
             for number, ((_, rows), count) in enumerate(zip(parts, taken, strict=True))]  # fmt: skip
    told = [
        MixtureReport(
            path=source.path if isinstance(source.path, str) else ", ".join(source.path),
            weight=source.weight,
            rows=len(rows.about),
            taken=len(some.about),
            tokens=sum(length for _, length, _, _ in some.about),
            trained_tokens=sum(trained for _, _, trained, _ in some.about),
        )
        for source, (_, rows), some in zip(sources, parts, drawn, strict=True)
    ]
    return joined(drawn), tuple(told)


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


def _why_none(fate: Fate, limit: int | None) -> list[str]:
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
