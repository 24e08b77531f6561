"""The training settings that decide what a run learns, as its manifests record them.

Whatever cannot change a weight (logging, saving, evaluation, places, hardware switches) is left out, so that a resumed
run may change it freely; a setting that this list does not know is recorded, as silence would be the worse mistake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Prefixes of `TrainingArguments` (and TRL's) that do not change what is trained.
_HARMLESS = (
    "_n_gpu", "activation_", "auto_find_batch_size", "batch_eval", "bf16_full_eval", "dataloader_multi",
    "dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch",
    "dataset_num_proc", "ddp_", "debug", "deepspeed", "disable_tqdm", "do_", "enable_jit", "eval_",
    "fp16_full_eval", "fsdp", "full_determinism", "generation_", "gradient_checkpointing", "greater_is", "hub_",
    "ignore_data_skip", "include_", "jit_mode", "label_names", "length_column", "liger_", "load_best",
    "local_rank", "log_", "logging_", "metric_for", "mp_parameters", "no_cuda", "output_dir", "overwrite_output",
    "parallelism", "past_index", "per_device_eval", "per_gpu_eval", "predict_", "prediction_loss", "project",
    "push_to_hub", "ray_scope", "remove_unused", "report_to", "restore_callback", "resume_from", "run_name",
    "save_", "skip_memory", "torch_compile", "torch_empty", "torchdynamo", "tpu_", "trackio", "trust_remote",
    "use_cache", "use_cpu", "use_ipex", "use_legacy", "use_liger", "use_mps", "warnings_",
    "data_seed", "seed",  # `data_facts` has them
)  # fmt: skip
#: Schedules whose rate does not depend on the length of the run.
_ENDLESS = ("constant", "constant_with_warmup")
#: Schedules with a state of their own, which no other schedule can continue.
_OWN_STATE = ("reduce_lr_on_plateau", "greedy")
LENGTH = ("training.max_steps", "training.num_train_epochs")


def training_facts(args: Any) -> dict[str, Any]:
    """The settings of a Trainer's arguments that change what is trained, in JSON's types."""
    found = {
        name: value for name, value in args.to_dict().items() if not name.startswith(_HARMLESS) and _is_plain(value)
    }
    if found.get("max_steps", -1) > 0:
        found.pop("num_train_epochs", None)  # which then has no effect
    return found


def model_facts(model: Any) -> dict[str, Any]:
    """Dropout rates of the base's config, and the type of its weights."""
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    found = {name: value for name, value in settings.items() if "drop" in name and isinstance(value, int | float)}
    dtype = getattr(model, "dtype", None)
    return found | ({"dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {})


def optimizer_facts(optimizer: Any, args: Any) -> dict[str, Any]:
    """The class of a run's optimizer and, where there is one already, the learning rate of each group."""
    if optimizer is None:
        from transformers import Trainer

        return {"class": Trainer.get_optimizer_cls_and_kwargs(args)[0].__name__}
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    return {
        "class": type(inner).__name__,
        "learning_rates": [float(group.get("initial_lr", group["lr"])) for group in inner.param_groups],
    }


def may_change(field: str, now: Mapping[str, Any]) -> bool:
    """Whether a run may be resumed with another length: its rate does not depend on how long it is."""
    return field in LENGTH and now.get("training", {}).get("lr_scheduler_type") in _ENDLESS


def cannot_change(field: str, was: Any, now: Any) -> str | None:
    """Why this difference can never be allowed; None if it can."""
    if field in ("training.optim", "optimizer.class"):
        return "the saved state belongs to the other optimizer"
    if field == "optimizer.learning_rates" and was and now and len(was) != len(now):
        return "the saved state belongs to other groups of parameters"
    if field == "training.lr_scheduler_type" and {was, now} & set(_OWN_STATE):
        return "the saved state belongs to the other schedule"
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)
