"""What every host module asks before it touches anything: is the base a Phi, and are the named targets there?"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from phi3_lora_plugin.chat.templates import TemplateError, template_for
from phi3_lora_plugin.lora.targets import ALL_LINEAR, TargetError, describe, resolve_targets
from phi3_lora_plugin.model.families import UnsupportedModel, has_towers, projections, recognise
from phi3_lora_plugin.model.refused import REFUSED_IDS

log = logging.getLogger(__name__)


def phi_config(base: str, revision: str | None = None) -> dict[str, Any] | None:
    """The config of `base` (folder or hub id) as plain data if it is one of the family, else None; runs no remote code.

    Phi-4-multimodal counts as none: hosts name targets by their ends. Of it, and of what is refused, the log says so.

    Raises:
        OSError: no config was found; the message names where it was looked for.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(base, revision=revision)
    try:
        recognise(config)
    except UnsupportedModel as error:
        if config.get("model_type") in REFUSED_IDS.values():
            log.warning("phi3_lora_plugin: %s: %s", base, error)
        return None
    if has_towers(config):
        log.warning(
            "phi3_lora_plugin: %s: names of targets fit its audio tower as well, and nothing is changed for this host; "
            "its text side is trained by `phi3-lora train`", base,
        )  # fmt: skip
        return None
    return dict(config)


def phi_config_if_found(base: str, revision: str | None = None) -> dict[str, Any] | None:
    """As `phi_config`, and None where no config can be read: whoever loads the base says so."""
    try:
        return phi_config(base, revision)
    except (OSError, ValueError) as error:
        log.debug("the config of %s cannot be read: %s", base, error)
        return None


def family_template(tokenizer: Any) -> Any:
    """The template of ours that renders as this tokenizer's own; None if it has none, or one of another family."""
    try:
        return template_for(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    except (TemplateError, AttributeError):
        return None


def no_remote_code(args: MutableMapping[str, Any]) -> list[str]:
    """Switch off the hub's own code for a model in a host's arguments; a sentence if it was on."""
    if not args.get("trust_remote_code"):
        return []
    args["trust_remote_code"] = False
    return ["trust_remote_code: false, transformers has this model; old remote code of it no longer runs"]


def check_targets(config: Mapping[str, Any], named: str | Iterable[str], key: str) -> None:
    """Refuse targets that a host would silently miss in part: a name that matches nothing, or a slice.

    Hosts hand names to PEFT, which adapts what it finds; of `q_proj, o_proj` it finds only the second on a fused model.

    Raises:
        TargetError: names `key` and the model's real modules.
    """
    names = [named] if isinstance(named, str) else list(named)
    slices = {part.name: projection.name for projection in projections(config) for part in projection.slices}
    wrong = [
        f"{key}: {name} is a slice of {slices[name]} on this model, which plain PEFT cannot adapt alone; write "
        f"{slices[name]}, or train with `phi3-lora train`, which can"
        for name in names
        if name in slices
    ]
    if wrong:
        raise TargetError(wrong, describe(config))
    plain = ALL_LINEAR if names == ["all"] else names
    resolve_targets(config, plain, 1, 1.0)
