"""Ray Tune: a recipe as a trainable; trials set fields of it and report checkpoints with their held-out loss."""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_lora_plugin.hosts.ray import ReportToRay
from phi3_lora_plugin.hosts.ray_checkpoints import bring, newest_step
from phi3_lora_plugin.pipeline import Result, train
from phi3_lora_plugin.recipe import load_recipe
from phi3_lora_plugin.store.manifest import read_manifest


def trainable(recipe: str | Path, overrides: Sequence[str] = ()) -> Callable[[Mapping[str, Any]], None]:
    """A function for `ray.tune.Tuner`: one trial is one run of a recipe, in one process.

    A trial's values are fields of the recipe by their dotted names (`training.learning_rate`, `lora.r`). It reports
    `eval_loss` (the held-out loss, nats a token), `loss`, `step` and `trainable_parameters` with its last checkpoint,
    and before that with each checkpoint at whose step the recipe evaluates, so that schedulers can stop it early. A
    trial that Tune starts again resumes from its newest complete checkpoint.

    Args:
        recipe: a name or a file, as `load_recipe` takes it.
        overrides: `["training.max_steps=50", ...]`, for every trial.

    Raises:
        RecipeError: the recipe or an override is wrong. What a trial sets wrongly ends that trial.
    """
    load_recipe(recipe, overrides)
    where = os.getcwd()

    def trial(config: Mapping[str, Any]) -> None:
        from ray import tune

        folder = Path.cwd() / "run"  # Tune's own for this trial
        if os.path.isdir(where):
            os.chdir(where)  # relative paths of the recipe are meant from there
        chosen = [f"{name}={json.dumps(value)}" for name, value in config.items()]
        run = load_recipe(recipe, [*overrides, *chosen, f"output_dir={folder}", "checkpoint.background=false"])
        if (kept := tune.get_checkpoint()) is not None:
            bring([kept], folder, print)
        report = ReportToTune()
        report.report_end(train(run, resume=newest_step(folder) >= 0, check=False, callbacks=[report]))

    return trial


class ReportToTune(ReportToRay):
    """Report the checkpoints that have a held-out loss of their own step, and the last one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A trial is one process: there is nothing to share."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The end is reported by `report_end`, when it has been evaluated."""

    def report_end(self, result: Result) -> None:
        """Report the last checkpoint with the held-out loss after training."""
        found = {
            "step": result.steps,
            "loss": result.train_loss,
            "eval_loss": result.eval_loss_after,
            "trainable_parameters": result.trainable_parameters,
        }
        saved = None if result.adapter is None else Path(result.adapter)
        self._to_tune({name: value for name, value in found.items() if value is not None}, saved)

    def _report(self, metrics: dict[str, Any], saved: Path | None) -> None:
        metric = None if saved is None else read_manifest(saved).get("metric")
        if metric is not None:
            self._to_tune(metrics | {str(metric["name"]): metric["value"]}, saved)

    def _to_tune(self, metrics: dict[str, Any], saved: Path | None) -> None:
        from ray import tune

        tune.report(metrics, checkpoint=None if saved is None else tune.Checkpoint.from_directory(saved))
