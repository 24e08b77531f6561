"""Rows that are nearly the same, among those to train on and between them and those to evaluate on.

Rows are compared by the sets of five tokens in a row that they hold (Broder 1997: the Jaccard similarity of shingles);
MinHash with locality-sensitive hashing, by the library datasketch, finds candidates, and each is then compared exactly.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError

_SHINGLE = 5  # tokens
_PERMUTATIONS = 64
_BATCH = 1000


@dataclass(frozen=True)
class Near:
    """Two rows by their number (from 1), and of the five-token pieces that either has the share that both have."""

    row: int
    like: int
    similarity: float


def near_duplicates(train: Any, held_out: Any, similarity: float) -> tuple[list[Near], list[Near]]:
    """(rows to train on that are like an earlier one, rows to evaluate on that are like one to train on).

    Args:
        train, held_out: data sets with `input_ids`; None for none to evaluate on.
        similarity: from which on, above 0 and up to 1.

    Raises:
        Phi3LoraError: datasketch is not installed.
    """
    try:
        from datasketch import MinHashLSH
    except ImportError as error:
        raise Phi3LoraError(f"--near needs datasketch ({error}): pip install 'phi3-lora-plugin[dedup]'") from error
    index = MinHashLSH(threshold=similarity, num_perm=_PERMUTATIONS)
    pieces: list[frozenset[bytes]] = []
    twice: list[Near] = []
    for number, (own, sketch) in enumerate(_sketches(train), 1):
        if (near := _nearest(number, own, index.query(sketch), pieces, similarity)) is not None:
            twice.append(near)
        pieces.append(own)
        index.insert(number, sketch)
    leaked = []
    for number, (own, sketch) in enumerate(_sketches(held_out) if held_out is not None else (), 1):
        if (near := _nearest(number, own, index.query(sketch), pieces, similarity)) is not None:
            leaked.append(near)
    return twice, leaked


def _nearest(
    number: int, own: frozenset[bytes], candidates: Sequence[int], pieces: Sequence[frozenset[bytes]], least: float
) -> Near | None:
    """The candidate that is most like the row, the earliest of several; None if none is enough."""
    best: Near | None = None
    for like in sorted(candidates):
        other = pieces[like - 1]
        share = len(own & other) / max(1, len(own | other))
        if share >= least and (best is None or share > best.similarity):
            best = Near(number, like, round(share, 4))
    return best


def _sketches(rows: Any) -> Iterator[tuple[frozenset[bytes], Any]]:
    from datasketch import MinHash

    for start in range(0, len(rows), _BATCH):
        some = [_pieces(ids) for ids in rows[start : start + _BATCH]["input_ids"]]
        yield from zip(some, MinHash.bulk(some, num_perm=_PERMUTATIONS), strict=True)


def _pieces(ids: Sequence[int]) -> frozenset[bytes]:
    tokens = array("i", ids)
    return frozenset(tokens[at : at + _SHINGLE].tobytes() for at in range(max(1, len(tokens) - _SHINGLE + 1)))
