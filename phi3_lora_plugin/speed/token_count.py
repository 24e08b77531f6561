"""Tokens that a Trainer has seen, counted by what the host knows of each batch.

`Trainer` counts them on the card (`include_num_input_tokens_seen`), and the host waits for each number until the card
is done with all that it has been given.
"""

# Plain functions that become methods of one trainer.
from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.seams import obstacle
from phi3_lora_plugin.speed.trainer_loss import held

if TYPE_CHECKING:
    from transformers import Trainer


def count_on_host(trainer: Trainer, base: Any) -> None:
    """Let a trainer of one process count without its card, where `documents` has read the batch.

    Several processes add up their counts on cards; older Trainers have no method for it. Both count as ever.
    """
    if trainer.args.world_size > 1 or obstacle("transformers.tokens"):
        return
    known: Any = trainer._track_num_input_tokens
    if getattr(known, "func", None) is not _track:
        trainer._track_num_input_tokens = partial(_track, held(trainer, known), weakref.ref(trainer), base)


def _track(stock: Callable[[], Any], trainer: Callable[[], Any], base: Any, inputs: Any) -> None:
    mine = trainer()
    count = _counted(mine.args.include_num_input_tokens_seen, base, inputs)
    if count is None:
        stock()(inputs)
    else:
        mine.state.num_input_tokens_seen += count


def _counted(what: str, base: Any, inputs: Any) -> int | None:
    """Tokens of a batch that a step was just made with; None if the host does not know how many there are."""
    if not isinstance(inputs, Mapping):  # prompts, as GRPO hands them on
        return None
    if what == "all" and "input_ids" in inputs:
        return int(inputs["input_ids"].numel())
    by, count = base.model.__dict__.get("_counted") or (None, 0)
    told = inputs.get("attention_mask", inputs.get("cu_seq_lens_q"))
    return count if what == "non_padding" and told is not None and told is by else None
