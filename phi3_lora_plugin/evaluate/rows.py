"""Which rows an evaluation is about: those that it is given, or those that a recipe holds out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.chat.formats import Adapter
from phi3_lora_plugin.chat.report import DataReport

if TYPE_CHECKING:
    from datasets import Dataset

    from phi3_lora_plugin.recipe import Recipe


@dataclass(frozen=True)
class EvalRows:
    """Rows of `input_ids` and `labels`, and the fate of all that was read on the way to them.

    Of a recipe with `reward`, rows are prompts.
    """

    rows: Dataset
    report: DataReport


def evaluation_rows(
    recipe: Recipe,
    tokenizer: Any,
    adapters: Mapping[str, Adapter],
    longest: int,
    path: str | None = None,
    most: int | None = None,
) -> EvalRows:
    """Read and encode the rows to evaluate on, as the recipe's `data` section says.

    Args:
        path: rows to take instead of those that the recipe holds out; of a data set with splits, the one that an
            override of `data.split` names.
        most: at most so many, from the top.
        longest: row in tokens, if `data.max_length` says nothing.

    Raises:
        DataError: there are none, or as `load_data`.
    """
    data = recipe.data

    def alone(where: Any, split: str | None, key: str) -> EvalRows:
        """Only the rows of `where`, read as a run reads the ones it trains on."""
        no_more = {"eval_path": None, "eval_split": None, "eval_fraction": 0.0}
        only = data.model_copy(update={"path": where, "split": split, "max_rows": most, **no_more})
        try:
            loaded = load_data(recipe.model_copy(update={"data": only}), tokenizer, adapters, max_length=longest)
        except DataError as error:
            named = [f"{key}{text.removeprefix('data.path')}" if text.startswith("data.path:") else text
                     for text in error.problems]  # fmt: skip
            raise DataError(named) from error
        return EvalRows(loaded.train, loaded.report)

    if recipe.preference.on:  # a pair of answers is not text to predict
        if path is None:
            raise DataError([f"{recipe.name} was trained on pairs; pass chats to evaluate on with --data FILE"])
        recipe = recipe.model_copy(update={"preference": recipe.preference.model_copy(update={"loss": "none"})})
    if path is not None:
        split = data.split if recipe.provenance.get("data.split") == "override" else None
        return alone(path, split, "--data")
    if data.eval_path is not None or data.eval_split is not None:
        where = data.path if data.eval_path is None else data.eval_path
        return alone(where, data.eval_split, "data.eval_path")
    if not data.eval_fraction:
        raise DataError([f"{recipe.name} holds out no rows to evaluate on; pass some with --data FILE"])
    # The same seed holds out the same rows as the run did.
    loaded = load_data(recipe, tokenizer, adapters, max_length=longest)
    assert loaded.eval is not None
    rows = loaded.eval if most is None else loaded.eval.select(range(min(most, len(loaded.eval))))
    return EvalRows(rows, loaded.report)
