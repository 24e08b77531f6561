"""Sizes of the models that Microsoft has published, so that plans and `inspect` answer before anything is downloaded.

`published.json` has of each config.json on the hub what its sizes follow from. The numbers of longrope are not among
them: no size depends on their values, and loading takes them from the model itself.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import UnsupportedModel, recognise
from phi3_lora_plugin.model.folder import ModelError, find_config, read_json


def published_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The sizes in the config.json of a hub id; None for one that is not known. Upper and lower case are the same.

    Of Phi-4-multimodal only the revision is known that transformers can load.

    Factors of longrope are all 1.0 here but for a first one that tells two members of the family from one another.
    """
    known = _published().get(f"{name}@{revision}".lower()) or _published().get(name.lower())
    if known is None:
        return None
    config = json.loads(json.dumps(known))
    if (rope := config.get("rope_scaling")) is not None:
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        count = int(size * config.get("partial_rotary_factor", 1.0)) // 2
        for key in ("short_factor", "long_factor"):
            first = rope.get(key, [])
            rope[key] = [*first, *[1.0] * (count - len(first))]
    return dict(config)


def planning_config(name: str, revision: str | None = None) -> Path | dict[str, Any]:
    """The config.json of a model: its file if it is on this machine, else what is known of the published one.

    Raises:
        ModelError: neither is available.
    """
    try:
        return find_config(name, revision)
    except ModelError:
        if (known := published_config(name, revision)) is None:
            raise
        return known


def why_refused(name: str, revision: str | None = None) -> str | None:
    """Why a model is not supported, as far as its config is known here; None if it is, or if nothing is known."""
    try:
        found = planning_config(name, revision)
        recognise(found if isinstance(found, dict) else read_json(found))
    except UnsupportedModel as error:
        return str(error)
    except (Phi3LoraError, ValueError, TypeError):  # loading reports what else is wrong
        return None
    return None


def read_planning_config(name: str, revision: str | None = None) -> Any:
    """`planning_config` as the native config object; raises also as `read_config`."""
    from phi3_lora_plugin.model.config import native_config, read_config

    found = planning_config(name, revision)
    return native_config(found, name) if isinstance(found, dict) else read_config(found)


@cache
def _published() -> dict[str, dict[str, Any]]:
    text = (files("phi3_lora_plugin.model") / "published.json").read_text(encoding="utf-8")
    return {name.lower(): config for name, config in json.loads(text).items()}
