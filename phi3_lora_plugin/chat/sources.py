"""What `data.path` says -> the sources it means: files, globs, folders, saved data sets, hub ids, what ships here."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi3_lora_plugin.chat.opened import PACKED
from phi3_lora_plugin.chat.readers import READERS, Place, Row, Rows, SourceError, reader
from phi3_lora_plugin.wording import closest, named_line

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_NAMES = {"train": "train training", "test": "test testing", "validation": "validation valid val dev eval evaluation"}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names.split()}
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Source:
    """One file or data set: what errors call it, and a function that reads it from the top each time it is called."""

    name: str
    rows: Callable[[], Rows]


@dataclass(frozen=True)
class Found:
    """The sources to read, and the files of a folder that were left out because they belong to another split."""

    sources: tuple[Source, ...]
    left_out: tuple[str, ...] = ()


def find_sources(
    path: str | Sequence[str], split: str | None = None, key: str = "data.path", hub: bool = True
) -> Found:
    """Return the sources that one or several paths mean, after a look at the beginning of each file.

    Args:
        path: a file, a glob, a folder, a folder of `datasets.save_to_disk`, `embedded:NAME`, or a hub id
            (`owner/name`, or `owner/name:config`); or several of them.
        split: which split, where there are several; None: the only one.
        key: how the recipe calls `path`, for errors.
        hub: load what looks like a hub id; else it is skipped, as only a connection can tell.

    Raises `SourceError` with everything that was not found or cannot be read.
    """
    sources: list[Source] = []
    left_out: list[str] = []
    problems: list[str] = []
    for one in [path] if isinstance(path, str) else path:
        try:
            found = _find(one, split, hub)
        except SourceError as error:
            problems += error.problems
        else:
            sources += found.sources
            left_out += found.left_out
    problems += named_twice(sources)
    if problems:
        raise SourceError([f"{key}: {problem}" for problem in problems])
    return Found(tuple(sources), tuple(left_out))


def named_twice(sources: Sequence[Source]) -> list[str]:
    """A problem for each name that several of the sources have."""
    counts = Counter(source.name for source in sources)
    return [f"{name}: named twice, so its rows would count twice" for name, count in counts.items() if count > 1]


def _find(path: str, split: str | None, hub: bool) -> Found:
    if path.startswith("embedded:"):
        from phi3_lora_plugin.embedded import locate

        return _find(str(locate(path)), split, hub)
    here = Path(path).expanduser()
    if here.is_dir():
        return _folder(here, split)
    if here.is_file():
        return _files([here], split)
    if glob.has_magic(path):
        matches = sorted(Path(match) for match in glob.glob(str(here), recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise SourceError([f"{path}: matches no file"])
        return _files(files, split)
    missing = f"{path}: no such file or folder{_nearest(here)}"
    local = here.suffix.lower() in (*READERS, *PACKED, ".txt", ".yaml") or Path(here.parts[0]).is_dir()
    if local or not _HUB_ID.fullmatch(path):
        raise SourceError([missing])
    return _hub(path, split, missing) if hub else Found(())


def _files(files: Iterable[Path], split: str | None) -> Found:
    """Return files that were named, or matched by a glob; of those there are no splits."""
    sources, problems = [], []
    for file in files:
        if split not in (None, "train"):
            problems.append(f"{file}: a file has no split {split!r}; give a folder or a data set, or another file")
            continue
        try:
            sources.append(Source(str(file), reader(file, str(file))))
        except SourceError as error:
            problems += error.problems
    if problems:
        raise SourceError(problems)
    return Found(tuple(sources))


def _folder(folder: Path, split: str | None) -> Found:
    """Return a saved data set, or the data files in a folder and below it that do not belong to another split."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(folder, split)
    inside = [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    suffixes = tuple(READERS) + tuple(f"{ending}{packed}" for ending in READERS for packed in PACKED)
    files = sorted(path for path in inside if path.name.lower().endswith(suffixes) and path.name not in _NOT_DATA)
    if not files:
        raise SourceError([f"{folder}: no data files in this folder; expected {', '.join(sorted(READERS))}"])
    if split is None:
        return _files(files, None)
    wanted: list[Path] = []
    others: list[Path] = []
    for file in files:
        named = _split_of(file.relative_to(folder))
        fits = named == _SPLITS.get(split, split) or (named is None and split == "train")
        (wanted if fits else others).append(file)
    if not wanted:
        raise SourceError([f"{folder}: no file of split {split!r}, only {', '.join(path.name for path in others)}"])
    return Found(_files(wanted, None).sources, tuple(map(str, others)))


def _split_of(path: Path) -> str | None:
    """Return the split named by a file's name, or by that of a folder around it."""
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _saved(folder: Path, split: str | None) -> Found:
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes of pyarrow, json and datasets
        raise SourceError([f"{folder}: a saved data set that cannot be read: {named_line(error, 300)}"]) from error
    return Found((_of_dataset(str(folder), data, split),))


def _hub(path: str, split: str | None, missing: str) -> Found:
    import datasets

    name, _, config = path.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # no connection, no such id, no such split or config: each its own family of errors
        advice = f"; write {name}:CONFIG" if "onfig" in str(error) and not config else ""
        raise SourceError([f"{missing}, and as a hub id: {named_line(error, 300)}{advice}"]) from error
    return Found((_of_dataset(path, data, split),))


def _of_dataset(name: str, data: Any, split: str | None) -> Source:
    """Return a source that reads one split of what the datasets library loaded."""
    if isinstance(data, dict):
        splits = ", ".join(data)
        if split is None and len(data) != 1:
            raise SourceError([f"{name}: has the splits {splits}; choose one with data.split or data.eval_split"])
        if split is not None and split not in data:
            raise SourceError([f"{name}: has no split {split!r}, only {splits}"])
        data = data[split] if split is not None else next(iter(data.values()))
    elif split not in (None, "train") and str(data.split) != split.split("[")[0]:
        raise SourceError([f"{name}: has no splits, so no {split!r}"])
    if not len(data):
        raise SourceError([f"{name}: is empty"])

    def rows() -> Iterator[Row]:
        for number, values in enumerate(data.with_format(None), 1):
            yield Row(values, Place(name, "row", number))

    return Source(name, rows)


def _nearest(path: Path) -> str:
    """Return what stands where the path leads, for an error: the closest name, or how far the path exists."""
    for parent in path.parents:
        if parent.is_dir():
            missing = path.relative_to(parent).parts[0]
            if near := closest(missing, [entry.name for entry in parent.iterdir()], 0.5):
                return f"; nearest is {parent / near}"
            return f"; no such folder: {parent / missing}" if missing != path.name and parent.parts else ""
    return ""
