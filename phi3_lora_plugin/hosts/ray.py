"""Ray Train: a recipe on the workers of a cluster, our checkpoints reported as Ray's, resumed when a worker dies.

Each worker runs the same `train` as one process would. When a worker dies, Ray starts all of them again; they resume
from the newest complete checkpoint: of the run's folder where they see it, else from the one that Ray keeps.
"""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.pipeline import Result, TrainingError, train
from phi3_lora_plugin.store.checkpoint import latest_complete
from phi3_lora_plugin.store.layout import FOLDER, step_name
from phi3_lora_plugin.store.manifest import read_manifest
from phi3_lora_plugin.training.callbacks import LoraCheckpoint
from phi3_lora_plugin.wording import closest

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


class RayError(Phi3LoraError):
    """Ray is not installed, or a setting that it does not have."""


@dataclass(frozen=True)
class Cluster:
    """The settings of `--ray KEY=VALUE`; `use_gpu` follows the recipe's device if not set."""

    num_workers: int = 1
    use_gpu: bool | None = None
    cpus_per_worker: int = 1
    max_failures: int = 3  # times that workers are started again; -1: without end
    storage_path: str | None = None  # where Ray keeps checkpoints: `ray/` in the run's folder
    address: str | None = None  # of a running cluster; None: RAY_ADDRESS, or a cluster of this machine


def read_settings(texts: Sequence[str]) -> Cluster:
    """`["num_workers=2", ...]` -> `Cluster`.

    Raises:
        RayError: with everything that is wrong.
    """
    kinds = {field.name: str(field.type) for field in fields(Cluster)}
    found: dict[str, Any] = {}
    problems = []
    for text in (part for given in texts for part in given.split(",")):
        name, equals, value = text.strip().partition("=")
        if name not in kinds or not equals:
            near = closest(name, kinds)
            problems.append(f"{text!r} is not one of {', '.join(f'{kind}=' for kind in kinds)}")
            problems[-1] += f"; did you mean {near}=?" if near and near != name else ""
        elif kinds[name].startswith("bool"):
            if value.lower() not in ("true", "false"):
                problems.append(f"{name}: expected true or false, got {value!r}")
            found[name] = value.lower() == "true"
        elif kinds[name] == "int":
            lowest = -1 if name == "max_failures" else 1
            if not value.lstrip("-").isdigit() or int(value) < lowest:
                problems.append(f"{name}: expected a whole number of at least {lowest}, got {value!r}")
            else:
                found[name] = int(value)
        else:
            found[name] = value
    if problems:
        raise RayError("--ray: " + "; ".join(problems))
    return Cluster(**found)


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

    Raises:
        RayError: Ray is not installed.
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
    started = not ray.is_initialized()
    if started:
        here = cluster.address is None and "RAY_ADDRESS" not in os.environ
        cores = {"num_cpus": cluster.num_workers * cluster.cpus_per_worker + 1} if here and not use_gpu else {}
        options = {"include_dashboard": False if here else None, "logging_level": "warning", "log_to_driver": not quiet}
        ray.init(address=cluster.address, **options, **cores)
    try:
        outcome = TorchTrainer(
            _work,
            train_loop_config={
                "recipe": recipe,
                "where": os.getcwd(),
                "resume": resume,
                "fresh": latest_complete(output_dir) is None,
                "quiet": quiet,
                "options": {"allow_drift": tuple(allow_drift), "samples": samples, "check": check},
            },
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker={"CPU": cluster.cpus_per_worker}
                | ({"GPU": 1} if use_gpu else {}),
            ),
            run_config=RunConfig(
                name="run",
                storage_path=cluster.storage_path or str(output_dir / "ray"),
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
    return value


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
        """Report the checkpoint taken at this step's beginning."""
        self._report(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the beginning of a step."""
        self._report(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the beginning of a step."""
        self._report(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the end."""
        self._report(state)

    def _report(self, state: Any) -> None:
        from ray import train as ray_train

        taken = None if self._ours is None else self._ours._taken
        if taken is None or taken == self._reported:
            return
        self._reported = taken
        saved = self._ours.saved if self._ours is not None else None  # on the first worker only
        checkpoint = None if saved is None else ray_train.Checkpoint.from_directory(saved)
        ray_train.report(self._metrics | {"step": taken}, checkpoint=checkpoint)


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
    kept = ray_train.get_checkpoint()
    if kept is not None and context.get_local_rank() == 0:
        _restore(kept, Path(recipe.output_dir))
    # A worker may die between writing and handing over: what is here was written by this very run.
    written = config["fresh"] and latest_complete(recipe.output_dir) is not None
    resume = _as_the_first_worker(config["resume"] or kept is not None or written)
    console = Console(quiet=config["quiet"] or context.get_world_rank() != 0, highlight=False, width=120)
    try:
        result = train(
            recipe, resume=resume, plugins=load_plugins(), console=console, callbacks=[ReportToRay()],
            **config["options"],
        )  # fmt: skip
        return replace(result, output_dir=recipe.output_dir)
    except Phi3LoraError as error:
        return error


def _as_the_first_worker(resume: bool) -> bool:
    """Resume together or not at all, also where workers see different disks."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return resume
    said = [resume]
    dist.broadcast_object_list(said)
    return said[0]


def _restore(kept: Any, output_dir: Path) -> None:
    """Put the checkpoint that Ray keeps into the run's folder, if that is new here or has only older ones."""
    newest = latest_complete(output_dir)
    with kept.as_directory() as folder:
        step = int(read_manifest(Path(folder))["step"])
        if newest is not None and int(read_manifest(newest)["step"]) >= step:
            return
        target = output_dir / FOLDER / step_name(step)
        if target.exists():
            shutil.rmtree(target)  # damaged, or it would be the newest
        staged = target.with_name(f".{target.name}.from-ray")
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(folder, staged)
        staged.rename(target)


def _has_gpu(recipe: Recipe) -> bool:
    import torch

    return recipe.model.device in ("auto", "cuda") and torch.cuda.is_available()
