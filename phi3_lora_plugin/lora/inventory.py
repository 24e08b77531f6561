"""Which tensors of a model are its adapter, where they are, and their shapes: read once, used at each save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.gather import plain_parameters, unwrapped
from phi3_lora_plugin.lora.state import StateError, active_adapter, lora_names, wrapped_lora_names
from phi3_lora_plugin.lora.walk import Structure, parameter_shapes, several_processes, structure
from phi3_lora_plugin.lora_files.keys import file_key, is_lora, without_wrappers

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, eq=False)
class Inventory:
    """The adapter of a model that is made of the same parts as when it was looked at.

    Attributes:
        asked: the adapter that was asked for.
        adapter: the one that was found; None in a model of loralib's layers.
        names: of the tensors, in the model's order.
        parameters: the same without wrappers -> parameter, where no hook changes how its layer is saved.
        shapes: what each tensor has to have, by its name in PEFT's files; of loralib's layers by that without wrappers.
        second_names: the other name of a tied embedding or head that is trained in full -> the name that the model
            gives it, both as in PEFT's files. A model names one parameter once; PEFT looks for both names.
        parts: what the model was made of; None where it may be sharded, and nothing is remembered.
    """

    asked: str | None
    adapter: str | None
    names: Sequence[str]
    parameters: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    second_names: Mapping[str, str]
    parts: Structure | None


def inventory_of(model: nn.Module, adapter: str | None = None, known: Inventory | None = None) -> Inventory:
    """Look for the adapter of a model, wrapped or not.

    Args:
        adapter: of a PEFT model, which one; the one that is trained if not given.
        known: an earlier result, returned if nothing was added, removed or replaced since.

    Raises:
        StateError: several adapters are trained, or none has this name.
    """
    inner = unwrapped(model)
    if known is not None and known.parts is not None and known.asked == adapter and known.parts.holds(inner):
        return known
    name, bias = adapter_and_bias(inner, adapter)
    config = getattr(inner, "peft_config", None)
    if isinstance(config, Mapping) and name is None:
        named = ", ".join(sorted(config))
        raise StateError(f"several adapters are trained at once ({named}): pass adapter= to choose one")
    if isinstance(config, Mapping) and name not in config:
        raise StateError(f"no adapter {name!r}; the model has {', '.join(sorted(config))}")
    names = wrapped_lora_names(inner, bias, name)
    shapes = expected_shapes(inner, name, [without_wrappers(each) for each in names])
    if name is not None:
        shapes = {file_key(each): shape for each, shape in shapes.items()}
    second = {} if name is None else _second_names(inner, name, {file_key(without_wrappers(each)) for each in names})
    parts = None if several_processes() else structure(inner)
    plain = plain_parameters(inner, names)
    parameters = None if plain is None else {without_wrappers(each): value for each, value in plain.items()}
    return Inventory(adapter, name, names, parameters, shapes, second, parts)


def expected_shapes(model: nn.Module, adapter: str | None, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shape that each LoRA tensor has to have, from its layer's sizes where these are plain, else from itself.

    Args:
        names: those that were found; the model's own are added to them.
    """
    inner = unwrapped(model)
    parameters = {without_wrappers(name): shape for name, shape in parameter_shapes(inner).items()}
    shapes = {name: tuple(parameters[name]) for name in names if name in parameters}
    for path, layer in inner.named_modules():
        path = without_wrappers(path)
        for name, shape in _layer_shapes(layer, adapter).items():
            full = f"{path}.{name}" if path else name
            if full in parameters:
                shapes[full] = shape
    return shapes


def _layer_shapes(layer: Any, adapter: str | None) -> dict[str, tuple[int, ...]]:
    """Parameter of a LoRA layer -> shape, where the layer's sizes give it: PEFT's Linear and Embedding, loralib's."""
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


def _second_names(model: nn.Module, adapter: str, found: set[str]) -> dict[str, str]:
    """Keys of what was trained in full under a further name that it has in the model -> the key that was found."""
    first: dict[int, str] = {}
    copies: dict[str, str] = {}
    if not any("modules_to_save" in dict(module.named_children()) for module in model.modules()):
        return copies
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = without_wrappers(name)
        key = file_key(plain)
        known = first.setdefault(id(parameter), key)
        if f".modules_to_save.{adapter}." in plain and key not in found and known in found:
            copies[key] = known
    return copies


def adapter_and_bias(model: nn.Module, asked: str | None = None) -> tuple[str | None, str]:
    """(the adapter that is asked for or trained, None if that is not one; which biases are trained with it)."""
    config = getattr(model, "peft_config", None)
    if not isinstance(config, Mapping):
        return None, trained_biases(model)
    name = asked or active_adapter(model)
    return name, getattr(config.get(name), "bias", "none")


def trained_biases(model: nn.Module) -> str:
    """Which of loralib's three words describes the biases that are trained."""
    trained = {
        without_wrappers(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[2] == "bias" and not is_lora(name)
    }
    if not trained:
        return "none"
    return "lora_only" if trained <= set(lora_names(model, "lora_only")) else "all"
