"""Several sources of different formats -> one data set: how much of each, drawn by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.rows import Rows, take

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe.sections import DataSection, MixtureSource

_INHERITED = ("format", "columns", "ignore", "split")


def sources_of(data: DataSection) -> Iterator[tuple[Any, DataSection, MixtureSource | None]]:
    """Yield (path, how it is read, its part in the mixture) for `data.path`; once, with None, for a single source."""
    from phi3_lora_plugin.recipe.sections import MixtureSource

    if not isinstance(data.path, list) or not any(isinstance(entry, dict) for entry in data.path):
        yield data.path, data, None
        return
    for entry in data.path:
        source = MixtureSource.model_validate(entry if isinstance(entry, dict) else {"path": entry})
        own = {name: getattr(source, name) for name in _INHERITED if getattr(source, name) is not None}
        yield source.path, data.model_copy(update=own), source


def counts(available: Sequence[int], sources: Sequence[MixtureSource]) -> list[int]:
    """Rows to take of each source.

    Where none has a weight, all of each up to its `max_rows`. Else the largest mixture with these shares in which no
    row stands twice: the source that has the least for its share gives all that it has.
    """
    most = [min(count, source.max_rows or count) for count, source in zip(available, sources, strict=True)]
    if all(source.weight is None for source in sources):
        return most
    weights = [1.0 if source.weight is None else source.weight for source in sources]
    size = min(count / weight for count, weight in zip(most, weights, strict=True))
    return [min(count, max(1, round(size * weight))) for count, weight in zip(most, weights, strict=True)]


def draw(rows: Rows, count: int, seed: int, number: int) -> Rows:
    """`count` of the rows in their order, chosen by `seed` and the `number` of the source."""
    if count == len(rows.about):
        return rows
    return take(rows, sorted(random.Random(f"{seed} {number}").sample(range(len(rows.about)), count)))
