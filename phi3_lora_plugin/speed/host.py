"""What a Trainer repeats in every step although nothing has changed since the last one: counting and walking.

On 32 layers, counting parameters for the FLOPs of a step takes 4 ms, `model.train()` 4.5 ms and `zero_grad` 3 ms.
"""

# Plain functions that become methods of one model: a copy of the model then has methods of its own.
from __future__ import annotations

from functools import partial
from typing import Any

_NAMES = ("train", "zero_grad")


def fuse_host(model: Any, base: Any) -> None:
    """Remember counts and lists on `model` (what a Trainer calls); `restore_host` undoes it."""
    base._flops_parameters = None
    base.num_parameters = partial(_num_parameters, base)
    model._all_parameters = None
    model._walked = tuple({id(each): each for each in (model, base, getattr(base, "model", base))}.values())[1:]
    for name, method in zip(_NAMES, (_train, _zero_grad), strict=True):
        setattr(model, name, partial(method, model))


def restore_host(model: Any, base: Any) -> None:
    """Undo `fuse_host`."""
    for name in ("num_parameters", "_flops_parameters"):
        base.__dict__.pop(name, None)
    for name in (*_NAMES, "_all_parameters", "_walked"):
        model.__dict__.pop(name, None)


def _num_parameters(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    # Remembered only in the form that `floating_point_ops` asks for in every step; trainable ones are always counted.
    if only_trainable or not exclude_embeddings:
        return int(type(self).num_parameters(self, only_trainable, exclude_embeddings))
    if self._flops_parameters is None:
        self._flops_parameters = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    return int(self._flops_parameters)


def _train(self: Any, mode: bool = True) -> Any:
    # Trainer calls this before every micro-batch; the walk is needed only where the mode really changes.
    if self.training == mode and all(module.training == mode for module in self._walked):
        return self
    self._all_parameters = None
    return type(self).train(self, mode)


def _zero_grad(self: Any, set_to_none: bool = True) -> None:
    # Parameters change with adapters and before a run begins, not between two steps.
    adapters = tuple(getattr(self, "peft_config", ()))
    if self._all_parameters is None or self._all_parameters[0] != adapters:
        self._all_parameters = adapters, tuple(self.parameters())
    for parameter in self._all_parameters[1]:
        if parameter.grad is not None:
            parameter.grad = None if set_to_none else parameter.grad.detach().zero_()
