"""Tensors of sharded models: gathered whole (FSDP2, FSDP1, ZeRO-3), and cut again to what a rank holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.walk import several_processes
from phi3_lora_plugin.lora_files.keys import WRAPPERS, without_wrappers
from phi3_lora_plugin.seams import require

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPER_CHILDREN = ("module", *WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP1, torch.compile and DeepSpeed: what was wrapped, not a copy.

    Of a model that holds the adapted one, as sentence-transformers', it is that one, which knows its adapter's config.
    """
    return adapted_inside(_bare(model))[1]


def adapted_inside(bare: nn.Module) -> tuple[str, nn.Module]:
    """(path, the one part up to two levels down that has PEFT's config); ("", the model itself) if there is not one."""
    if hasattr(bare, "peft_config"):
        return "", bare
    found = [
        (path, part)
        for name, child in bare.named_children()
        for path, part in ((name, child), *((f"{name}.{inner}", each) for inner, each in child.named_children()))
        if isinstance(getattr(part, "peft_config", None), Mapping)
    ]
    return found[0] if len(found) == 1 else ("", bare)


def path_of_adapted(model: nn.Module) -> str:
    """Where `unwrapped(model)` is in the model inside the wrappers, as a prefix of names: empty if it is all of it."""
    path = adapted_inside(_bare(model))[0]
    return f"{path}." if path else ""


def _bare(model: nn.Module) -> nn.Module:
    while True:
        children = dict(model.named_children())
        name = next((name for name in _WRAPPER_CHILDREN if name in children), None)
        alone = len(children) == 1 or type(model).__name__ == "DeepSpeedEngine"
        bare = alone and next(model.parameters(recurse=False), None) is None
        if name is None or not bare:
            return model
        model = children[name]


def gather(model: nn.Module, inner: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The named tensors of `inner`, whole. Collective if anything is sharded.

    Args:
        model: with its wrappers; `inner` is the model inside them (see `unwrapped`).
    """
    if is_flattened(model):
        return _gather_flattened(model, names)
    owners = _owners(inner, names)
    leaves: dict[nn.Module, dict[str, str]] = {}
    for name in names:
        leaves.setdefault(owners[name], {})[name.rpartition(".")[2]] = name
    found: dict[str, Any] = {}
    for module, inside in leaves.items():
        # A layer's own state_dict, so that its hooks run: slices refuse values between their blocks, and FSDP2 gives
        # the shards where it has whole copies, of 16 bits perhaps.
        own = module.state_dict()
        found |= {name: own[leaf] for leaf, name in inside.items()}
    parameters = {name: getattr(owners[name], name.rpartition(".")[2], None) for name in names}
    partitioned = [parameter for parameter in parameters.values() if is_partitioned(parameter)]
    if partitioned:
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(partitioned):
            found |= {name: each.detach().clone() for name, each in parameters.items() if each is not None}
    return {name: _whole(found[name]) for name in names}


def plain_parameters(inner: nn.Module, names: Sequence[str]) -> dict[str, Any] | None:
    """The named parameters, if they are all that `gather` would give: in one process, of layers without hooks."""
    from torch import nn

    require("torch.parameters", "torch.state_hooks", "torch.state_pre_hooks", "torch.save_state")
    if several_processes():
        return None
    found: dict[str, Any] = {}
    for name, module in _owners(inner, names).items():
        kind = type(module)
        hooked = module._state_dict_hooks or module._state_dict_pre_hooks or "state_dict" in vars(module)
        stock = kind.state_dict is nn.Module.state_dict and kind._save_to_state_dict is nn.Module._save_to_state_dict
        parameter = module._parameters.get(name.rpartition(".")[2])
        if hooked or not stock or parameter is None:
            return None
        found[name] = parameter
    return found


def _owners(inner: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Name of a tensor -> the module that it is in."""
    modules = dict(inner.named_modules())
    return {name: modules[name.rpartition(".")[0]] for name in names}


def _whole(tensor: Any) -> Any:
    """A DTensor (FSDP2, tensor parallel) gathered; anything else as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    place = tensor.device_mesh.device_type
    if tensor.device.type not in (place, "meta"):  # offloaded to the CPU, where NCCL cannot gather
        tensor = tensor.to(place)
    return tensor.full_tensor()


def whole_shape(tensor: Any) -> Any:
    """The shape of a parameter before ZeRO-3 cut it; a DTensor's own shape is that already."""
    return getattr(tensor, "ds_shape", tensor.shape)


def is_partitioned(tensor: Any) -> bool:
    """Whether ZeRO-3 has cut a parameter."""
    return hasattr(tensor, "ds_id") or hasattr(tensor, "ds_tensor")


def is_flattened(model: nn.Module) -> bool:
    """Whether FSDP1 has cut the parameters into one flat vector a unit."""
    if not several_processes():
        return False
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def _gather_flattened(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """Unit by unit, so that never more than one is whole. torch's own full state dict would gather the base too."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = {without_wrappers(name): name for name in names}
    found: dict[str, Any] = {}
    for path, unit in model.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            for name, parameter in unit.named_parameters():  # those of units inside are still cut; their turn is later
                full = without_wrappers(f"{path}.{name}" if path else name)
                if full in plain:
                    found[plain[full]] = parameter.detach().clone()
    return {name: found[name] for name in names if name in found}


def sharded_like(value: Tensor, target: Any) -> Any:
    """The value as the parameter has it: a DTensor of the same placement where that is one."""
    if not hasattr(target, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = target.device_mesh
    return distribute_tensor(value.to(mesh.device_type, target.dtype), mesh, target.placements)
