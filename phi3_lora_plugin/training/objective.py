"""What a run learns from: chats, pairs of answers, judged answers, rewards, and what it takes to train on that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from phi3_lora_plugin.recipe import Recipe


@dataclass(frozen=True)
class Objective:
    """One way to train.

    Attributes:
        trainer: the class of the Trainer.
        arguments: its arguments for (recipe, whether there are rows to evaluate on).
        feed: (rows, collator) for (encoded rows, recipe, tokenizer, tokens of the longest row).
        evaluated: rows to evaluate on as the trainer takes them.
        metric: the figure of an evaluation that measures how good the model is: "loss", or "reward".
    """

    trainer: Callable[..., Trainer]
    arguments: Callable[[Recipe, bool], TrainingArguments]
    feed: Callable[[Any, Recipe, Any, int], tuple[Any, Any]]
    evaluated: Callable[[Any], Any] = lambda rows: rows
    metric: str = "loss"


def _padded_by(collator: Callable[[int], Any]) -> Callable[[Any, Recipe, Any, int], tuple[Any, Any]]:
    """A `feed` of rows that `collator(pad id)` pads batch by batch, and that are never packed."""
    return lambda rows, recipe, tokenizer, longest: (rows, collator(tokenizer.pad_token_id))


def objective_of(recipe: Recipe) -> Objective:
    """The objective that a recipe names.

    Raises:
        ObjectiveError: the installed TRL cannot train with it.
    """
    if recipe.reward:
        from phi3_lora_plugin.training.grpo import RewardTrainer, asked, feed_tasks, grpo_arguments

        return Objective(partial(RewardTrainer, recipe=recipe), grpo_arguments, feed_tasks, asked, "reward")
    if recipe.preference.loss == "kto":
        from phi3_lora_plugin.training.kto import JudgedCollator, JudgedTrainer, kto_arguments

        return Objective(JudgedTrainer, kto_arguments, _padded_by(JudgedCollator))
    if recipe.preference.loss in ("orpo", "simpo"):
        from phi3_lora_plugin.training.reference_free import TwoSidesCollator, pair_arguments, pair_trainer

        return Objective(pair_trainer(recipe.preference.loss), pair_arguments, _padded_by(TwoSidesCollator))
    if recipe.preference.on:
        from phi3_lora_plugin.training.preference import PairCollator, PreferenceTrainer, preference_arguments

        return Objective(PreferenceTrainer, preference_arguments, _padded_by(PairCollator))
    from transformers import Trainer

    from phi3_lora_plugin.training.arguments import training_arguments
    from phi3_lora_plugin.training.rows import feed

    return Objective(Trainer, training_arguments, feed)
