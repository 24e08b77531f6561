"""The Phi family as data: what each member is, what stops and pads it, and which rows of a projection are what.

A member is recognised by its config, never by its path. Everything here is plain data; nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.refused import REFUSED, REFUSED_IDS


class UnsupportedModel(Phi3LoraError):
    """A model that is not one of the family, or is one that cannot be trained here; says why and what is possible."""


class RopeError(Phi3LoraError):
    """A rotary embedding config that no revision of Phi-3 was published with."""


@dataclass(frozen=True)
class Family:
    """One member of the family.

    Attributes:
        name: short, as presets use it.
        model_type: of transformers; its native class is used, never remote code.
        templates: names of the chat templates that its revisions carry, the current one first; a fixed text may
            stand before it (Phi-4-reasoning).
        stop: tokens that end a turn or a text; generation stops at each of them.
        pad: tokens to pad with, the first that exists and does not stop is taken; none makes the vocabulary grow.
    """

    name: str
    title: str
    model_type: str
    templates: tuple[str, ...]
    stop: tuple[str, ...]
    pad: tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """Rows `start` to `stop` (half-open) of a fused projection, and the name they have where they stand alone."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Projection:
    """A linear map of every decoder layer: weight [out_features, in_features]; `experts` of them stacked, if not 0."""

    name: str
    path: str
    in_features: int
    out_features: int
    slices: tuple[Slice, ...] = ()
    experts: int = 0


_PHI3_STOP = ("<|end|>", "<|endoftext|>")
_PHI3_PAD = ("<unk>", "<|placeholder1|>")
# Phi-4-mini has one token for unknown, end, begin and pad; this one is reserved and never written by its template.
_PHI4_MINI_PAD = ("<|endofprompt|>", "<|tag|>")
_PHI4_STOP = ("<|im_end|>", "<|endoftext|>")
_PHI4_PAD = ("<|dummy_85|>", "<|dummy_0|>")

FAMILIES = {
    family.name: family
    for family in (
        Family("phi-3-mini-4k", "Phi-3-mini-4k-instruct", "phi3", ("phi-3-mini-4k",), _PHI3_STOP, _PHI3_PAD),
        Family(
            "phi-3-mini-128k",
            "Phi-3-mini-128k-instruct",
            "phi3",
            ("phi-3-mini-4k", "phi-3-mini-128k-apr2024"),
            _PHI3_STOP,
            _PHI3_PAD,
        ),
        Family("phi-3.5-mini", "Phi-3.5-mini-instruct", "phi3", ("phi-3.5-mini",), _PHI3_STOP, _PHI3_PAD),
        Family("phi-3-medium-4k", "Phi-3-medium-4k-instruct", "phi3", ("phi-3-medium",), _PHI3_STOP, _PHI3_PAD),
        Family("phi-3-medium-128k", "Phi-3-medium-128k-instruct", "phi3", ("phi-3-medium",), _PHI3_STOP, _PHI3_PAD),
        Family("phi-4", "Phi-4", "phi3", ("phi-4", "phi-4-dec2024"), _PHI4_STOP, _PHI4_PAD),
        Family("phi-4-reasoning", "Phi-4-reasoning", "phi3", ("phi-4",), _PHI4_STOP, _PHI4_PAD),
        Family(
            "phi-4-mini",
            "Phi-4-mini-instruct or -reasoning",
            "phi3",
            ("phi-4-mini", "phi-4-mini-reasoning"),
            ("<|end|>", "<|endoftext|>"),
            _PHI4_MINI_PAD,
        ),
        Family(
            "phi-4-multimodal",
            "the text side of Phi-4-multimodal-instruct",
            "phi4_multimodal",
            ("phi-4-mini",),
            ("<|end|>", "<|endoftext|>"),
            _PHI4_MINI_PAD,
        ),
        Family("phi-3.5-moe", "Phi-3.5-MoE-instruct", "phimoe", ("phi-3.5-mini",), _PHI3_STOP, _PHI3_PAD),
        Family("phi-mini-moe", "Phi-mini-MoE-instruct", "phimoe", ("phi-3.5-mini",), _PHI3_STOP, _PHI3_PAD),
        Family("phi-tiny-moe", "Phi-tiny-MoE-instruct", "phimoe", ("phi-3.5-mini",), _PHI3_STOP, _PHI3_PAD),
        Family("phi3", "a model of the Phi-3 architecture", "phi3", (), _PHI3_STOP + _PHI4_STOP, ("<unk>",)),
        Family("phimoe", "a model of the PhiMoE architecture", "phimoe", (), _PHI3_STOP, ("<unk>",)),
    )
}

#: Every `model_type` that is trained here.
SUPPORTED = ("phi3", "phimoe", "phi4_multimodal")
#: Where Phi-4-multimodal keeps what sees and hears; some modules in there have the names of the text model's.
TOWERS = "model.embed_tokens_extend"

#: Larger than any model that fits a machine: a damaged or forged config beyond them would keep loops running for ever.
_LARGEST = {
    "num_hidden_layers": 1_000, "hidden_size": 1_000_000, "intermediate_size": 10_000_000, "vocab_size": 10_000_000,
    "num_attention_heads": 10_000, "num_key_value_heads": 10_000, "num_local_experts": 10_000,
}  # fmt: skip


def _refuse_sizes(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel for sizes that no model has."""
    wrong = [
        f"{name} is {config[name]}, expected at most {most:,}"
        for name, most in _LARGEST.items()
        if isinstance(config.get(name), int | float) and config[name] > most
    ]
    if wrong:
        raise UnsupportedModel(f"config.json: {'; '.join(wrong)}; download it again")


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    return tuple(int(config.get(key) or 0) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))  # type: ignore[return-value]


def recognise(config: Mapping[str, Any]) -> Family:
    """The member that a config (the content of config.json) describes; unpublished sizes are `phi3` or `phimoe`.

    Raises:
        UnsupportedModel: another architecture; says why and what is possible.
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise UnsupportedModel(_refusal(kind))
    _refuse_sizes(config)
    if kind == "phi4_multimodal":
        return FAMILIES["phi-4-multimodal"]
    if kind == "phimoe":
        if _sizes(config) != (4096, 32, 32064):
            return FAMILIES["phimoe"]
        # SlimMoE (arXiv 2506.18349) made the two smaller ones by pruning experts, of the smallest heads as well.
        width = int(config.get("intermediate_size") or 0)
        return FAMILIES[{960: "phi-mini-moe", 448: "phi-tiny-moe"}.get(width, "phi-3.5-moe")]
    long_context = int(config.get("max_position_embeddings") or 0) > 4096
    match _sizes(config):
        case (3072, 32, 32064):
            if not long_context:
                return FAMILIES["phi-3-mini-4k"]
            # The configs of the two 128k minis differ in nothing else.
            factors = rope_of(config).get("long_factor")
            first = factors[0] if isinstance(factors, list) and factors else None
            newer = isinstance(first, int | float) and abs(first - 1.08) < 0.005
            return FAMILIES["phi-3.5-mini" if newer else "phi-3-mini-128k"]
        case (5120, 40, 32064):
            return FAMILIES["phi-3-medium-128k" if long_context else "phi-3-medium-4k"]
        case (5120, 40, 100352):
            reasoning = float(rope_of(config).get("rope_theta") or 0) >= 500000
            return FAMILIES["phi-4-reasoning" if reasoning else "phi-4"]
        case (3072, 32, 200064):
            return FAMILIES["phi-4-mini"]
    return FAMILIES["phi3"]


def _refusal(kind: Any) -> str:
    reason = REFUSED.get(str(kind), "it is not a model of the Phi-3 family")
    return f"model_type {kind!r}: {reason}. Supported are `phi3`, `phimoe` and the text side of `phi4_multimodal`."


def refused_id(name: str, revision: str | None = None) -> str | None:
    """Why the main revision of a published model is refused, by its hub id; None for other models and revisions."""
    kind = REFUSED_IDS.get(name.lower())
    if kind is None or revision not in (None, "main"):
        return None
    return _refusal(kind)


def has_towers(config: Mapping[str, Any]) -> bool:
    """Whether a model sees and hears as well (Phi-4-multimodal), of which only the text side is trained."""
    return config.get("model_type") == "phi4_multimodal"


def projections(config: Mapping[str, Any]) -> tuple[Projection, ...]:
    """The linear maps of one decoder layer, with the slices inside the fused ones, from a config (GQA included).

    Raises:
        UnsupportedModel: another architecture.
    """
    recognise(config)
    hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or hidden // heads)
    q, kv = heads * size, groups * size
    if config.get("model_type") == "phimoe":
        experts = int(config["num_local_experts"])
        return (
            Projection("q_proj", "self_attn.q_proj", hidden, q),
            Projection("k_proj", "self_attn.k_proj", hidden, kv),
            Projection("v_proj", "self_attn.v_proj", hidden, kv),
            Projection("o_proj", "self_attn.o_proj", q, hidden),
            Projection("gate_up_proj", "mlp.experts.gate_up_proj", hidden, 2 * inner, experts=experts),
            Projection("down_proj", "mlp.experts.down_proj", inner, hidden, experts=experts),
        )
    qkv = (Slice("q_proj", 0, q), Slice("k_proj", q, q + kv), Slice("v_proj", q + kv, q + 2 * kv))
    gate_up = (Slice("gate_proj", 0, inner), Slice("up_proj", inner, 2 * inner))
    return (
        Projection("qkv_proj", "self_attn.qkv_proj", hidden, q + 2 * kv, qkv),
        Projection("o_proj", "self_attn.o_proj", q, hidden),
        Projection("gate_up_proj", "mlp.gate_up_proj", hidden, 2 * inner, gate_up),
        Projection("down_proj", "mlp.down_proj", inner, hidden),
    )


# Projections have their names whatever their sizes are.
_ANY_SIZE = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_local_experts"), 1)
_PHI3 = projections(_ANY_SIZE | {"model_type": "phi3"})

#: Slices of fused projections, by the names that they have where they stand alone -> the projection.
WHOLE = {part.name: projection.name for projection in _PHI3 for part in projection.slices}
#: Below a layer, the projections of a model that has none fused, in its order.
SPLIT = tuple(
    f"{projection.path.rpartition('.')[0]}.{part.name}"
    for projection in _PHI3
    for part in projection.slices or (projection,)
)


def linear_names(model_type: str) -> list[str]:
    """Names of the linear modules of every decoder layer, as PEFT's `target_modules` takes them (never experts)."""
    return [each.name for each in projections(_ANY_SIZE | {"model_type": model_type}) if not each.experts]


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config in today's keys, whichever of the published layouts it has.

    `rope_type` is "default" or "longrope": "su" and "yarn" are what the first 128k revisions called longrope.

    Raises:
        RopeError: the settings are not a mapping.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise RopeError(f"rope: {str(settings)[:60]!r} is not a mapping of settings such as rope_type and long_factor")
    given = dict(settings)
    old_name = given.pop("type", None)
    kind = given.get("rope_type") or old_name or "default"
    if kind in ("su", "yarn"):
        kind = "longrope"
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    share = given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rope = given | {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share}
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            if rope.get(name) is not None:
                rope[name] = list(rope[name])
        rope["original_max_position_embeddings"] = (
            given.get("original_max_position_embeddings") or config.get("original_max_position_embeddings") or 4096
        )
    return rope


def repair_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config dict with its rotary settings in one layout (`rope_parameters`) and checked.

    Raises:
        RopeError: an unknown type, or factors of the wrong number or kind; names field, found and expected.
    """
    repaired = {
        key: value
        for key, value in config.items()
        if key not in ("rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor")
    }
    rope = rope_of(config)
    if rope["rope_type"] not in ("default", "longrope"):
        raise RopeError(f"rope type {rope['rope_type']!r}: Phi-3 has 'default' and 'longrope' (once 'su' or 'yarn')")
    theta = rope["rope_theta"]
    if not isinstance(theta, int | float) or isinstance(theta, bool) or theta <= 0:
        raise RopeError(f"rope: rope_theta is {str(theta)[:60]!r}; expected a positive number")
    if rope["rope_type"] == "longrope":
        size = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
        wanted = int(size * rope["partial_rotary_factor"]) // 2
        problems = []
        for name in ("short_factor", "long_factor"):
            factors = rope.get(name)
            if not isinstance(factors, list) or not all(
                isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0 for factor in factors
            ):
                problems.append(f"{name} is {str(factors)[:60]}; expected a list of {wanted} positive numbers")
            elif len(factors) != wanted:
                problems.append(f"{name} has {len(factors)} numbers; expected {wanted}, half the rotary size of a head")
        if problems:
            raise RopeError("rope: " + "; ".join(problems))
        repaired["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    repaired["rope_parameters"] = rope
    return repaired


def row_limit(wanted: int | None, config: Mapping[str, Any]) -> int:
    """Tokens that a row may have: `wanted`, else the original context, after which longrope changes its factors.

    Raises:
        UnsupportedModel: more than the model was made for.
    """
    longest = int(config.get("max_position_embeddings") or 4096)
    if wanted is not None and wanted > longest:
        raise UnsupportedModel(
            f"data.max_length: {wanted:,} is more than the {longest:,} tokens of the model's context "
            f"(max_position_embeddings in config.json); write {longest} or less, or leave it out"
        )
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        longest = min(longest, int(rope["original_max_position_embeddings"]))
    return wanted or longest


def straddles(lengths: Sequence[int], config: Mapping[str, Any]) -> bool:
    """Whether a batch holds rows on both sides of longrope's switch.

    transformers picks the factors by the longest row of a batch, so the short rows of such a batch are computed with
    factors that they never see alone.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "longrope" or not lengths:
        return False
    limit = int(rope["original_max_position_embeddings"])
    return max(lengths) > limit >= min(lengths)
