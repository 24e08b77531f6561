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
from phi3_lora_plugin.speed.elementwise import add, add_and_norm, take
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
        attention_ours, mlp_ours = _ours_alone(self.self_attn), _ours_alone(self.mlp)
        if attention_ours:
            kwargs["unnormed"] = unnormed
        if supervised is not None and supervised.layer is self:
            kwargs["only"] = supervised.index(hidden_states.device)
            residual = take(residual, kwargs["only"])
        attended, _ = self.self_attn(hidden_states=normed, attention_mask=attention_mask, **kwargs)
        reuse = attention_ours and _in_place(attended, self.self_attn.o_proj)
        residual, normed, unnormed = add_and_norm(attended, residual, after.weight, after.variance_epsilon, reuse)
        made = self.mlp(normed, unnormed) if mlp_ours else self.mlp(normed)
        return add(made, residual, mlp_ours and _in_place(made, self.mlp.down_proj))


def _ours_alone(module: Any) -> bool:
    """Whether the forward of this module is ours, and other code sees neither what it is given nor what it gives."""
    return "forward" in module.__dict__ and not watched(module)


def _in_place(made: torch.Tensor, last: Any) -> bool:
    """Whether a sum may be written into what this projection, the last of a module of ours, has made.

    Only on a CPU: a card's kernel adds and norms in one, and memory that is freed is taken again at once.
    """
    return device_kind(made) == "cpu" and made.grad_fn is not None and fused_alone(last)


def fused_alone(projection: Any) -> bool:
    """Whether this is one of our LoRA layers, and other code sees neither what it is given nor what it gives."""
    return hasattr(projection, "fast") and not watched(projection) and not hooked(projection.base_layer)


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


#: transformers leaves its hooks behind once hidden states were asked for; whether they are now, `wants_more` tells.
_HARMLESS = ("phi3_lora_plugin.", "transformers.utils.output_capturing")


def _ours(function: Any) -> bool:
    return str(getattr(getattr(function, "func", function), "__module__", "")).startswith(_HARMLESS)
