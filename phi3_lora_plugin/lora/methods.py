"""Ways to start and train LoRA that need more than a config field: PiSSA, OLoRA, LoftQ, EVA, LoRA+."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.recipe.sections import INIT, INITS
from phi3_lora_plugin.wording import nearest

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, TrainingArguments

    from phi3_lora_plugin.lora.plan import TargetPlan

_EVA_PASSES = 1000


class MethodError(Phi3LoraError):
    """A method's pass over data or weights cannot be done, with what it would need."""


def init_problems(model: PreTrainedModel, plan: TargetPlan, init: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Why this `init_lora_weights` cannot be used here; empty if it can."""
    known = isinstance(init, bool) or re.fullmatch(INIT, str(init)) is not None
    if not known and init in ("corda", "lora_ga"):
        yield f"init_lora_weights: {init!r} needs a pass of PEFT's own over data first, which is not offered here"
    elif not known:
        yield f"init_lora_weights: {init!r} is not one of {', '.join(INITS)}{nearest(init, INITS)}"
    quantised = bool(getattr(model, "is_quantized", False))
    if rewrites_base(init) and quantised:
        yield (
            f"init_lora_weights: {init!r} takes part of the base weights into the adapter, and rounding the rest again "
            "would lose the quantised base that the adapter belongs to; use an unquantised base"
        )
    if init == "eva" and isinstance(config := options.get("eva_config"), Mapping):
        from peft import EvaConfig

        names = [field.name for field in fields(EvaConfig)]
        yield from (
            f"eva_config: unknown key {name!r}{nearest(name, names)}; available: {', '.join(names)}"
            for name in config
            if name not in names
        )
    if init == "loftq" and not getattr(model, "is_loaded_in_4bit", False):
        yield (
            "init_lora_weights: 'loftq' starts from the rounding error of a 4-bit base, and this base is not in 4 bit; "
            "load it with quantize nf4"
        )
    if init == "loftq" and (config := options.get("loftq_config")):
        settings = config if isinstance(config, Mapping) else vars(config)
        if (settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)) != (4, 1):
            yield (
                "loftq_config: the base is quantised already, to 4 bits and once, so loftq_bits 4 and loftq_iter 1 are "
                f"what there is; got {dict(settings)}"
            )
    if init == "eva" and options.get("data") is None:
        yield "init_lora_weights: 'eva' starts from what the layers see: pass batches of model inputs as data"
    if init != "eva" and options.get("data") is not None:
        yield f"data: only init_lora_weights='eva' uses it, not {init!r}"
    for name, owner in (("eva_config", "eva"), ("loftq_config", "loftq")):
        if options.get(name) and init != owner:
            yield f"{name}: only init_lora_weights={owner!r} uses it, not {init!r}"
    factorised = rewrites_base(init) or init in ("eva", "loftq", "orthogonal", "mica")
    if plan.blocks and factorised:
        yield (
            f"init_lora_weights: {init!r} starts from a factorisation for all rows of the fused projection at once, "
            "which fills B between the slices; name the fused projection, or use the default or gaussian start"
        )
    if plan.target_parameters and not (isinstance(init, bool) or init == "gaussian"):
        yield f"init_lora_weights: {init!r} does not go with experts, whose weights are not linear layers"
    high = next((one for one in plan.targets if one.rank > min(one.in_features, one.out_features)), None)
    if factorised and high is not None:
        small = min(high.in_features, high.out_features)
        yield f"init_lora_weights: {init!r} needs a rank of at most {small} in {high.module}, got {high.rank}"
    if init == "orthogonal" and any(target.rank % 2 for target in plan.targets):
        yield "init_lora_weights: 'orthogonal' needs even ranks"


def init_options(init: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `peft.LoraConfig` for this init, where PEFT has no name for it."""
    if init == "loftq":  # ours, after injection: PEFT's wants CUDA and takes alpha for r
        return {"init_lora_weights": True, "loftq_config": {}}
    if init == "eva":
        from peft import EvaConfig

        given = options.get("eva_config") or {}
        settings = {"rho": eva_rho(options), **given} if isinstance(given, Mapping) else vars(given)
        return {"init_lora_weights": init, "eva_config": EvaConfig(**settings)}
    return {"init_lora_weights": init}


def eva_rho(options: Mapping[str, Any]) -> float:
    """How much rank EVA may move between layers. 1, not PEFT's 2: taking LoRA out of layers has to be asked for."""
    given = options.get("eva_config") or {}
    return float(given.get("rho", 1.0) if isinstance(given, Mapping) else given.rho)


@contextmanager
def repeatable(init: Any) -> Iterator[None]:
    """Fix the seed of PiSSA's randomised factorisation, so that a run that resumes splits the base the same way."""
    import torch

    if not str(init).startswith("pissa_niter"):
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def gaussian_blocks(model: PeftModel, plan: TargetPlan, adapter: str = "default") -> None:
    """Start the A of each slice with the deviation 1/r of its own rank; PEFT has used that of all of them together."""
    import torch

    from phi3_lora_plugin.lora.slices import lora_layers

    layers = lora_layers(model, adapter)
    for module, blocks in plan.blocks.items():
        rows = layers[module].lora_A[adapter].weight.data.split([block.rank for block in blocks])
        for block, part in zip(blocks, rows, strict=True):
            torch.nn.init.normal_(part, std=1 / block.rank)


def finish_init(model: PeftModel, init: Any, options: Mapping[str, Any]) -> None:
    """What has to happen once the adapter is in the model: a pass over data or weights, or keeping the start."""
    if init == "eva":
        initialize_eva(model, options["data"])
    elif init == "loftq":
        initialize_loftq(model)
    elif rewrites_base(init):
        _keep_start(model)


def initialize_eva(model: PeftModel, data: Iterable[Mapping[str, Tensor]], adapter: str = "default") -> None:
    """Start A from the main directions of what each layer sees (EVA, arXiv 2410.07170; PEFT's incremental SVD).

    Args:
        model: built with `init_lora_weights="eva"`.
        data: batches of model inputs, on any device. With labels, only supervised tokens count. Every batch needs as
            many of these as the SVD has components, the largest rank times rho; smaller batches are skipped.

    Raises:
        MethodError: no batch is large enough, or the directions do not settle.
    """
    from peft import initialize_lora_eva_weights

    config = model.peft_config[adapter]
    rho = config.eva_config.rho
    need = max(round(rho * rank) for rank in [config.r, *config.rank_pattern.values()])
    batches = [dict(batch) for batch in data]
    sizes = [_counted(batch) for batch in batches]
    usable = [batch for batch, size in zip(batches, sizes, strict=True) if size >= need]
    if not usable:
        raise MethodError(
            f"EVA needs batches of at least {need} tokens that count (rank x rho); the largest of {len(batches)} has "
            f"{max(sizes, default=0)}. Use larger batches or a smaller rank"
        )
    passes = 0

    def forward(net: Any, batch: Mapping[str, Tensor]) -> Any:
        nonlocal passes
        passes += 1
        if passes > _EVA_PASSES:
            raise MethodError(
                f"EVA's directions have not settled after {_EVA_PASSES} batches; give it more varied data"
            )
        return net(**batch)

    modules, patterns = config.target_modules, (config.rank_pattern, config.alpha_pattern)
    initialize_lora_eva_weights(model, usable, forward_fn=forward, adapter_name=adapter, show_progress_bar=False)
    # From here on it is plain LoRA, and is saved as that: any host and any PEFT can load it.
    config = model.peft_config[adapter]
    config.init_lora_weights, config.eva_config = True, None
    if rho == 1:
        config.target_modules, (config.rank_pattern, config.alpha_pattern) = modules, patterns


def _counted(batch: Mapping[str, Tensor]) -> int:
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else batch["input_ids"] >= 0
    return int((mask & (batch["labels"] != -100)).sum() if "labels" in batch else mask.sum())


def initialize_loftq(model: PeftModel, base: str | Path | None = None, adapter: str = "default") -> None:
    """Start B A from the best rank-r part of what 4-bit rounding took from each layer (LoftQ, arXiv 2310.08659).

    The quantised base stays as it is, so the adapter loads on the same base quantised again. Unlike PEFT's function,
    this runs on any device and allows for the scaling.

    Args:
        base: folder or hub id of the unquantised weights, as safetensors; the model's own path if not given.

    Raises:
        MethodError: the weights are not there.
    """
    import torch

    from phi3_lora_plugin.lora.slices import lora_layers
    from phi3_lora_plugin.model.folder import ModelError, model_folder
    from phi3_lora_plugin.model.shards import Weights

    path = base or model.get_base_model().name_or_path
    try:
        weights = Weights(model_folder(path, model.peft_config[adapter].revision))
    except ModelError as error:
        raise MethodError(f"LoftQ needs the unquantised weights as safetensors: {error}") from error
    for name, layer in lora_layers(model, adapter).items():
        if f"{name}.weight" not in weights:
            raise MethodError(f"LoftQ: {path} has no weight {name}.weight")
        quantised = _dequantised(layer.get_base_layer())
        residual = weights.read(f"{name}.weight").to(quantised.device, torch.float32) - quantised
        left, sizes, right = torch.linalg.svd(residual, full_matrices=False)
        root, rank = (sizes / layer.scaling[adapter]).sqrt(), layer.r[adapter]
        for linear, value in (
            (layer.lora_A[adapter], root[:rank, None] * right[:rank]),
            (layer.lora_B[adapter], left[:, :rank] * root[:rank]),
        ):
            linear.weight.data.copy_(value)


def _dequantised(layer: Any) -> Tensor:
    import bitsandbytes

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def plain_lora(model: PeftModel, adapter: str = "default") -> tuple[dict[str, Tensor], LoraConfig]:
    """The adapter as it has to be saved to mean the same on the *original* base: tensors and config.

    Most adapters are that already. PiSSA and OLoRA have taken part of the base into A and B, and a server that loads
    these on the original base adds that part twice; here they become plain LoRA of twice the rank, trained minus
    start. Exact up to the rounding of the base's dtype. PEFT's `path_initial_model_for_weight_conversion` does this
    too, but needs the start on disk and refuses rsLoRA with patterns.

    Raises:
        MethodError: the start is not known, because the model was not built by `add_lora`.
    """
    import torch
    from peft import get_peft_model_state_dict

    from phi3_lora_plugin.lora.slices import lora_layers
    from phi3_lora_plugin.lora_files.keys import PREFIX

    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    plain = {name: tensor.detach() for name, tensor in state.items()}
    if not rewrites_base(config.init_lora_weights):
        return plain, config
    for module, layer in lora_layers(model, adapter).items():
        start = getattr(layer, "lora_start", {}).get(adapter)
        if start is None:
            raise MethodError(
                f"{module}: where {config.init_lora_weights} started is not known; build the model by add_lora"
            )
        key_a, key_b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        first_a, first_b = (tensor.to(plain[key_a]) for tensor in start)
        plain[key_a] = torch.cat([plain[key_a], first_a], dim=0)
        plain[key_b] = torch.cat([plain[key_b], -first_b], dim=1)
    growth = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, config.lora_alpha * growth
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {name: alpha * growth for name, alpha in config.alpha_pattern.items()}
    return plain, config


def rewrites_base(init: Any) -> bool:
    """Whether this init subtracts the start of the adapter from the base weights."""
    return init in ("pissa", "olora") or bool(re.fullmatch(r"pissa_niter_\d+", str(init)))


def _keep_start(model: PeftModel, adapter: str = "default") -> None:
    from phi3_lora_plugin.lora.slices import lora_layers

    for layer in lora_layers(model, adapter).values():
        factors = (layer.lora_A[adapter], layer.lora_B[adapter])
        layer.lora_start = {adapter: tuple(factor.weight.detach().clone().cpu() for factor in factors)}


def loraplus_optimizer(model: PeftModel, args: TrainingArguments, ratio: float) -> Optimizer:
    """The optimizer that `args` names, with B learning `ratio` times as fast as A (LoRA+, arXiv 2402.12354).

    Pass it to a Trainer as `optimizers=(optimizer, None)`; the schedule stays the Trainer's own. The learning rate and
    weight decay of `args` hold for A; embeddings with LoRA keep PEFT's 1e-6.

    Raises:
        MethodError: the ratio is below 1, or the optimizer cannot have groups of its own.
    """
    from peft.optimizers import create_loraplus_optimizer
    from transformers import Trainer

    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or ratio < 1:
        raise MethodError(f"LoRA+ ratio: expected a number of at least 1 (the paper uses 16), got {ratio!r}")
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if "optimizer_dict" in settings or "params" in settings or "model" in settings:
        raise MethodError(f"LoRA+ does not go with optim={args.optim}, which lays out the parameters itself")
    settings.pop("lr", None)
    return create_loraplus_optimizer(
        model, kind, lr=args.learning_rate, loraplus_lr_ratio=ratio, loraplus_weight_decay=args.weight_decay, **settings
    )
