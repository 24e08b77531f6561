"""A resumed run with settings that were changed on purpose: the new ones take effect at its first step.

The Trainer restores the optimizer and the schedule with the settings they were saved with, so that without this a
learning rate that was changed would be accepted and ignored.
"""

# This module defines a TrainerCallback, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

from transformers import TrainerCallback  # noqa: TID253

#: What the schedule makes of the learning rate.
_RATES = ("initial_lr", "lr")


class NewSettings(TrainerCallback):  # type: ignore[misc]
    """Gives a restored optimizer and schedule the settings of the arguments at hand.

    Args:
        trainer: its optimizer does not exist yet, or was made by its user.
    """

    def __init__(self, trainer: Any) -> None:
        given = trainer.optimizer
        fresh = given if given is not None else trainer.create_optimizer()
        self.groups = [{key: value for key, value in group.items() if key != "params"} for group in fresh.param_groups]
        if given is None:
            trainer.optimizer = None  # the Trainer makes its own, with the schedule

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **kwargs: Any
    ) -> None:
        """Comes after the Trainer has restored what was saved, and before its first step."""
        schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's wrapper
        for number, (group, new) in enumerate(zip(optimizer.param_groups, self.groups, strict=True)):
            group.update({key: value for key, value in new.items() if key not in _RATES})
            group["initial_lr"] = rate = new.get("initial_lr", new["lr"])
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs[number] = rate
            if hasattr(schedule, "lr_lambdas"):
                group["lr"] = rate * schedule.lr_lambdas[number](schedule.last_epoch)
        if hasattr(schedule, "_last_lr"):
            schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
