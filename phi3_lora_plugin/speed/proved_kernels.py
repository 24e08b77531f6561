"""Which Triton kernels are proved right on this card: each is tried once against its twin in plain PyTorch.

A kernel that a compiler gets wrong on some card must not train a model. What is wanted is tried in the sizes of the
model, on a few rows, when the fast layers are applied, never inside a training step. What fails, or does not run,
leaves the twin in its place, with one line that says so.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.speed import passes
from phi3_lora_plugin.wording import named_line

#: kind of passes -> functions of `passes` that one proof covers.
KINDS = ("norm", "rotate", "gate", "gate_sum", "loss")
_ROWS = 37  # more than one, and no multiple of anything
# Of all numbers together, by their norms: what the dtype and roundings inside allow.
_LARGEST_ERROR = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.004}
_OF_ONE = 4  # times as much, of a single number: among a million the worst is that far off

#: (device, dtype, kind, sizes) -> None where the kernels are right, or what is wrong with them.
_tried: dict[tuple[Any, ...], str | None] = {}


def passes_for(kind: str, x: torch.Tensor, *sizes: int) -> ModuleType:
    """`card_passes` where they are proved for tensors like x, else `passes`.

    Args:
        kind: one of `KINDS`.
        sizes: of "norm" its width, of "gate" the width of one half, of "gate_sum" that and the rank, of "loss" the
            words, of "rotate" (heads, key heads, size of a head, half of what turns of it).
    """
    if not x.is_cuda or _tried.get((x.device, x.dtype, kind, sizes), "") is not None:
        return passes
    from phi3_lora_plugin.speed import card_passes

    return card_passes


def prove(devices: Iterable[torch.device], dtypes: Iterable[torch.dtype], cases: Iterable[tuple[Any, ...]]) -> str:
    """Try the kernels of all cases, (kind, *sizes); say which run, and why others do not: "" without devices."""
    devices, dtypes, cases = list(devices), list(dtypes), list(cases)
    if not devices:
        return ""
    faults: dict[str, None] = {}
    for device in devices:
        for dtype in dtypes:
            for kind, *of in cases:
                case = (device, dtype, kind, tuple(of))
                if case not in _tried:
                    _tried[case] = fault(device, dtype, kind, tuple(of))
                if _tried[case] is not None:
                    faults[f"{kind} in plain PyTorch: {_tried[case]}"] = None
    return "; ".join(faults) if faults else "one Triton kernel a pass"


def cards_of(model: Any) -> set[torch.device]:
    """The GPUs that the model is on, or, while it is still on the CPU, the one that it will be moved to."""
    found = {parameter.device for parameter in model.parameters()}
    cards = {device for device in found if device.type == "cuda"}
    if not cards and all(device.type == "cpu" for device in found) and torch.cuda.is_available():
        cards.add(torch.device("cuda", torch.cuda.current_device()))
    return cards


def fault(device: torch.device, dtype: torch.dtype, kind: str, sizes: tuple[int, ...]) -> str | None:
    """What is wrong with the kernels of a kind here; None if they give what their twins give."""
    if find_spec("triton") is None:
        return "triton is not installed"
    try:
        from phi3_lora_plugin.speed import card_passes

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(device.type, enabled=False))
            for (name, got), (_, want) in zip(
                _TRIALS[kind](card_passes, device, dtype, *sizes),
                _TRIALS[kind](passes, device, _exact(dtype), *sizes),
                strict=True,
            ):
                error = _error(got.to(want.dtype), want)
                if not error <= _LARGEST_ERROR[dtype]:  # NaN is not
                    return f"its kernel gives a wrong {name} here (off by {error:.1%})"
    except Exception as error:
        # Whatever a compiler or a driver raises, there is another way.
        return f"its kernel does not run here ({named_line(error)})"
    return None


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """How far off all are together, or a share of how far the worst one is: one wrong number among many is found."""
    usual = want.norm() / want.numel() ** 0.5
    worst = ((got - want).abs() / (want.abs() + usual)).max()  # where a number is small, of a usual one
    return float(torch.maximum((got - want).norm() / want.norm(), worst / _OF_ONE))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _draw(device: torch.device, dtype: torch.dtype) -> Any:
    """Draws the same numbers in each dtype, all of which 16 bits hold."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator).to(torch.bfloat16)
        return numbers.to(device=device, dtype=dtype)

    return made


def _try_norm(run: Any, device: torch.device, dtype: torch.dtype, width: int) -> list[tuple[str, torch.Tensor]]:
    draw = _draw(device, dtype)
    x, residual, grad, ahead = (draw(_ROWS, width) for _ in range(4))
    weight = draw(width)
    total, normed, scale = run.add_norm(x, residual, weight, 1e-5)
    alone, _ = run.norm(x, weight, 1e-5)
    back = run.norm_backward(grad, ahead, x, weight, run.norm(x, weight, 1e-5)[1])
    return [("sum", total), ("norm of a sum", normed), ("scale", scale), ("norm", alone), ("gradient", back)]


def _try_rotate(
    run: Any, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, half: int
) -> list[tuple[str, torch.Tensor]]:
    draw = _draw(device, dtype)
    both = draw(1, _ROWS, heads + 2 * key_heads, size)
    cos, sin = draw(1, _ROWS, half), draw(1, _ROWS, half)
    run.turn_(both[:, :, : heads + key_heads], cos, sin)
    grads = (draw(1, _ROWS, count, size).transpose(1, 2) for count in (heads, key_heads, key_heads))
    return [("rotation", both), ("gradient", run.turn_backward(*grads, cos, sin))]


def _try_gate(run: Any, device: torch.device, dtype: torch.dtype, width: int) -> list[tuple[str, torch.Tensor]]:
    draw = _draw(device, dtype)
    both, grad = draw(_ROWS, 2 * width), draw(_ROWS, width)
    back, again = run.gate_backward(grad, both)
    return [("product", run.gate(both)), ("gradient", back), ("product made again", again)]


def _try_gate_sum(
    run: Any, device: torch.device, dtype: torch.dtype, width: int, rank: int
) -> list[tuple[str, torch.Tensor]]:
    draw = _draw(device, dtype)
    both, grad, down, wide = draw(_ROWS, 2 * width), draw(_ROWS, width), draw(_ROWS, rank), draw(2 * width, rank)
    wide = wide / 8  # an adapter adds less than there is
    back, again = run.gate_sum_backward(grad, both, down, wide, 2.0)
    made = run.gate_sum(both, down, wide, 2.0)
    return [("product with LoRA", made), ("gradient with LoRA", back), ("product with LoRA made again", again)]


def _try_loss(run: Any, device: torch.device, dtype: torch.dtype, words: int) -> list[tuple[str, torch.Tensor]]:
    logits = _draw(device, dtype)(_ROWS, words)
    labels = torch.arange(_ROWS, device=device) * (words // _ROWS) % words
    losses = run.cross_entropy_(logits.clone(), labels, 1.0, False)
    # Shares of a large vocabulary are small, and each is held to its own size.
    again = run.cross_entropy_(logits, labels, 256.0, True)
    return [("loss", losses), ("loss with its gradient", again), ("gradient", logits)]


_TRIALS: dict[str, Any] = {
    "norm": _try_norm,
    "rotate": _try_rotate,
    "gate": _try_gate,
    "gate_sum": _try_gate_sum,
    "loss": _try_loss,
}
