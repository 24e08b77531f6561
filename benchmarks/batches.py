"""Rows as batches for every variant and every check, and the loss of one as a Trainer computes it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch


def padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One batch, padded on the right with id 0: `input_ids`, `labels`, `attention_mask` [rows, longest], int64."""
    counts = torch.tensor([len(row["input_ids"]) for row in rows])
    width = int(counts.max())

    def filled(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

    mask = (torch.arange(width)[None] < counts[:, None]).long()
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def items_in(batches: Sequence[dict[str, Any]]) -> int:
    """Supervised tokens of these batches, of which a step's loss is the mean."""
    return sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)


def loss_of(model: Any, batch: dict[str, Any], device: torch.device, items: int, mixed: torch.dtype | None) -> Any:
    """The loss of a batch as its part of a mean over `items` tokens, in autocast to `mixed` if that is given."""
    with nullcontext() if mixed is None else torch.autocast(device.type, dtype=mixed):
        return model(**on_device(batch, device), num_items_in_batch=items).loss
