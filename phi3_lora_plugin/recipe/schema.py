"""JSON Schema of a recipe file, for editors: what may stand in it before parents and overrides are merged."""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.recipe import Recipe
from phi3_lora_plugin.recipe.sections import PEFT_NAMES
from phi3_lora_plugin.recipe.training import AUTO

_CHECKPOINTING = {
    "anyOf": [{"type": "boolean"}, {"enum": [AUTO, "yes", "on", "no", "off"]}, {"type": "null"}],
    "description": "Compute layers again in the backward pass; auto: as few of them as fit into memory.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema; it knows our keys, not those of the installed `TrainingArguments`, which `validate` checks.

    Of the latter it has the one for which we know a value more.
    """
    schema = Recipe.model_json_schema()
    sections: dict[str, Any] = schema["$defs"]
    sections["ModelSection"].pop("required")  # a parent may give the path
    lora = sections["LoraSection"]["properties"]
    for theirs, ours in PEFT_NAMES.items():
        lora[theirs] = {**lora[ours], "description": f"PEFT's name for `{ours}`."}
    lora["init_lora_weights"] = {"anyOf": [_bare(lora["init"]), {"type": "boolean"}]}
    training = schema["properties"]["training"]
    training["properties"] = {name: _CHECKPOINTING for name in ("activation_checkpointing", "gradient_checkpointing")}
    for section in (schema, *sections.values()):
        section["properties"] = {name: _or_null(value) for name, value in section["properties"].items()}
    extends = {"type": "string", "minLength": 1, "description": "Name of the recipe to start from, or a .yaml path."}
    schema["properties"] = {"extends": extends, **schema["properties"]}
    schema["anyOf"] = [{"required": ["extends"]}, {"required": ["model"]}]
    schema.pop("required")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "phi3-lora recipe",
        "description": "One LoRA run; printed by `phi3-lora schema`.",
    }


def _bare(value: dict[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in ("default", "description", "title")}


def _or_null(value: dict[str, Any]) -> dict[str, Any]:
    """Null takes the default back, so it may stand anywhere."""
    about = {key: inner for key, inner in value.items() if key in ("description", "default")}
    core = _bare(value)
    members = core.get("anyOf", [core] if core else [])
    if not members or {"type": "null"} in members:
        return {**core, **about}
    return {"anyOf": [*members, {"type": "null"}], **about}
