"""Which decoder layers a run computes again in the backward pass, as a Trainer's arguments say it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.recipe.training import installed_fields

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Reentrant checkpointing gives no gradient after frozen embeddings.
NOT_REENTRANT = {"use_reentrant": False}


@dataclass(frozen=True)
class Checkpointing:
    """Activation (gradient) checkpointing of decoder layers, as transformers offers it from 5.23 on.

    Attributes:
        every: the first layer and every `every`-th after it are computed again; 1: all of them, 0: none.
        offload: what is kept for that, the inputs of these layers, is held in the host's memory.
    """

    every: int = 0
    offload: bool = False

    def layers(self, count: int) -> tuple[bool, ...]:
        """For each of `count` layers whether it is computed again."""
        return tuple(bool(self.every) and number % self.every == 0 for number in range(count))

    def wording(self, count: int) -> str:
        """What that is for a model of `count` layers, for people."""
        again = sum(self.layers(count))
        if not again:
            return "all activations kept"
        offloaded = ", their inputs offloaded to host memory" if self.offload else ""
        if again == count:
            return f"all {count} layers recomputed{offloaded}"
        return f"{again} of {count} layers recomputed (every_n_layers: {self.every}){offloaded}"


def setting_name() -> str:
    """The setting by the name that the installed transformers has for it."""
    return "activation_checkpointing" if "activation_checkpointing" in installed_fields() else "gradient_checkpointing"


def offers_some_layers() -> bool:
    """Whether the installed transformers can recompute some layers only, and offload: not before 5.23."""
    from transformers import PreTrainedModel

    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", None)
    return enable is not None and {"every_n_layers", "offload"} <= set(inspect.signature(enable).parameters)


def checkpointing_of(arguments: TrainingArguments) -> Checkpointing:
    """What the arguments of a Trainer say."""
    if not checkpoints_activations(arguments):
        return Checkpointing()
    settings: Any = getattr(arguments, "activation_checkpointing_kwargs", None)
    settings = settings if isinstance(settings, dict) else {}
    return Checkpointing(int(settings.get("every_n_layers", 1)), bool(settings.get("offload", False)))


def checkpoints_activations(arguments: TrainingArguments) -> bool:
    """Whether any layer is computed again."""
    return bool(
        getattr(arguments, "activation_checkpointing", False) or getattr(arguments, "gradient_checkpointing", False)
    )


def set_checkpointing(arguments: TrainingArguments, wanted: Checkpointing) -> None:
    """Change the arguments of a Trainer that is not made yet."""
    more: dict[str, Any] = {"every_n_layers": wanted.every} if wanted.every > 1 else {}
    more |= {"offload": True} if wanted.offload else {}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(arguments, name):
            given = getattr(arguments, f"{name}_kwargs", None) or {}
            kept = {key: value for key, value in given.items() if key not in ("every_n_layers", "offload")}
            setattr(arguments, name, wanted.every > 0)
            setattr(arguments, f"{name}_kwargs", (NOT_REENTRANT | kept | more) if wanted.every else None)
