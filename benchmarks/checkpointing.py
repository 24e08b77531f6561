"""Layers that are computed again in the backward pass, by whatever name the installed transformers has for it."""

from __future__ import annotations

from typing import Any


def recompute(model: Any) -> None:
    """Switch it on for a PEFT model, as `phi3-lora train` does."""
    from phi3_lora_plugin.lora.inject import prepare_for_checkpointing

    prepare_for_checkpointing(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def keep(model: Any) -> None:
    """Switch it off again."""
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    if hasattr(model, "disable_input_require_grads"):
        model.disable_input_require_grads()
