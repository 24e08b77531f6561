"""Put LoRA into a model: a real `peft.LoraConfig` from a checked plan, then proof that exactly that is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.coverage import CoverageRow as CoverageRow
from phi3_lora_plugin.lora.coverage import adapted_modules
from phi3_lora_plugin.lora.coverage import coverage as coverage
from phi3_lora_plugin.lora.coverage import render_coverage as render_coverage
from phi3_lora_plugin.lora.plan import TargetPlan
from phi3_lora_plugin.lora.targets import TargetError, describe, resolve_targets
from phi3_lora_plugin.lora.text_side import text_side_problems
from phi3_lora_plugin.wording import nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_PLACED = ("target_modules", "r", "lora_alpha", "lora_dropout")  # set by add_lora's own arguments
_RESOLVED = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "target_parameters")
_SPENT = ("layers_pattern",)  # PEFT's name for the list of layers, which is always `layers` here
_OURS = ("autocast_adapter_dtype", "revision", "data")
_BESIDE_THE_POINT = (
    ".*is_gradient_checkpointing",  # PEFT asks transformers for a name that is deprecated there
    ".*did not match any targeted module",  # PEFT looks for the patterns of parameters among the modules
    ".*low_cpu_mem_usage=False",  # EVA's advice on memory
    ".*path_initial_model_for_weight_conversion",  # PEFT's limit, which `methods.plain_lora` does not have
)


class InjectionError(Phi3LoraError, RuntimeError):
    """After injection, the model would not train what was planned; nothing has been trained yet."""


def add_lora(
    model: PreTrainedModel, targets: str | Iterable[str], r: int, alpha: float, dropout: float = 0.0, **options: Any
) -> PeftModel:
    """Put LoRA on the named projections of a Phi model and return it as the `PeftModel` that PEFT itself would build.

    The model is changed in place. Base weights are frozen, adapters are float32 whatever the base is (for stability;
    `autocast_adapter_dtype=False` keeps the base's), quantised bases are left as they are.

    Args:
        targets: fused names, slices by their unfused names, `all-linear`, `experts`, or a regular expression; see
            `targets.resolve_targets` and docs/targets.md.
        alpha: the update is scaled by `alpha / r`, with `use_rslora` by `alpha / sqrt(r)`.
        **options: fields of `peft.LoraConfig` by their names there, and
            `autocast_adapter_dtype` (True); `revision` of the base, for the saved config (what the config knows, if
            not given); `data`, batches of model inputs for `init_lora_weights="eva"`.

    Raises:
        TargetError: with everything that is wrong with the targets and options, before the model is touched.
        UnsupportedModel: not a model of the Phi family.
        InjectionError: PEFT built something different from the plan.
    """
    from peft import LoraConfig, get_peft_model

    from phi3_lora_plugin.lora import methods
    from phi3_lora_plugin.lora.slices import apply_slices, clear_outside_blocks

    problems = list(_option_problems(options))
    init = options.get("init_lora_weights", True)
    init = True if init == "default" else init
    if hasattr(model, "peft_config") or any("lora_" in name for name, _ in model.named_parameters()):
        problems.append("the model already has an adapter; start from the base, or load the adapter to resume")
        raise TargetError(problems)
    try:
        plan = resolve_targets(
            model,
            targets,
            r,
            alpha,
            rslora=bool(options.get("use_rslora")),
            **{name: options[name] for name in _RESOLVED if options.get(name) is not None},
        )
    except TargetError as error:
        raise TargetError([*problems, *error.problems], describe(model.config.to_dict())) from None
    problems += _misfits(model, plan, dropout, init, options)
    if problems:
        raise TargetError(problems, describe(model.config.to_dict()))
    _warn_of_nothing_to_do(model, options)

    with warnings.catch_warnings(), methods.repeatable(init):
        for message in _BESIDE_THE_POINT:
            warnings.filterwarnings("ignore", message=message)
        peft_model = get_peft_model(
            model,
            LoraConfig(**_config_fields(model, plan, dropout, init, options)),
            autocast_adapter_dtype=options.get("autocast_adapter_dtype", True),
            revision=options.get("revision") or getattr(model.config, "_commit_hash", None),
        )
    if plan.blocks:
        if init is False:
            clear_outside_blocks(peft_model, plan)
        if init == "gaussian":
            methods.gaussian_blocks(peft_model, plan)
        apply_slices(peft_model, plan)
    methods.finish_init(peft_model, init, options)
    config = peft_model.peft_config["default"]
    if config.target_modules is not None:  # PEFT keeps a set, whose order in the saved file changes from run to run
        config.target_modules = sorted(config.target_modules)
    _check(peft_model, plan, options)
    return peft_model


def prepare_for_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Make gradients reach the adapters through checkpointed layers: the frozen embeddings' output requires grad.

    Call it before training with gradient (activation) checkpointing; also switches the key-value cache off, which
    checkpointing cannot use.
    """
    model.enable_input_require_grads()
    model.config.use_cache = False


def prepare_for_loss_scaling(model: PreTrainedModel | PeftModel) -> None:
    """Hold every trained float16 parameter in float32, modules saved as a whole included; adapters are so already.

    Mixed precision in float16 scales the loss, and torch's GradScaler refuses to unscale float16 gradients.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()


def _config_fields(
    model: PreTrainedModel, plan: TargetPlan, dropout: float, init: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig`; only those that are needed, so that older versions accept them too."""
    from phi3_lora_plugin.lora import methods

    used = (*_RESOLVED, *_SPENT, *_OURS)
    found = {
        "task_type": "CAUSAL_LM",
        **{name: value for name, value in options.items() if name not in used},
        "r": plan.r,
        "lora_alpha": plan.alpha,
        "lora_dropout": dropout,
        "target_modules": plan.target_modules or None,
        "target_parameters": plan.target_parameters or None,
        "layers_to_transform": plan.layers_to_transform,
        "exclude_modules": plan.exclude_modules,
        "rank_pattern": plan.rank_pattern,
        "alpha_pattern": plan.alpha_pattern,
        "modules_to_save": _full_where_ambiguous(options.get("modules_to_save"), model),
        **methods.init_options(init, options),
    }
    return {name: value for name, value in found.items() if value is not None}


def _option_problems(options: Mapping[str, Any]) -> Iterator[str]:
    from peft import LoraConfig

    names = [field.name for field in fields(LoraConfig)]
    for name in options:
        if name in _PLACED:
            yield f"{name}: use add_lora's own arguments targets, r, alpha and dropout"
        elif name not in names and name not in _OURS:
            guess = nearest(name, [*names, *_OURS], "; peft.LoraConfig has none such")
            yield f"{name}: unknown option{guess}"
    if (bias := options.get("bias", "none")) not in ("none", "all", "lora_only"):
        yield f"bias: expected 'none', 'all' or 'lora_only', got {bias!r}"
    if options.get("layers_pattern") not in (None, "layers", ["layers"]):
        yield f"layers_pattern: Phi keeps its layers in 'layers', got {options['layers_pattern']!r}"


def _misfits(
    model: PreTrainedModel, plan: TargetPlan, dropout: float, init: Any, options: Mapping[str, Any]
) -> Iterator[str]:
    """What cannot work together, with the reason."""
    from phi3_lora_plugin.lora import methods

    yield from methods.init_problems(model, plan, init, options)
    yield from text_side_problems(model, methods.rewrites_base(init), init, options)
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        yield f"dropout: expected a number from 0 to below 1, got {dropout!r}"
    modules = dict(model.named_modules())
    for target in plan.targets:
        owner, _, name = target.module.rpartition(".")
        if (target.module not in modules) if not target.experts else (not hasattr(modules.get(owner), name)):
            yield f"{target.module} is not in this model: its modules differ from its config"
            break
    variants = [
        name
        for name in ("use_dora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "monteclora_config",
                     "kasa_config", "arrow_config")
        if options.get(name)
    ]  # fmt: skip
    if plan.blocks:
        slices = ", ".join(dict.fromkeys(block.name for blocks in plan.blocks.values() for block in blocks))
        yield from (
            f"{name} does not go with slices ({slices}): it changes or reads all rows of the fused projection; "
            "name the fused projection instead"
            for name in variants
        )
    if plan.target_parameters:
        yield from (
            f"{name} does not go with experts: PEFT adapts their stacked weights by plain LoRA only"
            for name in variants
        )
        if dropout:
            yield (
                f"dropout {dropout} does not go with experts: PEFT adds LoRA to their weights before they see an "
                "input that could be dropped; use dropout 0"
            )
    yield from _save_problems(model, plan, options, set(modules))
    yield from _token_problems(model, options)


def _save_problems(model: Any, plan: TargetPlan, options: Mapping[str, Any], modules: set[str]) -> Iterator[str]:
    adapted = {target.module for target in plan.targets}
    for name in options.get("modules_to_save") or ():
        hits = {module for module in modules if module == name or module.endswith(f".{name}")}
        if not hits:
            hint = nearest(name, {module.rpartition(".")[2] for module in modules})
            yield f"modules_to_save: {name!r} matches no module{hint}"
        elif any(hit == module or module.startswith(f"{hit}.") for hit in hits for module in adapted):
            yield f"modules_to_save: {name!r} is trained in full and cannot have LoRA as well"
        elif any(hit.endswith("mlp.router") for hit in hits):
            yield f"modules_to_save: {name!r} is the router of the experts, which is never trained here"
        elif _tied(model) and name in ("lm_head", "embed_tokens") and not options.get("ensure_weight_tying"):
            yield (
                f"modules_to_save: {name!r} shares its weight (tie_word_embeddings), and a trained copy would "
                "differ from the other; set ensure_weight_tying, or train single tokens by trainable_token_indices"
            )


def _full_where_ambiguous(names: Iterable[str] | None, model: Any) -> list[str] | None:
    """PEFT takes every module whose path ends in these letters: `norm` would train each `input_layernorm` too."""
    modules = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for name in names or ():
        exact = [module for module in modules if module == name or module.endswith(f".{name}")]
        found += [name] if exact == [module for module in modules if module.endswith(name)] else exact
    return found or None


def _token_problems(model: Any, options: Mapping[str, Any]) -> Iterator[str]:
    asked = options.get("trainable_token_indices")
    if asked is None:
        return
    by_module = asked if isinstance(asked, Mapping) else {"embed_tokens": asked}
    ids = [token for each in by_module.values() for token in each]
    size = model.get_input_embeddings().weight.shape[0]
    wrong = [token for token in ids if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size]
    if wrong or not ids:
        yield f"trainable_token_indices: expected token ids of 0 to {size - 1}, got {wrong or 'none'}"
    known = {name.rpartition(".")[2]: hasattr(module, "weight") for name, module in model.named_modules()}
    yield from (
        f"trainable_token_indices: {name!r} matches no module with a weight{nearest(name, known)}"
        for name in by_module
        if not known.get(name.rpartition(".")[2])
    )
    whole = {name.rpartition(".")[2] for name in options.get("modules_to_save") or ()}
    twice = {name.rpartition(".")[2] for name in by_module} & whole
    yield from (
        f"trainable_token_indices: all of {name} is trained by modules_to_save already; leave one of them out"
        for name in sorted(twice)
    )


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _warn_of_nothing_to_do(model: Any, options: Mapping[str, Any]) -> None:
    bias = options.get("bias", "none")
    if bias != "none" and not any(name.endswith(".bias") for name, _ in model.named_parameters()):
        warnings.warn(f"bias={bias!r} trains nothing extra: this model has no biases", stacklevel=3)


def _check(model: Any, plan: TargetPlan, options: Mapping[str, Any]) -> None:
    """Check the finished model: LoRA exactly where the plan puts it, with its scaling, and nothing else trained."""
    from phi3_lora_plugin.lora import methods

    layers = adapted_modules(model)
    config = model.peft_config["default"]
    planned = {target.module: target for target in plan.targets}
    problems = []
    if methods.eva_rho(options) == 1:  # else EVA is configured to move rank between layers, and chooses the ranks
        problems += [f"{path} has LoRA but is not in the plan" for path in sorted(layers.keys() - planned.keys())]
        problems += [f"{path} is planned but has no LoRA" for path in sorted(planned.keys() - layers.keys())]
        for path in sorted(layers.keys() & planned.keys()):
            rank, scaling = layers[path].r["default"], layers[path].scaling["default"]
            want = planned[path].alpha / (planned[path].rank ** (0.5 if plan.rslora else 1))
            if rank != planned[path].rank or abs(scaling - want) > 1e-9 * want:
                problems.append(f"{path}: rank {rank} and scaling {scaling}, planned {planned[path].rank} and {want}")
    for name, parameter in model.named_parameters():
        extra = (
            "modules_to_save" in name and any(f"{module}." in name for module in config.modules_to_save or ())
            or "trainable_tokens_" in name
            or (config.bias != "none" and name.endswith("bias"))
        )  # fmt: skip
        if parameter.requires_grad and "lora_" not in name and not extra:
            problems.append(f"{name} would be trained but is not in the plan")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        problems.append("nothing would be trained")
    if problems:
        raise InjectionError("PEFT built something different from the plan:\n" + "\n".join(problems))
