"""The LoRA part of a model at one moment, copied and checked, so that training can continue while it is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.config import loralib_sidecar, minimal_config
from phi3_lora_plugin.lora.finite import all_finite, not_finite
from phi3_lora_plugin.lora.gather import gather, path_of_adapted, unwrapped
from phi3_lora_plugin.lora.inventory import Inventory, adapter_and_bias, inventory_of
from phi3_lora_plugin.lora.state import StateError, lora_names
from phi3_lora_plugin.lora_files.keys import file_key, without_wrappers
from phi3_lora_plugin.lora_files.peft_files import changes_base
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The LoRA part of a model at one moment, on the CPU; training can continue.

    Attributes:
        tensors: by the names of PEFT's files, or of a loralib model's own state.
        config: adapter_config.json; None for a model of loralib's layers, which has `sidecar` instead.
        raw: (tensors, config) as training has them, where `tensors` are the same update in another form (PiSSA).
        memory: by the names in the model, where Trainer reloads it by these and not through PEFT.
        notes: what is odd about it without being wrong.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    sidecar: Mapping[str, Any] | None = None
    raw: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
    memory: Mapping[str, Tensor] | None = None
    notes: tuple[str, ...] = ()


def take(
    model: nn.Module,
    adapter: str | None = None,
    keep: bool = True,
    copy: bool = True,
    inventory: Inventory | None = None,
) -> Snapshot | None:
    """Copy the LoRA tensors off a model, sharded or not. Collective: call it on every rank; only `keep` ones copy.

    Args:
        adapter: of a PEFT model, which one; the one that is trained if not given.
        copy: False where training waits until the snapshot is written: tensors on the CPU are then the live ones.
        inventory: the result of `inventory_of` for the model and this adapter, if it is known.

    Raises:
        StateError: nothing to save, or something that must not be saved: NaN, Inf, empty or partial tensors.
    """
    inner = unwrapped(model)
    found = inventory_of(model, adapter) if inventory is None else inventory
    state = found.parameters
    if state is None:
        gathered = gather(model, inner, found.names)
        state = {without_wrappers(name): tensor for name, tensor in gathered.items()}
    if not keep:
        return None
    copied = _copied(state, copy)
    if found.adapter is None:
        _refuse(adapter_problems(copied, found.shapes))
        return Snapshot(copied, sidecar=loralib_sidecar(inner), memory=copied, notes=_notes(copied))
    tensors = {file_key(name): tensor for name, tensor in copied.items()}
    _refuse(adapter_problems(tensors, found.shapes))
    tensors |= {second: tensors[first].clone() for second, first in found.second_names.items()}
    plain = minimal_config(inner.peft_config[found.adapter], inner)
    path = path_of_adapted(model)
    memory = None if _is_peft_model(inner) and not path else {path + name: tensor for name, tensor in copied.items()}
    converted = _as_plain_lora(inner, found.adapter, plain)
    if converted is not None:
        return Snapshot(converted[0], converted[1], raw=(tensors, plain), memory=memory, notes=_notes(tensors))
    return Snapshot(tensors, plain, memory=memory, notes=_notes(tensors))


def trained_but_not_saved(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Names of parameters that training changes and a LoRA-only checkpoint does not hold."""
    inner = unwrapped(model)
    name, bias = adapter_and_bias(inner, adapter)
    saved = set(lora_names(inner, bias, adapter=name))
    trained = (without_wrappers(name) for name, parameter in inner.named_parameters() if parameter.requires_grad)
    return [name for name in trained if name not in saved]


def adapter_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """Why tensors must not be saved as an adapter: one sentence a kind, with the first names.

    Args:
        expected: every name that has to be there -> its shape, from the model's layers and not from its tensors.
    """
    if not tensors:
        return ["found no LoRA tensor: the model has no adapter, or another rank has it"]
    found: dict[str, list[str]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in expected:
            found.setdefault("are not of this adapter", []).append(name)
        elif hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id"):
            found.setdefault("are shards that were not gathered", []).append(name)
        elif tensor.is_meta:
            found.setdefault("have no values (meta device)", []).append(name)
        elif tensor.numel() == 0:
            found.setdefault("are empty: shards that were not gathered", []).append(name)
        elif tuple(tensor.shape) != tuple(expected[name]):
            found.setdefault("have another shape than their layers (shards of one rank?)", []).append(
                f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name])}"
            )
        elif not tensor.is_floating_point():
            found.setdefault("are not floating-point numbers", []).append(f"{name} ({tensor.dtype})")
        else:
            whole[name] = tensor
    if not all_finite(list(whole.values())) and (broken := not_finite(whole)):
        found["are not finite (NaN or Inf)"] = broken
    if missing := [name for name in expected if name not in tensors]:
        found["are missing"] = missing
    return [f"{len(names)} of {len(expected)} tensors {what}: {listed(names)}" for what, names in found.items()]


def _copied(state: Mapping[str, Tensor], copy: bool = True) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; what cannot be copied (meta) stays as it is, to be refused."""
    return {
        name: tensor
        if tensor.is_meta or hasattr(tensor, "full_tensor")
        else tensor.detach().to("cpu", copy=copy).contiguous()
        for name, tensor in state.items()
    }


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise StateError("this adapter is not saved:\n" + "\n".join(f"  {problem}" for problem in problems))


def _notes(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    second = [tensor for name, tensor in tensors.items() if "lora_B" in name or "lora_embedding_B" in name]
    if second and not any(tensor.any() for tensor in second):
        return ("every lora_B is zero: nothing has been learned yet, the model is its base",)
    return ()


def _as_plain_lora(
    model: Any, adapter: str, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """An adapter that changed its base as one for the original base, where the model remembers where it started."""
    if not changes_base(config):
        return None
    if not any(adapter in getattr(layer, "lora_start", {}) for layer in model.modules()):
        log.warning(
            "init_lora_weights=%s changed the base, and where it started is not known: the adapter is saved as it is, "
            "and needs PEFT to change the base again when it is loaded",
            config["init_lora_weights"],
        )
        return None
    from phi3_lora_plugin.lora.methods import plain_lora

    tensors, settings = plain_lora(model, adapter)
    return _copied(tensors), minimal_config(settings, model)


def _is_peft_model(model: Any) -> bool:
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))
