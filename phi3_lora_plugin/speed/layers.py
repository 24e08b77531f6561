"""The layers of one model with the functions of `elementwise` in them: on instances, proved against stock layers."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch  # noqa: TID253

from phi3_lora_plugin.model.families import rope_of
from phi3_lora_plugin.speed.decoder_layer import FastDecoderLayer, fused_alone, takes, watched
from phi3_lora_plugin.speed.elementwise import Unnormed, rms_norm, rotate, swiglu, take
from phi3_lora_plugin.speed.lora_mlp import lora_mlp
from phi3_lora_plugin.speed.proved_kernels import cards_of, prove


def layers_obstacle(base: Any) -> str | None:
    """Why the layers of this causal model (without PEFT) keep their own forward; None if they need not."""
    if getattr(base.config, "model_type", None) != "phi3" or type(getattr(base, "model", None)).__name__ != "Phi3Model":
        return f"{type(base).__name__} is not Phi-3 as transformers has it"
    from transformers.models.phi3 import modeling_phi3

    return _difference(
        modeling_phi3.Phi3Attention, modeling_phi3.Phi3MLP, modeling_phi3.Phi3RMSNorm, modeling_phi3.Phi3DecoderLayer
    )


def fuse_layers(base: Any) -> int:
    """Give attention, MLP and norms of each layer our forward; return how many got one. `restore_layers` undoes it.

    A layer that is called in an unusual way (a cache, a trained norm, another activation) takes its stock forward, and
    so does every one in evaluation: there is nothing to keep, and a reloaded adapter gives the same numbers to the bit.
    """
    count = 0
    for layer in base.model.layers:
        layer.__dict__.pop("_stock", None)
        if type(layer) is FastDecoderLayer.__base__:
            layer.__class__ = FastDecoderLayer
    for module in base.model.modules():
        forward = _FORWARDS.get(type(module).__name__)
        if forward is None or "forward" in module.__dict__:
            continue
        module.forward = partial(forward, module)
        count += 1
    return count


def kernels_used(base: Any, devices: Iterable[torch.device]) -> str:
    """Try the kernels of the layers of `base` on these cards and the one that it is on; say which will run."""
    cards = {str(device): device for device in (*cards_of(base), *devices)}
    attention = next(each for each in base.modules() if hasattr(each, "qkv_proj") and hasattr(each, "scaling"))
    config = base.config
    half = int(attention.head_dim * rope_of(config.to_dict()).get("partial_rotary_factor", 1.0)) // 2
    cases = [
        ("norm", config.hidden_size),
        ("rotate", config.num_attention_heads, config.num_key_value_heads, attention.head_dim, half),
        ("gate", config.intermediate_size),
    ]
    projections = [getattr(layer.mlp, "gate_up_proj", None) for layer in base.model.layers]
    adapters = [a for projection in projections for a in getattr(projection, "lora_A", {}).values()]
    ranks = {getattr(a, "out_features", 0) for a in adapters}
    cases += [("gate_sum", config.intermediate_size, rank) for rank in sorted(ranks) if 0 < rank <= _HIGHEST_RANK]
    return prove(cards.values(), {base.model.norm.weight.dtype}, cases)


#: Up to which LoRA's product is part of the gate's kernel.
_HIGHEST_RANK = 128


def restore_layers(base: Any) -> None:
    """Undo `fuse_layers`."""
    ours = tuple(_FORWARDS.values())
    for module in base.modules():
        if getattr(module.__dict__.get("forward"), "func", None) in ours:
            del module.forward
        if type(module) is FastDecoderLayer:
            module.__class__ = FastDecoderLayer.__base__
        elif isinstance(module, FastDecoderLayer):  # FSDP2 has put a class of its own over ours
            module.__dict__["_stock"] = True


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if not self.training or not takes(self, hidden_states) or torch.compiler.is_compiling():
        stock: torch.Tensor = type(self).forward(self, hidden_states)
        return stock
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, hidden_states: torch.Tensor, unnormed: Unnormed | None = None) -> torch.Tensor:
    silu = isinstance(self.activation_fn, torch.nn.SiLU) or type(self.activation_fn).__name__ == "SiLUActivation"
    if not self.training or not silu or watched(self.activation_fn) or torch.compiler.is_compiling():
        stock: torch.Tensor = type(self).forward(self, hidden_states)
        return stock
    out: torch.Tensor | None = None
    if torch.is_grad_enabled() and not (watched(self.gate_up_proj) or watched(self.down_proj)):
        out = lora_mlp(hidden_states, self.gate_up_proj, self.down_proj, unnormed)
    return self.down_proj(swiglu(self.gate_up_proj(hidden_states))) if out is None else out  # type: ignore[no-any-return]


def _attention(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    only: torch.Tensor | None = None,
    unnormed: Unnormed | None = None,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = self.config._attn_implementation
    cached = past_key_values is not None or kwargs.get("past_key_value") is not None
    unusual = not self.training or cached or position_embeddings is None or name not in ALL_ATTENTION_FUNCTIONS
    unusual = unusual or torch.compiler.is_compiling()
    if unusual or _rotates_wider(hidden_states.device.type, position_embeddings[0].dtype):
        kwargs |= {} if past_key_values is None else {"past_key_values": past_key_values}
        out, weights = type(self).forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)
        return out if only is None else take(out, only), weights
    ours = fused_alone(self.qkv_proj)
    qkv = self.qkv_proj(hidden_states, **({"unnormed": unnormed} if ours else {}))
    cos, sin = position_embeddings
    heads, key_heads = self.config.num_attention_heads, self.num_key_value_heads
    # Nothing keeps the output of our projection: the rotated queries and keys can take its place.
    reuse = ours and qkv.grad_fn is not None
    query, key, value = rotate(qkv, cos, sin, heads, key_heads, self.head_dim, reuse)
    out, weights = ALL_ATTENTION_FUNCTIONS[name](
        self,
        query,
        key,
        value,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self.config, "sliding_window", None),
        **kwargs,
    )
    out = out.reshape(*hidden_states.shape[:-1], -1)
    return self.o_proj(out if only is None else take(out, only)), weights


def _rotates_wider(device: str, dtype: torch.dtype) -> bool:
    """Whether autocast is on and the base is float32: what projections give in 16 bits is then rotated in float32."""
    return bool(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != dtype)


#: By the names of transformers' classes: FSDP2 puts a class of its own over each.
_FORWARDS: dict[str, Callable[..., Any]] = {"Phi3Attention": _attention, "Phi3MLP": _mlp, "Phi3RMSNorm": _norm}


@cache
def _difference(attention: type, mlp: type, norm: type, layer: type) -> str | None:
    """Whether the installed layers compute something else than ours: tried once, on a small layer of each kind."""
    from transformers import Phi3Config, __version__

    # The layers' own initial values are drawn from the global generator, whose state belongs to the training run.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        for share in (1.0, 0.5):
            config = Phi3Config(
                hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=8,
                num_hidden_layers=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
                attn_implementation="sdpa",
            )  # fmt: skip
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(2, 5, 32, generator=draw)
            angles = torch.randn(2, 5, int(8 * share) // 2, generator=draw).repeat(1, 1, 2)
            calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
                "attention": (attention(config, 0), (x, (angles.cos(), angles.sin()), None)),
                "MLP": (mlp(config), (x,)),
                "norm": (norm(32, eps=1e-5), (x,)),
                "layer": (layer(config, 0), (x,)),
            }
            for what, (module, inputs) in calls.items():
                named = {"position_embeddings": calls["attention"][1][1]} if what == "layer" else {}
                for parameter in module.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2 + 0.3)
                    parameter.requires_grad_(False)
                want = module.eval()(*inputs, **named)
                forward = FastDecoderLayer.forward if what == "layer" else _FORWARDS[type(module).__name__]
                got = forward(module.train(), *inputs, **named)
                if isinstance(want, tuple):
                    want, got = want[0], got[0]
                if not torch.allclose(got, want, rtol=1e-4, atol=1e-5):
                    return f"the {what} of transformers {__version__} computes something else"
    return None
