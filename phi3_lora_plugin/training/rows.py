"""Chats for a Trainer: padded, or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.pack import PackedCollator, pack
from phi3_lora_plugin.chat.pad import pad

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


def feed(rows: Any, recipe: Recipe, tokenizer: Any, longest: int) -> tuple[Any, Any]:
    """(rows, collator): rows padded on the right batch by batch, or packs that attend row by row."""
    from transformers import DataCollatorForSeq2Seq

    from phi3_lora_plugin.chat.rows import lengths

    if not recipe.data.packing:
        padded = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, pad_to_multiple_of=8)
        return rows, WeightedCollator(padded)
    packs = pack(lengths(rows), longest)
    return _Packs(rows, packs), PackedCollator()


@dataclass(frozen=True)
class WeightedCollator:
    """A collator that pads on the right, and `loss_weights` of rows that have `weights`: float32, 0 where it pads."""

    inner: Any

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        """One batch."""
        if not any("weights" in row for row in rows):
            return self.inner(rows)
        batch = self.inner([{name: value for name, value in row.items() if name != "weights"} for row in rows])
        width = batch["labels"].shape[1]
        known = [row.get("weights", [1.0] * len(row["labels"])) for row in rows]
        batch["loss_weights"] = pad(known, 0.0, width).float()
        return batch


@dataclass(frozen=True)
class _Packs:
    """A data set of packs over a data set of rows."""

    rows: Any
    packs: list[list[int]]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"rows": [self.rows[row] for row in self.packs[index]]}


def first_batches(rows: Any, tokenizer: Any, device: Any, size: int = 8, count: int = 32) -> list[dict[str, Any]]:
    """The first rows as padded batches of model inputs, for initialisations that look at data."""
    from transformers import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    rows = rows.select_columns(["input_ids", "labels"])
    chosen = [rows[index] for index in range(min(len(rows), size * count))]
    made = [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    return [{key: value.to(device) for key, value in batch.items()} for batch in made]


def require_weighted_loss(applied: Sequence[Any], arguments: Any) -> None:
    """Rows with weights need a loss that multiplies by them.

    Raises:
        DataError: this run uses another loss; the message names it.
    """
    from phi3_lora_plugin.chat.dataset import DataError

    loss = next(one for one in applied if one.part == "loss")
    why = f"speed.loss is off ({loss.why})" if not loss.on else None
    if arguments.label_smoothing_factor:
        why = "training.label_smoothing_factor computes the loss from all logits"
    if why is not None:
        raise DataError([f"rows have weights between 0 and 1, which this run cannot use: {why}"])
