"""The entry-point target of installs made before `plugins.builtin` existed; it registers the same hooks."""

from phi3_lora_plugin.plugins.builtin import (
    register_dataset_adapters,
    register_exporters,
    register_models,
    register_recipes,
    trainer_callbacks,
)

__all__ = [
    "register_dataset_adapters",
    "register_exporters",
    "register_models",
    "register_recipes",
    "trainer_callbacks",
]
