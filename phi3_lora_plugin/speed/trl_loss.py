"""TRL's fused head on a CPU, which projects every position and recomputes it backwards, replaced by ours.

`SFTTrainer` (TRL 1.16) asks its model for `fused_lm_head=True` and wants log-probabilities, entropies and hits of each
token. On a GPU its own Triton kernel looks at supervised positions only, and stays.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.arguments import by_name
from phi3_lora_plugin.speed.last_layer import request
from phi3_lora_plugin.speed.loss import head_obstacle, known_supervised, supervised_rows

_FIELDS = {"loss", "log_probs", "entropy", "is_top1", "label_mask"}


def trl_loss_obstacle(trainer: Any, base: Any) -> str | None:
    """Why TRL's head cannot be replaced by ours; None if it can."""
    from trl import SFTTrainer
    from trl.trainer import utils

    if not isinstance(trainer, SFTTrainer) or type(trainer).compute_loss is not SFTTrainer.compute_loss:
        return f"{type(trainer).__name__} computes the loss by itself"
    output = getattr(utils, "FusedCausalLMOutput", None)
    if output is None or not {field.name for field in fields(output)} >= _FIELDS:
        return "this version of TRL has another loss head"
    if getattr(base.__dict__.get("forward"), "__name__", "") != type(base).forward.__name__:
        return "SFTTrainer has not put its head on this model"
    if trainer.args.device.type != "cpu":
        return f"TRL's own kernel is used on {trainer.args.device.type}"
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        return "compute_loss_func and label smoothing want logits"
    return head_obstacle(base)


def fuse_trl_loss(base: Any, compiled: bool = False) -> None:
    """Answer `fused_lm_head=True` from supervised positions; `restore_trl_loss` undoes it.

    `compiled`: whether torch.compile will be on; it then compiles what is before the loss, and the loss stays as it is.
    """
    if "_trl_forward" not in base.__dict__:
        base._trl_forward = base.forward
        base.forward = partial(_forward, base)
    base._trl_output = torch.compiler.disable(_output) if compiled else _output


def restore_trl_loss(base: Any) -> None:
    """Undo `fuse_trl_loss`."""
    if (forward := base.__dict__.pop("_trl_forward", None)) is not None:
        base.forward = forward
        del base._trl_output


def _forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
    if not fused_lm_head or head_obstacle(self) or kwargs.get("shift_labels") is not None:
        return self._trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
    if torch.compiler.is_compiling() and self._trl_output is _output:  # it would be compiled for each number of rows
        return self._trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
    labels, items = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None)
    kwargs.pop("shift_labels", None)
    kwargs = by_name(type(self), args, kwargs) | {"use_cache": False}
    hidden = self.model(**kwargs, **request(self, known_supervised(self, labels), kwargs)).last_hidden_state
    return self._trl_output(self.lm_head, hidden, labels, items)


def _output(head: Any, hidden: torch.Tensor, labels: torch.Tensor, items: Any) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    targets = labels[:, 1:]
    mask = targets != -100
    rows = hidden[:, :-1][mask] if hidden.shape[:2] == labels.shape else hidden[0]
    losses, entropy, right = supervised_rows(rows, head.weight, targets[mask], head.bias, True)
    log_probs = losses.new_zeros(mask.shape).masked_scatter(mask, -losses)
    count = mask.sum().clamp(min=1) if items is None else items
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / count,
        log_probs=log_probs,
        entropy=losses.new_zeros(mask.shape).masked_scatter(mask, entropy),
        is_top1=torch.zeros_like(mask).masked_scatter(mask, right),
        label_mask=mask,
    )
