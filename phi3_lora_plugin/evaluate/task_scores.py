"""What answers to the prompts of a recipe with `reward` earn, by the same functions as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.tasks import Task, columns_of
from phi3_lora_plugin.training.rewards import PLACE, folders_of, rewards_of

if TYPE_CHECKING:
    from phi3_lora_plugin.evaluate.answers import Answer, Question
    from phi3_lora_plugin.recipe import Recipe


def task_scores(recipe: Recipe, rows: Any, asked: Sequence[Question], made: Sequence[Answer]) -> dict[str, float]:
    """Mean of each reward over the answers that it applies to, and as "reward" the mean of their weighted sums.

    Raises:
        RewardError: a reward cannot be found, or failed.
    """
    tasks = [Task.from_json(rows[question.row]["task"]) for question in asked]
    said = [[{"role": "assistant", "content": one.text}] for one in made]
    stop = 1  # rewards look at whether the last id is a stop token, and an answer knows that
    ids = [[stop if one.stopped else 0] for one in made]
    columns = columns_of(tasks) | {PLACE: [rows[question.row]["place"] for question in asked]}
    scores: dict[str, float] = {}
    sums = [0.0] * len(made)
    named = zip(recipe.rewards.items(), rewards_of(list(recipe.rewards), [stop], folders_of(recipe)), strict=True)
    for (name, weight), reward in named:
        given = reward(prompts=[task.messages for task in tasks], completions=said, completion_ids=ids, **columns)
        numbers = [value for value in given if value is not None]
        if numbers:
            scores[name] = sum(numbers) / len(numbers)
        sums = [total + weight * (value or 0.0) for total, value in zip(sums, given, strict=True)]
    return {"reward": sum(sums) / len(sums)} | scores
