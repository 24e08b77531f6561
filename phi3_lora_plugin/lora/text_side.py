"""Keep LoRA on the text side of Phi-4-multimodal, so that what it makes of images and speech stays as it was.

The model sees and hears by a LoRA of its own for each (`vision-lora` and `speech-lora` next to its weights, arXiv
2503.01743), which `set_adapter` switches on. An adapter for text is one more of them, and changes nothing while another
one is on, as long as training touches neither the towers nor a weight below those adapters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from phi3_lora_plugin.model.families import TOWERS, has_towers


def excluded_modules(config: Mapping[str, Any]) -> str | None:
    """PEFT's `exclude_modules` for a model: names such as `o_proj` are those of modules in the audio tower too."""
    return rf"{re.escape(TOWERS)}\..+" if has_towers(config) else None


def text_side_problems(model: Any, rewrites_base: bool, init: Any, options: Mapping[str, Any]) -> Iterator[str]:
    """Options that would change what the model makes of images and speech; none for a model of text alone."""
    if not has_towers(model.config.to_dict()):
        return
    if (bias := options.get("bias", "none")) != "none":
        yield (
            f"bias={bias!r} trains biases in place, and here only the vision and audio towers have any; leave it out"
        )
    if rewrites_base:
        yield (
            f"init_lora_weights: {init!r} moves part of the weights into the adapter, which the model's own vision and "
            "speech adapters are added to; use the default or gaussian start"
        )
    inside = {name.rpartition(".")[2] for name, _ in model.named_modules() if name.startswith(f"{TOWERS}.")}
    for name in options.get("modules_to_save") or ():
        if TOWERS.rpartition(".")[2] in name.split(".") or name.rpartition(".")[2] in inside:
            yield f"modules_to_save: {name!r} is in the vision or audio tower, which keep their weights"


def reached_towers(model: Any) -> list[str]:
    """Modules of the vision and audio towers that have LoRA, which plain PEFT gives them for names such as `o_proj`."""
    return sorted(
        name[name.index(TOWERS) :]
        for name, module in model.named_modules()
        if f"{TOWERS}." in name and hasattr(module, "lora_A")
    )


def refuse_merging(config: Mapping[str, Any]) -> str | None:
    """Why an adapter is not merged into this base; None if it may be."""
    if not has_towers(config):
        return None
    return (
        "merging would change the weights that Phi-4-multimodal's own vision and speech adapters are added to, and so "
        "what it makes of images and speech; load the adapter next to theirs and switch by set_adapter "
        "(phi3-lora docs families), or ship it as an adapter"
    )
