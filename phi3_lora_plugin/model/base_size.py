"""How large a base model is and which dtype its weights are saved in, without loading them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import has_towers, projections
from phi3_lora_plugin.model.towers import tower_shapes

_SAVED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class BaseSize:
    """Parameters of a base model, and the dtype of most of them in its files; None where that is not known."""

    parameters: int
    dtype: str | None


def base_size(name: str, revision: str | None = None) -> BaseSize | None:
    """The size of a model whose files or config are here; None of one that is not known here. Never downloads."""
    from phi3_lora_plugin.model.published import planning_config

    try:
        config = planning_config(name, revision)
        if isinstance(config, dict):
            return size_of_config(config)
        if config.name == "config.json" and (found := size_of_files(config.parent)) is not None:
            return found
        return size_of_config(json.loads(config.read_text(encoding="utf-8")))
    except (Phi3LoraError, OSError, ValueError, KeyError, TypeError, ArithmeticError):
        return None  # loading reports what is wrong


def size_of_files(folder: Path) -> BaseSize | None:
    """From the headers of a folder's safetensors files; None if they are not all there."""
    from phi3_lora_plugin.model.folder import ModelError
    from phi3_lora_plugin.model.shards import Weights

    try:
        weights = Weights(folder)
    except ModelError:
        return None
    counts: Counter[str] = Counter()
    for name in weights:
        counts[weights.dtype(name)] += prod(weights.shape(name))
    return BaseSize(counts.total(), _SAVED.get(counts.most_common(1)[0][0])) if counts else None


def size_of_config(config: Mapping[str, Any]) -> BaseSize:
    """From the content of a config.json; raises as `projections`, and KeyError or ValueError if it is not a config."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return BaseSize(parameters(config), dtype if dtype in _SAVED.values() else None)


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a checkpoint has to hold; experts stacked, as transformers 5 holds them."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    moe = config.get("model_type") == "phimoe"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    norms = ["weight", "bias"] if moe else ["weight"]
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}"
        for each in projections(config):
            shape = (each.out_features, each.in_features)
            if each.experts:
                shapes[f"{at}.{each.path}"] = (each.experts, *shape)
            else:
                shapes[f"{at}.{each.path}.weight"] = shape
                if moe and config.get("attention_bias"):
                    shapes[f"{at}.{each.path}.bias"] = shape[:1]
        if moe:
            shapes[f"{at}.mlp.router.weight"] = (int(config["num_local_experts"]), hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{at}.{name}.{part}": (hidden,) for part in norms}
    shapes |= {f"model.norm.{part}": (hidden,) for part in norms}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    if moe and config.get("lm_head_bias"):
        shapes["lm_head.bias"] = (vocabulary,)
    return shapes | tower_shapes(config) if has_towers(config) else shapes


def parameters(config: Mapping[str, Any]) -> int:
    """Parameters of the whole model."""
    return sum(prod(shape) for shape in weight_shapes(config).values())
