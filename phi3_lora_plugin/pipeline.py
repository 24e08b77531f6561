"""The whole run, read top to bottom: recipe -> model and data -> LoRA -> Trainer -> checked adapter."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.load import environment_kept
from phi3_lora_plugin.plugins.discovery import Plugins, load_plugins
from phi3_lora_plugin.report.page import try_report
from phi3_lora_plugin.store.run_file import FAILED, INTERRUPTED, RunFile, read_run
from phi3_lora_plugin.training.rows import first_batches, require_weighted_loss
from phi3_lora_plugin.training.trackers import About, Trackers

Tell = Callable[[str], None]

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer, TrainerCallback

    from phi3_lora_plugin.evaluate.answers import Question
    from phi3_lora_plugin.recipe import Recipe


class TrainingError(Phi3LoraError, RuntimeError):
    """A run that could not continue, or whose result must not be used."""


@dataclass(frozen=True)
class Sample:
    """One held-out prompt: the data's answer, and the model's before and after training."""

    prompt: str
    expected: str
    before: str
    after: str


@dataclass(frozen=True)
class Result:
    """The result of a run. Losses are means per held-out batch in nats a token; sizes are in bytes."""

    status: str  # "done" or "interrupted"
    output_dir: str
    adapter: str | None
    base: str
    steps: int
    epochs: float
    tokens: int
    seconds: float
    train_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_bytes: int
    reload_difference: float | None
    eval_reward_before: float | None = None  # mean reward of one drawn answer to each held-out prompt
    eval_reward_after: float | None = None
    samples: tuple[Sample, ...] = ()

    def to_json(self) -> str:
        """One line of JSON with every field."""
        return json.dumps(asdict(self), ensure_ascii=False)


# What transformers before 5 tells accelerate by the environment, where the next run would find it.
@environment_kept("ACCELERATE_MIXED_PRECISION")
def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    allow_drift: Sequence[str] = (),
    samples: int = 0,
    check: bool = True,
    plugins: Plugins | None = None,
    console: Console | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Result:
    """Run a recipe and return what came of it; what `phi3-lora train` does.

    Leaves `report.html`, `metrics.jsonl` and `run.json` in `recipe.output_dir`, however the run ends.

    Args:
        recipe: from `load_recipe`.
        resume: continue from the newest complete checkpoint of `recipe.output_dir`.
        allow_drift: names of settings that may differ from the checkpoint's when resuming.
        samples: answer this many held-out prompts before and after.
        check: afterwards, reload the adapter in a fresh process with plain PEFT and compare logits.
        plugins: what was discovered; discovered here if not given.
        console: where to write; nowhere in particular if not given.
        callbacks: to add after those of the plugins.

    Raises:
        RecipeError, MissingPackage, DataError, ModelError, TargetError, SettingsError: wrong input, before anything is
            trained.
        DriftError: the checkpoint to resume from was made with other settings.
        TrainingError: the run stopped for its health (non-finite or stuck loss).
        ReloadError: the saved adapter is not the trained one.
    """
    record = RunFile(Path(recipe.output_dir).expanduser())
    trackers = Trackers()
    told: dict[str, Any] = {"status": FAILED}
    try:
        result = _train(
            recipe, record, trackers, resume, allow_drift, samples, check, plugins or load_plugins(), console, callbacks
        )
        told = {"status": result.status, "result": asdict(result)}
    except KeyboardInterrupt:
        told = {"status": INTERRUPTED}
        raise
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        record.end(**told)
        if record.content and (problem := try_report(record.folder)) and console:
            console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
        trackers.close(record.folder, told)
    return result


def _train(
    recipe: Recipe,
    record: RunFile,
    trackers: Trackers,
    resume: bool,
    allow_drift: Sequence[str],
    samples: int,
    check: bool,
    plugins: Plugins,
    console: Console | None,
    callbacks: Sequence[TrainerCallback],
) -> Result:
    from rich.console import Console
    from transformers import PrinterCallback, set_seed

    from phi3_lora_plugin.chat.dataset import load_data
    from phi3_lora_plugin.chat.rows import lengths
    from phi3_lora_plugin.evaluate.answers import questions
    from phi3_lora_plugin.evaluate.generate import stop_ids
    from phi3_lora_plugin.lora.coverage import coverage, render_coverage
    from phi3_lora_plugin.lora.inject import add_lora, prepare_for_checkpointing, prepare_for_loss_scaling
    from phi3_lora_plugin.model.device import device_name
    from phi3_lora_plugin.model.families import row_limit, straddles
    from phi3_lora_plugin.plan.at_start import record as recorded
    from phi3_lora_plugin.plan.at_start import settle_checkpointing
    from phi3_lora_plugin.speed.apply import accelerate_phi3
    from phi3_lora_plugin.store.checkpoint import latest_complete
    from phi3_lora_plugin.training.arguments import lora_options
    from phi3_lora_plugin.training.attach import wrap_again
    from phi3_lora_plugin.training.callbacks import CheckpointError
    from phi3_lora_plugin.training.checkpointing import checkpoints_activations
    from phi3_lora_plugin.training.health import HealthError
    from phi3_lora_plugin.training.interrupt import StopOnSignal
    from phi3_lora_plugin.training.metrics_log import MetricsLog
    from phi3_lora_plugin.training.objective import objective_of
    from phi3_lora_plugin.training.packages import require_packages
    from phi3_lora_plugin.training.progress import ProgressReport
    from phi3_lora_plugin.training.refused_settings import (
        refused,
        require_batches,
        require_compiler,
        require_optimizer,
    )
    from phi3_lora_plugin.training.resume import resumable
    from phi3_lora_plugin.training.run_facts import versions

    started = time.monotonic()
    say = console or Console(quiet=True)

    def tell(text: str) -> None:
        say.print(text, markup=False, highlight=False, soft_wrap=True)  # a path may hold [brackets]

    output_dir = Path(recipe.output_dir).expanduser()
    output_dir.mkdir(parents=True, exist_ok=True)
    for note in recipe.notes:
        tell(f"note: {note}")

    require_packages(recipe)
    set_seed(recipe.seed)
    model, tokenizer = plugins.load_model(recipe)
    longest = row_limit(recipe.data.max_length, model.config.to_dict())
    data = load_data(recipe, tokenizer, plugins.adapters(recipe.data.format), max_length=longest, cache=True)
    data.report.render(say)
    if not recipe.data.packing and straddles(lengths(data.train), model.config.to_dict()):
        tell(
            "note: rows are on both sides of the original context, where longrope changes its factors: short rows of a "
            "batch with a long one are computed with the long one's; set data.max_length to the original context, or "
            "training.train_sampling_strategy: group_by_length"
        )

    options = lora_options(recipe)
    if recipe.lora.init == "eva":
        options["data"] = first_batches(data.train, tokenizer, model.device)
    set_seed(recipe.seed)  # A depends on the seed alone, not on how the model was loaded
    model = add_lora(model, **options)
    trained_modules = coverage(model)
    say.print(render_coverage(trained_modules))
    objective = objective_of(recipe)
    arguments = objective.arguments(recipe, data.eval is not None)
    earlier = read_run(output_dir).get("checkpointing") if resume else None
    chosen = settle_checkpointing(recipe, arguments, model, data, earlier)
    if chosen is not None:
        tell(f"activation checkpointing: {chosen.wording(model.config)}")
    if checkpoints_activations(arguments):
        prepare_for_checkpointing(model)
    if arguments.fp16:
        prepare_for_loss_scaling(model)

    stop, metrics = StopOnSignal(), MetricsLog(output_dir)
    callbacks = [*plugins.callbacks(recipe), *callbacks]
    rows, collator = objective.feed(data.train, recipe, tokenizer, longest)
    evaluated = None if data.eval is None else objective.evaluated(data.eval)
    require_batches(arguments, rows, evaluated)
    require_compiler(arguments)
    require_optimizer(arguments, model, _steps(arguments, rows, recipe))
    with refused("training: the Trainer refuses these settings"):
        trainer = objective.trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=evaluated,
            data_collator=collator,
            processing_class=tokenizer,
            # In this order: what a callback of ours raises comes last.
            callbacks=[metrics, ProgressReport(say, metrics), stop, *callbacks],
            optimizers=(_optimizer(model, arguments, recipe), None),
        )
    applied = accelerate_phi3(trainer, recipe.speed)
    for one in applied:
        tell(f"speed: {one}")
    if "weights" in data.train.column_names:
        require_weighted_loss(applied, arguments)
    trainer.remove_callback(PrinterCallback)
    for callback in callbacks:
        if hasattr(callback, "bind"):
            callback.bind(trainer)
    called = trainer.callback_handler.callbacks
    called.insert(0, called.pop(called.index(metrics)))  # before trackers, which get its figures
    covered = [asdict(row) for row in trained_modules]
    trackers.hold(trainer, output_dir, About(recipe.to_yaml(), covered, json.loads(data.report.to_json())))

    # Not earlier: what is refused until here leaves a folder that the repaired recipe may use.
    if os.environ.get("RANK", "0") == "0":
        (output_dir / "data_report.json").write_text(data.report.to_json() + "\n", encoding="utf-8")
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        record.begin(
            resume,
            name=recipe.name,
            provenance=dict(recipe.provenance),
            notes=list(recipe.notes),
            coverage=covered,
            speed=[asdict(one) for one in applied],
            checkpointing=recorded(chosen),
            rows=_shown(data.train, tokenizer),
            device=device_name(arguments.device),
            processes=arguments.world_size,
            versions=versions(),
        )

    before = _evaluated(trainer, objective.metric)
    wrap_again(trainer)
    if before is not None:
        tell(f"held-out {objective.metric} before training: {before:.4f}")
    asked = questions(data.eval or (), tokenizer, stop_ids(model, tokenizer), samples)
    if samples and data.eval and not asked:
        tell("note: no held-out row has a whole answer to compare with")
    answers_before = _answers(model, tokenizer, asked)
    going_on = resumable(trainer, recipe.output_dir, allow_drift, tell) if resume else nullcontext()
    try:
        with stop, going_on as checkpoint:
            trainer.train(resume_from_checkpoint=checkpoint)
    except (HealthError, CheckpointError) as error:
        raise TrainingError(str(error)) from error
    interrupted = stop.received is not None
    after = None if interrupted else _evaluated(trainer, objective.metric)
    answers_after = [""] * len(asked) if interrupted else _answers(model, tokenizer, asked)

    adapter = latest_complete(output_dir)
    difference = None
    if check and adapter is not None and not interrupted and trainer.is_world_process_zero():
        difference = _check(model, adapter, recipe, data.train[0]["input_ids"], tell)
    trainable, total = model.get_nb_trainable_parameters()
    base = model.get_base_model()
    return Result(
        status="interrupted" if interrupted else "done",
        output_dir=str(output_dir),
        adapter=None if adapter is None else str(adapter),
        base=recipe.model.path,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0.0, 4),
        tokens=trainer.state.num_input_tokens_seen,
        seconds=round(time.monotonic() - started, 2),
        train_loss=metrics.loss,
        eval_loss_before=before if objective.metric == "loss" else None,
        eval_loss_after=after if objective.metric == "loss" else None,
        trainable_parameters=trainable,
        total_parameters=total,
        adapter_bytes=0 if adapter is None else sum(file.stat().st_size for file in adapter.glob("*.safetensors")),
        base_bytes=sum(p.numel() * p.element_size() for n, p in base.named_parameters() if "lora_" not in n),
        reload_difference=difference,
        eval_reward_before=before if objective.metric == "reward" else None,
        eval_reward_after=after if objective.metric == "reward" else None,
        samples=tuple(
            Sample(tokenizer.decode(each.ids, skip_special_tokens=True).strip(), each.expected, was, now)
            for each, was, now in zip(asked, answers_before, answers_after, strict=True)
        ),
    )


def _shown(rows: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows for the report, for the want of which no run fails."""
    from phi3_lora_plugin.chat.marked import marked_rows

    try:
        return [asdict(row) for row in marked_rows(rows, tokenizer)]
    except Exception:
        return []


def _answers(model: Any, tokenizer: Any, asked: Sequence[Question]) -> list[str]:
    from phi3_lora_plugin.evaluate.answers import answer

    return [said.text for said in answer(model, tokenizer, [question.ids for question in asked], 48)]


def _evaluated(trainer: Trainer, metric: str) -> float | None:
    from phi3_lora_plugin.training.refused_settings import require_metric

    if trainer.eval_dataset is None:
        return None
    measured = trainer.evaluate()
    require_metric(trainer.args, measured)
    return float(measured[f"eval_{metric}"])


def _steps(arguments: Any, rows: Any, recipe: Recipe) -> int | None:
    """Steps of the run; None where answers are drawn for each row, so that batches are not rows."""
    from phi3_lora_plugin.training.refused_settings import planned_steps

    if arguments.max_steps <= 0 and (recipe.reward or not hasattr(rows, "__len__")):
        return None
    batch = arguments.train_batch_size * arguments.world_size
    return planned_steps(arguments, 0 if arguments.max_steps > 0 else -(-len(rows) // batch))


def _optimizer(model: Any, arguments: Any, recipe: Recipe) -> Any:
    """LoRA+'s optimizer if the recipe asks for it; None lets the Trainer make the one that its arguments name."""
    if recipe.lora.loraplus_lr_ratio is None:
        return None
    from phi3_lora_plugin.lora.methods import loraplus_optimizer

    return loraplus_optimizer(model, arguments, recipe.lora.loraplus_lr_ratio)


def _check(model: Any, adapter: Path, recipe: Recipe, ids: Sequence[int], tell: Tell) -> float | None:
    """Reload the adapter in a fresh process; None, with the reason printed, where a second base would take too much."""
    from phi3_lora_plugin.embedded import locate
    from phi3_lora_plugin.training.reload_check import reload_check

    if recipe.model.quantize != "none":
        tell("reload not checked: the base is quantised; phi3-lora verify checks the files")
        return None
    parameters = model.num_parameters()
    if parameters > 1_000_000_000:
        tell(f"reload not checked: a second copy of {parameters / 1e9:.1f}B parameters may not fit")
        return None
    check = reload_check(model, adapter, locate(recipe.model.path), recipe.model.revision, ids[:256])
    return check.largest_difference
