"""Rows of different lengths as one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def pad(rows: Sequence[Sequence[Any]], value: float, width: int = 0, multiple: int = 1) -> Tensor:
    """The rows as a tensor [rows, width], filled up on the right with `value`.

    Args:
        width: at least that of the longest row, which is what it is if not given.
        multiple: the width is rounded up to one of it.
    """
    import torch

    width = -(-max(width, *map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def pad_inputs(
    ids: Sequence[Sequence[int]],
    value: int,
    multiple: int,
    prefix: str = "",
    **more: tuple[Sequence[Sequence[int]], int],
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of rows, and a tensor for each of `more`: (rows, what to pad with).

    All are [rows, longest, rounded up to one of `multiple`], int64, with `prefix` before their names.
    """
    tables = {"input_ids": (ids, value), "attention_mask": ([[1] * len(row) for row in ids], 0), **more}
    return {f"{prefix}{name}": pad(rows, fill, multiple=multiple) for name, (rows, fill) in tables.items()}
