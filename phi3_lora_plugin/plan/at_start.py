"""What `training.activation_checkpointing: auto` means for a run that is about to start, the same in all processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.plan.checkpointing import ALL, Choice, is_auto, unplanned
from phi3_lora_plugin.plan.feed import lengths_of
from phi3_lora_plugin.plan.machine import free_memory
from phi3_lora_plugin.training.checkpointing import Checkpointing, offers_some_layers, set_checkpointing
from phi3_lora_plugin.wording import first_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from phi3_lora_plugin.chat.dataset import Data
    from phi3_lora_plugin.recipe import Recipe

_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def settle_checkpointing(
    recipe: Recipe, arguments: TrainingArguments, model: Any, data: Data, recorded: Any = None
) -> Choice | None:
    """Choose what fits into the memory that is free now, and write it into the arguments.

    Where a plan cannot tell, all layers are recomputed, and the choice says why. Collective where there are several
    processes: the first one decides, by the smallest memory of them all.

    Args:
        arguments: of a Trainer that is not made yet.
        model: loaded, with its LoRA.
        data: the encoded rows.
        recorded: of a run that is resumed, the choice that was recorded (`record`).

    Returns:
        None if the recipe does not leave it to `auto`.
    """
    if not is_auto(recipe):
        return None
    kind = arguments.device.type
    held = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = free_memory(kind, held)
    several = arguments.world_size > 1
    if several:
        import torch.distributed as dist

        found: list[Any] = [None] * arguments.world_size
        dist.all_gather_object(found, memory)
        memory = None if None in found else min(found)
    chosen: list[Any] = [None]
    if arguments.process_index == 0:
        chosen = [_read(recorded) or _planned(recipe, arguments, kind, data, memory)]
    if several:
        dist.broadcast_object_list(chosen)
    choice: Choice = chosen[0]
    set_checkpointing(arguments, choice.checkpointing)
    return choice


def record(choice: Choice | None) -> dict[str, Any] | None:
    """The choice as the run's file holds it."""
    return None if choice is None else asdict(choice)


def _read(recorded: Any) -> Choice | None:
    try:
        found = recorded["checkpointing"]
        setting = Checkpointing(int(found["every"]), bool(found["offload"]))
    except (TypeError, KeyError, ValueError):
        return None
    known = offers_some_layers() or setting in (Checkpointing(), ALL)  # transformers may be older now
    return Choice(setting, "as when this run began") if known else None


def _planned(recipe: Recipe, arguments: TrainingArguments, kind: str, data: Data, memory: int | None) -> Choice:
    from phi3_lora_plugin.plan.plan import plan

    if reason := unplanned(recipe):
        return Choice(ALL, reason)
    if arguments.fsdp or arguments.deepspeed or any(_is_on(os.environ, name) for name in _SHARDED):
        return Choice(ALL, "plans do not cover sharded models")
    try:
        lengths = lengths_of(data.train, data.eval)
        # The weights are loaded, and the program is part of what is not free any more.
        made = plan(recipe, memory, kind, lengths=lengths, program=0 if kind in ("cpu", "mps") else None)
    except Exception as error:  # whatever it is, it says nothing about the training itself
        return Choice(ALL, f"cannot be planned: {first_line(error)}")
    return Choice(Checkpointing(made.every_n_layers, made.offload), made.chosen or "")


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes")
