"""One line for a Trainer that exists: LoRA-only checkpoints, stop tokens, a pad that is not one, and the fast paths."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.lora.gather import unwrapped
from phi3_lora_plugin.lora.text_side import reached_towers
from phi3_lora_plugin.model.families import SUPPORTED, projections
from phi3_lora_plugin.model.load import set_stop_tokens
from phi3_lora_plugin.model.refused import REFUSED, REFUSED_IDS
from phi3_lora_plugin.model.tokenizer import stop_token_ids
from phi3_lora_plugin.speed.apply import accelerate_phi3

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from phi3_lora_plugin.recipe import Recipe

_LOOKED_AT = 64  # rows, to see whether they are padded already


def attach(
    trainer: Trainer,
    recipe: Recipe | None = None,
    *,
    speed: str | Mapping[Any, bool] | None = None,
    callbacks: Iterable[TrainerCallback] | None = None,
    **checkpoint: Any,
) -> list[str]:
    """Add what Phi-3 needs to a Trainer that exists, and return a sentence for each thing done.

    For `transformers.Trainer` and what derives from it (TRL's trainers do), before `trainer.train()`. Calling it twice
    does nothing the second time.

    Args:
        recipe: its `checkpoint` and `speed` sections apply.
        speed: "auto", "off" or {part: bool}, see `accelerate_phi3`; None: as in the recipe, or "auto".
        callbacks: to add instead of `LoraCheckpoint`.
        checkpoint: what `LoraCheckpoint` takes, if neither `recipe` nor `callbacks` is given.

    Raises:
        ModelError: the tokenizer has ids that the embedding has no row for.
        TokenizerError: no token of the vocabulary could pad.
    """
    from phi3_lora_plugin.training.callbacks import LoraCheckpoint

    done = []
    if trains_alone(type(trainer)):
        done.append(
            f"WARNING: {type(trainer).__name__} has its own train(), which does not call Trainer.train: callbacks, "
            "and the Trainer's own evaluation and saving, run only where it calls them"
        )
    present = trainer.callback_handler.callbacks
    if callbacks is not None:
        wanted = list(callbacks)
    elif any(isinstance(callback, LoraCheckpoint) for callback in present):
        wanted = []
    else:
        wanted = [LoraCheckpoint.from_recipe(recipe) if recipe else LoraCheckpoint(**checkpoint)]
    for callback in wanted:
        alike = LoraCheckpoint if isinstance(callback, LoraCheckpoint) else ()
        if any(callback is one or isinstance(one, alike) for one in present):
            continue
        trainer.add_callback(callback)
        done.append(
            "LoRA-only checkpoints are saved next to the Trainer's own"
            if isinstance(callback, LoraCheckpoint)
            else f"callback {type(callback).__name__} added"
        )
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, LoraCheckpoint) or (callback in wanted and hasattr(callback, "bind")):
            callback.bind(trainer)
    model = unwrapped(trainer.model)
    if _is_phi(model):
        done += _stop_tokens(trainer, model)
        done += _targets_missed(model)
        done += _towers_reached(model)
    elif (kind := _kind(model)) in REFUSED_IDS.values():
        done.append(f"WARNING: model_type {kind!r}: {REFUSED[kind]}; its stop tokens and LoRA targets are not checked")
    parts = speed if speed is not None else "auto" if recipe is None else recipe.speed
    return done + _speed(trainer, model, parts)


def trains_alone(kind: type) -> bool:
    """Whether the class that defines `train` does so without naming `super` or a Trainer's `train`."""
    code = getattr(inspect.unwrap(kind.train), "__code__", None)  # type: ignore[attr-defined]
    home = next(each for each in kind.__mro__ if "train" in each.__dict__)
    if code is None or home.__module__ == "transformers.trainer":
        return False
    return not ({"super", "train", "_inner_training_loop"} & {*code.co_names, *code.co_freevars})


def wrap_again(trainer: Trainer) -> bool:
    """After an evaluation and before training: let accelerate wrap the model for several processes; whether it had to.

    Evaluating marks the model as prepared, and accelerate 1.15 then wraps it no more: each process would train on its
    own rows, without an error.
    """
    marked = getattr(trainer.model, "_is_accelerate_prepared", False)
    if trainer.args.world_size == 1 or not marked or trainer.model_wrapped is not trainer.model:
        return False
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return False  # these are wrapped for evaluation as well
    trainer.accelerator.free_memory()  # forgets the models that it has prepared
    trainer.model._is_accelerate_prepared = False
    return True


def _kind(model: Any) -> Any:
    return getattr(getattr(model, "config", None), "model_type", None)


def _is_phi(model: Any) -> bool:
    return _kind(model) in SUPPORTED


def _stop_tokens(trainer: Any, model: Any) -> list[str]:
    processor: Any = getattr(trainer, "processing_class", None)
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_added_vocab") or getattr(model, "generation_config", None) is None:
        return []
    if not _padded_already(trainer.train_dataset, tokenizer.pad_token_id):
        return set_stop_tokens(model, tokenizer)
    # Another pad token now would have the old one trained, wherever a collator masks pads by their id.
    done = set_stop_tokens(model, tokenizer, repair=False)
    if tokenizer.pad_token_id in stop_token_ids(tokenizer):
        done.append(f"rows are already padded with {tokenizer.pad_token}, so it stays the pad token")
    return done


def _padded_already(rows: Any, pad: int | None) -> bool:
    """Whether some of the first rows hold pads: masked positions, or the pad token twice at an end."""
    if not hasattr(rows, "__getitem__"):
        return False
    for row in islice(iter(rows), _LOOKED_AT):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            return False
        ids, mask = list(row["input_ids"]), list(row.get("attention_mask", ()))
        if 0 in mask or (pad is not None and (ids[:2] == [pad] * 2 or ids[-2:] == [pad] * 2)):
            return True
    return False


def _targets_missed(model: Any) -> list[str]:
    """Names of a `LoraConfig` that match nothing; PEFT does not report them as long as another one matches."""
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    inside = {part.name: whole.name for whole in projections(model.config.to_dict()) for part in whole.slices}
    said = []
    for config in getattr(model, "peft_config", {}).values():
        named = getattr(config, "target_modules", None)
        missed = sorted(set(named) & set(inside) - adapted) if isinstance(named, set | list | tuple) else []
        if missed and (fused := sorted({inside[name] for name in missed} - adapted)):
            said.append(
                f"WARNING: {', '.join(missed)} got no LoRA: this model fuses them into {' and '.join(fused)}; "
                "name those in target_modules, or use phi3_lora_plugin.add_lora to adapt slices"
            )
    return said


def _towers_reached(model: Any) -> list[str]:
    """LoRA that names such as `o_proj` have put into the audio tower of Phi-4-multimodal."""
    if not (found := reached_towers(model)):
        return []
    return [
        f"WARNING: LoRA sits in {len(found)} modules of the vision and audio towers, such as {found[0]}: text rows do "
        r"not train them; pass exclude_modules=r'.*embed_tokens_extend\..*', or use phi3_lora_plugin.add_lora"
    ]


def _speed(trainer: Any, model: Any, parts: Any) -> list[str]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if parts == "off" or not _is_phi(model) or "num_parameters" in base.__dict__:
        return []
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return []
    return [f"speed: {applied}" for applied in accelerate_phi3(trainer, parts)]
