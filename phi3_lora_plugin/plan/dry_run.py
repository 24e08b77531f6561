"""A training step on tensors that have shapes and no storage: which of them are alive at once, and what they are.

The model, its LoRA, the fast paths and the optimizer are the real ones and run the real code; only nothing is computed
(torch's fake tensors). So autograd saves here what it saves there, and nothing has to be kept in step by hand.
"""

# This module defines subclasses of something heavy; it is imported only inside functions.
from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch  # noqa: TID253
from peft.tuners.lora.layer import Linear as PeftLinear  # noqa: TID253

from phi3_lora_plugin.model.quantize import PACKED_BYTES
from phi3_lora_plugin.seams import look_up, require
from phi3_lora_plugin.speed.lora_linear import fused, single_adapter

FakeTensor: Any = look_up("torch.fake")
FakeTensorMode: Any = look_up("torch.fake_mode")
_TorchDispatchMode: Any = look_up("torch.dispatch")
_disable_current_modes: Any = look_up("torch.without_modes")
_leaves: Any = look_up("torch.leaves")
_ITEM: Any = look_up("torch.item")
require("torch.storage", "torch.parameters", "torch.buffers", "transformers.attention")

KINDS = ("base", "adapter", "gradients", "optimizer", "activations", "logits")


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


@dataclass(frozen=True)
class Moment:
    """The most that was alive at once in one phase: bytes of each of `KINDS`, and which operation it was."""

    phase: str
    bytes: dict[str, int]
    operation: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Footprint:
    """What a run needs besides the program itself: the worst moment of each phase, and what malloc makes of it."""

    parameters: int
    trainable: int
    dtype: Any
    base_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    moments: tuple[Moment, ...]
    held: int
    """Bytes that glibc's malloc holds at the worst moment beyond those that are alive."""


@dataclass
class _Live(_TorchDispatchMode):  # type: ignore[misc]
    """Follows every storage from the operation that made it to its end."""

    vocabulary: int
    real: bool = False  # the tensors have values: what a test holds the dry run to
    base: int = 0
    alive: dict[int, tuple[int, bool]] = field(default_factory=dict)  # storage -> (bytes, has a row of logits)
    now: int = 0
    logits: int = 0
    events: list[tuple[int, int]] = field(default_factory=list)
    parameters: Sequence[Any] = ()
    optimizer: Any = None
    _best: tuple[int, dict[str, int], str] = (0, {}, "")
    _count: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in _leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if self.real:
            made = func(*args, **(kwargs or {}))
        elif tensors and not any(isinstance(each, FakeTensor) for each in tensors):
            with _disable_current_modes():  # ids, labels and masks are real, and with them all that depends on values
                made = func(*args, **(kwargs or {}))
        else:
            made = _without_values(func, args)
            if made is None:
                made = func(*args, **(kwargs or {}))
        for tensor in _leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        if self.now > self._best[0]:
            self._best = (self.now, self._kinds(), func.name().partition(".")[0])
        return made

    def _see(self, tensor: Any) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        size = storage.nbytes()
        logits = tensor.dim() > 0 and tensor.shape[-1] == self.vocabulary and tensor.numel() > self.vocabulary
        self._count += 1
        self.alive[storage._cdata] = (size, logits)
        self.now += size
        self.logits += size * logits
        self.events.append((self._count, size))
        weakref.finalize(storage, self._gone, storage._cdata, self._count)

    def _gone(self, key: int, number: int) -> None:
        size, logits = self.alive.pop(key, (0, False))
        self.now -= size
        self.logits -= size * logits
        self.events.append((number, -1))

    def _kinds(self) -> dict[str, int]:
        adapter = sum(_bytes(p) for p in self.parameters)
        gradients = sum(_bytes(p.grad) for p in self.parameters if p.grad is not None)
        states = self.optimizer.state.values() if self.optimizer is not None else ()
        optimizer = sum(_bytes(value) for state in states for value in state.values() if torch.is_tensor(value))
        rest = self.now - self.base - adapter - gradients - optimizer - self.logits
        return dict(zip(KINDS, (self.base, adapter, gradients, optimizer, rest, self.logits), strict=True))

    @contextmanager
    def phase(self, name: str, found: list[Moment]) -> Iterator[None]:
        self._best = (0, {}, "")
        yield
        _, kinds, operation = self._best
        found.append(Moment(name, kinds or self._kinds(), operation.removeprefix("aten::")))


def _without_values(func: Any, args: Any) -> Any:
    """What depends on values that are not here: hidden states at real positions are as many as there are such."""
    if func is _ITEM:
        return False if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
    if func is torch.ops.aten.index.Tensor and args[1] and args[1][0] is not None:
        index = args[1][0]
        if index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with _disable_current_modes():
                count = int(index.sum())
            return args[0].new_empty((count, *args[0].shape[index.dim() :]))
    return None


class _PackedFunction(torch.autograd.Function):  # type: ignore[misc]
    """A frozen linear map whose weight is unpacked for every use, as bitsandbytes does; keeps the packed one only."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, shape: tuple[int, int]) -> Any:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return torch.nn.functional.linear(x, x.new_empty(shape))

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad @ grad.new_empty(ctx.shape), None, None


class _PackedLinear(torch.nn.Linear):  # type: ignore[misc]
    """Stands for bitsandbytes' layers: as many bytes, the same temporaries."""

    compute: Any = torch.float32

    def forward(self, x: Any) -> Any:
        out = _PackedFunction.apply(x.to(self.compute), self.weight, (self.out_features, self.in_features))
        return out.to(x.dtype).clone()  # PEFT clones what a 4-bit layer gives before it adds to it


class _FusedPackedLinear(PeftLinear):  # type: ignore[misc]
    """Stands for `FusedLoraLinear4bit`."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        base, adapter = self.base_layer, single_adapter(self)
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)

        def unpack() -> Any:  # must not know x: what it knows stays alive until the backward pass
            return torch.empty((base.out_features, base.in_features), dtype=base.compute)

        return fused(self, adapter, x.to(base.compute), base.weight, base.bias, unpack).to(x.dtype)


def footprint(
    config: Any,
    lora: dict[str, Any],
    arguments: Any,
    batch: Batch,
    *,
    dtype: Any,
    quantize: str = "none",
    speed: Any = "auto",
    attention: str = "sdpa",
    evaluate: Batch | None = None,
    others: Sequence[Batch] = (),
) -> Footprint:
    """Run steps without computing anything and say what was alive at the worst moments.

    Args:
        config: native config object of the model.
        lora: options of `add_lora`.
        arguments: the `TrainingArguments` of the run.
        dtype: of the frozen weights.
        evaluate: the largest batch of the evaluation, if there is one.
        others: smaller batches, which come between the first and the last step as shuffled rows do: malloc keeps what
            they leave in pieces.

    Raises:
        TargetError, UnsupportedModel: as `add_lora`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from phi3_lora_plugin.lora.inject import add_lora, prepare_for_checkpointing
    from phi3_lora_plugin.speed.apply import speed_up
    from phi3_lora_plugin.training.arguments import checkpoints_activations

    config._attn_implementation = attention
    config.use_cache = False
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)
        parameters = model.num_parameters()
        if quantize != "none":
            _pack_weights(model, PACKED_BYTES[quantize], dtype)
        # Where A and B begin changes nothing about their sizes, and needs values that are not here.
        model = add_lora(model, **{key: value for key, value in lora.items() if key not in _STARTS})
    if checkpoints_activations(arguments):
        prepare_for_checkpointing(model)
        options = {"use_reentrant": False, "preserve_rng_state": False}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    parts = {applied.part: applied.on for applied in speed_up(model, speed)}
    if quantize == "nf4" and (speed == "auto" or (isinstance(speed, Mapping) and speed.get("lora", True))):
        for module in model.modules():
            if type(module) is PeftLinear and type(module.base_layer) is _PackedLinear:
                module.__class__ = _FusedPackedLinear
    model.train()
    moments: list[Moment] = []
    live = _Live(config.vocab_size)
    inputs = {each: _inputs(each) for each in (batch, *others, evaluate) if each is not None}
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        _without_storage(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        live.base = live.now - sum(_bytes(parameter) for parameter in trained)
        live.parameters = trained
        adapter = sum(_bytes(parameter) for parameter in trained)
        with live.phase("load", moments):
            pass
        live.optimizer = optimizer = _optimizer(arguments, model, trained)
        micro = min(2, max(1, int(arguments.gradient_accumulation_steps)))
        if evaluate is not None:
            with live.phase("evaluation", moments):
                _evaluate(model, inputs[evaluate], arguments, parts["loss"])
        for each in (batch, *others, batch):  # from the second on, the optimizer has its state
            for _ in range(micro):
                with live.phase("training step", moments):
                    _loss(model, inputs[each], arguments).backward()
            with live.phase("optimizer step", moments):
                if arguments.max_grad_norm:
                    torch.nn.utils.clip_grad_norm_(trained, arguments.max_grad_norm)
                optimizer.step()
            model.zero_grad()
        trainable = sum(parameter.numel() for parameter in trained)
        states = live._kinds()["optimizer"]
    worst: dict[str, Moment] = {}
    for moment in moments:
        if moment.phase not in worst or moment.total > worst[moment.phase].total:
            worst[moment.phase] = moment
    moments = list(worst.values())
    return Footprint(parameters, trainable, dtype, live.base, adapter, states, tuple(moments), _held(live))


_STARTS = ("init_lora_weights", "data", "eva_config", "loftq_config")


def _held(live: _Live) -> int:
    """What malloc would hold beyond what is alive, at its peak; the frozen weights are mapped from their file."""
    from phi3_lora_plugin.plan.heap import Heap

    heap, alive, most = Heap(), 0, 0
    sizes: dict[int, int] = {}
    skip = live.base
    for key, size in live.events:
        if size >= 0:
            if skip > 0:  # the model comes first
                skip -= size
                continue
            heap.allocate(key, size)
            sizes[key] = size
            alive += size
            most = max(most, alive)
        else:
            heap.free(key)
            alive -= sizes.pop(key, 0)
    return max(0, heap.peak - most)


def _pack_weights(model: Any, factor: float, compute: Any) -> None:
    for layer in model.model.layers:
        for module in list(layer.modules()):
            if type(module) is torch.nn.Linear:
                module.__class__ = _PackedLinear
                module.compute = compute
                size = int(module.weight.numel() * factor)
                module.weight = torch.nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)


def _without_storage(model: Any) -> None:
    """Give every parameter and buffer of a model on the meta device a place on the CPU that takes no memory."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        torch.nn.Parameter(empty, tensor.requires_grad)
                        if isinstance(tensor, torch.nn.Parameter)
                        else empty
                    )
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
    width = batch.width
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]
    mask = [[1] * length + [0] * (width - length) for length in batch.lengths]
    return {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def _loss(model: Any, inputs: dict[str, Any], arguments: Any) -> Any:
    """What `Trainer.compute_loss` does under accelerate: autocast, and outputs turned to float32."""
    kind = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    mixed = nullcontext() if kind is None else torch.autocast("cpu", dtype=kind)
    with mixed:
        outputs = model(**inputs, num_items_in_batch=max(1, sum(inputs["labels"].ne(-100).flatten().tolist())))
    if kind is not None and outputs.logits is not None:
        outputs.logits = outputs.logits.float()
    return outputs.loss


def _evaluate(model: Any, inputs: dict[str, Any], arguments: Any, by_rows: bool) -> None:
    from phi3_lora_plugin.speed.loss import asked

    model.eval()
    with torch.no_grad(), asked(model.get_base_model(), "loss") if by_rows else nullcontext():
        _loss(model, inputs, arguments)
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


def _bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())
