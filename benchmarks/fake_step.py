"""A training step of the real code without weights: the model of a config on a card that is not there (`fake_card`).

The model, its LoRA, its NF4 layers, checkpointing and the fast paths are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch


def build(
    config: Any,
    lora: dict[str, Any],
    *,
    dtype: torch.dtype,
    quantize: str = "none",
    checkpointing: bool = False,
) -> Any:
    """A PEFT model of this config whose tensors are on the meta device; `lora` holds options of `add_lora`.

    Raises:
        ImportError: `quantize` is not "none" and bitsandbytes is not installed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from benchmarks.checkpointing import recompute
    from phi3_lora_plugin.lora.inject import add_lora

    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype)
        if quantize != "none":
            _pack(model, dtype)
        # Where A and B begin changes no shape, and needs values that are not here.
        model = add_lora(model, **{name: value for name, value in lora.items() if name not in _STARTS})
    if checkpointing:
        recompute(model)
    return model.train()


_STARTS = ("init_lora_weights", "data", "eva_config", "loftq_config")


def _pack(model: Any, compute: torch.dtype) -> None:
    """Real bitsandbytes layers in NF4 with double quantisation in place of the layers' linear maps."""
    import bitsandbytes as bnb

    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is not torch.nn.Linear:
                    continue
                packed = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=compute, quant_type="nf4"
                )
                size = linear.weight.numel()
                packed.weight = torch.nn.Parameter(torch.empty(size // 2, 1, dtype=torch.uint8), requires_grad=False)
                packed.weight.quant_type, packed.weight.compress_statistics = "nf4", True
                setattr(parent, name, packed)
    model.is_loaded_in_4bit = True


def _quant_state(layer: Any, dtype: torch.dtype, device: str) -> Any:
    from bitsandbytes.functional import QuantState

    scales = -(-layer.in_features * layer.out_features // 64)
    float32: Any = partial(torch.empty, dtype=torch.float32, device=device)
    second = QuantState(float32(-(-scales // 256)), blocksize=256, code=float32(256), dtype=torch.float32)
    return QuantState(
        torch.empty(scales, dtype=torch.uint8, device=device),
        torch.Size((layer.out_features, layer.in_features)),
        float32(16),
        64,
        "nf4",
        dtype,
        offset=float32(()),
        state2=second,
    )


def settle(model: Any, device: str = "cpu") -> None:
    """Give every parameter and buffer of a model on the meta device a fake place on `device`; inside `on_a_card`."""
    from phi3_lora_plugin.plan.dry_run import without_storage

    without_storage(model, device)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_dtype"):
            module.weight.quant_state = _quant_state(module, module.compute_dtype, device)


def batch(lengths: Sequence[int], supervised: float = 0.45, packed: bool = True) -> dict[str, Any]:
    """What our collators make of rows of these lengths, the last share of each supervised."""
    rows = []
    for length in lengths:
        start = length - max(1, round(supervised * length))
        rows.append({"input_ids": [3] * length, "labels": [-100] * start + [3] * (length - start)})
    if packed:
        from phi3_lora_plugin.chat.pack import PackedCollator

        return PackedCollator()(rows)
    width = -(-max(lengths) // 8) * 8
    return {
        "input_ids": torch.full((len(rows), width), 3),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * length + [0] * (width - length) for length in lengths]),
    }


def loss(model: Any, inputs: dict[str, Any], items: int, mixed: torch.dtype | None, device: str = "cpu") -> Any:
    """The loss as a Trainer asks for it under accelerate, over `items` supervised tokens; inside `on_a_card`."""
    with nullcontext() if mixed is None else _autocast(device, mixed):
        return model(**inputs, num_items_in_batch=items).loss


@contextmanager
def _autocast(device: str, dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast`, which switches itself off without a card."""
    with torch.autocast("cpu", dtype=dtype, enabled=device == "cpu"):
        before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)
        try:
            yield
        finally:
            torch.set_autocast_enabled(device, before[0])
            torch.set_autocast_dtype(device, before[1])


def items(inputs: dict[str, Any]) -> int:
    """Supervised tokens of a batch that is on the host, as a Trainer counts them."""
    return max(1, int(inputs["labels"][:, 1:].ne(-100).sum()))


def fast(model: Any, parts: Any, device: torch.device, flash: bool = True) -> Any:
    """`speed_up` as on a card whose kernels are right. Whether they are takes values, so it is not tried here.

    `flash`: whether the card has kernels for all documents at once, as those of compute capability 8.0 and later do.
    """
    fault = None if flash else "does not run before compute capability 8.0"
    from phi3_lora_plugin.speed import layers, loss, proved_kernels, varlen_kernels
    from phi3_lora_plugin.speed.apply import speed_up

    prove_attention, prove_kernels = varlen_kernels.prove, proved_kernels.prove
    with (
        mock.patch.object(varlen_kernels, "_fault", lambda *case: fault),
        mock.patch.object(varlen_kernels, "prove", lambda devices, *sizes: prove_attention([device], *sizes)),
        mock.patch.object(proved_kernels, "fault", lambda *case: None),
        mock.patch.object(layers, "prove", lambda devices, *sizes: prove_kernels([device], *sizes)),
        mock.patch.object(loss, "prove", lambda devices, *sizes: prove_kernels([device], *sizes)),
    ):
        return speed_up(model, parts)
