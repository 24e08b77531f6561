"""The decoder layer with each sum and its norm in one function; its class is swapped, as `lora_swap` does it.

A class and not a forward on the instance: transformers wraps the `forward` of a class of layers, and checkpoints
activations there.
"""

# This module defines a subclass of something heavy; it is imported only inside functions.
from __future__ import annotations

from typing import Any

import torch  # noqa: TID253
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer  # noqa: TID253

from phi3_lora_plugin.speed.device_kind import device_kind
from phi3_lora_plugin.speed.elementwise import Unnormed, add, add_and_norm, take
from phi3_lora_plugin.speed.shards import hooked


class FastDecoderLayer(Phi3DecoderLayer):  # type: ignore[misc]
    """`Phi3DecoderLayer`; in evaluation, with dropout or where others look at its norms it is that one exactly."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, supervised: Any = None, **kwargs: Any
    ) -> Any:
        """[rows, tokens, hidden] -> [rows, tokens, hidden], or [1, supervised, hidden] if asked so by `last_layer`."""
        before, after = self.input_layernorm, self.post_attention_layernorm
        dropouts = self.resid_attn_dropout, self.resid_mlp_dropout
        drops = any(dropout.p or watched(dropout) for dropout in dropouts)
        ours = all(takes(norm, hidden_states) and not watched(norm) for norm in (before, after))
        unusual = args or drops or not ours or "_stock" in self.__dict__
        if unusual or not self.training or torch.compiler.is_compiling():
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        residual, normed, unnormed = add_and_norm(hidden_states, None, before.weight, before.variance_epsilon)
        kwargs |= _told(self.self_attn, unnormed)
        if supervised is not None and supervised.layer is self:
            kwargs["only"] = supervised.index(hidden_states.device)
            residual = take(residual, kwargs["only"])
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        reuse = _ours_alone(attended, self.self_attn, "o_proj")
        residual, normed, unnormed = add_and_norm(attended, residual, after.weight, after.variance_epsilon, reuse)
        made = self.mlp(normed, **_told(self.mlp, unnormed))
        return add(made, residual, _ours_alone(made, self.mlp, "down_proj"))


def _ours_alone(made: torch.Tensor, module: Any, last: str) -> bool:
    """Whether `made` by this module is what our function for its last projection made, and no other code sees it.

    Only on a CPU: a card's kernel adds and norms in one, and memory that is freed is taken again at once.
    """
    if device_kind(made) != "cpu" or made.grad_fn is None or watched(module):
        return False
    return "forward" in module.__dict__ and fused_alone(getattr(module, last))


def fused_alone(projection: Any) -> bool:
    """Whether this is one of our LoRA layers, and other code sees neither what it is given nor what it gives."""
    return hasattr(projection, "fast") and not watched(projection) and not hooked(projection.base_layer)


def _told(module: Any, unnormed: Unnormed) -> dict[str, Any]:
    """What its normed input was made of, for a module whose forward is ours and sees that input as it is."""
    return {"unnormed": unnormed} if "forward" in module.__dict__ and not watched(module) else {}


# FSDP and accelerate find the layers to wrap by the name of their class.
FastDecoderLayer.__name__ = Phi3DecoderLayer.__name__


def takes(norm: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the functions of `elementwise` have the numbers and gradients of this norm."""
    weight = getattr(norm, "weight", None)
    if weight is None or not hasattr(norm, "variance_epsilon"):  # another norm, or a tuner's layer in its place
        return False
    return not weight.requires_grad and weight.dtype == hidden_states.dtype and not hasattr(weight, "full_tensor")


def watched(module: Any) -> bool:
    """Whether code other than ours looks at the inputs or outputs of a module, or has put a forward on it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(not _ours(hook) for each in hooks for hook in each.values()):
        return True
    return "forward" in module.__dict__ and not _ours(module.__dict__["forward"])


#: Hooks of transformers stay once hidden states were asked for; who asks for them is heard elsewhere (`wants_more`).
_HARMLESS = ("phi3_lora_plugin.", "transformers.utils.output_capturing")


def _ours(function: Any) -> bool:
    return str(getattr(getattr(function, "func", function), "__module__", "")).startswith(_HARMLESS)
