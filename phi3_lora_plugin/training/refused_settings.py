"""What transformers and torch refuse in a recipe's `training:`, asked before the first step and told in one sentence.

A schedule that divides by zero at its last step, a mistyped optimizer argument or a batch larger than the data would
otherwise end a run with a traceback, or without one trained row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError

#: Optimizers that need more than a parameter to be made: groups of matrices, or the whole model.
_SPECIAL = ("galore", "apollo", "lomo")
_TOO_MANY = 1000  # steps, where their number is not known before training


class SettingsError(Phi3LoraError):
    """Settings under `training:` that the installed transformers or torch refuses."""


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn what another library raises at settings into `SettingsError`, which begins with `what`."""
    try:
        yield
    except Phi3LoraError:
        raise
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, a RuntimeError that settings do not explain
            raise
        said = f"no such value: {error}" if isinstance(error, KeyError) else str(error)
        raise SettingsError(f"{what}: {said}") from error


def require_batches(args: Any, rows: Any, evaluated: Any) -> None:
    """Refuse `dataloader_drop_last` where it drops all rows, to train on or to evaluate on.

    Raises:
        SettingsError: says how many rows there are, and how many a batch has.
    """
    if not args.dataloader_drop_last:
        return
    processes = 1 if args.accelerator_config.split_batches else args.world_size
    sizes = {"per_device_train_batch_size": args.train_batch_size, "per_device_eval_batch_size": args.eval_batch_size}
    problems = [
        f"training.dataloader_drop_last drops all {len(given)} rows to {verb}: a batch has {size * processes}; "
        f"leave it out, or lower training.{name}"
        for (name, size), given, verb in zip(sizes.items(), (rows, evaluated), ("train on", "evaluate on"), strict=True)
        if hasattr(given, "__len__") and len(given) < size * processes
    ]
    if problems:
        raise SettingsError("\n".join(problems))


def require_metric(args: Any, metrics: Mapping[str, Any]) -> None:
    """Refuse a `metric_for_best_model` that an evaluation does not measure, where the run evaluates.

    Raises:
        SettingsError: names the metrics that there are.
    """
    wanted = args.metric_for_best_model
    if wanted is None or args.eval_strategy == "no":
        return
    told = ("_runtime", "_per_second", "_time")
    names = sorted(name for name in metrics if name.startswith("eval_") and not name.endswith(told))
    if (wanted if wanted.startswith("eval_") else f"eval_{wanted}") not in metrics:
        raise SettingsError(
            f"training.metric_for_best_model: {wanted!r} is not measured; available: {', '.join(names)}"
        )


def require_optimizer(args: Any, model: Any, steps: int | None) -> None:
    """Make the optimizer and the schedule of the arguments on one number, and ask for its first and last rates.

    Args:
        steps: how many the run has; None if that is not known before training.

    Raises:
        SettingsError: names the settings that are wrong.
    """
    import torch
    from transformers import Trainer, get_scheduler

    name = getattr(args.optim, "value", args.optim)
    parameter = torch.nn.Parameter(torch.zeros(1))
    with refused(f"training.optim: {name} cannot be made from training.optim_args and training.adam_*"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if not name.startswith(_SPECIAL):
            given = [pair.partition("=")[0] for pair in (args.optim_args or "").replace(" ", "").split(",") if pair]
            if idle := [each for each in given if each not in settings]:
                raise SettingsError(f"training.optim_args: {', '.join(idle)} has no effect with training.optim: {name}")
            kind([parameter], **settings)
    total = steps or _TOO_MANY
    warmup = args.get_warmup_steps(total)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    with refused(
        f"training.lr_scheduler_type: {schedule} cannot run {total} steps, {warmup} of them warm-up, with "
        f"training.lr_scheduler_kwargs: {args.lr_scheduler_kwargs or {}} and training.learning_rate: "
        f"{args.learning_rate:g}"
    ):
        made = get_scheduler(
            args.lr_scheduler_type,
            optimizer=torch.optim.SGD([parameter], lr=args.learning_rate),
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        for rate in getattr(made, "lr_lambdas", ()):
            for step in {0, min(warmup, total), *([total] if steps else [])}:
                rate(step)


def require_compiler(args: Any) -> None:
    """Ask `torch.compile` for its backend and mode, which it looks up before it sees a model.

    Raises:
        SettingsError: it does not know them.
    """
    if not args.torch_compile:
        return
    import torch

    with refused("training.torch_compile"):
        torch.compile(torch.nn.Identity(), backend=args.torch_compile_backend, mode=args.torch_compile_mode)


def planned_steps(args: Any, batches: int) -> int:
    """How many steps a Trainer makes with these arguments and this many batches an epoch."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return int(math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps))))
