"""Tensors of sharded models: gathered whole (FSDP2, FSDP1, ZeRO-3), and cut again to what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.state_keys import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPER_CHILDREN = ("module", "_orig_mod", "_fsdp_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, DataParallel, FSDP1, torch.compile and DeepSpeed: what was wrapped, not a copy."""
    while True:
        children = dict(model.named_children())
        name = next((name for name in _WRAPPER_CHILDREN if name in children), None)
        bare = not model._parameters and (len(children) == 1 or type(model).__name__ == "DeepSpeedEngine")
        if name is None or not bare:
            return model
        model = children[name]


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """Let everybody who walks over the modules of `model` in this block see one walk; none may come or go meanwhile.

    Taking an adapter out asks for names, parameters, layers and shapes: a dozen walks of 3 ms each over 32 layers.
    """
    from torch import distributed

    # Gathering shards swaps parameters for others while it goes on. And there may be a block like this one around.
    if (distributed.is_available() and distributed.is_initialized()) or "named_modules" in model.__dict__:
        yield
        return
    modules = tuple(model.named_modules())
    parameters = tuple(_parameters_of(modules))
    stock = type(model)

    def named_modules(memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        if memo or prefix or not remove_duplicate:
            return iter(stock.named_modules(model, memo, prefix, remove_duplicate))
        return iter(modules)

    def named_parameters(prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        if prefix or not recurse or not remove_duplicate:
            return iter(stock.named_parameters(model, prefix, recurse, remove_duplicate))
        return iter(parameters)

    model.named_modules, model.named_parameters = named_modules, named_parameters
    try:
        yield
    finally:
        del model.named_modules, model.named_parameters


def _parameters_of(modules: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """What `named_parameters` gives, from a walk that has been made."""
    seen = set()
    for path, module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}" if path else name, parameter


def gather(model: nn.Module, inner: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The named tensors of `inner`, whole. Collective if anything is sharded.

    Args:
        model: with the wrappers that it has, of which `inner` is the `unwrapped`.
    """
    if is_flattened(model):
        return _gather_flattened(model, names)
    owners: dict[str, list[str]] = {}
    for name in names:
        owners.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    modules = dict(inner.named_modules())
    found: dict[str, Any] = {}
    for path, leaves in owners.items():
        # A layer's own state_dict, so that its hooks run: slices refuse to save what lies between them, and FSDP2 gives
        # the shards where it has whole copies, of 16 bits perhaps.
        own = modules[path].state_dict()
        found |= {f"{path}.{leaf}" if path else leaf: own[leaf] for leaf in leaves}
    parameters = dict(inner.named_parameters())
    partitioned = [parameters[name] for name in names if is_partitioned(parameters.get(name))]
    if partitioned:
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(partitioned):
            found |= {name: parameters[name].detach().clone() for name in names if name in parameters}
    return {name: _whole(found[name]) for name in names}


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
