"""The one place where a recipe becomes other libraries' arguments: TrainingArguments and add_lora's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.device import Device, read_device
from phi3_lora_plugin.model.precision import precision_for
from phi3_lora_plugin.recipe.sections import PEFT_NAMES
from phi3_lora_plugin.recipe.training import AUTO, installed_fields
from phi3_lora_plugin.training.checkpointing import NOT_REENTRANT, setting_name
from phi3_lora_plugin.training.refused_settings import refused

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from phi3_lora_plugin.recipe import Recipe


def training_arguments(
    recipe: Recipe,
    has_eval: bool = False,
    kind: type[TrainingArguments] | None = None,
    device: Device | None = None,
    **ours: Any,
) -> TrainingArguments:
    """Return the installed transformers' `TrainingArguments` for a recipe.

    The recipe's settings win over our defaults, and `ours` over both.

    Args:
        has_eval: whether there are rows to evaluate on; without them nothing is evaluated.
        kind: class to make, one derived from `TrainingArguments`; itself if not given.
        device: to train on; what `model.device` means here if not given.
        ours: more arguments, as the installed class names them.

    Raises:
        SettingsError: the class refuses what the recipe sets.
    """
    from transformers import TrainingArguments

    given = dict(recipe.training)
    settings = _defaults(recipe, device or read_device(recipe.model.device)) | given
    if not has_eval:
        settings["eval_strategy"] = "no"
    elif "eval_strategy" not in given:
        settings["eval_strategy"] = "epoch"
    if "per_device_train_batch_size" in given:  # what fits for training fits for evaluation; upstream's 8 may not
        settings.setdefault("per_device_eval_batch_size", given["per_device_train_batch_size"])
    name = setting_name()
    if settings.get(name) == AUTO:
        settings[name] = True  # until `plan.checkpointing` has chosen, what fits wherever anything does
    if settings.get(name):
        settings[f"{name}_kwargs"] = NOT_REENTRANT | (settings.get(f"{name}_kwargs") or {})
    if kind is not None:
        settings.setdefault(name, False)  # on by default in TRL's
        settings.setdefault("learning_rate", 5e-5)  # each of TRL's has one of its own; a recipe means one thing
    with refused("training: transformers refuses these settings"):
        return (kind or TrainingArguments)(**(settings | ours))


def _defaults(recipe: Recipe, device: Device) -> dict[str, Any]:
    cpu = device.kind == "cpu"
    defaults: dict[str, Any] = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "use_cpu": cpu,
        "report_to": "none",
        "save_strategy": "no",  # LoraCheckpoint saves
        "logging_steps": 10,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it shows a NaN loss as 0.0
        "label_names": ["labels"],
        "remove_unused_columns": False,  # rows are encoded and have no others
        "dataloader_pin_memory": device.kind in ("cuda", "xpu"),
        "ddp_find_unused_parameters": False,  # every LoRA tensor takes part in every step
        "disable_tqdm": True,
        # A padded token is not a trained one; older classes can only count both.
        "include_num_input_tokens_seen": "non_padding"
        if "str" in installed_fields()["include_num_input_tokens_seen"]
        else True,
    }
    if recipe.training.get("report_to", "none") not in ("none", [], ["none"]):
        # What trackers call the run; the same when it is resumed.
        name = Path(recipe.output_dir).expanduser().resolve().name
        defaults["run_name"] = name if name != recipe.output_dir else f"{recipe.name}-{name}"  # wandb warns of the same
        if "project" in installed_fields():
            defaults["project"] = "phi3-lora"
        if "logging_dir" in installed_fields() and "TENSORBOARD_LOGGING_DIR" not in os.environ:  # before transformers 5
            defaults["logging_dir"] = str(Path(recipe.output_dir).expanduser() / "tensorboard")
    if not {"bf16", "fp16"} & set(recipe.training):
        defaults |= precision_for(recipe.model, device).arguments
    return defaults


class BatchError(Phi3LoraError):
    """A batch that cannot be divided evenly among the processes of a run."""


def same_batch(recipe: Recipe, processes: int) -> Recipe:
    """The recipe for each of several processes whose steps together are those of one process with the recipe given.

    Rows a device are divided, else the steps that are accumulated.

    Raises:
        BatchError: neither number can be divided.
    """
    rows = int(recipe.training.get("per_device_train_batch_size", 8))  # 8 is transformers' own
    steps = int(recipe.training.get("gradient_accumulation_steps", 1))
    if rows % processes == 0:
        change = {"per_device_train_batch_size": rows // processes}
    elif steps % processes == 0:
        change = {"gradient_accumulation_steps": steps // processes}
    else:
        raise BatchError(
            f"a batch of {rows} rows, {steps} times a step, cannot be divided among {processes} processes; change "
            "training.per_device_train_batch_size or training.gradient_accumulation_steps"
        )
    return recipe.model_copy(update={"training": recipe.training | change})


def lora_options(recipe: Recipe) -> dict[str, Any]:
    """Return the keyword arguments of `add_lora` for a recipe; options beyond its own are named as `LoraConfig`'s.

    Only what differs from PEFT's default is passed, so that older versions take it.
    """
    lora = recipe.lora
    options: dict[str, Any] = {"targets": lora.targets, "r": lora.r, "alpha": lora.alpha, "dropout": lora.dropout}
    theirs = {ours: name for name, ours in PEFT_NAMES.items()}
    for name, field in type(lora).model_fields.items():
        value = getattr(lora, name)
        if name not in (*options, "loraplus_lr_ratio") and value not in (field.default, {}, []):
            options[theirs.get(name, name)] = value
    if lora.init == "random":  # PEFT's False, which starts B at random as well as A
        options["init_lora_weights"] = False
    return options
