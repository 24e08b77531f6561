"""Stock code back in the place of parts of the switch."""

# Imported only inside functions, like everything that is heavy.
from __future__ import annotations

from collections.abc import Collection
from typing import Any

from phi3_lora_plugin.speed.documents import restore_documents
from phi3_lora_plugin.speed.host import restore_host
from phi3_lora_plugin.speed.layers import restore_layers
from phi3_lora_plugin.speed.lora_swap import restore_lora
from phi3_lora_plugin.speed.loss import restore_loss
from phi3_lora_plugin.speed.masters import restore_masters
from phi3_lora_plugin.speed.proved_prefetch import stop


def restore(model: Any, base: Any, parts: Collection[str]) -> None:
    """Undo these parts of `speed_up`, where they are on; `base` is the causal model in `model`."""
    if "loss" in parts:
        if "_trl_forward" in base.__dict__:
            from phi3_lora_plugin.speed.trl_loss import restore_trl_loss

            restore_trl_loss(base)
        restore_loss(base)
    if "last_layer" in parts:
        getattr(base, "model", base).__dict__.pop("_last_layer", None)
    if "attention" in parts:
        restore_documents(base)
    if "layers" in parts:
        restore_layers(base)
    if "lora" in parts:
        stop(model)
        restore_lora(model)
    if "masters" in parts:
        restore_masters(model)
    if "host" in parts:
        restore_host(model, base)
