"""Rows for a Trainer: padded, packed, or in pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


def feed(rows: Any, recipe: Recipe, tokenizer: Any, longest: int) -> tuple[Any, Any]:
    """(rows, collator): rows padded on the right batch by batch, pairs too, or packs that attend row by row."""
    from transformers import DataCollatorForSeq2Seq

    from phi3_lora_plugin.chat.pack import PackedCollator, pack
    from phi3_lora_plugin.chat.rows import lengths

    if recipe.preference.on:
        from phi3_lora_plugin.training.preference import PairCollator

        return rows, PairCollator(tokenizer.pad_token_id)
    if not recipe.data.packing:
        return rows, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100, pad_to_multiple_of=8)
    packs = pack(lengths(rows), longest)
    return _Packs(rows, packs), PackedCollator()


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
    chosen = [rows[index] for index in range(min(len(rows), size * count))]
    made = [collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    return [{key: value.to(device) for key, value in batch.items()} for batch in made]
