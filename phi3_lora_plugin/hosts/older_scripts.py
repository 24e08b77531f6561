"""Scripts published for older releases, run as they are: arguments that were renamed, remote code, GPU kernels.

The model card's script, the cookbook's and hundreds after them pass what today's transformers and TRL refuse. Each is
passed on under its present name, or left out, with a sentence; what nobody knows reaches the library, which refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import fields
from functools import wraps
from inspect import signature
from typing import Any

from phi3_lora_plugin.hosts.base import no_remote_code, phi_config_if_found
from phi3_lora_plugin.hosts.on_import import undo_all, when_imported
from phi3_lora_plugin.recipe.training import translate

Say = Callable[[str], Any]
Undo = Callable[[], None]

#: Module -> (its class of arguments, its trainer).
_PAIRS = {
    "trl.trainer.sft_trainer": ("SFTConfig", "SFTTrainer"),
    "trl.trainer.dpo_trainer": ("DPOConfig", "DPOTrainer"),
    "trl.trainer.kto_trainer": ("KTOConfig", "KTOTrainer"),
    "trl.trainer.reward_trainer": ("RewardConfig", "RewardTrainer"),
}
_RENAMED = {"tokenizer": "processing_class", "max_seq_length": "max_length"}
_DROPPED = {
    "dataset_batch_size": "rows are encoded in batches",
    "num_of_sequences": "packing needs no buffer",
    "chars_per_token": "packing needs no buffer",
    "eval_packing": "rows to evaluate on are packed like the others",
    "max_prompt_length": "prompt and answer share max_length",
    "max_target_length": "prompt and answer share max_length",
    "is_encoder_decoder": "Phi is a decoder",
    "model_adapter_name": "the adapter is named default",
    "ref_adapter_name": "the reference is the base without its adapter",
}


def older_scripts(say: Say) -> tuple[list[str], Undo]:
    """Wrap what takes such arguments, TRL's own as it is imported; (sentences, undo)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

    undone = [
        _wrap_arguments(TrainingArguments, say),
        _wrap_trainer(Trainer, TrainingArguments, say),
        *(_wrap_loading(kind, say) for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification)),
    ]

    def wrap_pair(module: Any) -> Undo:
        config, trainer = (getattr(module, name, None) for name in _PAIRS[module.__name__])
        if config is None or trainer is None:
            return lambda: None
        return undo_all([_wrap_arguments(config, say), _wrap_trainer(trainer, config, say)])

    undone += [when_imported(name, wrap_pair) for name in _PAIRS]
    return ["arguments of older releases are passed on under their present names"], undo_all(undone)


def _wrapped_init(kind: Any, change: Callable[[dict[str, Any]], None]) -> Undo:
    """Have `change(keyword arguments)` look at what `kind` is made with, before it is."""
    stock, own = kind.__init__, "__init__" in kind.__dict__

    @wraps(stock)
    def init(self: Any, *given: Any, **named: Any) -> None:
        change(named)
        stock(self, *given, **named)

    kind.__init__ = init

    def undo() -> None:
        if kind.__dict__.get("__init__") is init:
            if own:
                kind.__init__ = stock
            else:
                del kind.__init__

    return undo


def _wrap_arguments(kind: Any, say: Say) -> Undo:
    def change(named: dict[str, Any]) -> None:
        for sentence in present_arguments(kind, named):
            say(f"{kind.__name__}: {sentence}")

    return _wrapped_init(kind, change)


def present_arguments(kind: Any, named: MutableMapping[str, Any]) -> list[str]:
    """Rename, convert or drop what the class of arguments does not know any more; a sentence for each."""
    known, said = {field.name for field in fields(kind)}, []
    for name in [name for name in named if name not in known]:
        value = named[name]
        if name in _DROPPED:
            del named[name]
            said.append(f"{name} is left out: {_DROPPED[name]}")
            continue
        if (new := _RENAMED.get(name, "")) in known:
            now, why = {new: value}, ""
        else:
            translated = translate({name: value})
            now, why = translated.values, "".join(note.removeprefix("left out: ") for _, note in translated.notes)
            if translated.problems or not set(now) <= known:
                continue
        del named[name]
        said.append(", ".join(f"{name} is now {new}" for new in now) or f"{name} is left out: {why}")
        for new, value in now.items():
            named.setdefault(new, value)
    return said + _without_accelerator(named)


def _without_accelerator(named: MutableMapping[str, Any]) -> list[str]:
    import torch

    half = [name for name in ("bf16", "fp16") if named.get(name)]
    if not half or named.get("use_cpu") or torch.accelerator.is_available():
        return []
    named["use_cpu"] = True
    if named.get("fp16"):
        named["fp16"] = False
    return [f"{half[0]} on a machine without an accelerator: use_cpu" + (", in float32" if half[0] == "fp16" else "")]


def _wrap_trainer(kind: Any, config: Any, say: Say) -> Undo:
    """A trainer that was given its settings itself: they go into its arguments, made of the class that has them."""
    from transformers.trainer_utils import IntervalStrategy

    takes = set(signature(kind.__init__).parameters)

    def change(named: dict[str, Any]) -> None:
        if getattr(named.get("args"), "eval_strategy", "no") != "no" and named.get("eval_dataset") is None:
            named["args"].eval_strategy = IntervalStrategy.NO
            say(f"{kind.__name__}: nothing is evaluated: there is no eval_dataset")
        settings = {name: named[name] for name in named if name not in takes and name != "tokenizer"}
        if "tokenizer" in named and "tokenizer" not in takes:
            named.setdefault("processing_class", named.pop("tokenizer"))
            say(f"{kind.__name__}: tokenizer is now processing_class")
        if not settings:
            return
        before = set(settings)
        said = present_arguments(config, settings)
        known = {field.name for field in fields(config)}
        unknown = before & set(settings) - known
        for name in before - unknown:
            del named[name]
        said += [f"{name} is now of {config.__name__}" for name in sorted(before & set(settings) & known)]
        args = named.get("args")
        if args is None:
            args = config(output_dir="tmp_trainer")
        elif not isinstance(args, config):
            args = config(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
        for name in set(settings) & known:
            setattr(args, name, settings[name])
        named["args"] = args
        for sentence in said:
            say(f"{kind.__name__}: {sentence}")

    return _wrapped_init(kind, change)


def _wrap_loading(kind: Any, say: Say) -> Undo:
    """`from_pretrained` of a Phi without remote code, and without kernels and devices that this machine lacks."""
    own, stock = kind.__dict__.get("from_pretrained"), kind.from_pretrained

    @wraps(stock)
    def from_pretrained(cls: Any, *given: Any, **named: Any) -> Any:
        base = given[0] if given else named.get("pretrained_model_name_or_path")
        for sentence in present_loading(base, named):
            say(f"{kind.__name__}: {sentence}")
        return (own.__func__ if own is not None else stock.__func__)(cls, *given, **named)

    kind.from_pretrained = classmethod(from_pretrained)

    def undo() -> None:
        if own is not None:
            kind.from_pretrained = own
        else:
            del kind.from_pretrained

    return undo


def present_loading(base: Any, named: MutableMapping[str, Any]) -> list[str]:
    """Change what loading a Phi was asked for and cannot be had on this machine; a sentence for each."""
    import torch

    said = []
    if named.get("trust_remote_code") and phi_config_if_found(str(base), named.get("revision")) is not None:
        said += no_remote_code(named)
    wanted = named.get("attn_implementation")
    if named.pop("use_flash_attention_2", False):
        named["attn_implementation"] = wanted = "flash_attention_2"
    if wanted == "flash_attention_2" and not _has_flash():
        named["attn_implementation"] = "sdpa"
        said.append("flash_attention_2 is not installed: sdpa")
    place = named.get("device_map")
    names = list(place.values()) if isinstance(place, dict) else [place]
    on_gpu = [one for one in names if isinstance(one, int) or str(one).partition(":")[0] == "cuda"]
    if place is not None and on_gpu and not torch.cuda.is_available():
        named["device_map"] = "cpu"
        said.append(f"device_map {place!r} on a machine without CUDA: cpu")
    return said


def _has_flash() -> bool:
    import torch
    from transformers.utils import is_flash_attn_2_available

    from phi3_lora_plugin.seams import is_installed

    return bool(is_flash_attn_2_available()) or (torch.cuda.is_available() and is_installed("kernels"))
