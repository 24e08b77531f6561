"""ORPO and SimPO (TRL's ORPOTrainer and CPOTrainer) over pairs that are encoded already; neither has a reference."""

# This module subclasses something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.chat.encode import IGNORE
from phi3_lora_plugin.chat.pad import pad_inputs
from phi3_lora_plugin.recipe import Recipe
from phi3_lora_plugin.training.arguments import training_arguments
from phi3_lora_plugin.training.trl_trainers import trl_trainer

#: `preference.loss` -> the name that TRL's trainer has.
_NAMES = {"orpo": "ORPO", "simpo": "CPO"}


def pair_arguments(recipe: Recipe, has_eval: bool) -> Any:
    """The recipe's `training` and `preference` as TRL's own arguments."""
    section = recipe.preference
    ours: dict[str, Any] = {
        "beta": section.beta,
        "max_length": 1 << 20,  # of what is not called: rows are cut already, and counted
        "disable_dropout": False,  # as set in the recipe
    }
    if section.loss == "simpo":
        ours |= {
            "loss_type": "simpo",
            "simpo_gamma": section.gamma,
            "cpo_alpha": section.cpo_alpha,
            "label_smoothing": section.label_smoothing,
        }
    return training_arguments(recipe, has_eval, _found(section.loss)[1], **ours)


def _found(loss: str) -> tuple[type[Any], type[Any]]:
    return trl_trainer(_NAMES[loss], f"preference.loss: {loss}", "0.24")


@cache
def pair_trainer(loss: str) -> type[Any]:
    """TRL's trainer for `loss`, "orpo" or "simpo", as one that leaves encoded rows as they are.

    Raises:
        ObjectiveError: the installed TRL has none.
    """

    class PairTrainer(_found(loss)[0]):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            rows = {name: given[name] for name in ("train_dataset", "eval_dataset")}
            kept = {name: None if value is None else _AsTheyAre(value) for name, value in rows.items()}
            super().__init__(**(given | kept))
            self.train_dataset, self.eval_dataset = rows.values()
            self.use_dpo_data_collator = True  # its keys are what ours has, too

    return PairTrainer


@dataclass(frozen=True)
class _AsTheyAre:
    """Rows that TRL's constructor maps in vain."""

    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def map(self, *arguments: Any, **named: Any) -> _AsTheyAre:
        return self


@dataclass(frozen=True)
class TwoSidesCollator:
    """Rows of `chat.pairs` -> what ORPOTrainer and CPOTrainer compute with, each side padded on the right.

    `input_ids`, `attention_mask`, `labels` (-100 where untrained) [rows, longest], int64, with the prefixes `chosen_`
    and `rejected_`.
    """

    pad: int
    multiple: int = 8

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate one batch."""
        batch: dict[str, torch.Tensor] = {}
        for name in ("chosen", "rejected"):
            parts = [slice(None, row["cut"]) if name == "chosen" else slice(row["cut"], None) for row in rows]
            ids, labels = ([row[key][part] for row, part in zip(rows, parts, strict=True)]
                           for key in ("input_ids", "labels"))  # fmt: skip
            batch |= pad_inputs(ids, self.pad, self.multiple, f"{name}_", labels=(labels, IGNORE))
        return batch
