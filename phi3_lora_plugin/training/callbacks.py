"""`LoraCheckpoint`: LoRA-only checkpoints from any Trainer, in the store of checkpoint.py, next to the Trainer's own.

A checkpoint is taken between two steps, when evaluation and the Trainer's own saving are over; so it has their metric,
and the random state from which a resumed run continues exactly.
"""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.finite import sick_weights
from phi3_lora_plugin.lora.gather import is_flattened, unwrapped
from phi3_lora_plugin.lora.inventory import Inventory, inventory_of
from phi3_lora_plugin.lora.snapshot import take, trained_but_not_saved
from phi3_lora_plugin.lora.state import StateError, active_adapter, lora_names
from phi3_lora_plugin.lora_files.peft_files import WEIGHTS
from phi3_lora_plugin.model.tokenizer import tokenizer_files
from phi3_lora_plugin.seams import obstacle
from phi3_lora_plugin.store.adapter_files import FORMATS, adapter_files
from phi3_lora_plugin.store.layout import FOLDER, FOLDER_WHEN_PUSHED, entries
from phi3_lora_plugin.store.retention import Retention
from phi3_lora_plugin.store.run import CheckpointRun
from phi3_lora_plugin.training.health import HealthError, is_zero_loss, sick_log, zero_loss
from phi3_lora_plugin.training.resume_state import capture
from phi3_lora_plugin.training.run_facts import refuse_drift, run_facts
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)


class CheckpointError(Phi3LoraError, RuntimeError):
    """The last state of a run could not be saved."""


class LoraCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Save the LoRA part of the model, and nothing else, whole or not at all; never touch the Trainer's files.

    Args:
        folder: the store; by default `lora/` in the Trainer's output folder (`_lora/` if that is pushed to the hub,
            which leaves out what begins with `_`).
        every_steps: save every this many steps, whatever the Trainer saves; None: whenever the Trainer saves or has
            evaluated. The end of training is saved in any case.
        keep_last: newest checkpoints to keep; this and the next two as `retention.Retention` has them.
        keep_best: best ones to keep, by evaluation loss.
        keep_every: keep for good each one whose step is a multiple of this.
        format: "peft", "loralib" or "both"; see `adapter_files`.
        background: write on a thread while training continues.
        resume: also write what `resume.resumable` needs to resume exactly.
        adapter: of a PEFT model with several, which one.
        unhealthy: at weights, losses or gradients that are not finite, or a loss stuck at 0.0: "raise" a `HealthError`
            at the end of the step, "stop" training and set `reason`, or "ignore" (what is not finite is never saved).
        zero_losses: how many logs in a row of a loss of exactly 0.0 count as stuck.
        allow_drift: settings that may differ from those of the run that is resumed; see `run_facts.refuse_drift`.
        facts: what else the manifests record.

    Attributes:
        reason: why training was stopped for its health; None if it was not.
        saved: the newest checkpoint that was written, on rank zero.

    Raises from within training:
        StateError: the model has no LoRA, or nothing that may be saved, before the first step.
        LoralibError: `format` cannot hold this kind of LoRA, before the first step.
        OSError: the folder cannot be written, before the first step.
        DriftError: resumed with other settings, before the first step.
        StoreBusy: another run writes into the folder, before the first step.
        CheckpointError: the last state could not be written. Failures before that are logged, and training continues.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        every_steps: int | None = None,
        keep_last: int = 2,
        keep_best: int = 1,
        keep_every: int | None = None,
        format: str = "peft",
        background: bool = False,
        resume: bool = True,
        adapter: str | None = None,
        unhealthy: str = "raise",
        zero_losses: int = 3,
        allow_drift: Sequence[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if every_steps is not None and every_steps < 1:
            raise Phi3LoraError(f"every_steps: expected a whole number of at least 1 or None, got {every_steps!r}")
        if format not in FORMATS:
            raise Phi3LoraError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
        if unhealthy not in ("raise", "stop", "ignore"):
            raise Phi3LoraError(f"unhealthy: expected raise, stop or ignore, got {unhealthy!r}")
        self.folder = None if folder is None else Path(folder)
        self.every_steps = every_steps
        self.retention = Retention(keep_last, keep_best, keep_every, keep_last)
        self.format, self.background, self.resume, self.adapter = format, background, resume, adapter
        self.unhealthy, self.zero_losses = unhealthy, zero_losses
        self.allow_drift, self.facts = tuple(allow_drift), dict(facts or {})
        self.reason: str | None = None
        self._trainer: Any = None
        self._trials = 0
        self._run: CheckpointRun | None = None  # on rank zero, from the first run on
        self._training = False
        self._began_at = 0
        self._mergeable: list[Any] = []  # loralib's layers, which must not merge during training
        self._trained: list[tuple[str, Any]] | None = None  # during training
        self._inventory: Inventory | None = None  # during training, too
        self._due: int | None = None  # the step that is to be taken before the next one
        self._taken: int | None = None
        self._zeros = 0
        self._metric: tuple[int, dict[str, Any] | None] = (-1, None)

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LoraCheckpoint:
        """As configured by the recipe's `checkpoint` section."""
        about = {"recipe": {"name": recipe.name, "digest": recipe.digest()}, "quantize": recipe.model.quantize}
        return cls.from_sections(recipe.checkpoint, recipe.data, about)

    @classmethod
    def from_sections(cls, section: Any, data: Any, facts: Mapping[str, Any] | None = None) -> LoraCheckpoint:
        """As configured by a `checkpoint` section; the manifests record how `data` rendered chats in training."""
        chat = {name: value for name, value in data.rendering.items() if value is not None}
        return cls(**dict(section), facts={**(facts or {}), "chat": chat})

    def bind(self, trainer: Any) -> None:
        """Tell it the Trainer: it needs the folder of a hyperparameter trial and float16's loss scale from there."""
        self._trainer = trainer

    @property
    def saved(self) -> Path | None:
        return None if self._run is None else self._run.saved

    # Events, in the order in which they come.

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at what will be saved, and at what is resumed, before anything is trained."""
        if self._run is not None:
            self._run.close()  # of a run that failed
        self._run, self.reason, self._due, self._taken, self._zeros = None, None, None, None, 0
        self._training, self._began_at = True, state.global_step
        if not lora_names(unwrapped(model)):
            raise StateError(f"{type(unwrapped(model)).__name__} has no LoRA parameters: nothing to save")
        self._mergeable = _kept_apart(model)
        self._trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        store = self._store(args, state)
        problem = None
        try:
            self._inventory = inventory_of(model, self.adapter)
            first = take(model, self.adapter, state.is_world_process_zero, copy=False, inventory=self._inventory)
            if first is not None:
                self._begin(args, state, model, kwargs, store, first)
        except Exception as error:
            problem = error
        _raise_everywhere(args, problem)

    def _begin(self, args: Any, state: Any, model: Any, kwargs: Mapping[str, Any], store: Path, first: Any) -> None:
        """Refuse what would fail later: a format that cannot hold this adapter, drift, a store that is taken."""
        adapter_files(first, self.format)
        tokenizer = kwargs.get("processing_class")
        rows = getattr(kwargs.get("train_dataloader"), "dataset", None)
        facts = run_facts(args, model, tokenizer, rows, self.adapter, kwargs.get("optimizer")) | self.facts
        if others := trained_but_not_saved(model, self.adapter):
            log.warning("%d trained parameters are not LoRA and are not saved: %s", len(others), listed(others, 3))
        for entry in entries(store) if state.global_step else ():
            if entry.step == state.global_step:
                refuse_drift(entry.path, entry.manifest, facts, self.allow_drift)
        self._run = CheckpointRun(
            store, facts, tokenizer_files(tokenizer), self.format, self.retention, state.global_step
        )
        self._run.open(self.background)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take what is due; the loader of the next epoch has not drawn its random numbers yet."""
        self._take_if_due(args, state, control, kwargs)

    on_step_begin = on_epoch_begin

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note whether this step is to be saved; keep the Trainer from saving what is not finite."""
        if self.every_steps is not None and state.global_step % self.every_steps == 0:
            self._due = state.global_step
        about_to = self._due == state.global_step or control.should_save or control.should_log
        if about_to and self.unhealthy != "ignore":
            self._judge(sick_weights(model, self._trained), control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """As at the end of a step, for runs that save by epochs; take the last state before anything changes it.

        A run that stops within an epoch is evaluated as if the epoch were over, which draws random numbers that the
        run without the stop does not draw; and at the end of training the best weights are loaded over the last.
        """
        if self.unhealthy != "ignore":
            self._judge(sick_weights(model), control)
        if not control.should_training_stop:
            return
        within = not float(state.epoch or 0.0).is_integer() and state.global_step < state.max_steps
        if within or (args.load_best_model_at_end and not control.should_save):
            self._due = state.global_step
            self._take_if_due(args, state, control, {"model": model, **kwargs})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look for losses and gradients that show that the run has gone wrong."""
        if not self._training or self.unhealthy == "ignore" or "loss" not in (logs or {}):
            return
        self._judge(sick_log(logs, state.global_step), control)
        self._zeros = self._zeros + 1 if is_zero_loss(logs) else 0
        if self._zeros >= self.zero_losses:
            self._judge(zero_loss(self._zeros, state.global_step), control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Remember the metric; take loralib's updates out of the weights, where its `eval()` merged them."""
        _unmerge(kwargs.get("model"))
        found = _metric(args, metrics or {})
        if found is not None or self._metric[0] != state.global_step:  # of several data sets one has the metric
            self._metric = (state.global_step, found)
        wanted = self.every_steps is None or args.load_best_model_at_end
        if self._training and wanted and state.global_step > self._began_at:
            self._due = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take this step once the Trainer has saved its own, unless there is a schedule and it is not on it."""
        if self.every_steps is None:
            self._due = state.global_step
        self._take_if_due(args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the end, wait for what is being written, and raise if the last state was not saved."""
        if not self._training:
            return
        try:
            if state.global_step > self._began_at and self._taken != state.global_step:
                self._due = state.global_step
                self._take_if_due(args, state, control, kwargs)
        finally:
            self._training, self._trained, self._inventory = False, None, None
            for layer in self._mergeable:
                layer.merge_weights = True
            if self._run is not None:
                self._run.close()
        if self.reason is not None and self.unhealthy == "raise":
            raise HealthError(self.reason)
        if self._run is not None and self._run.failed is not None:
            step, error = self._run.failed
            raise CheckpointError(f"step {step} could not be saved in {self._run.store}: {error}") from error
        if self.reason is None:
            _load_best(args, state, kwargs.get("model"), self.adapter)

    def _store(self, args: Any, state: Any) -> Path:
        if self.folder is not None and not state.is_hyper_param_search:
            return self.folder
        output = Path(args.output_dir)
        if state.is_hyper_param_search:
            self._trials += 1
            trial = getattr(self._trainer, "_trial", None)
            if trial is not None and obstacle("transformers.trials") is None:
                output = Path(self._trainer._get_output_dir(trial))
            else:
                output = output / (state.trial_name or f"run-{self._trials - 1}")
        return output / (FOLDER_WHEN_PUSHED if getattr(args, "push_to_hub", False) else FOLDER)

    def _judge(self, reason: str | None, control: Any) -> None:
        """Stop at the first reason; from then on nothing is saved, not even by the Trainer."""
        if reason is not None and self.reason is None:
            self.reason = reason
            log.error("training stops: %s", reason)
        if self.reason is not None:
            control.should_save = False
            control.should_training_stop = True

    def _take_if_due(self, args: Any, state: Any, control: Any, kwargs: Mapping[str, Any]) -> None:
        """Copy what belongs to this step off the model and have it written. Every process comes here together."""
        step, self._due = self._due, None
        if step is None or step != state.global_step or step == self._taken or not self._training or self.reason:
            return
        if self.unhealthy != "ignore":  # once more: other callbacks have had their turn since the step's end
            self._judge(sick_weights(kwargs["model"]), control)
            if self.reason is not None:
                return
        self._taken = step
        files = None
        # First, because every process has to come by here, also if one then refuses the adapter. That it is a part only
        # does not show in the optimizer's state under FSDP1.
        if self.resume and not is_flattened(kwargs["model"]):
            scaler = getattr(getattr(self._trainer, "accelerator", None), "scaler", None)
            handler = getattr(self._trainer, "callback_handler", None)
            others = () if handler is None else (*handler.callbacks, self._trainer.control)
            files = capture(args, state, kwargs.get("optimizer"), kwargs.get("lr_scheduler"), scaler, others)
        try:
            model, keep = kwargs["model"], state.is_world_process_zero
            self._inventory = inventory_of(model, self.adapter, self._inventory)
            snapshot = take(model, self.adapter, keep, copy=self.background, inventory=self._inventory)
        except StateError as error:
            if self.unhealthy != "ignore":
                raise
            log.error("step %d is not saved: %s", step, error)
            return
        if snapshot is not None and self._run is not None:
            self._run.save(step, snapshot, files, self._metric[1] if self._metric[0] == step else None)


def _metric(args: Any, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metric that compares checkpoints: the Trainer's, else the evaluation loss."""
    name = getattr(args, "metric_for_best_model", None) or "loss"
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        return None
    if not math.isfinite(float(metrics[name])):
        log.warning("%s is %s, cannot be compared: the checkpoint is saved without it", name, metrics[name])
        return None
    greater = getattr(args, "greater_is_better", None)
    return {
        "name": name,
        "value": float(metrics[name]),
        "greater_is_better": not name.endswith("loss") if greater is None else bool(greater),
    }


def _load_best(args: Any, state: Any, model: Any, adapter: str | None) -> None:
    """`load_best_model_at_end` for an adapter with a name of its own, which PEFT saves where the Trainer does not look.

    Raises:
        CheckpointError: it is not there either; the model has the last weights, not the best.
    """
    best, inner = state.best_model_checkpoint, unwrapped(model)
    if not args.load_best_model_at_end or best is None or not hasattr(inner, "load_adapter"):
        return
    name = adapter or active_adapter(inner)
    if name in (None, "default"):  # loaded by the Trainer
        return
    folder = Path(best) / str(name)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"load_best_model_at_end: {folder} has no {WEIGHTS}, so the model has the weights of the last step "
            f"({state.global_step}), not of the best; load the folder that BEST names in the store of checkpoints"
        )
    inner.load_adapter(str(folder), name, is_trainable=True)


def _kept_apart(model: Any) -> list[Any]:
    """Keep loralib's layers from merging in `eval()`, which rounds the base each time; the layers that would have."""
    _unmerge(model)
    found = [layer for layer in model.modules() if _is_loralib(layer) and layer.merge_weights]
    for layer in found:
        layer.merge_weights = False
    return found


def _unmerge(model: Any) -> None:
    """loralib's `eval()` adds the update to the weight: what the Trainer saves next would have it twice."""
    from torch import nn

    for layer in model.modules() if model is not None else ():
        if _is_loralib(layer) and layer.merge_weights and layer.merged:
            training = layer.training
            layer.train(True)
            nn.Module.train(layer, training)  # the mode without loralib's merging


def _is_loralib(layer: Any) -> bool:
    return hasattr(layer, "merge_weights") and hasattr(layer, "merged") and hasattr(layer, "lora_alpha")


def _raise_everywhere(args: Any, problem: Exception | None) -> None:
    """Raise the first process's error on every process: the others would wait for it in vain."""
    if args.world_size > 1:
        import torch.distributed as dist

        said = [None if problem is None else f"{type(problem).__name__}: {problem}"]
        dist.broadcast_object_list(said)
        if problem is None and said[0] is not None:
            raise CheckpointError(f"the first process stopped: {said[0]}")
    if problem is not None:
        raise problem
