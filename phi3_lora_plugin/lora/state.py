"""The LoRA part of a model and nothing else: which parameters it is, taking it out, putting it back.

loralib's three functions, for loralib's layers, for PEFT's (wrapped, added by `add_adapter`, injected) and for slices.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.finite import not_finite
from phi3_lora_plugin.lora.gather import gather, is_flattened, is_partitioned, sharded_like, unwrapped, whole_shape
from phi3_lora_plugin.lora.state_input import copies_of_the_base, no_numbers
from phi3_lora_plugin.lora.walk import parameter_shapes
from phi3_lora_plugin.lora_files.keys import index_of, is_lora, spelling, without_wrappers
from phi3_lora_plugin.seams import require
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)


class StateError(Phi3LoraError):
    """A LoRA state that does not fit the model, or a model whose LoRA state cannot be taken out."""


class UnknownBias(Phi3LoraError, NotImplementedError):
    """`bias` is not one of the three words; a NotImplementedError as in loralib, a ValueError as everywhere else."""


class LoadReport(NamedTuple):
    """What a load left over: names of the model that got no value, and unused keys of the state."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Freeze everything but LoRA (A, B, DoRA's magnitudes, PEFT's modules_to_save and trained tokens).

    As in loralib (microsoft/LoRA, `loralib.utils`), frozen LoRA of loralib's layers stays frozen. In PEFT layers the
    active adapters become trainable, also when they were loaded for inference.

    Args:
        bias: "none"; "all", every parameter named `bias`; "lora_only", those of the layers that have LoRA.

    Raises:
        UnknownBias: any other word.
    """
    _check_bias(bias)
    inner = unwrapped(model)
    active = _active_peft_names(inner)
    wanted = _bias_names(inner, bias)
    found = False
    for name, parameter in inner.named_parameters():
        plain = without_wrappers(name)
        if is_lora(plain):
            found = True
            adapter = spelling(plain).adapter
            if adapter is not None and active is not None:
                parameter.requires_grad_(adapter in active)
        else:
            parameter.requires_grad_(plain in wanted)
    if not found:
        log.warning("%s has no LoRA parameter: everything is frozen now", type(inner).__name__)


def lora_state_dict(model: nn.Module, bias: str = "none", *, adapter: str | None = None) -> dict[str, Tensor]:
    """The LoRA tensors of a model by the names that its own `state_dict` has, without those of wrappers around it.

    The tensors are the live ones (detached), as in loralib. Sharded ones are gathered, which is a collective: call it
    on every rank.

    Args:
        bias: as for `mark_only_lora_as_trainable`. Buffers that happen to be called `bias` are never among them.
        adapter: of a PEFT model, only this one; else all of them.

    Raises:
        UnknownBias: any other word.
        StateError: the model has no adapter of this name.
    """
    inner = unwrapped(model)
    names = wrapped_lora_names(inner, bias, adapter)
    return {without_wrappers(name): tensor for name, tensor in gather(model, inner, names).items()}


def lora_names(model: nn.Module, bias: str = "none", *, adapter: str | None = None) -> list[str]:
    """The keys that `lora_state_dict` gives, without touching a tensor."""
    return [without_wrappers(name) for name in wrapped_lora_names(unwrapped(model), bias, adapter)]


def wrapped_lora_names(inner: nn.Module, bias: str, adapter: str | None) -> list[str]:
    """As `lora_names`, spelled as the model spells them: with the wrappers around its layers."""
    _check_bias(bias)
    if adapter is not None and adapter not in (known := adapters_of(inner)):
        raise StateError(f"no adapter {adapter!r}; the model has {', '.join(sorted(known)) or 'none'}")
    biases = _bias_names(inner, bias)
    named = ((name, without_wrappers(name)) for name in _state_names(inner))
    return [
        name
        for name, plain in named
        if (is_lora(plain) or plain in biases) and (adapter is None or spelling(plain).adapter in (adapter, None))
    ]


def load_lora_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True, *, adapter: str | None = None
) -> LoadReport:
    """Put LoRA tensors into a model that has the layers for them, whichever of the usual spellings their keys have.

    Keys may be those of `lora_state_dict`, of PEFT's files (no adapter name) or loralib's, with or without the prefixes
    that DDP, FSDP and torch.compile add. Values are cast to the parameters' types. A layer whose LoRA is merged into
    its weight is unmerged, loaded and merged again. Sharded parameters get their shard: call it on every rank.

    Args:
        strict: a missing or unexpected key is an error, and nothing is loaded.
        adapter: of a PEFT model with several, the one that a state without adapter names is for; else the active one.

    Raises:
        StateError: missing or unexpected keys if `strict`; in any case misshapen or non-finite tensors, values that
            are not tensors, a key that could mean two parameters, or weights of another base, which PEFT writes next
            to adapted embeddings. The model is then as before.
    """

    inner = unwrapped(model)
    if is_flattened(inner):
        raise StateError("FSDP1 has flattened the parameters: load the LoRA state before the model is wrapped")
    if adapter is not None and adapter not in (known := adapters_of(inner)):
        raise StateError(f"no adapter {adapter!r}; the model has {', '.join(sorted(known)) or 'none'}")
    targets = _parameters(inner)
    index = index_of(targets, adapter or _default_adapter(inner), _tied_names(inner))
    chosen, unexpected, problems = index.match(state)
    unexpected, others = copies_of_the_base(model, inner, state, unexpected)
    filled = set(chosen.values())
    missing = [name for name in index.expected(filled) if name not in filled]
    odd = {key: what for key in chosen if (what := no_numbers(state[key]))}
    tensors = {key: name for key, name in chosen.items() if key not in odd}
    found = {
        "of the base, and the model has other values there": others,
        "missing, so these would keep what they have": missing if strict else [],
        "unexpected, nothing in the model takes them": unexpected if strict else [],
        "not floating-point numbers": [f"{key} ({what})" for key, what in odd.items()],
        "of another shape": [
            f"{key}: {tuple(state[key].shape)}, the model has {tuple(whole_shape(targets[name]))}"
            for key, name in tensors.items()
            if tuple(state[key].shape) != tuple(whole_shape(targets[name]))
        ],
        "not finite (NaN or Inf)": not_finite({key: state[key] for key in tensors}),
    }
    problems += [f"  {len(names)} {what}: {listed(names)}" for what, names in found.items() if names]
    if problems:
        raise StateError("the LoRA state does not fit the model:\n" + "\n".join(problems))
    if not chosen:
        log.warning("none of the %d tensors is for this model; nothing was loaded", len(state))
    with _unmerged(inner):
        _write(inner, targets, {name: state[key] for key, name in chosen.items()})
    return LoadReport(missing, unexpected)


def adapters_of(model: nn.Module) -> set[str]:
    """The names of the PEFT adapters in a model; empty for loralib's layers."""
    names = (spelling(without_wrappers(name)).adapter for name in _state_names(model))
    return {name for name in names if name is not None}


def active_adapter(model: nn.Module) -> str | None:
    """The one PEFT adapter that is trained, or active if none is; None if that is not one."""
    trained = {
        each.adapter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (each := spelling(without_wrappers(name))).adapter is not None
    }
    if not trained:
        return _default_adapter(model)
    return next(iter(trained)) if len(trained) == 1 else None


def _check_bias(bias: str) -> None:
    if bias not in ("none", "all", "lora_only"):
        raise UnknownBias(f"bias: expected 'none', 'all' or 'lora_only', got {bias!r}")


def _state_names(model: nn.Module) -> list[str]:
    """Parameters once each, and persistent buffers that belong to LoRA; in the order of the model."""
    require("torch.buffers", "torch.persistent")
    names = list(parameter_shapes(model))
    for prefix, module in model.named_modules():
        names += [
            f"{prefix}.{name}" if prefix else name
            for name in module._buffers
            if name.startswith("lora_") and name not in module._non_persistent_buffers_set
        ]
    return names


def _bias_names(model: nn.Module, bias: str) -> set[str]:
    """Real parameters called `bias`, by plain name: all, or those of the layers that have LoRA."""
    if bias == "none":
        return set()
    found = {
        without_wrappers(name)
        for name, _ in model.named_parameters()
        if name.rpartition(".")[2] == "bias" and not is_lora(name) and ".original_module." not in f".{name}"
    }
    if bias == "all":
        return found
    layers = {re.split(r"(?:^|\.)lora_", without_wrappers(name))[0] for name in _state_names(model) if is_lora(name)}
    # The layer itself (loralib), what PEFT wraps, and what loralib's Conv layers wrap.
    return found & {
        ".".join(part for part in (layer, inside, "bias") if part)
        for layer in layers
        for inside in ("", "base_layer", "conv")
    }


def _active_peft_names(model: nn.Module) -> set[str] | None:
    active: set[str] | None = None
    for module in model.modules():
        names = getattr(module, "active_adapters", None)
        if isinstance(names, (list, tuple)) and hasattr(module, "base_layer"):
            active = (active or set()) | set(names)
    return active


def _default_adapter(model: nn.Module) -> str | None:
    names = _active_peft_names(model) or adapters_of(model)
    return next(iter(names)) if len(names) == 1 else None


def _parameters(model: nn.Module) -> dict[str, Any]:
    """Everything that a state may be for, by plain name: LoRA tensors and parameters called `bias`."""
    biases = _bias_names(model, "all")
    found = {without_wrappers(name): parameter for name, parameter in model.named_parameters()}
    for name, buffer in model.named_buffers():
        if is_lora(without_wrappers(name)):
            found[without_wrappers(name)] = buffer
    return {name: tensor for name, tensor in found.items() if is_lora(name) or name in biases}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several -> the name that `_parameters` uses."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = without_wrappers(name)
        if is_lora(plain) and first.setdefault(id(parameter), plain) != plain:
            found[plain] = first[id(parameter)]
    return found


@contextmanager
def _unmerged(model: nn.Module) -> Iterator[None]:
    """Take LoRA out of the weights that it is merged into, and put it back at the end."""
    peft, loralib = [], []
    for module in model.modules():
        if getattr(module, "merged", False) is not True:
            continue
        if hasattr(module, "merged_adapters"):
            peft.append((module, list(module.merged_adapters)))
        elif hasattr(module, "merge_weights"):
            loralib.append((module, module.training))
    for layer, _ in peft:
        layer.unmerge()
    for layer, _ in loralib:
        layer.train(True)  # loralib subtracts its update here
    try:
        yield
    finally:
        for layer, names in peft:
            layer.merge(adapter_names=names)
        for layer, training in loralib:
            layer.train(training)


def _write(model: nn.Module, targets: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters; if a layer refuses its own, every parameter gets back what it had."""
    import torch

    partitioned = [targets[name] for name in values if is_partitioned(targets[name])]
    if partitioned:
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0), torch.no_grad():
            for name, value in values.items():
                targets[name].copy_(value)
        return
    modules = {without_wrappers(path): module for path, module in model.named_modules()}
    before = {name: targets[name].detach().clone() for name in values}
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            # By the layer's own hook, so that its checks run (slices refuse values between their blocks).
            modules[path].load_state_dict({leaf: sharded_like(value, targets[name])}, strict=False)
    except RuntimeError as error:
        with torch.no_grad():
            for name, value in before.items():
                targets[name].copy_(value)
        raise StateError(f"the LoRA state does not fit the model:\n{error}") from error
