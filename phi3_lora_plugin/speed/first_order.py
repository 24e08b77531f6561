"""Gradients that are written by hand cannot be differentiated again: asking for that is an error, not a wrong number.

`torch.autograd.function.once_differentiable` says nothing where the gradient that comes in is a constant, nor where
`torch.autograd.grad` is asked for parameters alone.
"""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.error import Phi3LoraError


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `backward` of an autograd function that cannot be differentiated again.

    Raises (the function returned):
        Phi3LoraError: it is called with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise Phi3LoraError(
                "the fast paths have no second derivatives, which create_graph=True asks for; take stock code with "
                "`speed: off` in the recipe, or slow_down(model)"
            )
        return backward(ctx, *grads)

    return checked
