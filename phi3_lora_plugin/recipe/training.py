"""Check a recipe's `training:` against the installed `TrainingArguments`, by reading its source and not running it.

Names that changed between transformers 4.48 and 5.23 are translated both ways by looking at which of them the class
has; importing the class instead would take seconds and load torch.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from phi3_lora_plugin.recipe.near_keys import other_word
from phi3_lora_plugin.seams import class_body
from phi3_lora_plugin.wording import describe, nearest, shorten

Kinds = frozenset[str]

# The same setting under several names, newest first; the first that the installed class has is used.
_RENAMED = (
    ("eval_strategy", "evaluation_strategy"),
    ("activation_checkpointing", "gradient_checkpointing"),
    ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
    ("use_cpu", "no_cuda"),
    ("per_device_train_batch_size", "per_gpu_train_batch_size"),
    ("per_device_eval_batch_size", "per_gpu_eval_batch_size"),
    ("hub_model_id", "push_to_hub_model_id"),
)

#: Value of `activation_checkpointing` that is ours: as many activations are kept as fit into memory.
AUTO = "auto"
#: Values of `lr_scheduler_type` that change the rate by what an evaluation measures.
NEEDS_EVALUATION = ("reduce_lr_on_plateau", "greedy")
_CHOSEN = ("activation_checkpointing", "gradient_checkpointing")

# Settings with no effect on what is trained or saved here; published samples have them.
_DROPPED = {
    "overwrite_output_dir": "a run never overwrites another's checkpoints",
    "save_safetensors": "adapters are always safetensors",
    "include_tokens_per_second": "tokens per second are always shown",
    "tpu_num_cores": "transformers 5 has none",
    "tpu_metrics_debug": "transformers 5 has none",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR, which transformers 5 reads",
    "half_precision_backend": "there is one backend left",
    "use_mps_device": "the device is chosen by model.device",
    "do_train": "`phi3-lora train` trains",
    "do_eval": "a run evaluates if data.eval_path or data.eval_fraction is given",
    "do_predict": "Trainer does not read it",
    "remove_unused_columns": "rows are encoded before the trainer sees them and have no other columns",
    "label_names": "labels are always `labels`",
}

# Settings that have a place of their own in a recipe, or none, and where that is.
_ELSEWHERE = {
    "output_dir": "write output_dir at the top level of the recipe",
    "seed": "write seed at the top level of the recipe",
    "save_strategy": "our checkpoints replace the trainer's; write checkpoint.every_steps",
    "save_steps": "write checkpoint.every_steps",
    "save_total_limit": "write checkpoint.keep_last",
    "save_only_model": "our checkpoints replace the trainer's; see checkpoint.*",
    "save_on_each_node": "our checkpoints are written once",
    "load_best_model_at_end": "write checkpoint.keep_best; the best checkpoint is pointed at by BEST",
    "resume_from_checkpoint": "use `phi3-lora train RECIPE --resume`",
    "max_length": "write data.max_length",
    "max_seq_length": "write data.max_length",
    "packing": "write data.packing",
    "eval_packing": "write data.packing",
    "packing_strategy": "write data.packing; rows are packed whole, each attending to itself",
    "padding_free": "write data.packing",
    "assistant_only_loss": "write data.train_on: assistant",
    "completion_only_loss": "write data.train_on: last_turn",
    "dataset_text_field": "rows are chats; write data.format and data.columns",
    "dataset_kwargs": "write data.format and data.columns",
    "dataset_num_proc": "rows are encoded in batches; there is nothing to set",
    "formatting_func": "write data.format, or register a data format",
    "chat_template_path": "write data.template",
    "truncation_mode": "rows are cut at the end, and counted; see data.max_length",
    "shuffle_dataset": "rows are shuffled by seed",
    "eos_token": "stop tokens come with the model",
    "pad_token": "the pad token comes with the model",
    "tokenizer": "the tokenizer comes with the model",
    "processing_class": "the tokenizer comes with the model",
    "model_init_kwargs": "write them under model:",
    "model_name_or_path": "write model.path",
    "trust_remote_code": "remote code is never run; leave it out",
    "dtype": "write model.dtype",
    "torch_dtype": "write model.dtype",
    "attn_implementation": "write model.attention",
    "use_flash_attention_2": "write model.attention: flash_attention_2",
    "quantization_config": "write model.quantize: nf4",
    "load_in_4bit": "write model.quantize: nf4",
    "load_in_8bit": "write model.quantize: int8",
    "use_cache": "it is switched off for training",
    "hub_token": "a token does not belong in a file; set HF_TOKEN or run `hf auth login`",
    "push_to_hub_token": "a token does not belong in a file; set HF_TOKEN or run `hf auth login`",
    "push_to_hub_organization": "write training.hub_model_id: organization/name",
    "split_batches": "write training.accelerator_config: {split_batches: true}",
    "dispatch_batches": "write training.accelerator_config: {dispatch_batches: true}",
    "lora_alpha": "write lora.alpha",
    "lora_dropout": "write lora.dropout",
    "target_modules": "write lora.targets",
    "peft_config": "write it under lora:",
}

# (smallest, is the smallest itself allowed) for numbers that the class itself does not check.
_LEAST: dict[str, tuple[float, bool]] = {
    "per_device_train_batch_size": (1, True),
    "per_device_eval_batch_size": (1, True),
    "gradient_accumulation_steps": (1, True),
    "num_train_epochs": (0, False),
    "learning_rate": (0, True),
    "weight_decay": (0, True),
    "warmup_steps": (0, True),
    "warmup_ratio": (0, True),
    "max_grad_norm": (0, True),
    "logging_steps": (0, False),
    "eval_steps": (0, False),
    "neftune_noise_alpha": (0, True),
    "dataloader_num_workers": (0, True),
    "max_steps": (1, True),
    "label_smoothing_factor": (0, True),
    "adam_epsilon": (0, True),
    "eval_accumulation_steps": (1, True),
    "torch_empty_cache_steps": (1, True),
}
#: What goes with worker processes only.
OF_WORKERS = ("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
# Values below the smallest that mean "not set".
_UNSET = {"max_steps": -1}


@dataclass
class Translated:
    """`values` as the installed class names them; `was` maps a translated name to the one that was given."""

    values: dict[str, Any] = field(default_factory=dict)
    was: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)


def translate(given: Mapping[str, Any], installed: Mapping[str, Kinds] | None = None) -> Translated:
    """Rename, check and convert `training:` for the installed class.

    Args:
        given: the section as written, under any version's names; a value of None asks for the default.
        installed: names and kinds of the class's fields; read from the installed transformers if not given.
    """
    fields = installed_fields() if installed is None else installed
    result = Translated()
    for key, value in given.items():
        if key in _ELSEWHERE:
            result.problems.append((key, f"does not belong here: {_ELSEWHERE[key]}"))
        elif key in _DROPPED:
            result.notes.append((key, f"left out: {_DROPPED[key]}"))
        else:
            try:
                name, value = _rename(key, value, fields)
                if name not in fields:
                    raise ValueError(_unknown(key, fields))
                if name in result.values:
                    other = result.was.get(name, name)
                    raise ValueError(f"means the same as {other!r}, which is given too; keep one of them")
                kinds = fields[name] | {AUTO} if name in _CHOSEN else fields[name]
                result.values[name] = None if value is None else _convert(name, value, kinds)
            except ValueError as error:
                result.problems.append((key, str(error)))
                continue
            if name != key:
                result.was[name] = key
                result.notes.append((key, f"read as {name}: {shorten(result.values[name])}"))
    pair = {"warmup_steps", "warmup_ratio"}
    if "float" not in fields.get("warmup_steps", ()) and len(pair & set(result.values)) == 1:
        (other,) = pair - set(result.values)
        result.values[other] = None  # two arguments for one thing: a child that gives one takes back its parent's other
    result.problems += _chosen_twice(result.values)
    if result.values.get("push_to_hub") and not result.values.get("hub_model_id"):
        result.problems.append(("push_to_hub", "needs training.hub_model_id; otherwise the folder's name becomes it"))
    return result


def _chosen_twice(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Problems of settings that `auto` chooses and that are given as well."""
    found = []
    for name in _CHOSEN:
        given = values.get(f"{name}_kwargs")
        if values.get(name) == AUTO and isinstance(given, dict):
            found += [
                (f"{name}_kwargs", f"{key} is what {name}: {AUTO} chooses; leave it out, or write {name}: true")
                for key in ("every_n_layers", "offload")
                if key in given
            ]
    return found


@lru_cache(maxsize=1)
def installed_fields() -> dict[str, Kinds]:
    """Names of the installed `TrainingArguments`' fields and what each may hold; imports transformers only if it must.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    try:
        source = (_transformers() / "training_args.py").read_text(encoding="utf-8")
    except (OSError, ValueError):  # compiled, zipped, moved
        source = ""
    return fields_of(source)


def fields_of(source: str) -> dict[str, Kinds]:
    """Names and kinds (`int`, `float`, `bool`, `str`, `list`, `dict`, `None`, or a class's name) of the dataclass.

    Where the source has no such class in a form that is known, the installed class is imported and asked.
    """
    annotated = {
        line.target.id: frozenset(_kinds(line.annotation))
        for line in class_body(source, "TrainingArguments")
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not line.target.id.startswith("_")
    }
    return annotated or _fields_of_class()


def _fields_of_class() -> dict[str, Kinds]:
    from dataclasses import fields
    from inspect import formatannotation

    from transformers import TrainingArguments

    public = [field for field in fields(TrainingArguments) if not field.name.startswith("_")]
    return {field.name: frozenset(_kinds(_parsed(formatannotation(field.type)))) for field in public}


def _parsed(annotation: str) -> ast.expr:
    return ast.parse(annotation, mode="eval").body


def _transformers() -> Path:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "transformers is not installed; `training:` is checked against it", name="transformers"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _kinds(annotation: ast.expr) -> set[str]:
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kinds(left) | _kinds(right)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _kinds(inner) | {"None"}
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            return set().union(*(_kinds(member) for member in members))
        case ast.Subscript(value=outer):
            return _kinds(outer)
        case ast.Constant(value=str() as text):
            return _kinds(_parsed(text))
        case ast.Constant(value=None):
            return {"None"}
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return {{"List": "list", "Dict": "dict", "NoneType": "None"}.get(name, name)}
    return {ast.unparse(annotation)}


def _rename(key: str, value: Any, fields: Mapping[str, Kinds]) -> tuple[str, Any]:
    """The installed class's name and value for a setting that has had several."""
    for names in _RENAMED:
        if key in names:
            return next((name for name in names if name in fields), key), value
    if key in ("warmup_ratio", "warmup_steps"):
        return _warmup(key, value, fields)
    if key == "group_by_length" and key not in fields and "train_sampling_strategy" in fields:
        if not isinstance(value, bool | None):
            raise ValueError(f"expected true or false, found {shorten(value)}")
        return "train_sampling_strategy", {True: "group_by_length", False: "random", None: None}[value]
    if key == "train_sampling_strategy" and key not in fields and "group_by_length" in fields:
        if value not in ("group_by_length", "random", None):
            raise ValueError(f"{shorten(value)} is not in the installed transformers; write group_by_length or random")
        return "group_by_length", None if value is None else value == "group_by_length"
    if key == "adafactor" and isinstance(value, bool):
        return ("optim", "adafactor") if value else ("optim", None)
    return key, value


def _warmup(key: str, value: Any, fields: Mapping[str, Kinds]) -> tuple[str, Any]:
    """A share of the run is `warmup_ratio` in old classes and a `warmup_steps` below 1 in new ones."""
    if value is None:
        return ("warmup_ratio" if key == "warmup_ratio" and key in fields else "warmup_steps"), None
    number = _convert(key, value, frozenset({"float"}))
    steps_take_shares = "float" in fields.get("warmup_steps", ())
    if key == "warmup_ratio":
        if not 0 <= number < 1:
            raise ValueError(f"expected a share of the run from 0 to below 1, found {shorten(value)}")
        return ("warmup_steps", number) if steps_take_shares else ("warmup_ratio", number)
    if 0 < number < 1 and not steps_take_shares:
        return "warmup_ratio", number
    if number >= 1 and number != int(number):
        raise ValueError(f"expected whole steps, or a share of the run below 1, found {shorten(value)}")
    return "warmup_steps", int(number) if number == int(number) else number


def _convert(key: str, value: Any, kinds: Kinds) -> Any:
    """`value` as the field takes it; raises ValueError saying what was expected."""
    number: int | float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool) and ("float" in kinds or isinstance(value, int)):
        number = value if kinds & {"int", "float"} else None
    elif isinstance(value, str) and "float" in kinds and "str" not in kinds:
        try:  # `2e-4` is text to other YAML readers, and people have learnt to quote it
            number = float(value)
        except ValueError:
            number = None
    if number is not None:
        if not math.isfinite(number):
            raise ValueError(f"expected a finite number, found {shorten(value)}")
        least, allowed = _LEAST.get(key, (-math.inf, True))
        unset = _UNSET.get(key)
        if number != unset and (number < least or (number == least and not allowed)):
            bound = f"{'at least' if allowed else 'more than'} {least}"
            also = f", or {unset} for no limit" if unset is not None else ""
            raise ValueError(f"expected {bound}{also}, found {shorten(value)}")
        return number
    if value == AUTO and AUTO in kinds:
        return value
    if isinstance(value, str) and "bool" in kinds and value.lower() in ("yes", "on", "no", "off"):
        return value.lower() in ("yes", "on")
    if isinstance(value, str) and "str" in kinds:
        choices = [choice for kind in sorted(kinds) for choice in _choices(kind)]
        if choices and value not in choices and "list" not in kinds:
            named = f"one of {', '.join(choices)}" if len(choices) <= 12 else "a known one"
            raise ValueError(f"{shorten(value)} is not {named}{nearest(value, choices)}")
        return value
    if type(value).__name__ in kinds & {"bool", "list", "dict"}:
        return value
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    words |= {"list": "a list", "dict": "a mapping", AUTO: AUTO}
    expected = [words[kind] for kind in words if kind in kinds and not (kind == "int" and "float" in kinds)]
    raise ValueError(f"expected {' or '.join(expected) or 'nothing that YAML can hold'}, found {describe(value)}")


@lru_cache(maxsize=64)
def _choices(kind: str) -> tuple[str, ...]:
    """The values of transformers' enumeration of that name; empty if there is none."""
    if kind in ("int", "float", "bool", "str", "list", "dict", "None"):
        return ()
    for file in ("training_args.py", "trainer_utils.py"):
        if body := class_body((_transformers() / file).read_text(encoding="utf-8"), kind):
            values = [line.value for line in body if isinstance(line, ast.Assign)]
            return tuple(one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str))
    return ()


def _unknown(key: str, fields: Mapping[str, Kinds]) -> str:
    names = [*fields, *(name for names in _RENAMED for name in names), "warmup_ratio", *_ELSEWHERE]
    near = f"; did you mean {other!r}?" if (other := other_word(key)) else nearest(key, names)
    return f"the installed transformers has no such argument{near}"
