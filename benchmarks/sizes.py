"""The models that presets name, in their published sizes, and with fewer layers where one is enough.

Sizes are facts of the configs on the hub; nothing is downloaded. Longrope factors are ones: how large they are changes
no shape, and both kinds are there.
"""

from __future__ import annotations

from typing import Any

MINI = dict(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32064,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    sliding_window=2047,
)
_SLIM_MOE = MINI | dict(  # SlimMoE, arXiv 2506.18349: pruned from Phi-3.5-MoE
    hidden_size=4096,
    num_local_experts=16,
    num_experts_per_tok=2,
    head_dim=128,
    attention_bias=True,
    lm_head_bias=True,
)
_MEDIUM = MINI | dict(
    hidden_size=5120,
    intermediate_size=17920,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=10,
)

#: hub id -> fields of `Phi3Config` (`PhimoeConfig` where there are experts); `rope` is "longrope" where it is that.
SIZES: dict[str, dict[str, Any]] = {
    "microsoft/Phi-3-mini-4k-instruct": MINI,
    "microsoft/Phi-3-mini-128k-instruct": MINI
    | dict(max_position_embeddings=131072, sliding_window=262144, rope="longrope"),
    "microsoft/Phi-3.5-mini-instruct": MINI
    | dict(max_position_embeddings=131072, sliding_window=262144, rope="longrope"),
    "microsoft/Phi-3-medium-4k-instruct": _MEDIUM,
    "microsoft/phi-4": _MEDIUM
    | dict(
        vocab_size=100352,
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        sliding_window=None,
    ),
    "microsoft/Phi-4-mini-instruct": MINI
    | dict(
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=200064,
        max_position_embeddings=131072,
        sliding_window=262144,
        partial_rotary_factor=0.75,
        tie_word_embeddings=True,
        rope="longrope",
    ),
    "microsoft/Phi-3.5-MoE-instruct": MINI
    | dict(
        hidden_size=4096,
        intermediate_size=6400,
        num_key_value_heads=8,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=131072,
        sliding_window=131072,
        rope="longrope",
        attention_bias=True,
        lm_head_bias=True,
    ),
    "microsoft/Phi-mini-MoE-instruct": _SLIM_MOE | dict(intermediate_size=960, num_key_value_heads=8),
    "microsoft/Phi-tiny-MoE-instruct": _SLIM_MOE
    | dict(intermediate_size=448, num_attention_heads=16, num_key_value_heads=4),
    "embedded:tiny-phi3": dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2048,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    ),
}


def config(model: str, layers: int | None = None, **changes: Any) -> Any:
    """The native config of a model that a preset names, with `layers` of its layers.

    Raises:
        KeyError: no size is known for it.
    """
    from transformers import Phi3Config, PhimoeConfig

    fields = SIZES[model] | changes | ({} if layers is None else {"num_hidden_layers": layers})
    kind = PhimoeConfig if "num_local_experts" in fields else Phi3Config
    if fields.pop("rope", "") == "longrope":
        head = fields["hidden_size"] // fields["num_attention_heads"]
        factors = [1.0] * int(head * fields.get("partial_rotary_factor", 1.0) / 2)
        rope: dict[str, Any] = dict(rope_type="longrope", short_factor=factors, long_factor=factors)
        if hasattr(Phi3Config(), "rope_parameters"):
            rope |= dict(rope_theta=10000.0, original_max_position_embeddings=4096)
            if kind is PhimoeConfig:
                rope |= dict(short_mscale=1.2, long_mscale=1.2)
            fields["rope_parameters"] = rope
        else:  # transformers before 5
            fields["rope_scaling"] = dict(type="longrope", short_factor=factors, long_factor=factors)
    made = kind(**fields, pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")
    made.use_cache = False
    return made
