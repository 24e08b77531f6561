"""What a host's process needs to be changed so that Phi-3 works in it: explicit, said in sentences, and reversible.

Nothing is changed by importing this package. `activate()` changes what is asked for, once; `deactivate()` takes it all
back. Each part is one seam of a library that is meant to be filled (a table), or one function of it that is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

#: What can be activated, and what it does.
PARTS = {
    "targets": "PEFT knows which modules of phi3 and phimoe get LoRA where a LoraConfig names none",
    "report_to": "report_to: phi3_lora adds LoRA-only checkpoints where a host passes nothing but names",
    "trl": "TRL trains Phi-3 with our templates and exact masks",
    "trainers": "every Trainer gets our callbacks, repairs and fast paths as training begins",
}
#: Tables of names, which change nothing for anybody who does not use those names.
TABLES = ("targets", "report_to")
#: `report_to` takes this name.
REPORT_TO = "phi3_lora"
#: Every projection of a layer, as published recipes for Phi-3 have it; of PhiMoE the attention, never the router.
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "phimoe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

_undo: dict[str, Callable[[], None]] = {}


class ActivationError(Phi3LoraError):
    """A part that does not exist, or a seam that the installed library does not have any more."""


def activate(
    recipe: Recipe | None = None,
    *,
    parts: Sequence[str] = TABLES,
    callbacks: Sequence[str] | None = None,
    say: Callable[[str], Any] | None = None,
) -> list[str]:
    """Change this process so that Phi-3 works in any host that runs in it; return a sentence for each thing done.

    A part that is active already is left as it is, and nothing is said about it.

    Args:
        recipe: its `checkpoint`, `speed` and `lora.targets` apply; without one, the defaults.
        parts: of `PARTS`; by default those that only fill tables.
        callbacks: for "trainers", what `hosts.trainers.chosen` takes; None: those of every plugin.
        say: is called with each sentence that comes up later, when a Trainer begins; None: they go to the log.

    Raises:
        ActivationError: an unknown part, or an installed library without the seam.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ActivationError(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    done = []
    for part in PARTS:
        if part not in parts or part in _undo:
            continue
        if part == "targets":
            sentences, undo = _targets(recipe)
        elif part == "report_to":
            sentences, undo = _report_to(recipe)
        elif part == "trl":
            from phi3_lora_plugin.hosts.trl import exact_rows

            sentences, undo = exact_rows()
        else:
            from phi3_lora_plugin.hosts.trainers import attach_to_all

            sentences, undo = attach_to_all(recipe, callbacks, say)
        _undo[part] = undo
        done += sentences
    return done


def deactivate() -> None:
    """Take back all that `activate` did in this process; Trainers that exist keep what they were given."""
    while _undo:
        _undo.popitem()[1]()


def active() -> tuple[str, ...]:
    """The parts that are active now."""
    return tuple(_undo)


def _targets(recipe: Recipe | None) -> tuple[list[str], Callable[[], None]]:
    """Fill PEFT's table of default targets, which has `phi` but not `phi3`; what somebody else put there stays."""
    from peft.utils import constants

    table: dict[str, Any] = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    wanted, sentences = dict(TARGETS), []
    if recipe is not None and isinstance(recipe.lora.targets, list):
        named = recipe.lora.targets
        kind = next((kind for kind, known in TARGETS.items() if set(named) <= set(known)), None)
        if kind is None:
            sentences.append(
                f"recipe {recipe.name} names {', '.join(named)}, which PEFT alone cannot place; it gets all projections"
            )
        else:
            wanted[kind] = list(named)
    added = [kind for kind in wanted if kind not in table]
    for kind in added:
        table[kind] = wanted[kind]
        sentences.append(f"LoRA without target_modules goes to {', '.join(wanted[kind])} of a {kind} model")

    def undo() -> None:
        for kind in added:
            table.pop(kind, None)

    return sentences, undo


def _report_to(recipe: Recipe | None) -> tuple[list[str], Callable[[], None]]:
    """Register the callback under a name; hosts that pass strings create it without arguments."""
    from transformers.integrations import integration_utils

    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    kind: type = LoraCheckpoint
    if recipe is not None:

        def as_the_recipe_says(self: Any) -> None:
            self.__dict__.update(LoraCheckpoint.from_recipe(recipe).__dict__)

        kind = type("LoraCheckpoint", (LoraCheckpoint,), {"__init__": as_the_recipe_says})
    table: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    table[REPORT_TO] = kind
    return [f"report_to: {REPORT_TO} adds LoRA-only checkpoints"], lambda: table.pop(REPORT_TO, None)
