"""Cross-entropy on supervised positions only, in chunks, without ever holding the logits of a batch.

In chat data 40-70% of the positions carry no label; their logits are the largest tensors of a training step and all
of them are multiplied by zero. Here the frozen head is applied to supervised rows alone, in chunks, and the
gradient of the hidden states is formed in the same pass, so that memory does not grow with vocabulary times tokens.
"""

# This module defines an autograd function, a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch  # noqa: TID253
from torch import nn  # noqa: TID253
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: TID253
from transformers.loss import loss_utils  # noqa: TID253
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: TID253
from transformers.utils import can_return_tuple  # noqa: TID253

from phi3_lora_plugin.speed import passes
from phi3_lora_plugin.speed.arguments import by_name
from phi3_lora_plugin.speed.bounds import facts_of_call, to_device
from phi3_lora_plugin.speed.device_kind import device_kind
from phi3_lora_plugin.speed.documents import reads_documents
from phi3_lora_plugin.speed.elementwise import take
from phi3_lora_plugin.speed.first_order import first_order
from phi3_lora_plugin.speed.last_layer import request
from phi3_lora_plugin.speed.proved_kernels import cards_of, passes_for, prove
from phi3_lora_plugin.speed.shards import has_own_forward, hooked, say_once, shard_obstacle, wrapper_of

#: Rows of logits held at one time at least; 256 rows of Phi-4-mini's 200,064 words are 205 MB in float32.
CHUNK = 256
_ENOUGH = 512  # rows on a CPU: more make no product faster, and leave its caches sooner
_BYTES = {"cuda": 2**27, "cpu": 2**26}  # of logits held at one time, where they are more than `CHUNK` rows

# float16 ends at 6e-8, and probabilities of a large vocabulary are smaller: their gradients are formed in this scale.
_FLOAT16_SCALE = 256.0


class _SupervisedCrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """Cross-entropy of each row [rows]; the head is frozen, so only the hidden states get a gradient.

    With `stats` also, without gradient, the entropy of each row's prediction and whether it is right.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any, stats: bool) -> Any:
        given, hidden = hidden.dtype, hidden.to(weight.dtype)
        exact = torch.promote_types(torch.float32, hidden.dtype)  # float64 stays what it is
        losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        entropy: Any = torch.empty_like(losses) if stats else None
        right: Any = torch.empty_like(targets, dtype=torch.bool) if stats else None
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        ctx.scale = _FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0
        run = passes_for("loss", hidden, len(weight))
        at_once = _alike(len(hidden), _rows_at_once(weight, run is passes))
        size = min(at_once, len(hidden)) * len(weight)
        memory = _logits_memory(weight, size)
        held = memory[:size].view(-1, len(weight))
        for chunk in _chunks(len(hidden), at_once):
            rows, labels = hidden[chunk], targets[chunk]
            logits = held[: len(rows)]
            if bias is None:
                torch.mm(rows, weight.t(), out=logits)
            else:
                torch.addmm(bias, rows, weight.t(), out=logits)
            wanted = logits, labels, ctx.scale, gradient is not None
            if stats:  # which no kernel gives
                losses[chunk] = passes.cross_entropy_(*wanted, (entropy[chunk], right[chunk]))
            else:
                losses[chunk] = run.cross_entropy_(*wanted)
            if gradient is not None:  # of the logits, in their place
                torch.mm(logits, weight, out=gradient[chunk])
        if _holds(weight):
            _held[weight] = memory
        ctx.save_for_backward(gradient)
        ctx.dtype = given
        if stats:
            ctx.mark_non_differentiable(entropy, right)
        return losses, entropy, right

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_losses: Any, *others: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        if ctx.scale == 1.0:
            gradient = gradient * grad_losses[:, None].to(gradient.dtype)
        else:  # a scaler's 65,536 is itself more than float16 holds
            gradient = gradient.float() * (grad_losses[:, None] / ctx.scale)
        return gradient.to(ctx.dtype), None, None, None, None


def _alike(rows: int, most: int) -> int:
    """Rows of a chunk where all take about as many, up to `most`: one of few would read the whole head for them."""
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // (chunks * 128))) * 128


def _chunks(rows: int, at_once: int) -> Iterator[slice]:
    """Parts of that many rows; the last takes a few rows again, for the same results, to have a multiple of 16.

    Products of other numbers of rows take up to half as long again on a CPU in bfloat16.
    """
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        yield slice(max(0, stop - -(-(stop - start) // 16) * 16), stop)


#: Head -> memory for a chunk of its logits on a CPU, where new memory in each step costs as much as a pass over it.
#: Whoever uses it takes it out meanwhile: another thread may be in the same model.
_held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _holds(head: torch.Tensor) -> bool:
    """Whether that memory is kept: the allocator of a card keeps its own."""
    return device_kind(head) == "cpu" and not torch.compiler.is_compiling()


def _logits_memory(head: torch.Tensor, size: int) -> torch.Tensor:
    """[size or more] logits of the chunks of one call, in the dtype of the head."""
    if not _holds(head):
        return head.new_empty(size)
    memory = _held.pop(head, None)
    if memory is None or memory.dtype != head.dtype or len(memory) < size:
        with torch.inference_mode(False):  # an evaluation may come first
            memory = head.new_empty(size)
    return memory  # type: ignore[no-any-return]


def _rows_at_once(head: torch.Tensor, in_float32: bool) -> int:
    """Rows of logits held at one time: many, since each chunk reads the whole head."""
    kind = device_kind(head)
    row = len(head) * (4 if in_float32 and kind == "cuda" else head.element_size())
    most = _BYTES.get(kind, 0) // row // 128 * 128
    return max(CHUNK, min(most, _ENOUGH) if kind == "cpu" else most)


def supervised_rows(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    stats: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(cross-entropy, entropy, whether it is right) of each row of `hidden` [rows, width] for its target [rows]."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        rows: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] = _SupervisedCrossEntropy.apply(
            hidden, weight, bias, targets, stats
        )
    return rows


def supervised_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    supervised: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal cross-entropy of a frozen head, as `transformers.loss.ForCausalLMLoss` computes it from full logits.

    Args:
        hidden: last hidden states [..., hidden], already aligned with `targets`, or of supervised positions alone.
        weight: frozen head [vocabulary, hidden]; `bias` [vocabulary] as well.
        targets: ids [...]; -100 where nothing is supervised.
        num_items: what the sum is divided by; the number of supervised positions if not given.
        weights: [...], what the cross-entropy of each position is multiplied by; `num_items` counts positions all the
            same, so that half a weight is half a part of the loss, in whichever batch it comes.
        supervised: on the host, where `targets` are not -100, if that is known there; otherwise the card is asked.

    Returns:
        A scalar, float32 unless `hidden` is float64; 0 where nothing is supervised, with a zero gradient.
    """
    if supervised is None:
        index = targets.ne(-100).flatten().nonzero().flatten()
    else:
        index = to_device(supervised.flatten().nonzero().flatten(), hidden.device)
    wanted, rows = targets.flatten().index_select(0, index), hidden.reshape(1, -1, hidden.shape[-1])
    if rows.shape[1] == targets.numel():
        rows = take(rows, index)
    losses, _, _ = supervised_rows(rows[0], weight, wanted, bias)
    if weights is not None:
        losses = losses * weights.to(losses).flatten().index_select(0, index)
    total = losses.sum()
    items: Any = num_items if num_items is not None else max(1, len(losses))
    return total / (items.to(total.device) if torch.is_tensor(items) else items)


def head_obstacle(model: Any, units: bool = False) -> str | None:
    """Why the loss of this causal model (PEFT taken off) cannot come from hidden states; None if it can.

    Args:
        units: whether units of FSDP will make the head whole before it is used, if it is in shards now.
    """
    head: Any = getattr(model, "lm_head", None)
    if wrapper := wrapper_of(head):
        return f"the head is among the {wrapper}"
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain linear layer: an adapter or quantisation sits on it"
    # not `parameters()`: inside a unit of FSDP1 there are none
    if any(getattr(each, "requires_grad", False) for each in (head.weight, head.bias)):
        return "the head is trained, so its own gradient is needed"
    if not units and (obstacle := shard_obstacle(head.weight, (head.out_features, head.in_features))):
        return f"the head has {obstacle}"
    if hooked(head) or has_own_forward(head):
        return "hooks on the head, or a forward of its own, want its logits"
    if not hasattr(model, "model") or not hasattr(type(model), "loss_function"):
        return f"{type(model).__name__} is not built like a causal model of transformers"
    kind = getattr(model.config, "model_type", None)
    if kind == "phimoe":
        return f"{type(model).__name__} adds terms of its own to the loss"
    if kind != "phi3":
        return f"{type(model).__name__} is not Phi-3 as transformers has it"
    if str(type(model).forward.__module__).rpartition(".")[2] != "modeling_phi3":
        return f"{type(model).__name__} has a forward of its own"
    if model.loss_function is not loss_utils.ForCausalLMLoss:
        return "the model has a loss_function of its own, which wants logits"
    return None


def loss_kernel_used(model: Any, devices: Iterable[torch.device]) -> str:
    """Try the kernel of the loss on these cards and the one that the model is on; say whether it will run."""
    cards = {str(device): device for device in (*cards_of(model), *devices)}
    weight = model.lm_head.weight
    return prove(cards.values(), [weight.dtype], [("loss", len(weight))])


def fuse_loss(model: Any) -> None:
    """Let `model` (Phi3ForCausalLM) compute its training loss without logits; `restore_loss` undoes it.

    In training mode with labels the output then has `logits=None`; in evaluation mode only inside
    `asked(model, "loss")`. Without labels, inside `asked(model, "logits")`, or when the head has become trainable
    since, the stock forward runs.
    """
    if "_stock_forward" in model.__dict__:
        return
    model._stock_forward, model._asked, model._cross_entropy = model.forward, None, supervised_cross_entropy
    model.forward = partial(_forward, model)
    # Trainer drops the columns of a dataset that are not named here.
    model.forward.__signature__ = inspect.signature(model._stock_forward)


def only_if_asked(model: Any) -> None:
    """From now on leave logits out only inside `asked(model, "loss")`: other callers of the model get them."""
    model._asked = "logits"


def leave_uncompiled(model: Any) -> None:
    """Let `torch.compile` compile what is before the loss, and leave the loss as it is."""
    model._cross_entropy = torch.compiler.disable(supervised_cross_entropy)


def restore_loss(model: Any) -> None:
    """Undo `fuse_loss`."""
    if "_stock_forward" not in model.__dict__:
        return
    if getattr(model.__dict__.get("forward"), "func", None) is _forward:
        del model.forward, model._asked, model._stock_forward, model._cross_entropy
    else:  # other code has put another forward over ours; from here on ours passes everything through
        model._asked = "logits"


@contextmanager
def asked(model: Any, what: str) -> Iterator[None]:
    """While the block runs, "logits" makes `model` return logits with every loss, "loss" never, even in evaluation."""
    before = model.__dict__.get("_asked")
    if "_stock_forward" in model.__dict__:
        model._asked = what
    try:
        yield
    finally:
        if "_stock_forward" in model.__dict__:
            model._asked = before


@can_return_tuple  # type: ignore[untyped-decorator]
def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    kwargs = by_name(type(self), args, kwargs)
    labels, weights, keep = kwargs.get("labels"), kwargs.pop("loss_weights", None), kwargs.get("logits_to_keep", 0)
    some = torch.is_tensor(keep) or keep != 0
    wanted = self._asked == "logits" or not (self.training or self._asked == "loss")
    wanted |= kwargs.get("ignore_index", -100) != -100 or labels is not None and labels.dim() != 2
    if labels is None or weights is None and (wanted or some):
        return self._stock_forward(**kwargs)
    # Compiled with it, the rows with a label would be compiled for each number of them.
    compiled = torch.compiler.is_compiling() and self._cross_entropy is supervised_cross_entropy
    obstacle = "torch.compile is on" if compiled else head_obstacle(self)
    if weights is not None and (wanted or some or obstacle):
        return _stock_weighted(self, weights, kwargs)
    if compiled:
        return self._stock_forward(**kwargs)
    if obstacle:
        say_once(f"loss: transformers computes the logits of every position: {obstacle}")
        return self._stock_forward(**kwargs)
    del kwargs["labels"]
    kwargs.pop("logits_to_keep", None)
    num_items = kwargs.pop("num_items_in_batch", None)
    shifted = kwargs.pop("shift_labels", None)
    supervised = None
    if shifted is None:
        shifted, supervised = nn.functional.pad(labels[:, 1:], (0, 1), value=-100), known_supervised(self, labels)
    outputs = self.model(**kwargs, **request(self, supervised, kwargs))
    hidden = outputs.last_hidden_state
    loss = self._cross_entropy(
        hidden,
        self.lm_head.weight,
        shifted.to(hidden.device),
        bias=self.lm_head.bias,
        num_items=num_items,
        supervised=supervised,
        weights=None if weights is None else nn.functional.pad(weights[:, 1:], (0, 1)),
    )
    return CausalLMOutputWithPast(
        loss=loss,
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def known_supervised(model: Any, labels: torch.Tensor) -> torch.Tensor | None:
    """[rows, tokens] on the host, where the next token has a label; None if the part for documents has not read it."""
    if not reads_documents(model.model):
        return None
    known = facts_of_call.get()
    if known.supervised is None or known.of[0] is not labels:
        return None
    return nn.functional.pad(known.supervised[:, 1:], (0, 1))


def _stock_weighted(self: Any, weights: Any, inputs: dict[str, Any]) -> Any:
    """The stock forward with a weighted loss from its logits, since transformers has no weighted loss."""
    labels, items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
    inputs.pop("logits_to_keep", None)
    outputs = self._stock_forward(**inputs)
    logits = outputs.logits[:, :-1].float().flatten(0, 1)
    targets = labels[:, 1:].flatten().to(logits.device)
    losses = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    items = items if items is not None else targets.ne(-100).sum().clamp(min=1)
    outputs.loss = (losses * weights[:, 1:].flatten().to(losses)).sum() / items
    return outputs
