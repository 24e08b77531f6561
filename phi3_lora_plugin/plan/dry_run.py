"""A training step on tensors that have shapes and no storage: which of them are alive at once, and what they are.

The model, its LoRA, the fast paths and the optimizer are the real ones and run the real code; only nothing is computed
(torch's fake tensors). So autograd saves here what it saves there, and nothing has to be kept in step by hand.

Decoder layers are alike, so models of two and of three of them are run (`extend`).
"""

# This module imports something heavy; it is imported only inside functions.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch  # noqa: TID253
import torch.utils.checkpoint  # noqa: TID253

from phi3_lora_plugin.plan.extend import LONGEST, Footprint, Kinds, alike, extended, shortened
from phi3_lora_plugin.plan.live import Live, Moment, mark_layers, size_of
from phi3_lora_plugin.plan.packed import make_buffers
from phi3_lora_plugin.seams import look_up, require
from phi3_lora_plugin.speed.device_kind import dry_run_for
from phi3_lora_plugin.training.checkpointing import Checkpointing, checkpointing_of

FakeTensorMode: Any = look_up("torch.fake_mode")
require("torch.parameters", "torch.buffers", "transformers.attention", "transformers.checkpointing")

_STARTS = ("init_lora_weights", "data", "eva_config", "loftq_config")


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens of its rows, the share of them that is supervised, and whether they are packed."""

    lengths: tuple[int, ...]
    supervised: float = 1.0
    packed: bool = False

    @property
    def width(self) -> int:
        """Positions of a row, as the collators make them: packs are one row, others are padded to multiples of 8."""
        return sum(self.lengths) if self.packed else -(-max(self.lengths) // 8) * 8

    @property
    def tokens(self) -> int:
        """Positions of all rows, padding included."""
        return self.width if self.packed else self.width * len(self.lengths)


@dataclass(frozen=True)
class Run:
    """What is run: as `footprint` takes it, but for the config."""

    lora: Mapping[str, Any]
    arguments: Any
    batch: Batch
    dtype: Any
    mixed: str
    quantize: str
    speed: Any
    attention: str
    evaluate: Batch | None
    device: str
    memory: int | None


def dry_runs(
    config: Any,
    lora: dict[str, Any],
    arguments: Any,
    batch: Batch,
    *,
    dtype: Any,
    mixed: str = "no",
    quantize: str = "none",
    speed: Any = "auto",
    attention: str = "sdpa",
    evaluate: Batch | None = None,
    device: str = "cpu",
    memory: int | None = None,
    whole: bool = False,
) -> Callable[[Checkpointing], Footprint]:
    """A function that runs a step without computing anything and reports what was alive at the worst moments.

    It takes the layers to compute again, and shares among several calls what is the same for them.

    Args:
        config: native config object of the model.
        lora: options of `add_lora`.
        arguments: the `TrainingArguments` of the run.
        dtype: of the frozen weights.
        mixed: what autocast computes in: "bf16", "fp16" or "no".
        evaluate: the largest batch of the evaluation, if there is one.
        device: kind of what the run is on. A card unpacks 4-bit weights into buffers that stay; a CPU's attention keeps
            less than what other devices have in the worst case.
        memory: bytes of the card, if known.
        whole: run all layers even where they are alike; tests compare the short way with it.

    Raises:
        TargetError, UnsupportedModel: as `add_lora`, when the function is called.
    """
    run = Run(lora, arguments, batch, dtype, mixed, quantize, speed, attention, evaluate, device, memory)
    count = int(config.num_hidden_layers)
    targets = {key: value for key, value in lora.items() if key not in ("dropout", *_STARTS)}

    @cache
    def measured(layers: Kinds, offload: bool) -> Footprint:
        return _measure(shortened(config, len(layers)), run, layers, offload)

    def footprint_of(checkpointing: Checkpointing) -> Footprint:
        layers = checkpointing.layers(count)
        if whole or count <= LONGEST or not alike(config, targets):
            found = measured(layers, checkpointing.offload)
        else:
            found = extended(partial(measured, offload=checkpointing.offload), layers)
        worst: dict[str, Moment] = {}
        for moment in found.moments:
            if moment.phase not in worst or moment.total > worst[moment.phase].total:
                worst[moment.phase] = moment
        return replace(found, moments=tuple(worst.values()))

    return footprint_of


def footprint(config: Any, lora: dict[str, Any], arguments: Any, batch: Batch, **options: Any) -> Footprint:
    """`dry_runs` with the checkpointing that the arguments name."""
    return dry_runs(config, lora, arguments, batch, **options)(checkpointing_of(arguments))


def _measure(config: Any, run: Run, layers: Kinds, offload: bool) -> Footprint:
    """All moments of a model as it is; `layers` names those that are computed again."""
    model, parameters, loss_by_rows = _model(config, run, layers, offload)
    live, moments = Live(config.vocab_size), list[Moment]()
    inputs = {each: _inputs(each) for each in (run.batch, run.evaluate) if each is not None}
    with FakeTensorMode(allow_non_fake_inputs=True), live, dry_run_for(run.device):
        without_storage(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        live.base = live.now - sum(size_of(parameter) for parameter in trained)
        live.parameters = trained
        with live.phase("load", moments):
            pass
        if run.device == "cuda" and run.quantize == "nf4":
            make_buffers(model, run.memory)
        live.optimizer = optimizer = _optimizer(run.arguments, model, trained)
        _fill_gradients(trained)
        optimizer.step()  # from now on it has its state
        model.zero_grad()
        mark_layers(model.get_base_model().model.layers, live)
        if run.evaluate is not None:
            with live.phase("evaluation", moments):
                _evaluate(model, inputs[run.evaluate], run.mixed, loss_by_rows)
        if run.arguments.gradient_accumulation_steps > 1:
            _fill_gradients(trained)  # of the micro-batch before
        with live.phase("training step", moments):
            _loss(model, inputs[run.batch], run.mixed).backward()
        with live.phase("optimizer step", moments):
            if run.arguments.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(trained, run.arguments.max_grad_norm)
            optimizer.step()
        return Footprint(
            parameters,
            trainable=sum(parameter.numel() for parameter in trained),
            base_bytes=live.base,
            adapter_bytes=sum(size_of(parameter) for parameter in trained),
            optimizer_bytes=live.kinds()["optimizer"],
            moments=tuple(moments),
        )


def _model(config: Any, run: Run, layers: Kinds, offload: bool) -> tuple[Any, int, bool]:
    """(model in training mode on the meta device, its parameters without LoRA, whether the fast loss is on)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from phi3_lora_plugin.lora.inject import add_lora, prepare_for_checkpointing
    from phi3_lora_plugin.plan.packed import fuse_packed, pack_weights
    from phi3_lora_plugin.speed.apply import speed_up

    config._attn_implementation = run.attention
    config.use_cache = False
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(run.dtype)
        parameters = model.num_parameters()
        if run.quantize != "none":
            pack_weights(model, run.quantize, run.dtype)
        # Where A and B begin changes nothing about their sizes, and needs values that are not here.
        model = add_lora(model, **{key: value for key, value in run.lora.items() if key not in _STARTS})
    if any(layers):
        prepare_for_checkpointing(model)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if offload:
            function = _without_inputs(partial(torch.utils.checkpoint.checkpoint, **options))
            model.get_base_model()._set_gradient_checkpointing(True, function)
        else:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable(options)
        for layer, again in zip(model.get_base_model().model.layers, layers, strict=True):
            layer.gradient_checkpointing = again
    parts = {applied.part: applied.on for applied in speed_up(model, run.speed)}
    chosen = run.speed if isinstance(run.speed, Mapping) else {"lora": run.speed == "auto"}
    if run.quantize == "nf4" and chosen.get("lora", True):
        fuse_packed(model)
    return model.train(), parameters, parts["loss"]


def _without_inputs(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpoint function whose inputs are elsewhere until they are wanted, as `offload` of transformers has it."""

    def bring(kept: Any) -> Any:
        return kept if torch.is_tensor(kept) else torch.empty(kept[0], dtype=kept[1])

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(_shape, bring):
            return checkpoint(*args, **kwargs)

    return call


def _shape(tensor: Any) -> Any:
    return (tensor.shape, tensor.dtype) if tensor.is_floating_point() else tensor


def _fill_gradients(trained: Sequence[Any]) -> None:
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)


def without_storage(model: Any, device: str = "cpu") -> None:
    """Give every parameter and buffer of a model on the meta device a place that takes no memory; in a fake mode."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, torch.nn.Parameter):
                        empty = torch.nn.Parameter(empty, tensor.requires_grad)
                        empty.__dict__.update(tensor.__dict__)
                    made[id(tensor)] = empty
                tensors[name] = made[id(tensor)]


def _inputs(batch: Batch) -> dict[str, Any]:
    """What the collator makes of such rows: real tensors, whose values are looked at on the way."""
    rows = []
    for length in batch.lengths:
        trained = max(1, round(length * batch.supervised))
        rows.append({"input_ids": [0] * length, "labels": [-100] * (length - trained) + [0] * trained})
    if batch.packed:
        from phi3_lora_plugin.chat.pack import PackedCollator

        return PackedCollator()(rows)
    from phi3_lora_plugin.chat.pad import pad

    return {
        "input_ids": torch.zeros(len(rows), batch.width, dtype=torch.long),
        "labels": pad([row["labels"] for row in rows], -100, batch.width),
        "attention_mask": pad([[1] * length for length in batch.lengths], 0, batch.width),
    }


def _loss(model: Any, inputs: dict[str, Any], mixed: str) -> Any:
    """What `Trainer.compute_loss` does under accelerate: autocast, and outputs turned to float32."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed)
    with nullcontext() if kind is None else torch.autocast("cpu", dtype=kind):
        outputs = model(**inputs, num_items_in_batch=max(1, sum(inputs["labels"].ne(-100).flatten().tolist())))
    if kind is not None and outputs.logits is not None:
        outputs.logits = outputs.logits.float()
    return outputs.loss


def _evaluate(model: Any, inputs: dict[str, Any], mixed: str, by_rows: bool) -> None:
    from phi3_lora_plugin.speed.loss import asked

    model.eval()
    with torch.no_grad(), asked(model.get_base_model(), "loss") if by_rows else nullcontext():
        _loss(model, inputs, mixed)
    model.train()


def _optimizer(arguments: Any, model: Any, trained: list[Any]) -> Any:
    from transformers import Trainer

    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if kind.__module__.startswith("torch.") and "optimizer_dict" not in settings:
            return kind(trained, **settings)
    except (ImportError, ValueError, RuntimeError):
        pass
    return torch.optim.AdamW(trained)  # no smaller than any that is offered
