"""One switch for all that makes a step faster: what is safe here is applied, and every part reports why or why not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.seams import obstacle

if TYPE_CHECKING:
    import torch
    from transformers import Trainer

#: What can be switched, and what it does.
PARTS = {
    "loss": "cross-entropy on supervised positions only, in chunks",
    "attention": "separate documents, no padding, no mask",
    "lora": "one autograd function for a frozen projection and its LoRA",
    "layers": "norm, rotation and gate each in one function, with less kept for backward",
    "last_layer": "what comes after its attention at supervised positions only",
    "masters": "adapters in float32, computed in the dtype of the base",
    "host": "train(), zero_grad and parameter counts by shorter ways",
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


@dataclass(frozen=True)
class _Where:
    """Cards that a model will be moved to, and why its weights will not stay as they are, if that is known."""

    cards: Iterable[torch.device]
    wrapped: str | None


def speed_up(
    model: Any, parts: str | Mapping[Any, bool] = "auto", device: torch.device | None = None
) -> tuple[Applied, ...]:
    """Apply the parts that are wanted and safe to a PEFT model; call it before a Trainer is built around the model.

    Args:
        model: `PeftModel`, or a transformers model with injected adapters.
        parts: "auto", "off", or {part: bool} to switch parts one by one (parts not named are as in "auto").
        device: where the model will run, if it is not there yet; kernels are tried there.

    Returns:
        One line a part. Applying twice changes nothing; what an earlier call put on and this one does not want is taken
        back, as `slow_down` takes everything back.

    Raises:
        SpeedError: an unknown part.
    """
    return _switch(model, _wanted(parts), device)


def _switch(
    model: Any,
    wanted: Mapping[str, bool],
    device: torch.device | None,
    wrapped: str | None = None,
    kept: Collection[str] = (),
) -> tuple[Applied, ...]:
    """`speed_up`; `wrapped` says why weights will not stay as they are, `kept` what stays although it is not wanted."""
    import torch

    base = _base(model)
    where = _Where(() if device is None or device.type != "cuda" else (device,), wrapped)
    changed = obstacle("torch.hooks", "torch.pre_hooks", "torch.backward_hooks")
    done = []
    with torch.inference_mode(False):  # what is made here is trained later
        earlier = base.__dict__.get("_sped_up", ())
        gone = [part for part in earlier if not (wanted[part] or part in kept)]
        if gone:
            from phi3_lora_plugin.speed.restore import restore

            restore(model, base, gone)
        for part in PARTS:
            if not wanted[part]:
                done.append(Applied(part, False, "switched off"))
            elif changed:
                done.append(Applied(part, False, changed))
            else:
                done.append(_APPLY[part](model, base, where))
    on = {one.part for one in done if one.on} | set(earlier) - set(gone) | set(kept)
    base._sped_up = tuple(part for part in PARTS if part in on)
    return tuple(done)


def slow_down(model: Any) -> None:
    """Undo `speed_up` and `accelerate_phi3`: stock forwards, classes and dtypes everywhere."""
    from phi3_lora_plugin.speed.restore import restore

    base = _base(model)
    restore(model, base, PARTS)
    base.__dict__.pop("_sped_up", None)


def accelerate_phi3(trainer: Trainer, parts: str | Mapping[Any, bool] = "auto") -> tuple[Applied, ...]:
    """`speed_up` for a Trainer that exists already, in one line; call it before `trainer.train()`.

    TRL's trainers bypass a model's forward: there the head of `SFTTrainer` itself is replaced, where that is slow. The
    loss that a plain Trainer computes in training and for `eval_loss` does without logits; other code that asks for
    outputs (`compute_metrics`, `return_outputs`, your own `compute_loss`) gets them.
    """
    from phi3_lora_plugin.speed.loss import leave_uncompiled
    from phi3_lora_plugin.speed.token_count import count_on_host
    from phi3_lora_plugin.speed.trainer_loss import follow, liger_loss, own_loss

    model = trainer.accelerator.unwrap_model(trainer.model)
    base = _base(model)
    wanted = dict(_wanted(parts))
    left: dict[str, Applied] = {}

    def leave(part: str, why: str) -> None:
        if wanted[part]:
            wanted[part], left[part] = False, Applied(part, False, why)

    if trainer.optimizer is not None:
        # An optimizer that exists has states in the dtype of its parameters.
        leave("masters", "the optimizer already exists")
    if trainer.args.n_gpu > 1:
        for part in ("loss", "attention", "layers", "host"):
            leave(part, f"nn.DataParallel copies the model onto {trainer.args.n_gpu} GPUs: start one process a GPU")
    for part, why in _sharded_later(trainer).items():
        leave(part, why)
    if getattr(trainer.args, "use_liger_kernel", False):
        leave("layers", "Liger's kernels were asked for")
    if _compiles(trainer):
        leave("attention", "torch_compile would compile it again for each new number of documents")
        leave("layers", "torch_compile fuses these by itself")
    own = own_loss(trainer)
    if wanted["loss"] and own:
        left["loss"] = _apply_trl_loss(trainer, base, own)
        wanted["loss"] = False
    elif wanted["loss"] and (liger := liger_loss(trainer)):
        leave("loss", liger)
    kept = [part for part, one in left.items() if one.on]  # TRL's loss
    if trainer.optimizer is not None:
        kept.append("masters")
    applied = _switch(model, wanted, trainer.args.device, _moved_later(trainer), kept)
    if applied[1].on:
        count_on_host(trainer, base)
    if applied[0].on:
        follow(trainer, base)
        if _compiles(trainer):
            leave_uncompiled(base)
    return tuple(left.get(one.part, one) for one in applied)


def _sharded_later(trainer: Any) -> dict[str, str]:
    """Part -> why stock code runs instead in the wrappers that this trainer will put around the model."""
    if getattr(trainer, "is_deepspeed_enabled", False):
        plugin = trainer.accelerator.state.deepspeed_plugin
        if getattr(plugin, "zero_stage", 0) == 3:
            return {
                "loss": f"ZeRO-3 partitions the head: {_ALL_LOGITS}",
                "lora": "ZeRO-3 partitions parameters: PEFT's forward runs",
            }
    elif getattr(trainer, "is_fsdp_enabled", False):
        units = {"last_layer": "hooks of FSDP stand between the last layer and its loss"}
        plugin = trainer.accelerator.state.fsdp_plugin
        if getattr(plugin, "fsdp_version", 1) == 1:
            # transformers wraps with `peft.utils.other.fsdp_auto_wrap_policy`
            units["lora"] = "FSDP1 makes units of A and B, which are whole in their own forward only: PEFT's runs"
        return units
    return {}


def _moved_later(trainer: Any) -> str | None:
    """Why frozen weights will not be found later where they are now."""
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP puts them together in each forward"
    return "torch_compile is on" if _compiles(trainer) else None


def _compiles(trainer: Any) -> bool:
    """Whether this trainer will compile its model, by its arguments or by accelerate's settings."""
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    return bool(getattr(trainer.args, "torch_compile", False)) or getattr(plugin, "backend", "NO") != "NO"


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _wanted(parts: str | Mapping[Any, bool]) -> Mapping[str, bool]:
    if isinstance(parts, str):
        if parts not in ("auto", "off"):
            raise SpeedError(f"speed: {parts!r} is not 'auto', 'off' or a mapping of {', '.join(PARTS)}")
        return dict.fromkeys(PARTS, parts == "auto")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise SpeedError(f"speed: unknown part {', '.join(unknown)}; available: {', '.join(PARTS)}")
    return dict.fromkeys(PARTS, True) | dict(parts)


def _apply_loss(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.loss import fuse_loss, head_obstacle, loss_kernel_used
    from phi3_lora_plugin.speed.shards import in_units

    obstacle = head_obstacle(base, in_units(model))
    if obstacle is not None:
        return Applied("loss", False, f"{obstacle}: {_ALL_LOGITS}")
    fuse_loss(base)
    return Applied("loss", True, _with("loss", loss_kernel_used(base, where.cards)))


def _apply_trl_loss(trainer: Trainer, base: Any, own_loss: str) -> Applied:
    """The loss of a trainer that computes its own: one of TRL's can be computed from fewer positions."""
    if not any(parent.__module__.startswith("trl.") for parent in type(trainer).__mro__):
        return Applied("loss", False, own_loss)
    from phi3_lora_plugin.speed.trl_loss import fuse_trl_loss, trl_loss_obstacle

    obstacle = trl_loss_obstacle(trainer, base)
    if obstacle is None:
        fuse_trl_loss(base, _compiles(trainer))
    return Applied("loss", obstacle is None, obstacle or PARTS["loss"])


def _apply_lora(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.lora_swap import fuse_lora, fused_layers
    from phi3_lora_plugin.speed.proved_prefetch import prefetch_used

    fuse_lora(model)
    count, others = fused_layers(model)
    kept = [f"{number} keep PEFT's forward: {why}" for why, number in others.items()]
    if not count:
        return Applied("lora", False, "; ".join(kept) or "no LoRA layer over a plain linear layer")
    unpacked = prefetch_used(model, where.wrapped)
    return Applied("lora", True, "; ".join((f"{count} layers", *kept, *([unpacked] if unpacked else []))))


def _apply_attention(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.documents import attention_used, documents_obstacle, fuse_documents

    obstacle = documents_obstacle(base)
    if obstacle is not None:
        return Applied("attention", False, obstacle)
    fuse_documents(model, base, where.cards)
    return Applied("attention", True, f"{PARTS['attention']}; {attention_used(base)}")


def _apply_layers(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.layers import fuse_layers, kernels_used, layers_obstacle

    obstacle = layers_obstacle(base)
    if obstacle is not None:
        return Applied("layers", False, obstacle)
    fuse_layers(base)
    return Applied("layers", True, _with("layers", kernels_used(base, where.cards)))


def _apply_last_layer(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.last_layer import last_layer_obstacle

    obstacle = last_layer_obstacle(base)
    if obstacle is None:
        base.model._last_layer = True
    else:
        getattr(base, "model", base).__dict__.pop("_last_layer", None)
    return Applied("last_layer", obstacle is None, obstacle or PARTS["last_layer"])


def _apply_masters(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.masters import float32_adapters

    changed = float32_adapters(model)
    return Applied(
        "masters", True, f"{changed} adapter tensors were in half precision" if changed else "already float32"
    )


def _apply_host(model: Any, base: Any, where: _Where) -> Applied:
    from phi3_lora_plugin.speed.host import fuse_host

    if not hasattr(type(base), "num_parameters"):
        return Applied("host", False, f"{type(base).__name__} is not a model of transformers")
    fuse_host(model, base)
    return Applied("host", True, PARTS["host"])


def _with(part: str, kernels: str) -> str:
    return f"{PARTS[part]}; {kernels}" if kernels else PARTS[part]


_ALL_LOGITS = "transformers computes the logits of every position"

_APPLY = {
    "loss": _apply_loss,
    "attention": _apply_attention,
    "lora": _apply_lora,
    "layers": _apply_layers,
    "last_layer": _apply_last_layer,
    "masters": _apply_masters,
    "host": _apply_host,
}
