"""The functions of `passes` on a card: one Triton kernel each (`triton_kernels`), as operators of PyTorch."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

import torch  # noqa: TID253

from phi3_lora_plugin.speed import card_ops  # noqa: F401  the operators are defined when it is imported

Pair = tuple[torch.Tensor, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Pair:
    """As `passes.norm`."""
    made: Pair = torch.ops.phi3_lora.norm(x, weight, eps)
    return made


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    """As `passes.add_norm`."""
    made: tuple[torch.Tensor, ...] = torch.ops.phi3_lora.add_norm(x, residual, weight, eps)
    return made


def norm_backward(
    grad: torch.Tensor, ahead: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """As `passes.norm_backward`."""
    made: torch.Tensor = torch.ops.phi3_lora.norm_backward(grad, ahead, x, weight, scale)
    return made


def turn_(both: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As `passes.turn_`."""
    torch.ops.phi3_lora.turn_(both, cos, sin)
    torch.autograd.graph.increment_version(both)  # as PyTorch's own operators do: who kept it for backward is told


def turn_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """As `passes.turn_backward`."""
    made: torch.Tensor = torch.ops.phi3_lora.turn_backward(grad_q, grad_k, grad_v, cos, sin)
    return made


def gate(both: torch.Tensor) -> torch.Tensor:
    """As `passes.gate`."""
    made: torch.Tensor = torch.ops.phi3_lora.gate(both)
    return made


def gate_backward(grad: torch.Tensor, both: torch.Tensor) -> Pair:
    """As `passes.gate_backward`."""
    made: Pair = torch.ops.phi3_lora.gate_backward(grad, both)
    return made


def gate_sum(both: torch.Tensor, down: torch.Tensor, wide: torch.Tensor, scaling: float) -> torch.Tensor:
    """As `passes.gate_sum`."""
    made: torch.Tensor = torch.ops.phi3_lora.gate_sum(both, down, wide, scaling)
    return made


def gate_sum_backward(
    grad: torch.Tensor, both: torch.Tensor, down: torch.Tensor, wide: torch.Tensor, scaling: float
) -> Pair:
    """As `passes.gate_sum_backward`."""
    made: Pair = torch.ops.phi3_lora.gate_sum_backward(grad, both, down, wide, scaling)
    return made


def cross_entropy_(logits: torch.Tensor, labels: torch.Tensor, scale: float, gradient: bool) -> torch.Tensor:
    """As `passes.cross_entropy_`."""
    made: torch.Tensor = torch.ops.phi3_lora.cross_entropy_(logits, labels, scale, gradient)
    torch.autograd.graph.increment_version(logits)
    return made
