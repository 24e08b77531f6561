"""What the values of an adapter's settings may be: PEFT's and mlx-lm's adapter_config.json, loralib's sidecar."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

from phi3_lora_plugin.model.file_values import LARGEST, complaints, optional

if TYPE_CHECKING:
    from pydantic import BaseModel


def wrong_values(config: Mapping[str, Any], of: str = "peft") -> dict[str, str]:
    """A line for each setting with a value that it cannot have; settings that are missing, null or unknown are fine.

    Args:
        of: who wrote the settings: peft, mlx or loralib.
    """
    return complaints(_settings()[of], config)


@cache
def _settings() -> dict[str, type[BaseModel]]:
    from pydantic import AfterValidator, Field

    def regex(text: str) -> str:
        try:
            re.compile(f"({text})")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from None
        return text

    key: Any = Annotated[str, AfterValidator(regex)]
    rank: Any = Annotated[int, Field(ge=1, lt=LARGEST)]
    number: Any = Annotated[float, Field(gt=-LARGEST, lt=LARGEST)]
    share: Any = Annotated[float, Field(ge=0, le=1)]
    tokens: Any = list[Annotated[int, Field(ge=0, lt=LARGEST)]]
    flags: Any = list[bool]
    peft = {
        "r": rank,
        "lora_alpha": number,
        "lora_dropout": share,
        "rank_pattern": dict[key, rank],
        "alpha_pattern": dict[key, number],
        "target_modules": list[str] | str,
        "target_parameters": list[str],
        "modules_to_save": list[str],
        "trainable_token_indices": tokens | dict[str, tokens],
        "init_lora_weights": bool | str,
        **dict.fromkeys(("base_model_name_or_path", "revision", "bias"), str),
        **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), bool),
    }
    mlx = {
        "lora_parameters": optional("MlxParameters", {"scale": number, "dropout": share}),
        **dict.fromkeys(("fine_tune_type", "model"), str),
    }
    module = {"kind": str, "r": rank, "alpha": number, "enable_lora": flags}
    loralib = {
        **dict.fromkeys(("r", "lora_r"), rank),
        **dict.fromkeys(("alpha", "lora_alpha"), number),
        **dict.fromkeys(("dropout", "lora_dropout"), share),
        **dict.fromkeys(("base", "base_model_name_or_path"), str),
        "enable_lora": flags | dict[str, flags],
        "modules": dict[str, optional("LoralibModule", module)],  # type: ignore[misc]
    }
    return {name: optional(name, kinds) for name, kinds in (("peft", peft), ("mlx", mlx), ("loralib", loralib))}
