"""TRL's KTOTrainer over rows that are encoded already; the reference is the model with its adapter off."""

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

_ROW = {"prompt_ids": [3], "completion_ids": [4], "KL_completion_ids": [5], "label": True}


def _takes_our_batches(module: Any) -> bool:
    """Whether the trainer's own collator makes the tensors that `JudgedCollator` makes."""
    collator = getattr(module, "DataCollatorForUnpairedPreference", None)
    if collator is None:
        return False
    made = collator(pad_token_id=0)([_ROW])
    return isinstance(made.get("label"), torch.Tensor) and {"completion_mask", "KL_completion_mask"} <= made.keys()


KTOTrainer, KTOConfig = trl_trainer("KTO", "preference.loss: kto", "1.8", _takes_our_batches)


def kto_arguments(recipe: Recipe, has_eval: bool) -> Any:
    """The recipe's `training` and `preference` as TRL's own arguments."""
    section = recipe.preference
    ours: dict[str, Any] = {
        "beta": section.beta,
        "desirable_weight": section.desirable_weight,
        "undesirable_weight": section.undesirable_weight,
        "max_length": None,  # rows are cut already, and counted
        "disable_dropout": False,  # as set in the recipe
    }
    return training_arguments(recipe, has_eval, KTOConfig, **ours)


class JudgedTrainer(LeavesRows, KTOTrainer):  # type: ignore[misc,valid-type]
    """KTOTrainer that leaves encoded rows as they are and a new adapter alone."""


@dataclass(frozen=True)
class JudgedCollator:
    """Rows of `chat.judged` -> what KTOTrainer computes with, padded on the right.

    `input_ids`, `attention_mask`, `completion_mask` [rows, longest], int64; the same with the prefix `KL_` of each
    prompt with the answer of the row before it, as TRL pairs them; `label` [rows], bool.
    """

    pad: int
    multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate one batch."""
        parts = [_parted(row) for row in rows]
        before = [parts[-1], *parts[:-1]]
        batch = self._padded("", [(prompt + answer, mask) for prompt, answer, mask in parts])
        batch |= self._padded("KL_", [
            (prompt + answer, [0] * len(prompt) + mask[len(mask) - len(answer) :])
            for (prompt, _, _), (_, answer, mask) in zip(parts, before, strict=True)
        ])  # fmt: skip
        return batch | {"label": torch.tensor([bool(row["label"]) for row in rows])}

    def _padded(self, name: str, chats: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
        ids, masks = zip(*chats, strict=True)
        return pad_inputs(ids, self.pad, self.multiple, name, completion_mask=(masks, 0))


def _parted(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """(prompt, answer from its first trained token on, which tokens of both are trained) of a row."""
    ids, trained = list(row["input_ids"]), [int(label != IGNORE) for label in row["labels"]]
    start = trained.index(1)
    return ids[:start], ids[start:], trained
