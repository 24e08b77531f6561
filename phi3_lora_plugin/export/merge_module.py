"""The merge of a part of a model, computed by PEFT itself on a skeleton that holds only that part.

So DoRA, rsLoRA, rank and alpha patterns, PiSSA's and OLoRA's changed bases and PhiMoE's stacked experts come out as
`merge_and_unload` has them, while memory holds one module.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from torch import Tensor

# What says where adapters go or how they are trained; the skeleton has only modules that the file has tensors for.
_PLACING = (
    "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "trainable_token_indices",
    "task_type", "eva_config", "corda_config", "megatron_config", "auto_mapping", "lora_ga_config", "runtime_config",
    "base_model_name_or_path", "ensure_weight_tying", "layer_replication", "peft_version",
)  # fmt: skip


def merge_module(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, float]:
    """(merged weight, merged bias, largest difference) of one Linear or Embedding, all float32.

    The difference is between PEFT's own forward pass before merging and a plain one with the merged weight, on random
    inputs of unit variance.

    Args:
        config: adapter_config.json.
        tensors: the adapter's tensors of this module, by PEFT's names without `base_model.model.`.
        weight: the base's, float32; it is changed.
    """
    import torch
    from torch import nn

    embedding = f"{module}.lora_embedding_A" in tensors
    if embedding:
        leaf: nn.Module = nn.Embedding(*weight.shape, _weight=weight)
        inputs = torch.randint(0, weight.shape[0], (4, 8), generator=torch.Generator().manual_seed(0))
    else:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias, requires_grad=False)
        leaf = linear
        inputs = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
    root = _skeleton({module: leaf})
    layer = _inject(root, config, module, tensors)
    with torch.inference_mode():
        before = layer.eval()(inputs)
        layer.merge()
        merged = layer.get_base_layer()
        after = merged(inputs)
    difference = float((before - after).abs().max())
    return merged.weight.data, None if bias is None else merged.bias.data, difference


def expert_deltas(
    config: Mapping[str, Any], module: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Updates of the stacked weights of one `experts` module: parameter name -> (experts, out, in), float32.

    Args:
        shapes: parameter name -> (experts, out, in), in the order in which the model has them.
    """
    import torch
    from torch import nn

    leaf = nn.Module()
    for name, shape in shapes.items():
        # The update does not depend on the base's values, so one number stands for them all.
        leaf.register_parameter(name, nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False))
    root = _skeleton({module: leaf})
    layer = _inject(root, config, module, tensors)
    found = {}
    with torch.inference_mode():
        while hasattr(layer, "parameter_name"):
            found[layer.parameter_name] = layer.get_delta_weight("default")
            layer = layer.base_layer
    return found


def _skeleton(leaves: Mapping[str, Any]) -> Any:
    from torch import nn

    root = nn.Module()
    for path, leaf in leaves.items():
        *folders, last = path.split(".")
        at = root
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, nn.Module())
            at = getattr(at, folder)
        at.add_module(last, leaf)
    return root


def _inject(root: Any, config: Mapping[str, Any], module: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put the adapter on `module` of the skeleton and load its tensors, all of them; returns PEFT's layer."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    known = {field.name for field in fields(LoraConfig)}
    settings = {name: value for name, value in config.items() if name in known and name not in _PLACING}
    init = settings.get("init_lora_weights")
    base_taken = isinstance(init, str) and init.lower() in ("pissa", "olora")
    experts = [name for name in config.get("target_parameters") or [] if name.rpartition(".")[0] in module]
    is_experts = module.endswith(".experts")
    settings |= {
        "target_modules": None if is_experts else [module],
        "target_parameters": experts if is_experts else None,
        "init_lora_weights": init if base_taken else True,
        "loftq_config": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    if is_experts:
        settings.pop("target_modules")
    with warnings.catch_warnings():
        # PEFT looks for patterns of parameters among modules, and warns of patterns that belong to other modules.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(**settings), root)
        state = {name: tensor for name, tensor in tensors.items()}
        result = set_peft_model_state_dict(root, state)
    layer = root.get_submodule(module)
    loaded = {name for name, _ in layer.named_parameters() if "lora_" in name}
    if result.unexpected_keys or len(loaded) != len(tensors):
        raise MergeError(
            f"{module}: PEFT expects {sorted(loaded)}, the adapter has {sorted(tensors)}; "
            f"unexpected: {result.unexpected_keys}"
        )
    return layer


class MergeError(Phi3LoraError):
    """This adapter cannot be merged into this base as asked; lists every reason. Nothing was written."""
