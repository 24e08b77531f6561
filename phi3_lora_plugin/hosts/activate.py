"""What has to change in a host's process so that Phi-3 works in it: explicit, reported in sentences, and reversible.

Importing this package changes nothing. `activate()` changes what is asked for, once; `deactivate()` undoes all of it.
Each part is one seam of a library that is meant to be filled (a table), or one function of it that is wrapped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.model.families import linear_names
from phi3_lora_plugin.seams import ActivationError, look_up

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

log = logging.getLogger(__name__)

#: What can be activated, and what it does.
PARTS = {
    "targets": "PEFT knows which modules of phi3, phimoe and phi4_multimodal get LoRA where a LoraConfig names none",
    "report_to": "report_to: phi3_lora adds LoRA-only checkpoints where a host passes nothing but names",
    "trl": "TRL trains Phi-3 with our templates and exact masks",
    "older": "scripts written for older releases run: renamed arguments, remote code, kernels that are not here",
    "trainers": "every Trainer gets our callbacks, repairs and fast paths when training starts",
}
#: Tables of names, which change nothing for code that does not use those names.
TABLES = ("targets", "report_to")
#: `report_to` takes this name.
REPORT_TO = "phi3_lora"
#: Every projection of a layer, as published recipes for Phi-3 have it; of PhiMoE the attention, never the router; of
#: Phi-4-multimodal the text side.
TARGETS = {
    **{kind: linear_names(kind) for kind in ("phi3", "phimoe")},
    # PEFT matches the ends of paths, and `self_attn.o_proj` is one of the audio tower's as well.
    "phi4_multimodal": ["qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"],
}

Done = tuple[list[str], Callable[[], None]]  # a sentence for each thing done, and how to undo it
_undo: dict[str, Callable[[], None]] = {}


def activate(
    recipe: Recipe | None = None,
    *,
    parts: Sequence[str] = TABLES,
    callbacks: Sequence[str] | None = None,
    optional: Sequence[str] = (),
    say: Callable[[str], Any] | None = None,
) -> list[str]:
    """Change this process so that Phi-3 works in any host that runs in it; return a sentence for each thing done.

    A part that is already active is left as it is and not reported again.

    Args:
        recipe: its `checkpoint`, `speed` and `lora.targets` apply; without one, the defaults.
        parts: of `PARTS`; by default those that only fill tables.
        callbacks: for "trainers", what `hosts.trainers.chosen` takes; None: those of every plugin.
        optional: of `parts`, those that stay off, with a sentence, where their library has changed.
        say: is called with each sentence that comes up later, when a Trainer begins; None: they go to the log.

    Raises:
        ActivationError: an unknown part, or an installed library that has changed where a part that is not optional
            holds on to it; names the library, its version and what is switched off. Nothing is activated then.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ActivationError(f"unknown part {', '.join(unknown)}; available: {', '.join(PARTS)}")
    done: list[str] = [] if recipe is None else _base_refused(recipe)
    new = [part for part in PARTS if part in parts and part not in _undo]
    try:
        for part in new:
            sentences, _undo[part] = _activated(part, recipe, callbacks, part in optional, say)
            done += sentences
    except BaseException:
        for part in new:
            if part in _undo:
                _undo.pop(part)()
        raise
    return done


def _base_refused(recipe: Recipe) -> list[str]:
    from phi3_lora_plugin.model.published import why_refused

    why = why_refused(recipe.model.path, recipe.model.revision)
    return [] if why is None else [f"WARNING: {recipe.name} names {recipe.model.path}, which is not supported: {why}"]


def _activated(part: str, recipe: Recipe | None, callbacks: Sequence[str] | None, optional: bool, say: Any) -> Done:
    if part == "targets":
        return _targets(recipe)
    if part == "report_to":
        return _report_to(recipe)
    if part == "trl":
        from phi3_lora_plugin.hosts.trl import exact_rows

        return exact_rows(optional)
    if part == "older":
        from phi3_lora_plugin.hosts.older_scripts import older_scripts

        return older_scripts(say or log.info)
    from phi3_lora_plugin.hosts.trainers import attach_to_all

    return attach_to_all(recipe, callbacks, say)


def deactivate() -> None:
    """Undo all that `activate` did in this process; Trainers that exist keep what they were given."""
    while _undo:
        _undo.popitem()[1]()


def active() -> tuple[str, ...]:
    """The parts that are active now."""
    return tuple(_undo)


def _targets(recipe: Recipe | None) -> Done:
    """Fill PEFT's table of default targets, which has `phi` but not `phi3`; what other code put there stays."""
    table: dict[str, Any] = look_up("peft.targets")
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


def _report_to(recipe: Recipe | None) -> Done:
    """Register the callback under a name; hosts that pass strings create it without arguments."""
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    kind: type = LoraCheckpoint
    if recipe is not None:

        def as_the_recipe_says(self: Any) -> None:
            self.__dict__.update(LoraCheckpoint.from_recipe(recipe).__dict__)

        kind = type("LoraCheckpoint", (LoraCheckpoint,), {"__init__": as_the_recipe_says})
    table: dict[str, Any] = look_up("transformers.report_to")
    table[REPORT_TO] = kind
    return [f"report_to: {REPORT_TO} adds LoRA-only checkpoints"], lambda: table.pop(REPORT_TO, None)
