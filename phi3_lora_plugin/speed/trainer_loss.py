"""The loss without logits under a Trainer: its own loss does without them, other callers of the model get them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

if TYPE_CHECKING:
    from transformers import Trainer


def own_loss(trainer: Trainer) -> str | None:
    """Why this trainer's loss is not the one that the model computes; None if it is."""
    from transformers import Trainer

    replaced = trainer.__dict__.get("compute_loss")
    if type(trainer).compute_loss is not Trainer.compute_loss:
        return f"{type(trainer).__name__} computes the loss by itself"
    if replaced is not None and getattr(replaced, "func", None) is not _compute_loss:
        return "compute_loss of this trainer was replaced"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func wants logits"
    if trainer.label_smoother is not None:
        return "label smoothing wants logits"
    return None


def liger_loss(trainer: Trainer) -> str | None:
    """Leave the loss to us where `use_liger_kernel` did not ask for Liger's; why not, where it did.

    Trainer applies Liger inside `train()`, after us: its loss would stand in the place of ours without a word.
    """
    if not getattr(trainer.args, "use_liger_kernel", False):
        return None
    asked: dict[str, bool] = dict(getattr(trainer.args, "liger_kernel_config", None) or {})
    named = [name for name in ("fused_linear_cross_entropy", "cross_entropy") if asked.get(name)]
    if named or not hasattr(trainer.args, "liger_kernel_config"):
        return f"Liger's {named[0] if named else 'fused_linear_cross_entropy'} was asked for"
    trainer.args.liger_kernel_config = asked | {"fused_linear_cross_entropy": False, "cross_entropy": False}
    return None


def follow(trainer: Any, base: Any) -> None:
    """Let only this trainer's own loss do without logits: they stay in every other output of `base`."""
    from phi3_lora_plugin.speed.loss import only_if_asked

    only_if_asked(base)
    if getattr(trainer.__dict__.get("compute_loss"), "func", None) is _compute_loss:
        return
    # `base` as it is now: later it may be inside any number of wrappers
    for name, ours in (("compute_loss", _compute_loss), ("prediction_step", _prediction_step)):
        setattr(trainer, name, partial(ours, held(trainer, getattr(trainer, name)), base))


def held(trainer: Any, method: Any) -> Callable[[], Any]:
    """A trainer's method that the trainer can keep without keeping itself alive.

    Otherwise a dropped trainer waits for a garbage collection, and that waits five seconds for each DataLoader worker.
    """
    return WeakMethod(method) if getattr(method, "__self__", None) is trainer else lambda: method


def _compute_loss(
    stock: Callable[[], Any], base: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
) -> Any:
    from phi3_lora_plugin.speed.loss import asked

    without = not return_outputs or base.__dict__.get("_asked") == "loss"
    with asked(base, "loss" if without else "logits"):
        return stock()(model, inputs, return_outputs=return_outputs, **kwargs)


def _prediction_step(
    stock: Callable[[], Any], base: Any, model: Any, inputs: Any, prediction_loss_only: bool, *rest: Any, **kwargs: Any
) -> Any:
    from phi3_lora_plugin.speed.loss import asked

    with asked(base, "loss" if prediction_loss_only else "logits"):
        return stock()(model, inputs, prediction_loss_only, *rest, **kwargs)
