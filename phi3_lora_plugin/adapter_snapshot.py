"""The LoRA part of a model at one moment, copied off it and checked, so that training may go on while it is written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.adapter_files import loralib_sidecar, minimal_config
from phi3_lora_plugin.lora.gather import unwrapped, walked_once, whole_shape
from phi3_lora_plugin.lora.peft_files import changes_base
from phi3_lora_plugin.lora.state import StateError, active_adapter, lora_names, lora_state_dict
from phi3_lora_plugin.lora.state_keys import file_key, is_lora, without_wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(frozen=True)
class Snapshot:
    """The LoRA part of a model at one moment, on the CPU; training may go on.

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


def take(model: nn.Module, adapter: str | None = None, keep: bool = True, copy: bool = True) -> Snapshot | None:
    """Copy the LoRA tensors off a model, sharded or not. Collective: call it on every rank; only `keep` ones copy.

    Args:
        adapter: of a PEFT model, which one; the one that is trained if not given.
        copy: False where training waits until the snapshot is written: tensors on the CPU are then the live ones.

    Raises:
        StateError: nothing to save, or something that must not be saved: NaN, Inf, empty or partial tensors.
    """
    with walked_once(unwrapped(model)):
        return _take(model, adapter, keep, copy)


def _take(model: nn.Module, adapter: str | None, keep: bool, copy: bool) -> Snapshot | None:
    inner = unwrapped(model)
    config = getattr(inner, "peft_config", None)
    if not isinstance(config, Mapping):
        state = lora_state_dict(model, bias=_trained_biases(inner))
        if not keep:
            return None
        tensors = _copied(state, copy)
        _refuse(adapter_problems(tensors, expected_shapes(inner, None, list(state))))
        return Snapshot(tensors, sidecar=loralib_sidecar(inner), memory=tensors, notes=_notes(tensors))
    name = adapter or active_adapter(inner)
    if name is None:
        raise StateError(f"several adapters are trained at once ({', '.join(sorted(config))}): say which one to save")
    settings = config.get(name)
    if settings is None:
        raise StateError(f"no adapter {name!r}; the model has {', '.join(sorted(config))}")
    state = lora_state_dict(model, bias=getattr(settings, "bias", "none"), adapter=name)
    if not keep:
        return None
    copied = _copied(state, copy)
    tensors = {file_key(key): tensor for key, tensor in copied.items()}
    _refuse(adapter_problems(tensors, {file_key(k): v for k, v in expected_shapes(inner, name, list(state)).items()}))
    tensors |= _under_second_names(inner, name, tensors)
    plain = minimal_config(settings, inner)
    memory = None if _is_peft_model(inner) else copied
    converted = _as_plain_lora(inner, name, plain)
    if converted is not None:
        return Snapshot(converted[0], converted[1], raw=(tensors, plain), memory=memory, notes=_notes(tensors))
    return Snapshot(tensors, plain, memory=memory, notes=_notes(tensors))


def trained_but_not_saved(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Names of parameters that training changes and a LoRA-only checkpoint does not hold."""
    inner = unwrapped(model)
    config = getattr(inner, "peft_config", None)
    if isinstance(config, Mapping):
        name = adapter or active_adapter(inner)
        bias = getattr(config.get(name), "bias", "none") if name else "none"
    else:
        name, bias = None, _trained_biases(inner)
    saved = set(lora_names(inner, bias, adapter=name))
    trained = (without_wrappers(name) for name, parameter in inner.named_parameters() if parameter.requires_grad)
    return [name for name in trained if name not in saved]


def adapter_problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> list[str]:
    """Why tensors must not be saved as an adapter: one sentence a kind, with the first names.

    Args:
        expected: every name that has to be there -> its shape, from the model's layers and not from its tensors.
    """
    import torch

    if not tensors:
        return ["there is no LoRA tensor: the model has no adapter, or it lives on another rank"]
    found: dict[str, list[str]] = {}
    looked_at = [t for t in tensors.values() if type(t) is torch.Tensor and t.is_floating_point() and not t.is_meta]
    # One pass that keeps nothing; a norm may also overflow, so only the tensors themselves can say that one is sick.
    healthy = bool(torch.isfinite(torch.stack(torch._foreach_norm(looked_at)).sum())) if _alike(looked_at) else False
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
            shapes = f"{name} is {tuple(tensor.shape)}, expected {tuple(expected[name])}"
            found.setdefault("have another shape than their layers (shards of one rank?)", []).append(shapes)
        elif not tensor.is_floating_point():
            found.setdefault("are no floating-point numbers", []).append(f"{name} ({tensor.dtype})")
        elif not healthy and not torch.isfinite(tensor).all():
            found.setdefault("are not finite (NaN or Inf)", []).append(name)
    if missing := [name for name in expected if name not in tensors]:
        found["are missing"] = missing
    return [
        f"{len(names)} of {len(expected)} tensors {what}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}"
        for what, names in found.items()
    ]


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1


def expected_shapes(model: nn.Module, adapter: str | None, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape that each LoRA tensor has to have, from its layer's sizes where these are plain, else from itself.

    Args:
        names: those that were found; the model's own are added to them.
    """
    inner = unwrapped(model)
    parameters = {without_wrappers(name): parameter for name, parameter in inner.named_parameters()}
    shapes = {name: tuple(whole_shape(parameters[name])) for name in names if name in parameters}
    for path, layer in inner.named_modules():
        path = without_wrappers(path)
        for name, shape in _layer_shapes(layer, adapter).items():
            full = f"{path}.{name}" if path else name
            if full in parameters:
                shapes[full] = shape
    return shapes


def _layer_shapes(layer: Any, adapter: str | None) -> dict[str, tuple[int, ...]]:
    """Parameter of a LoRA layer -> shape, of the kinds whose sizes say it: PEFT's Linear and Embedding, loralib's."""
    if adapter is not None:
        ranks = vars(layer).get("r")  # `getattr` is slow on the thousand modules that have none
        rank = ranks.get(adapter) if isinstance(ranks, dict) else None
        if not rank or not hasattr(layer, "lora_embedding_A") or hasattr(layer, "parameter_name"):
            return {}
        rows, columns = layer.out_features, layer.in_features
        if adapter in layer.lora_embedding_A:
            return {f"lora_embedding_A.{adapter}": (rank, columns), f"lora_embedding_B.{adapter}": (rows, rank)}
        if type(layer.get_base_layer()).__name__.startswith("Conv"):
            return {}
        return {f"lora_A.{adapter}.weight": (rank, columns), f"lora_B.{adapter}.weight": (rows, rank)}
    own = vars(layer)
    if "lora_alpha" not in own or "merge_weights" not in own or not own.get("r"):
        return {}
    if hasattr(layer, "num_embeddings"):
        return {"lora_A": (layer.r, layer.num_embeddings), "lora_B": (layer.embedding_dim, layer.r)}
    if hasattr(layer, "enable_lora"):
        groups, height = sum(layer.enable_lora), layer.out_features // len(layer.enable_lora)
        return {"lora_A": (layer.r * groups, layer.in_features), "lora_B": (height * groups, layer.r)} if groups else {}
    if hasattr(layer, "in_features"):
        return {"lora_A": (layer.r, layer.in_features), "lora_B": (layer.out_features, layer.r)}
    return {}


def _copied(state: Mapping[str, Tensor], copy: bool = True) -> dict[str, Tensor]:
    """Contiguous copies on the CPU; what cannot be copied (meta) stays as it is, to be refused."""
    return {
        name: tensor
        if tensor.is_meta or hasattr(tensor, "full_tensor")
        else tensor.detach().to("cpu", copy=copy).contiguous()
        for name, tensor in state.items()
    }


def _under_second_names(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of what was trained in full under the other name that it has in the model.

    Tied embedding and head are one parameter, which a model names once; PEFT looks for both names when it loads.
    """
    first: dict[int, str] = {}
    copies: dict[str, Tensor] = {}
    if not any("modules_to_save" in vars(module).get("_modules", ()) for _, module in model.named_modules()):
        return copies
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = without_wrappers(name)
        key = file_key(plain)
        first.setdefault(id(parameter), key)
        known = first[id(parameter)]
        if f".modules_to_save.{adapter}." in plain and key not in tensors and known in tensors:
            copies[key] = tensors[known].clone()
    return copies


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


def _trained_biases(model: nn.Module) -> str:
    """Which of loralib's three words says what biases are trained."""
    trained = {
        without_wrappers(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[2] == "bias" and not is_lora(name)
    }
    if not trained:
        return "none"
    return "lora_only" if trained <= set(lora_names(model, "lora_only")) else "all"


def _is_peft_model(model: Any) -> bool:
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))
