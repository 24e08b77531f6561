"""One switch for all that makes a step faster: what is safe here is applied, and every part says why or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from transformers import Trainer

#: What can be switched, and what it does.
PARTS = {
    "loss": "cross-entropy on supervised positions only, in chunks",
    "attention": "document by document; padding left out, no mask built",
    "lora": "one autograd function for a frozen projection and its LoRA",
    "masters": "adapters in float32, computed in the dtype of the base",
    "host": "parameter counts remembered, no walk over frozen modules in every step",
}


class SpeedError(Phi3LoraError):
    """`speed` names a part that does not exist."""


@dataclass(frozen=True)
class Applied:
    """One part of the switch: whether it is on, and the reason."""

    part: str
    on: bool
    why: str

    def __str__(self) -> str:
        return f"{self.part}: {'on' if self.on else 'off'} ({self.why})"


def speed_up(model: Any, parts: str | Mapping[Any, bool] = "auto") -> tuple[Applied, ...]:
    """Apply the parts that are wanted and safe to a PEFT model; call it before a Trainer is built around the model.

    Args:
        model: `PeftModel`, or a transformers model with injected adapters.
        parts: "auto", "off", or {part: bool} to switch parts one by one (parts not named are as in "auto").

    Returns:
        One line a part. Applying twice changes nothing; `slow_down` takes everything back.

    Raises:
        SpeedError: an unknown part.
    """
    wanted = _wanted(parts)
    base = _base(model)
    return tuple(_APPLY[part](model, base) if wanted[part] else Applied(part, False, "switched off") for part in PARTS)


def slow_down(model: Any) -> None:
    """Undo `speed_up` and `accelerate_phi3`: stock forwards, classes and dtypes everywhere."""
    from phi3_lora_plugin.speed.documents import restore_documents
    from phi3_lora_plugin.speed.host import restore_host
    from phi3_lora_plugin.speed.lora_linear import restore_lora
    from phi3_lora_plugin.speed.loss import restore_loss
    from phi3_lora_plugin.speed.masters import restore_masters

    base = _base(model)
    if "_trl_forward" in base.__dict__:
        from phi3_lora_plugin.speed.trl_loss import restore_trl_loss

        restore_trl_loss(base)
    restore_loss(base)
    restore_documents(base)
    restore_lora(model)
    restore_masters(model)
    restore_host(model, base)


def accelerate_phi3(trainer: Trainer, parts: str | Mapping[Any, bool] = "auto") -> tuple[Applied, ...]:
    """`speed_up` for a Trainer that exists already, in one line; call it before `trainer.train()`.

    TRL's trainers bypass a model's forward: there the head of `SFTTrainer` itself is replaced, where that is slow. A
    Trainer that hands logits on (`compute_metrics`, `return_outputs`) gets them; one that evaluates for the loss alone
    does without.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    wanted = dict(_wanted(parts))
    if trainer.optimizer is not None and wanted["masters"]:
        # An optimizer that exists has states in the dtype of its parameters.
        wanted["masters"] = False
        late = Applied("masters", False, "the optimizer exists already")
    else:
        late = None
    own_loss = _computes_own_loss(trainer)
    if not own_loss or not wanted["loss"]:
        applied = speed_up(model, wanted)
        if applied[0].on:
            _follow(trainer, _base(model))
    else:
        loss = _apply_trl_loss(trainer, model, own_loss)
        applied = tuple(loss if one.part == "loss" else one for one in speed_up(model, wanted | {"loss": False}))
    return tuple(late if late and one.part == "masters" else one for one in applied)


def _follow(trainer: Any, base: Any) -> None:
    """Give logits to whoever asks this trainer for outputs, and to nobody else."""
    if "_stock_compute_loss" in trainer.__dict__:
        return
    from functools import partial

    trainer._stock_compute_loss, trainer._stock_prediction_step = trainer.compute_loss, trainer.prediction_step
    trainer.compute_loss = partial(_compute_loss, trainer)
    trainer.prediction_step = partial(_prediction_step, trainer)


def _compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
    from phi3_lora_plugin.speed.loss import asked

    base = _base(self.accelerator.unwrap_model(model))
    if not return_outputs or base.__dict__.get("_asked") == "loss":
        return self._stock_compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
    with asked(base, "logits"):
        return self._stock_compute_loss(model, inputs, return_outputs=True, **kwargs)


def _prediction_step(self: Any, model: Any, inputs: Any, prediction_loss_only: bool, *rest: Any, **kwargs: Any) -> Any:
    from phi3_lora_plugin.speed.loss import asked

    base = _base(self.accelerator.unwrap_model(model))
    with asked(base, "loss" if prediction_loss_only else "logits"):
        return self._stock_prediction_step(model, inputs, prediction_loss_only, *rest, **kwargs)


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _wanted(parts: str | Mapping[Any, bool]) -> Mapping[str, bool]:
    if isinstance(parts, str):
        if parts not in ("auto", "off"):
            raise SpeedError(f"speed: {parts!r} is neither 'auto' nor 'off' nor a mapping of {', '.join(PARTS)}")
        return dict.fromkeys(PARTS, parts == "auto")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SpeedError(f"speed: unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return dict.fromkeys(PARTS, True) | dict(parts)


def _computes_own_loss(trainer: Trainer) -> str | None:
    from transformers import Trainer

    if type(trainer).compute_loss is not Trainer.compute_loss:
        return f"{type(trainer).__name__} computes the loss by itself"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func wants logits"
    if trainer.label_smoother is not None:
        return "label smoothing wants logits"
    return None


def _apply_loss(model: Any, base: Any) -> Applied:
    from phi3_lora_plugin.speed.loss import fuse_loss, head_obstacle

    obstacle = head_obstacle(base)
    if obstacle is None:
        fuse_loss(base)
    return Applied("loss", obstacle is None, obstacle or PARTS["loss"])


def _apply_trl_loss(trainer: Trainer, model: Any, own_loss: str) -> Applied:
    """The loss of a trainer that computes its own: of TRL's we know one that can be had from fewer positions."""
    if not any(parent.__module__.startswith("trl.") for parent in type(trainer).__mro__):
        return Applied("loss", False, own_loss)
    from phi3_lora_plugin.speed.trl_loss import fuse_trl_loss, trl_loss_obstacle

    base = _base(model)
    obstacle = trl_loss_obstacle(trainer, base)
    if obstacle is None:
        fuse_trl_loss(base)
    return Applied("loss", obstacle is None, obstacle or PARTS["loss"])


def _apply_lora(model: Any, base: Any) -> Applied:
    from phi3_lora_plugin.speed.lora_linear import fuse_lora, fused_layers

    fuse_lora(model)
    count, others = fused_layers(model)
    if not count:
        return Applied("lora", False, "no LoRA layer over a plain linear layer")
    left = f", {others} other LoRA layers keep PEFT's forward" if others else ""
    return Applied("lora", True, f"{count} layers{left}")


def _apply_attention(model: Any, base: Any) -> Applied:
    from phi3_lora_plugin.speed.documents import documents_obstacle, fuse_documents

    obstacle = documents_obstacle(base)
    if obstacle is None:
        fuse_documents(model, base)
    return Applied("attention", obstacle is None, obstacle or PARTS["attention"])


def _apply_masters(model: Any, base: Any) -> Applied:
    from phi3_lora_plugin.speed.masters import float32_adapters

    changed = float32_adapters(model)
    return Applied("masters", True, f"{changed} adapter tensors were in half precision" if changed else "they are")


def _apply_host(model: Any, base: Any) -> Applied:
    from phi3_lora_plugin.speed.host import fuse_host

    if not hasattr(type(base), "num_parameters"):
        return Applied("host", False, f"{type(base).__name__} is no model of transformers")
    fuse_host(model, base)
    return Applied("host", True, PARTS["host"])


_APPLY = {
    "loss": _apply_loss,
    "attention": _apply_attention,
    "lora": _apply_lora,
    "masters": _apply_masters,
    "host": _apply_host,
}
