"""A model's config.json as the native config object, with rotary settings repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_lora_plugin.model.families import RopeError, UnsupportedModel, recognise, repair_rope
from phi3_lora_plugin.model.folder import ModelError, read_json


def read_config(path: Path) -> Any:
    """The native config object of a config.json, with rotary settings repaired and without `auto_map`.

    Raises:
        ModelError: the file is missing or not JSON, or the native class refuses it.
        UnsupportedModel: not a model of the family.
        RopeError: rotary settings that no revision has.
    """
    return native_config(read_json(path), str(path))


def native_config(given: dict[str, Any], where: str) -> Any:
    """The native config object of a config.json's content; `where` is for errors. Raises as `read_config` does."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        recognise(given)
        repaired = {key: value for key, value in repair_rope(given).items() if key not in ("auto_map", "_name_or_path")}
        native = CONFIG_MAPPING[repaired["model_type"]]
        if not hasattr(native(), "rope_parameters"):
            _refuse_pruned_heads(repaired, where)
            repaired = _old_layout(repaired)
        return native.from_dict(repaired)
    except (UnsupportedModel, RopeError, ModelError):
        raise
    except Exception as error:  # sizes that are not numbers; the native class raises errors of its own
        raise ModelError(f"{where} does not describe a model: {type(error).__name__}: {error}") from error


def _refuse_pruned_heads(config: dict[str, Any], where: str) -> None:
    """transformers before 5 computes the size of a head of PhiMoE, and does not look at `head_dim`."""
    import transformers

    heads, size = int(config["num_attention_heads"]), config.get("head_dim")
    if config["model_type"] == "phimoe" and size and heads * int(size) != int(config["hidden_size"]):
        raise ModelError(
            f"{where}: {heads} heads of {size} are not hidden_size {config['hidden_size']}, as in Phi-tiny-MoE; this "
            f"needs transformers 5 or newer, and {transformers.__version__} is installed: pip install -U transformers"
        )


def _old_layout(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings as transformers before 5 has them."""
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] == "longrope":
        config["rope_scaling"] = {
            "type": "longrope",
            "short_factor": rope["short_factor"],
            "long_factor": rope["long_factor"],
        }
    return config
