"""The section `phi3_lora:` that hosts' config files may have: a recipe's keys for what a host has no keys for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.recipe.sections import ChatSection, CheckpointSection, Section


class SettingsError(Phi3LoraError):
    """A `phi3_lora:` section, or a host's config around it, that cannot be used; names every key that is wrong."""


class HostSettings(Section):
    """The keys of `phi3_lora:`; all are optional."""

    data: ChatSection = ChatSection()
    checkpoint: CheckpointSection | Literal[False] = CheckpointSection()
    """Which LoRA-only checkpoints are written next to the host's own; false: none."""
    masks: bool = True
    """Encode chats here, so that ids are the published template's and labels exact; false leaves it to the host."""

    def digest(self) -> str:
        """Twelve letters that differ where the encoded rows do."""
        return hashlib.sha256(json.dumps(self.data.model_dump(), sort_keys=True).encode()).hexdigest()[:12]


def read_settings(given: Mapping[str, Any] | None) -> HostSettings:
    """The section as settings; None is the defaults.

    Raises:
        SettingsError: with every key that is unknown or has a value it cannot have.
    """
    try:
        return HostSettings.model_validate(dict(given or {}))
    except (ValidationError, TypeError, ValueError) as error:
        raise SettingsError("\n  ".join(["phi3_lora: cannot be used as it is:", *_lines(error)])) from error


def _lines(error: Exception) -> list[str]:
    if not isinstance(error, ValidationError):
        return [f"expected a mapping with {', '.join(HostSettings.model_fields)}: {error}"]
    # `checkpoint` may be a section or false; pydantic answers for both, with parts such as `literal[False]`.
    errors = [found for found in error.errors() if "literal[False]" not in found["loc"]] or error.errors()
    return [f"{'.'.join(str(part) for part in one['loc'] if '[' not in str(part))}: {one['msg']}" for one in errors]


def checkpoint_callback(settings: HostSettings) -> Any:
    """The `LoraCheckpoint` that the section configures, which records how chats were rendered; None for false."""
    if settings.checkpoint is False:
        return None
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    return LoraCheckpoint.from_sections(settings.checkpoint, settings.data)
