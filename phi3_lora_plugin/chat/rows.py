"""Encoded rows while they are collected: flat arrays, split without leaks, and made into an Arrow table at the end."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.report import Left

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Rows:
    """Encoded rows as flat arrays, and what the report says of them."""

    ids: array[int] = field(default_factory=lambda: array("i"))
    labels: array[int] = field(default_factory=lambda: array("i"))
    weights: dict[int, array[float]] = field(default_factory=dict)  # by row; of others all that is trained counts as 1
    cuts: list[int] = field(default_factory=list)  # of pairs: where the rejected chat begins, after the chosen one
    good: list[bool] = field(default_factory=list)  # of judged answers
    tasks: list[str] = field(default_factory=list)  # of rows to answer: `tasks.Task` as JSON
    groups: list[bytes] = field(default_factory=list)  # of preferences: rows with the same prompt are of one group
    about: list[tuple[str, int, int, tuple[str, ...]]] = field(default_factory=list)  # place, tokens, trained, roles
    digests: list[bytes] = field(default_factory=list)
    roles: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)  # most rows share theirs

    def add(self, place: str, row: Mapping[str, Any], roles: tuple[str, ...]) -> None:
        ids, labels = array("i", row["input_ids"]), array("i", row["labels"])
        self.ids += ids
        self.labels += labels
        trained = len(labels) - row["labels"].count(IGNORE)
        self.about.append((place, len(ids), trained, self.roles.setdefault(roles, roles)))
        extra = b""
        if "weights" in row:
            self.weights[len(self.about) - 1] = array("f", row["weights"])
            extra = self.weights[len(self.about) - 1].tobytes()
        if "task" in row:
            self.tasks.append(row["task"])
        if "cut" in row:
            self.cuts.append(row["cut"])
        if "label" in row:
            self.good.append(row["label"])
            extra = bytes([row["label"]])
        if "cut" in row or "label" in row:
            prompt = ids[: next(index for index, label in enumerate(labels) if label != IGNORE)]
            self.groups.append(hashlib.blake2b(prompt.tobytes(), digest_size=16).digest())
        self.digests.append(hashlib.blake2b(ids.tobytes() + labels.tobytes() + extra, digest_size=16).digest())


#: What only some kinds of rows have, each row one.
_BY_ROW = ("cuts", "good", "tasks", "groups")


def split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows] | None:
    """Hold out a share of the distinct conversations (of preferences: of the prompts), so that no copy is trained on.

    None if there are not two of them.
    """
    keys = rows.groups or rows.digests
    distinct = list(dict.fromkeys(keys))
    if len(distinct) < 2:
        return None
    count = min(len(distinct) - 1, max(1, round(fraction * len(distinct))))
    chosen = set(random.Random(seed).sample(distinct, count))
    numbers = range(len(rows.about))
    return take(rows, [n for n in numbers if keys[n] not in chosen]), take(
        rows, [n for n in numbers if keys[n] in chosen]
    )


def take(rows: Rows, numbers: Sequence[int]) -> Rows:
    """The rows with these numbers, in this order."""
    starts = [0]
    for _, length, _, _ in rows.about:
        starts.append(starts[-1] + length)
    part = Rows()
    for number in numbers:
        part.ids += rows.ids[starts[number] : starts[number + 1]]
        part.labels += rows.labels[starts[number] : starts[number + 1]]
        if number in rows.weights:
            part.weights[len(part.about)] = rows.weights[number]
        part.about.append(rows.about[number])
        part.digests.append(rows.digests[number])
        for name in _BY_ROW:
            getattr(part, name).extend(getattr(rows, name)[number : number + 1])
    return part


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of several parts, one after the other."""
    whole = Rows()
    for part in parts:
        whole.weights |= {number + len(whole.about): weights for number, weights in part.weights.items()}
        for name in ("ids", "labels", "about", "digests", *_BY_ROW):
            getattr(whole, name).extend(getattr(part, name))
    return whole


def duplicates(rows: Rows) -> Iterator[Left]:
    """Yield each row that is the same as an earlier one."""
    first: dict[bytes, str] = {}
    for about, digest in zip(rows.about, rows.digests, strict=True):
        if digest in first:
            yield Left(about[0], f"the same conversation as {first[digest]}")
        else:
            first[digest] = about[0]


def leaked(rows: Rows, train: Rows) -> Iterator[Left]:
    """Yield each row that is trained on too."""
    known = set(train.digests)
    for about, digest in zip(rows.about, rows.digests, strict=True):
        if digest in known:
            yield Left(about[0], "the same conversation is trained on")


def to_table(rows: Rows) -> pyarrow.Table:
    """The rows as an Arrow table, made from whole columns: one row at a time would take longer than encoding them."""
    import numpy as np
    import pyarrow as pa

    offsets = np.cumsum([0, *(length for _, length, _, _ in rows.about)], dtype=np.int64)
    columns = [pa.LargeListArray.from_arrays(offsets, pa.array(np.array(c, np.int32))) for c in (rows.ids, rows.labels)]
    table = pa.table(columns, names=["input_ids", "labels"])
    if rows.weights:
        flat = np.array(rows.labels, np.int32).__ne__(IGNORE).astype(np.float32)
        for number, weights in rows.weights.items():
            flat[offsets[number] : offsets[number + 1]] = weights
        table = table.append_column("weights", pa.LargeListArray.from_arrays(offsets, pa.array(flat)))
    # Of rows to answer, the name of the file and the line: what fails while they are answered names them.
    places = [place.rpartition("/")[2] for place, _, _, _ in rows.about] if rows.tasks else []
    for name, values, kind in (
        ("cut", rows.cuts, pa.int32()),
        ("label", rows.good, pa.bool_()),
        ("task", rows.tasks, pa.large_string()),
        ("place", places, pa.string()),
    ):
        if values:
            table = table.append_column(name, pa.array(values, kind))
    return table


def lengths(rows: Any) -> list[int]:
    """Tokens of each row of a data set of `to_table`'s, without making Python lists of them."""
    from pyarrow.compute import list_value_length

    return list(list_value_length(rows.data.column("input_ids")).to_pylist())


def trained_tokens(rows: Any) -> int:
    """Tokens with a label of a data set of `to_table`'s."""
    import pyarrow.compute as pc

    labels = pc.list_flatten(rows.data.column("labels"))
    return int(pc.sum(pc.not_equal(labels, IGNORE)).as_py() or 0)
