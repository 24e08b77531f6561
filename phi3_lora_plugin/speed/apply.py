"""One switch for all that makes a step faster: what is safe here is applied, and every part says why or why not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer

#: What can be switched, and what it does.
PARTS = {
    "loss": "cross-entropy on supervised positions only, in chunks",
    "lora": "one autograd function for a frozen projection and its LoRA",
    "host": "parameter counts remembered, no walk over frozen modules in every step",
}


class SpeedError(ValueError):
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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return tuple(_APPLY[part](model, base) if wanted[part] else Applied(part, False, "switched off") for part in PARTS)


def slow_down(model: Any) -> None:
    """Undo `speed_up`: stock forwards and classes everywhere."""
    from phi3_lora_plugin.speed.lora_linear import restore_lora
    from phi3_lora_plugin.speed.loss import restore_loss

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "_trl_forward" in base.__dict__:
        from phi3_lora_plugin.speed.trl_loss import restore_trl_loss

        restore_trl_loss(base)
    restore_loss(base)
    restore_lora(model)
    for module in {id(model): model, id(base): base}.values():
        for name in ("num_parameters", "train", "zero_grad"):
            module.__dict__.pop(name, None)


def accelerate_phi3(trainer: Trainer, parts: str | Mapping[str, bool] = "auto") -> tuple[Applied, ...]:
    """`speed_up` for a Trainer that exists already, in one line; call it before `trainer.train()`.

    TRL's trainers bypass a model's forward: there the head of `SFTTrainer` itself is replaced, where that is slow.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    wanted = dict(_wanted(parts))
    own_loss = _computes_own_loss(trainer)
    if not own_loss or not wanted["loss"]:
        return speed_up(model, wanted)
    loss = _apply_trl_loss(trainer, model, own_loss)
    applied = speed_up(model, wanted | {"loss": False})
    return tuple(loss if one.part == "loss" else one for one in applied)


@contextmanager
def packed_rows(model: Any) -> Iterator[None]:
    """Attend document by document while the block runs; rows are packed, or padded on the right and without a mask."""
    from phi3_lora_plugin.speed.attention import register_attention

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(register_attention())
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def _wanted(parts: str | Mapping[str, bool]) -> Mapping[str, bool]:
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

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
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


def _apply_host(model: Any, base: Any) -> Applied:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counts: dict[tuple[bool, bool], int] = {}
    count = type(base).num_parameters

    def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        key = (only_trainable, exclude_embeddings)
        if key not in counts:
            counts[key] = count(base, only_trainable, exclude_embeddings)
        return counts[key]

    def train(mode: bool = True) -> Any:
        # Trainer calls this before every micro-batch; the walk is needed only where the mode really changes.
        return model if model.training == mode else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        for parameter in trained:
            parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()

    base.num_parameters = num_parameters
    model.train = train
    model.zero_grad = zero_grad
    return Applied("host", True, PARTS["host"])


_APPLY = {"loss": _apply_loss, "lora": _apply_lora, "host": _apply_host}
