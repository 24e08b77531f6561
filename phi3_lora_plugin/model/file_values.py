"""What the values in a model's JSON files may be, as far as they are read here; transformers checks the rest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

LARGEST = 2**31  # of a size or a token's number; what is beyond is damage
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings")  # fmt: skip


def wrong_values(name: str, content: Mapping[str, Any]) -> dict[str, str]:
    """A line for each value of the file `name` that it cannot have; what is missing, null or unknown is fine."""
    model = _files().get(name)
    return complaints(model, content) if model else {}


def complaints(model: type[BaseModel], content: Mapping[str, Any]) -> dict[str, str]:
    """What `model` says against the values of `content`, a line for each by its name."""
    from pydantic import ValidationError

    try:
        model.model_validate(dict(content))
    except ValidationError as error:
        lines: dict[str, str] = {}
        for one in error.errors():
            name = str(one["loc"][0])
            value = repr(content[name])
            why = one["msg"].removeprefix("Input ").removeprefix("Value error, ")
            # Of a value that may be of several kinds, the first complaint stands for all.
            lines.setdefault(name, f"{name}={value if len(value) <= 60 else value[:57] + '...'}: {why}")
        return lines
    return {}


def optional(name: str, kinds: Mapping[str, Any]) -> type[BaseModel]:
    """A model of settings that may all be missing or null; of these kinds, which nothing is converted to."""
    from pydantic import ConfigDict, create_model

    fields: dict[str, Any] = {key: (kind | None, None) for key, kind in kinds.items()}
    made: type[BaseModel] = create_model(name, __config__=ConfigDict(strict=True), **fields)
    return made


@cache
def _files() -> dict[str, type[BaseModel]]:
    from pydantic import Field

    size: Any = Annotated[int, Field(ge=1, lt=LARGEST)]
    number: Any = Annotated[float, Field(allow_inf_nan=False)]
    stops: Any = int | list[int]
    config = {
        **dict.fromkeys(_SIZES, size),
        **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), number),
        "sliding_window": Annotated[int, Field(ge=0, lt=LARGEST)],
        "model_type": str,
        "tie_word_embeddings": bool,
        "eos_token_id": stops,
    }
    return {
        "config.json": optional("ModelConfig", config),
        "generation_config.json": optional("GenerationConfig", {"eos_token_id": stops}),
        "tokenizer_config.json": optional("TokenizerConfig", {"model_max_length": int | number}),
        "model.safetensors.index.json": optional("WeightIndex", {"weight_map": dict[str, str]}),
    }
