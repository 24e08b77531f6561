"""TRL's DPOTrainer over rows that are encoded already; the reference is the model with its adapter off."""

# This module subclasses something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.pad import pad_inputs
from phi3_lora_plugin.recipe import Recipe
from phi3_lora_plugin.training.arguments import training_arguments
from phi3_lora_plugin.training.trl_trainers import LeavesRows, trl_trainer


def _takes_our_batches(module: Any) -> bool:
    """Whether the trainer's own collator makes the tensors that `PairCollator` makes; before TRL 1 it made others."""
    try:
        made = module.DataCollatorForPreference(pad_token_id=0)(
            [{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}]
        )
    except (AttributeError, KeyError, TypeError):
        return False
    return {"input_ids", "completion_mask"} <= set(made)


DPOTrainer, DPOConfig = trl_trainer("DPO", "preference.loss", "1.0", _takes_our_batches)


def preference_arguments(recipe: Recipe, has_eval: bool) -> Any:
    """The recipe's `training` and `preference` as TRL's own arguments."""
    section = recipe.preference
    ours: dict[str, Any] = {
        "beta": section.beta,
        "loss_type": [section.loss],
        "label_smoothing": section.label_smoothing,
        "max_length": None,  # rows are cut already, and counted
        "disable_dropout": False,  # as set in the recipe
    }
    return training_arguments(recipe, has_eval, DPOConfig, **ours)


class PreferenceTrainer(LeavesRows, DPOTrainer):  # type: ignore[misc,valid-type]
    """DPOTrainer that leaves encoded rows as they are and a new adapter alone."""


@dataclass(frozen=True)
class PairCollator:
    """Rows of `chat.pairs` -> what DPOTrainer computes with: the chosen chats above, the rejected ones below.

    `input_ids`, `attention_mask`, `completion_mask` [2 * rows, longest], int64; padded on the right.
    """

    pad: int
    multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate one batch."""
        halves = [slice(None, row["cut"]) for row in rows], [slice(row["cut"], None) for row in rows]
        chats = [
            (row["input_ids"][part], row["labels"][part])
            for parts in halves
            for row, part in zip(rows, parts, strict=True)
        ]
        trained = [[int(label != IGNORE) for label in labels] for _, labels in chats]
        return pad_inputs([ids for ids, _ in chats], self.pad, self.multiple, completion_mask=(trained, 0))
