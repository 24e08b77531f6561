"""TRL's GRPOTrainer on rows that our encoder reads: prompts as in chat, every stop token, rewards by name."""

# This module subclasses something heavy; it is imported only inside functions.
from __future__ import annotations

import logging
from dataclasses import fields, replace
from functools import partial
from typing import Any

from phi3_lora_plugin.chat.encode import EncodeError, Policy, encode_prompts
from phi3_lora_plugin.chat.tasks import Task, columns_of
from phi3_lora_plugin.model.folder import published_stops
from phi3_lora_plugin.model.tokenizer import stop_token_ids
from phi3_lora_plugin.recipe import Recipe
from phi3_lora_plugin.training.arguments import training_arguments
from phi3_lora_plugin.training.rewards import PLACE, folders_of, rewards_of
from phi3_lora_plugin.training.trl_trainers import ObjectiveError, forget_copy, trl_trainer

log = logging.getLogger(__name__)

GRPOTrainer, GRPOConfig = trl_trainer(
    "GRPO", "reward", "1.0", lambda module: hasattr(module.GRPOTrainer, "_tokenize_prompts")
)


def grpo_arguments(recipe: Recipe, has_eval: bool) -> Any:
    """The recipe's `training`, `grpo` and the weights of `reward` as TRL's own arguments.

    Raises:
        ObjectiveError: settings that TRL refuses together.
    """
    ours: dict[str, Any] = {
        **recipe.grpo.model_dump(),
        "reward_weights": list(recipe.rewards.values()),
        "include_num_input_tokens_seen": False,  # TRL counts what it generates, too
        "metric_for_best_model": "reward",
        "greater_is_better": True,
        "num_generations_eval": 1,
        "disable_dropout": False,  # as set in the recipe
    }
    known = {field.name for field in fields(GRPOConfig)}
    try:
        return training_arguments(recipe, has_eval, GRPOConfig, **{k: v for k, v in ours.items() if k in known})
    except ValueError as error:
        raise ObjectiveError(f"training by reward: {error}") from error


class RewardTrainer(GRPOTrainer):  # type: ignore[misc,valid-type]
    """GRPOTrainer whose prompts are ours, which stops at all of the model's stop tokens and leaves a new adapter alone.

    Args:
        recipe: names the rewards, and how prompts are encoded.
        given: as of any Trainer; a `data_collator` is not looked at.
    """

    def __init__(self, *, recipe: Recipe, model: Any, processing_class: Any, **given: Any) -> None:
        data = recipe.data
        thoughts = "train" if data.thoughts == "error" else data.thoughts
        self._policy = replace(Policy.of(data), train_on="assistant", thoughts=thoughts)
        self._template_name = data.template
        stops = stop_token_ids(processing_class, published_stops(model.generation_config.to_dict(), {}))
        model.generation_config.eos_token_id = stops
        given.pop("data_collator", None)
        super().__init__(
            model=model,
            reward_funcs=list(rewards_of(list(recipe.rewards), stops, folders_of(recipe))),
            processing_class=processing_class,
            **given,
        )
        if missing := set(stops) - set(self.eos_token_ids):
            raise ObjectiveError(f"this TRL does not stop at the tokens {sorted(missing)}: pip install -U trl")
        forget_copy(self)
        self._unrewarded = 0

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        encoded: list[list[int]] = []
        for ids in encode_prompts(prompts, self.processing_class, self._policy, self._template_name):
            if isinstance(ids, EncodeError):  # of a row that was encoded once before
                raise ids
            encoded.append(ids)
        return encoded, None, {}

    def log(self, logs: dict[str, float], *others: Any) -> None:
        """As TRL, and a warning when no completion of several logs in a row earned anything."""
        super().log(logs, *others)
        if "reward" in logs and "loss" in logs:
            silent = not logs.get("reward_std") and not logs["reward"]
            self._unrewarded = self._unrewarded + 1 if silent else 0
            if self._unrewarded == 3:
                log.warning(
                    "no completion earned a reward in the last 3 logs, up to step %d: nothing is learned; look at what "
                    "the model answers (phi3-lora chat), or train it on answers first",
                    self.state.global_step,
                )


def feed_tasks(rows: Any, recipe: Recipe, tokenizer: Any, longest: int) -> tuple[Any, None]:
    """(rows as TRL asks for them: `prompt` and every column for rewards; no collator)."""
    return asked(rows), None


def asked(rows: Any) -> Any:
    """Encoded tasks as a data set of prompts and columns; each row has all columns that any has, None where not."""
    names = tuple(columns_of([Task.from_json(text) for text in rows["task"]]))
    return rows.with_transform(partial(_asked, names))


def _asked(names: tuple[str, ...], batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    tasks = [Task.from_json(text) for text in batch["task"]]
    columns = {name: [task.columns.get(name) for task in tasks] for name in names}
    return {"prompt": [task.messages for task in tasks], **columns, PLACE: batch["place"]}
