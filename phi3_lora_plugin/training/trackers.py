"""Experiment trackers (`training.report_to`): one tracker run from the first evaluation to the last, with our figures.

The Trainer's own integrations log what the Trainer logs; `MetricsLog` adds tokens a second and memory to that. Here
they also get what belongs to the run as a whole (coverage, data report, recipe, adapter), and end when the run does:
left alone they end with `trainer.train()`, and the evaluation after it opens a second run, or a second folder.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.store.checkpoint import latest_complete
from phi3_lora_plugin.store.run_file import FAILED

log = logging.getLogger(__name__)

#: Where TensorBoard's events go in the output folder, unless TENSORBOARD_LOGGING_DIR says otherwise.
TENSORBOARD = "tensorboard"
_LISTED = 50  # rows of a list in a data report that a tracker gets; data_report.json has all


@dataclass(frozen=True)
class About:
    """What a run is made of: its recipe as YAML, and as plain data what is trained and on what."""

    recipe: str
    coverage: Sequence[Mapping[str, Any]]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What came of a run: figures by name, its newest adapter (a folder), and other files."""

    name: str
    failed: bool
    figures: Mapping[str, float]
    adapter: Path | None
    files: Sequence[Path]
    ours: bool  # whether the tracker's run began with this one


class TrackerError(Phi3LoraError, RuntimeError):
    """A tracker that cannot begin its run."""


class UntilClosed:
    """A tracker's callback whose run begins before `trainer.train()` and ends with `close`.

    Evaluations before and after training belong to the same run.
    """

    def __init__(self, tracker: Any, trainer: Any) -> None:
        self.tracker, self._trainer = tracker, trainer
        tracker.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)

    def __getattr__(self, event: str) -> Any:
        return getattr(self.tracker, event)

    def on_train_begin(self, *given: Any, **named: Any) -> None:
        """It has begun already."""

    def on_train_end(self, *given: Any, **named: Any) -> None:
        """It ends later."""

    def close(self) -> None:
        """Now it is the end."""
        trainer = self._trainer
        self.tracker.on_train_end(
            trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=trainer.processing_class
        )


@dataclass
class Trackers:
    """The trackers of one run; none until `hold`."""

    held: list[tuple[str, UntilClosed]] = field(default_factory=list)
    _ours: set[str] = field(default_factory=set)  # those whose process-wide run began with this one

    def hold(self, trainer: Any, output_dir: Path, about: About) -> None:
        """Begin the runs of the Trainer's trackers, TensorBoard's in one folder. Nothing on other ranks.

        Raises:
            TrackerError: one cannot begin: it is not reached, or refuses the key.
        """
        from transformers.integrations import get_reporting_integration_callbacks

        if not trainer.is_world_process_zero():
            return
        names = {kind: name for name in trainer.args.report_to for kind in get_reporting_integration_callbacks([name])}
        called = trainer.callback_handler.callbacks
        for index, callback in enumerate(called):
            name = names.get(type(callback))
            if name is None or name not in _KINDS:
                continue
            # Before transformers 5 it is an argument.
            if name == TENSORBOARD and getattr(callback, "logging_dir", "") is None:
                callback.logging_dir = str(output_dir / TENSORBOARD)
            if not _KINDS[name].running(callback):
                self._ours.add(name)
            try:
                called[index] = held = UntilClosed(callback, trainer)
            except Exception as error:
                raise TrackerError(
                    f"training.report_to: {name} cannot begin a run: {type(error).__name__}: {error}"
                ) from error
            self.held.append((name, held))
            _safely(name, _KINDS[name].begin, callback, about)

    def close(self, folder: Path, told: Mapping[str, Any]) -> None:
        """Send what came of the run in a folder, and end the trackers' runs. What a tracker refuses is logged.

        Args:
            told: `status` of the run and, if it came to one, `result` (a `Result` as a mapping).
        """
        for name, held in self.held:
            outcome = _outcome(folder, told, name in self._ours)
            _safely(name, _KINDS[name].end, held.tracker, outcome)
            _safely(name, held.close)
            _safely(name, _KINDS[name].leave, held.tracker, outcome)
        self.held.clear()


@dataclass(frozen=True)
class _Kind:
    """How one tracker takes what is ours.

    Attributes:
        begin: (its callback, `About`) once its run has begun.
        end: (its callback, `Outcome`) before its run ends.
        leave: (its callback, `Outcome`) after its callback has ended.
        running: whether somebody else's run is open already.
    """

    begin: Callable[[Any, About], None]
    end: Callable[[Any, Outcome], None]
    leave: Callable[[Any, Outcome], None] = lambda callback, outcome: None
    running: Callable[[Any], bool] = lambda callback: False


def adapter_files(adapter: Path) -> list[Path]:
    """The files of an adapter folder, without what resuming takes."""
    return sorted(path for path in adapter.iterdir() if path.is_file())


def _safely(name: str, function: Callable[..., None], *given: Any) -> None:
    """Call a function of a tracker; what it refuses is logged."""
    try:
        function(*given)
    except Exception as error:
        log.warning("%s: %s: %s", name, type(error).__name__, error)


def _short(data: Mapping[str, Any]) -> dict[str, Any]:
    """A data report with long lists cut."""
    return {name: value[:_LISTED] if isinstance(value, list | tuple) else value for name, value in data.items()}


def _numbers(about: About) -> dict[str, Any]:
    """What of coverage and data report is a single number."""
    train = about.data.get("train") or {}
    found = {f"data/{name}": train[name] for name in ("rows", "tokens", "trained_tokens") if name in train}
    return found | {"lora/parameters": sum(row["parameters"] for row in about.coverage)}


def _config(about: About) -> dict[str, Any]:
    """All of it as one section of a run's configuration."""
    section = {"coverage": list(about.coverage), "data_report": _short(about.data), **_numbers(about)}
    return {"phi3_lora": section}


# TensorBoard: text and scalars; it has no artifacts, so that the adapter is named by its path.


def _tensorboard_begin(callback: Any, about: About) -> None:
    rows = "\n".join(
        f"| {row['module']} | {len(row['layers'])} | {row['rank']} | {row['parameters']:,} |" for row in about.coverage
    )
    writer = callback.tb_writer
    writer.add_text("coverage", f"| module | layers | rank | parameters |\n|---|---|---|---|\n{rows}")
    writer.add_text("data_report", f"```\n{json.dumps(_short(about.data), indent=1, ensure_ascii=False)}\n```")
    writer.add_text("recipe", f"```\n{about.recipe}\n```")


def _tensorboard_end(callback: Any, outcome: Outcome) -> None:
    for name, value in outcome.figures.items():
        callback.tb_writer.add_scalar(f"final/{name}", value)
    if outcome.adapter is not None:
        callback.tb_writer.add_text("adapter", str(outcome.adapter))


# wandb


def _wandb_begin(callback: Any, about: About) -> None:
    import wandb

    wandb.config.update(_config(about), allow_val_change=True)


def _wandb_end(callback: Any, outcome: Outcome) -> None:
    import wandb

    run: Any = wandb.run
    run.summary.update({f"final/{name}": value for name, value in outcome.figures.items()})
    _log_artifacts(wandb.Artifact, run.log_artifact, outcome)


def _wandb_leave(callback: Any, outcome: Outcome) -> None:
    import wandb

    if outcome.ours:
        wandb.finish(exit_code=1 if outcome.failed else 0)


# MLflow


def _mlflow_begin(callback: Any, about: About) -> None:
    import mlflow

    mlflow.log_text(about.recipe, "recipe.yaml")
    mlflow.log_dict(dict(about.data), "data_report.json")
    mlflow.log_dict({"coverage": list(about.coverage)}, "coverage.json")
    mlflow.log_metrics({name: float(value) for name, value in _numbers(about).items()})


def _mlflow_end(callback: Any, outcome: Outcome) -> None:
    import mlflow

    mlflow.log_metrics({f"final/{name}": value for name, value in outcome.figures.items()})
    for file in adapter_files(outcome.adapter) if outcome.adapter else ():
        mlflow.log_artifact(str(file), "adapter")
    for file in outcome.files:
        mlflow.log_artifact(str(file))
    if outcome.failed and outcome.ours:
        mlflow.end_run("FAILED")


# trackio, which keeps everything on this machine


def _trackio_begin(callback: Any, about: About) -> None:
    import trackio

    trackio.config.update(_config(about))


def _trackio_end(callback: Any, outcome: Outcome) -> None:
    import trackio

    if outcome.figures:
        trackio.log({f"final/{name}": value for name, value in outcome.figures.items()})
    if hasattr(trackio, "log_artifact"):  # from 0.30 on
        _log_artifacts(trackio.Artifact, trackio.log_artifact, outcome)


def _log_artifacts(artifact: Callable[..., Any], log_artifact: Callable[[Any], Any], outcome: Outcome) -> None:
    """The adapter and the pages of a run as one artifact each, of wandb or of trackio, which has its interface."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", outcome.name).strip("-") or "run"
    model = adapter_files(outcome.adapter) if outcome.adapter else ()
    for kind, files in (("model", model), ("report", outcome.files)):
        if files:
            made = artifact(f"{name}-{kind}", type=kind)
            for file in files:
                made.add_file(str(file))
            log_artifact(made)


_KINDS = {
    TENSORBOARD: _Kind(_tensorboard_begin, _tensorboard_end),
    "wandb": _Kind(_wandb_begin, _wandb_end, _wandb_leave, lambda callback: import_module("wandb").run is not None),
    "mlflow": _Kind(
        _mlflow_begin, _mlflow_end, running=lambda callback: import_module("mlflow").active_run() is not None
    ),
    "trackio": _Kind(_trackio_begin, _trackio_end),
}


def _outcome(folder: Path, told: Mapping[str, Any], ours: bool) -> Outcome:
    pages = [folder / name for name in ("report.html", "recipe.yaml", "data_report.json", "metrics.jsonl")]
    return Outcome(
        name=folder.resolve().name,
        failed=told["status"] == FAILED,
        figures=_figures(told.get("result") or {}),
        adapter=latest_complete(folder),
        files=[page for page in pages if page.is_file()],
        ours=ours,
    )


def _figures(result: Mapping[str, Any]) -> dict[str, float]:
    names = ("train_loss", "eval_loss_before", "eval_loss_after", "eval_reward_before", "eval_reward_after", "tokens",
             "seconds", "steps", "adapter_bytes", "trainable_parameters", "reload_difference")  # fmt: skip
    found = {name: value for name in names if isinstance(value := result.get(name), int | float)}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}
