"""What happens to each weight of a base in a merge: every tensor of the adapter gets its place, or it is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.merge_module import MergeError
from phi3_lora_plugin.lora_files.peft_files import full_tensors
from phi3_lora_plugin.model.families import WHOLE, projections
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

    from phi3_lora_plugin.lora_files.peft_files import PeftAdapter
    from phi3_lora_plugin.model.shards import Weights

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


class VerificationError(Phi3LoraError, RuntimeError):
    """The merged model is not the adapted one, which is a defect here or in a library; nothing was written."""


@dataclass(frozen=True)
class Plan:
    """What happens to which weight: module -> adapter tensors, names that are replaced, rows that are set."""

    modules: Mapping[str, Mapping[str, Tensor]]
    experts: Mapping[str, Mapping[str, Tensor]]
    full: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]]
    untied: bool


def plan_merge(peft: PeftAdapter, weights: Weights, config: Mapping[str, Any], untie: bool) -> Plan:
    """Every tensor of the adapter gets its place in the base, or the merge is refused."""
    problems = []
    init = str(peft.config.get("init_lora_weights")).lower()
    if init.startswith(("pissa_niter", "corda", "loftq", "lora_ga")):
        problems.append(
            f"init_lora_weights={init!r} changed the base in a way that cannot be computed again (random or data); "
            "save the adapter with PEFT's path_initial_model_for_weight_conversion, then merge that"
        )
    modules: dict[str, dict[str, Tensor]] = {}
    experts: dict[str, dict[str, Tensor]] = {}
    left: dict[str, Tensor] = {}
    for key, tensor in peft.tensors.items():
        module, found, _ = key.partition(".lora_")
        outer = module.split(".base_layer")[0]
        if not found:
            left[key] = tensor
        elif outer.endswith(".experts"):
            experts.setdefault(outer, {})[key] = tensor
        else:
            modules.setdefault(module, {})[key] = tensor
    full, tokens = full_tensors(peft, left)
    strangers: list[str] = []
    for module, tensors in modules.items():
        name = f"{module}.weight"
        if name == HEAD and _tied(config) and name not in weights:
            name = TABLE
        if name not in weights:
            strangers.append(module)
            continue
        a, b = (
            next((t for key, t in tensors.items() if f"lora_{f}" in key or f"embedding_{f}" in key), None) for f in "AB"
        )
        shape = weights.shape(name)[::-1] if f"{module}.lora_embedding_A" in tensors else weights.shape(name)
        if a is None or b is None or (b.shape[0], a.shape[1]) != shape:
            shapes = [tuple(t.shape) if t is not None else "missing" for t in (a, b)]
            problems.append(f"{module}: A {shapes[0]} and B {shapes[1]} do not fit the base's weight {shape}")
        if f"{module}.lora_B.bias" in tensors and f"{module}.bias" not in weights:
            problems.append(f"{module}: the adapter has a bias (lora_bias), and the base has none to add it to")
    if strangers:
        split = any(module.rpartition(".")[2] in WHOLE for module in strangers)
        problems.append(
            f"{len(strangers)} adapted modules are not in the base: {listed(strangers, 3)}"
            + ("; the adapter is split, this base fused: `phi3-lora convert ... --to fused` first" if split else "")
        )
    for module in experts:
        for name in _expert_names(module, weights, config):
            if name not in weights:
                problems.append(f"{module}: the base has no {name}")
                break
    full = {name: tensor for name, tensor in full.items() if not weights.equal(name, tensor)}
    for name, tensor in full.items():
        place = TABLE if name == HEAD and _tied(config) and name not in weights else name
        if place not in weights:
            problems.append(f"{name}: trained in full, but the base has no such weight")
        elif tuple(tensor.shape) != weights.shape(place):
            problems.append(
                f"{name}: the adapter has shape {tuple(tensor.shape)}, the base {weights.shape(place)}; was the "
                "vocabulary resized? Resize the base in the same way first"
            )
    for module, (ids, _) in tokens.items():
        if f"{module}.weight" not in weights:
            problems.append(f"{module}: token rows were trained, but the base has no such embedding")
        elif max(ids) >= weights.shape(f"{module}.weight")[0]:
            problems.append(
                f"{module}: token {max(ids)} is beyond the base's {weights.shape(f'{module}.weight')[0]} rows"
            )
    untied = False
    if _tied(config):
        both = HEAD in full and TABLE in full and bool((full[HEAD] == full[TABLE]).all())
        one_side = {"lm_head", "model.embed_tokens"} & set(modules) or (({HEAD, TABLE} & set(full)) and not both)
        if one_side and not untie:
            problems.append(
                "head and embeddings share one weight in this base, and the adapter trained only one of them; merged "
                "they would differ: pass --untie to write them separately, or train with ensure_weight_tying"
            )
        untied = bool(one_side)
        if both:
            full.pop(HEAD)
    if not (modules or experts or full or tokens):
        problems.append("the adapter has nothing to merge")
    if problems:
        raise MergeError(
            f"{peft.folder} cannot be merged into {weights.folder}:\n" + "\n".join(f"  {p}" for p in problems)
        )
    return Plan(modules, experts, full, tokens, untied)


def merged_tensors(
    settings: Mapping[str, Any], plan: Plan, weights: Weights, config: Mapping[str, Any], quantized: str
) -> Any:
    """Yield (name, tensor, changed, difference from PEFT's forward pass) of the merged model, one at a time."""
    biases: dict[str, Tensor] = {}
    deltas: dict[str, dict[str, Tensor]] = {}
    for name in weights:
        if name in biases:
            yield name, biases.pop(name), True, 0.0
            continue
        if name.endswith(".bias") and f"{name.removesuffix('.bias')}.lora_B.bias" in plan.modules.get(name[:-5], {}):
            continue  # comes with its weight, which is merged in one go
        if plan.untied and name in (TABLE, HEAD):
            continue  # written at the end, both
        yield from _one(name, name, settings, plan, weights, config, quantized, deltas, biases)
    yield from ((name, bias, True, 0.0) for name, bias in biases.items())
    if plan.untied:
        yield from _one(TABLE, TABLE, settings, plan, weights, config, "none", deltas, biases)
        yield from _one(
            HEAD, HEAD if HEAD in weights else TABLE, settings, plan, weights, config, "none", deltas, biases
        )


def _one(
    name: str, stored: str, settings: Mapping[str, Any], plan: Plan, weights: Weights, config: Mapping[str, Any],
    quantized: str, deltas: dict[str, dict[str, Tensor]], biases: dict[str, Tensor],
) -> Any:  # fmt: skip
    """One weight of the merged model; `stored` is its name in the base."""
    import torch

    from phi3_lora_plugin.export.merge_module import expert_deltas, merge_module

    module = name.rpartition(".")[0]
    tensor = plan.full[name] if name in plan.full else weights.read(stored)
    changed = name in plan.full
    if quantized != "none" and any(module.endswith(f".{p.path}") for p in projections(config)):
        tensor = _through_quantisation(tensor, quantized)
    if module in plan.tokens and name.endswith(".weight"):
        ids, rows = plan.tokens[module]
        tensor = tensor.index_copy(0, torch.tensor(ids), rows.to(tensor.dtype))
        changed = True
    difference = 0.0
    if module in plan.modules and name.endswith(".weight"):
        parts = plan.modules[module]
        bias = None
        if f"{module}.lora_B.bias" in parts:
            bias = weights.read(f"{module}.bias").float().clone()
        tensor, bias, difference = merge_module(settings, module, parts, tensor.float().clone(), bias)
        if difference > 1e-3 * max(1.0, float(tensor.abs().max())) * max(tensor.shape) ** 0.5:
            raise VerificationError(
                f"{name}: the merged module differs from PEFT's by {difference:.2e}; this is a defect, report it"
            )
        if bias is not None:
            biases[f"{module}.bias"] = bias
        changed = True
    expert = _expert_of(name, config)
    if expert and expert[0] in plan.experts:
        layer, parameter, part = expert
        if layer not in deltas:
            hidden, inner, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
            shapes = {"gate_up_proj": (count, 2 * inner, hidden), "down_proj": (count, hidden, inner)}
            deltas.clear()  # of the layer before: memory holds one
            deltas[layer] = expert_deltas(settings, layer, plan.experts[layer], shapes)
        if parameter in deltas[layer]:
            delta = deltas[layer][parameter]
            tensor = tensor.float() + (delta if part is None else delta[part])
            changed = True
    yield name, tensor, changed, difference


def _expert_of(name: str, config: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """(experts module, parameter, its part) that a weight on disk is; PhiMoE is stored expert by expert, w1 w2 w3."""
    inner = config.get("intermediate_size", 0)
    if match := re.fullmatch(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight", name):
        part = {"1": slice(0, inner), "2": slice(None), "3": slice(inner, 2 * inner)}[match[3]]
        return f"{match[1]}.mlp.experts", "down_proj" if match[3] == "2" else "gate_up_proj", (int(match[2]), part)
    if match := re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)", name):
        return match[1], match[2], None
    return None


def _expert_names(module: str, weights: Weights, config: Mapping[str, Any]) -> list[str]:
    """The names under which the base stores the experts of `module`."""
    if f"{module}.gate_up_proj" in weights:
        return [f"{module}.gate_up_proj", f"{module}.down_proj"]
    folder = module.replace(".mlp.experts", ".block_sparse_moe.experts")
    count = config.get("num_local_experts", 1)
    return [f"{folder}.{expert}.w{part}.weight" for expert in range(count) for part in (1, 2, 3)]


def _tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", False))


def _through_quantisation(weight: Tensor, kind: str) -> Tensor:
    """The values that bitsandbytes gives back for a weight that it was given to quantise."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MergeError('this needs bitsandbytes: pip install "phi3-lora-plugin[qlora]"') from error
    if kind == "nf4":
        stored, state = functional.quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        back: Tensor = functional.dequantize_4bit(stored, state)
        return back
    stored, rows, _ = functional.int8_vectorwise_quant(weight.half())
    result: Tensor = functional.int8_vectorwise_dequant(stored, rows)
    return result
