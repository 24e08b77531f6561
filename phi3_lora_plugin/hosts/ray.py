"""Ray Train: a recipe on the workers of a cluster, our checkpoints reported as Ray's, resumed when a worker dies.

Each worker runs the same `train` as one process would. When a worker or its machine dies, or there is room for more
workers, Ray starts all of them again; they resume from the newest complete checkpoint: of the first worker's folder,
else the one that Ray keeps. Machines need no common disk.
"""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from transformers import TrainerCallback  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.hosts.ray_checkpoints import bring, claim, first_of_all, newest_step, of_the_first, share
from phi3_lora_plugin.hosts.ray_settings import Cluster, RayError, storage_of
from phi3_lora_plugin.pipeline import Result, TrainingError, train
from phi3_lora_plugin.store.checkpoint import latest_complete
from phi3_lora_plugin.store.layout import FOLDER
from phi3_lora_plugin.training.arguments import same_batch
from phi3_lora_plugin.training.callbacks import LoraCheckpoint

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)


def train_on_ray(
    recipe: Recipe,
    cluster: Cluster,
    *,
    resume: bool = False,
    allow_drift: Sequence[str] = (),
    samples: int = 0,
    check: bool = True,
    quiet: bool = False,
) -> Result:
    """`train` on the workers of a Ray cluster; one of this machine is started if there is none.

    A range of workers divides the recipe's batch among as many as there are, so that each step has the same rows.

    Raises:
        RayError: Ray is not installed, or its storage cannot be used or has another run.
        BatchError: the batch cannot be divided among every number of workers of a range.
        TrainingError: the run stopped for its health, or workers died more often than `max_failures`.
        ValueError: what `train` raises for wrong input.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import; no usage statistics without consent
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # a busy machine takes its time
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # of `print`, whose code dill would hash
        import ray
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.exceptions import TrainingFailedError
    except ImportError as error:
        raise RayError(f"--ray needs Ray Train ({error}): pip install 'phi3-lora-plugin[ray]'") from error

    output_dir = Path(recipe.output_dir).resolve()
    section = recipe.checkpoint.model_copy(update={"background": False})  # what is reported has to be there
    recipe = recipe.model_copy(update={"output_dir": str(output_dir), "checkpoint": section})
    use_gpu = _has_gpu(recipe) if cluster.use_gpu is None else cluster.use_gpu
    elastic = not isinstance(cluster.num_workers, int)
    for number in range(cluster.fewest, cluster.most + 1) if elastic else ():
        same_batch(recipe, number)
    storage = storage_of(cluster, output_dir)
    if not resume and storage.has_run():
        raise RayError(f"{storage} has checkpoints of a run; pass --resume, or another storage_path or output_dir")
    started = not ray.is_initialized()
    if started:
        here = cluster.address is None and "RAY_ADDRESS" not in os.environ
        cores = {"num_cpus": cluster.most * cluster.cpus_per_worker + 1} if here and not use_gpu else {}
        options = {"include_dashboard": False if here else None, "logging_level": "warning", "log_to_driver": not quiet}
        # "local": not a cluster that somebody else has started on this machine
        ray.init(address="local" if here else cluster.address, **options, **cores)
    try:
        outcome = TorchTrainer(
            _work,
            train_loop_config={
                "recipe": recipe,
                "where": os.getcwd(),
                "resume": resume,
                "run": uuid4().hex,
                "fresh": latest_complete(output_dir) is None,
                "divide": elastic,
                "quiet": quiet,
                "options": {"allow_drift": tuple(allow_drift), "samples": samples, "check": check},
            },
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker}
                | ({"GPU": 1} if use_gpu else {}), elastic_resize_monitor_interval_s=cluster.resize_seconds,
            ),
            run_config=RunConfig(
                name=storage.name, storage_path=storage.path, storage_filesystem=storage.filesystem,
                failure_config=FailureConfig(cluster.max_failures, controller_failure_limit=cluster.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=max(2, recipe.checkpoint.keep_last)),
            ),
        ).fit()  # fmt: skip
    except TrainingFailedError as error:
        raise TrainingError(f"Ray stopped the run: {error}") from error
    finally:
        if started:
            ray.shutdown()
    value = outcome.return_value
    if isinstance(value, Exception):
        raise value
    if not isinstance(value, Result):
        raise TrainingError("Ray returned no result from the first worker")
    return _here(value, outcome, output_dir)


def _here(result: Result, outcome: Any, output_dir: Path) -> Result:
    """Bring the last checkpoint to this machine, if the first worker wrote it on another one."""
    kept = [outcome.checkpoint] if outcome.checkpoint is not None else []
    if bring(kept, output_dir, log.warning) is not None:
        log.warning("the first worker ran on another machine: %s is copied from Ray's storage", output_dir / FOLDER)
    adapter = latest_complete(output_dir)
    return replace(result, adapter=None if adapter is None else str(adapter))


class ReportToRay(TrainerCallback):  # type: ignore[misc]
    """Hand each LoRA-only checkpoint to Ray once it is written; every worker waits for the others as it does."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._ours: LoraCheckpoint | None = None
        self._reported: int | None = None
        self._metrics: dict[str, float] = {}

    def bind(self, trainer: Any) -> None:
        """Find the callback that writes."""
        self._trainer = trainer
        found = (one for one in trainer.callback_handler.callbacks if isinstance(one, LoraCheckpoint))
        self._ours = next(found, None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse to train workers separately, each on its own rows."""
        if args.world_size > 1 and self._trainer.model_wrapped is self._trainer.model:
            raise TrainingError("the workers would not share their gradients: accelerate has not wrapped the model")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the newest figures."""
        self._metrics |= {key: value for key, value in (logs or {}).items() if isinstance(value, int | float)}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the checkpoint that was taken since, if one was."""
        taken = None if self._ours is None else self._ours._taken
        if taken is None or taken == self._reported:
            return
        self._reported = taken
        saved = self._ours.saved if self._ours is not None else None  # on the first worker only
        self._report(self._metrics | {"step": taken}, saved)

    on_epoch_begin = on_save = on_train_end = on_step_begin

    def _report(self, metrics: dict[str, Any], saved: Path | None) -> None:
        from ray import train as ray_train

        checkpoint = None if saved is None else ray_train.Checkpoint.from_directory(saved)
        ray_train.report(metrics, checkpoint=checkpoint)


def _work(config: dict[str, Any]) -> Result | Exception:
    """What each worker does. Wrong input comes back as a value: Ray would try it again."""
    from ray import train as ray_train
    from rich.console import Console

    from phi3_lora_plugin.plugins.discovery import load_plugins

    recipe, where = config["recipe"], Path(config["where"])
    if where.is_dir():
        os.chdir(where)  # relative paths of the recipe are meant from there
    context = ray_train.get_context()
    if os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # as its launcher sets it; else it wraps no model on a CPU
    console = Console(quiet=config["quiet"] or context.get_world_rank() != 0, highlight=False, width=120)
    output_dir = Path(recipe.output_dir)
    try:
        if config["divide"]:
            recipe = same_batch(recipe, context.get_world_size())
            console.print(f"workers: {context.get_world_size()}")
        resume = _ready_to_resume(config, output_dir, lambda text: console.print(text, markup=False))
        result = train(
            recipe, resume=resume, plugins=load_plugins(), console=console, callbacks=[ReportToRay()],
            **config["options"],
        )  # fmt: skip
        return replace(result, output_dir=recipe.output_dir)
    except Phi3LoraError as error:
        return error


def _ready_to_resume(config: dict[str, Any], output_dir: Path, say: Callable[[str], Any]) -> bool:
    """Put what to resume from where every worker sees it; whether there is something, or it was asked for."""
    import torch.distributed as dist
    from ray import train as ray_train
    from ray.train import CheckpointConsistencyMode

    context = ray_train.get_context()
    resume, problem, of_a_machine = bool(config["resume"]), None, context.get_local_rank() == 0
    try:
        if of_a_machine and config["fresh"] and not resume:
            claim(output_dir, config["run"])
        if context.get_world_rank() == 0:
            kept = ray_train.get_checkpoint()
            if kept is not None:
                every = ray_train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, 10)
                every.sort(key=lambda one: one.metrics["step"], reverse=True)
                bring([one.checkpoint for one in every] or [kept], output_dir, say)
            # A worker may die between writing and handing over: what is here was written by this very run.
            resume = resume or kept is not None or (config["fresh"] and newest_step(output_dir) >= 0)
    except RayError as error:
        problem = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        resume, problem = of_the_first(resume), first_of_all(problem)
        if resume and problem is None:
            share(output_dir, of_a_machine)
    if problem is not None:
        raise RayError(problem)
    return resume


def _has_gpu(recipe: Recipe) -> bool:
    import torch

    return recipe.model.device in ("auto", "cuda") and torch.cuda.is_available()
