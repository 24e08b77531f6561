"""Whether the next NF4 weight is unpacked while a product runs: where a trial on this card found it right and faster.

Tried with weights of the model, forwards and backwards, when the fast layers are applied and never inside a training
step: every product has to be the same to the bit, also where unpacking is late, and all of them take less time by the
card's own clock. Anything else leaves one buffer, filled when its weight is wanted, and one line says why.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed.lora_linear import single_adapter
from phi3_lora_plugin.speed.prefetch import Buffers, fits_twice
from phi3_lora_plugin.speed.shards import in_units, shard_obstacle
from phi3_lora_plugin.wording import named_line

_WEIGHTS = 4  # of the model, that are tried: those of one layer
_ROWS = 2048  # more than bitsandbytes has a product of its own for
_LEARNING, _CHECKED, _TIMED = 2, 3, 3
_LATE = 24  # passes over an output, about as long as a product, that unpacking waits for
_FASTER = 1.01

#: (device, dtype, sizes) -> how many times as fast it is there, or what is wrong with it.
_tried: dict[tuple[Any, ...], float | str] = {}


def prefetch_used(model: Any, wrapped: str | None = None) -> str:
    """Unpack the NF4 weights of a model ahead where that is right, and say what will run: "" where there are none.

    Args:
        model: with its fused LoRA layers.
        wrapped: why weights will not stay where they are, if that is known.
    """
    layers = _layers(model)
    if not layers:
        return ""
    obstacle = wrapped or ("units of FSDP put their weights together" if in_units(model) else None)
    weights = [layer.base_layer.weight for layer in layers]
    if obstacle is None:
        obstacle = _obstacle(weights)
    gain: float | str = obstacle or _gain(layers)
    if isinstance(gain, str):
        stop(model)
        return f"{_IN_TURN}: {gain}"
    start(model)
    return f"the next NF4 weight is unpacked while a product runs, {gain:.2f}x as fast in a trial here"


def start(model: Any) -> None:
    """Unpack ahead what is found right or not: `prefetch_used` decides that, and tests and benchmarks."""
    from phi3_lora_plugin.speed.lora_linear4bit import unpack_ahead

    for layer in _layers(model):
        unpack_ahead(layer.base_layer.weight)


def stop(model: Any) -> None:
    """Undo `start`, and give the second buffers back."""
    layers = _layers(model)
    if layers:
        from phi3_lora_plugin.speed.lora_linear4bit import let_go, unpack_in_turn

        for layer in layers:
            unpack_in_turn(layer.base_layer.weight)
        let_go()


def _layers(model: Any) -> list[Any]:
    """Fused LoRA layers over 4-bit weights; there are none without bitsandbytes."""
    try:
        from phi3_lora_plugin.speed.lora_linear4bit import FusedLoraLinear4bit
    except ImportError:
        return []
    return [module for module in model.modules() if isinstance(module, FusedLoraLinear4bit)]


def _obstacle(weights: Sequence[Any]) -> str | None:
    """Why these weights must not be unpacked ahead, without a trial."""
    if any(not weight.is_cuda for weight in weights):
        return "they are not on a GPU"
    if found := next((found for weight in weights if (found := shard_obstacle(weight))), None):
        return found
    if any(getattr(weight, "quant_state", None) is None for weight in weights):
        return "they are not quantised yet"
    if len({weight.device for weight in weights}) > 1:
        return "they are on several GPUs"
    if len(weights) < 2:
        return "there is one alone"
    largest = max(weight.quant_state.shape.numel() * weight.quant_state.dtype.itemsize for weight in weights)
    memory = torch.cuda.get_device_properties(weights[0].device).total_memory
    if not fits_twice(largest, memory):
        return f"a second buffer takes {largest / 1e6:.0f} MB of the card's {memory / 1e9:.0f} GB"
    return None


def _gain(layers: Sequence[Any]) -> float | str:
    """How many times as fast products are with the next weight unpacked meanwhile, or why it is not done."""
    some = layers[:_WEIGHTS]
    weights = [layer.base_layer.weight for layer in some]
    state = weights[0].quant_state
    case = weights[0].device, state.dtype, tuple(tuple(weight.quant_state.shape) for weight in weights)
    if case not in _tried:
        _tried[case] = trial(some, torch.device(weights[0].device), state.dtype)
    return _tried[case]


def trial(layers: Sequence[Any], device: torch.device, dtype: torch.dtype) -> float | str:
    """How many times as fast it is, or what is wrong: no product may differ, and all take a hundredth less time."""
    from phi3_lora_plugin.speed.lora_linear4bit import buffers_of, let_go, unpack_ahead, unpack_in_turn

    weights = [layer.base_layer.weight for layer in layers]
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            stack.callback(let_go)
            for weight in weights:
                stack.callback(unpack_in_turn, weight)
            computed = layers[0].base_layer.compute_dtype or dtype
            adapters = [single_adapter(layer) for layer in layers]
            parts = [layer.part(name, computed) if name else None for layer, name in zip(layers, adapters, strict=True)]
            if None in parts:
                return "their layers take PEFT's forward"
            inputs = _inputs(weights, device, computed)
            buffers = buffers_of(device, dtype)
            buffers.reserve(max(weight.quant_state.shape.numel() for weight in weights))
            want = list(_products(parts, inputs))
            for weight in weights:
                unpack_ahead(weight)
            for number in range(_LEARNING + _CHECKED):
                before, late = buffers.found, number >= _LEARNING
                got = list(_products(parts, inputs, buffers if late else None))  # the host waits for none of them
                if not all(map(torch.equal, got, want)):
                    return "a product differs on this card"
                if late and buffers.found - before < len(want):
                    return f"{buffers.found - before} of {len(want)} weights were there when they were wanted"
            del got, want
            return _timed(parts, inputs, weights, device)
    except Exception as error:
        # Whatever a driver raises, there is another way.
        return f"it does not run here ({named_line(error)})"


def _inputs(weights: Sequence[Any], device: torch.device, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Rows of each width that products take."""
    draw = torch.Generator(device).manual_seed(0)
    widths = sorted({side for weight in weights for side in weight.quant_state.shape})
    return {width: torch.randn(_ROWS, width, generator=draw, device=device, dtype=dtype) for width in widths}


def _products(
    parts: Sequence[Any], inputs: dict[int, torch.Tensor], late: Buffers | None = None
) -> Iterator[torch.Tensor]:
    """Each weight forwards, then back in reverse, as a step has them; `late` keeps their unpacking waiting."""
    for backwards in (False, True):
        for part in reversed(parts) if backwards else parts:
            if late is not None:
                with late.streams.beside():
                    for _ in range(_LATE):
                        inputs[max(inputs)].sum()
            width, deep = _sides(part)
            yield part.back(inputs[width], None) if backwards else part.product(inputs[deep])


def _sides(part: Any) -> tuple[int, int]:
    width, deep = part.weight.quant_state.shape
    return int(width), int(deep)


def _timed(parts: Any, inputs: Any, weights: Sequence[Any], device: torch.device) -> float | str:
    """How many times as fast ahead is as in turn, each at its best of some rounds, one after the other."""
    from phi3_lora_plugin.speed.lora_linear4bit import unpack_ahead, unpack_in_turn

    best = {True: float("inf"), False: float("inf")}
    for _ in range(_TIMED):
        for ahead in (False, True):
            for weight in weights:
                (unpack_ahead if ahead else unpack_in_turn)(weight)
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for number in range(4):
                if number == 2:  # the host is ahead of the card by now, and the order is known
                    begun.record(torch.cuda.current_stream(device))
                for _ in _products(parts, inputs):
                    pass
            ended.record(torch.cuda.current_stream(device))
            ended.synchronize()
            best[ahead] = min(best[ahead], begun.elapsed_time(ended))
    gain = best[False] / best[True]
    return gain if gain >= _FASTER else f"the next one unpacked meanwhile is {gain:.2f}x as fast in a trial here"


_IN_TURN = "NF4 weights are unpacked when they are wanted"
