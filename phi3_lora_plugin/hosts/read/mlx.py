"""An mlx-lm config (`mlx_lm.lora --config FILE`) as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_lora_plugin.hosts.read.common import ImportConfigError, Reading, number
from phi3_lora_plugin.model.folder import read_json
from phi3_lora_plugin.model.published import published_config

SIGNS = tuple("lora_parameters iters fine_tune_type num_layers lora_layers steps_per_report grad_checkpoint".split())
KEYS = {
    "iters": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "learning_rate": "training.learning_rate",
    "steps_per_report": "training.logging_steps",
    "save_every": "checkpoint.every_steps",
    "adapter_path": "output_dir",
    "max_seq_length": "data.max_length",
    "grad_checkpoint": "training.gradient_checkpointing",
    "seed": "seed",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
}
NOT_NEEDED = {
    "train": "`phi3-lora train` trains",
    "test": "`phi3-lora eval`",
    "test_batches": "`phi3-lora eval`",
    "resume_adapter_file": "--resume",
    "val_batches": "all rows are evaluated",
    "clear_cache_threshold": "of MLX",
}
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "adafactor": "adafactor", "sgd": "sgd"}
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear", "exponential_decay": "cosine"}
#: mlx-lm's where they are not a recipe's.
DEFAULTS = {
    "training.max_steps": 1000,
    "training.per_device_train_batch_size": 4,
    "training.learning_rate": 1e-5,
    "data.max_length": 2048,
    "seed": 0,
    "training.lr_scheduler_type": "constant",
    "checkpoint.every_steps": 100,
}


def read(reading: Reading) -> None:
    """See `hosts.read`."""
    path = reading.take("model")
    base = str(path).replace("mlx-community/", "microsoft/") if isinstance(path, str) else path
    if isinstance(base, str) and base != path:
        base, _, bits = base.rpartition("-") if base.endswith("bit") else (base, "", "")
        reading.note("model", f"read as {base}: MLX's copy is quantised its own way", path)
        if bits:
            reading.put("model.quantize", "int8" if bits == "8bit" else "nf4")
    reading.read_base("model", base)
    kind, mode = reading.take("fine_tune_type", "lora"), reading.take("training_mode", "normal")
    if mode != "normal":
        reading.read_loss("training_mode", mode)
    if kind not in ("lora", "dora"):
        raise ImportConfigError(f"fine_tune_type: {kind}: a recipe trains LoRA")
    if kind == "dora" or reading.take("use_dora"):
        reading.put("lora.dora", True)
    _lora(reading)
    _layers(reading, reading.take("num_layers", reading.take("lora_layers", 16)))
    _data(reading)
    optimizer = str(reading.take("optimizer", "adam"))
    if optimizer in OPTIMIZERS:
        reading.put("training.optim", OPTIMIZERS[optimizer])
    else:
        reading.note("optimizer", "not an optimizer of transformers; left out", optimizer)
    settings = dict((reading.take("optimizer_config") or {}).get(optimizer) or {})
    reading.by_table({"weight_decay": "training.weight_decay"}, settings)
    reading.leave(settings, f"optimizer_config.{optimizer}.")
    if (steps := reading.take("steps_per_eval")) is not None:
        if "data.eval_path" in reading.recipe:
            reading.put("training.eval_strategy", "steps")
        reading.put("training.eval_steps", steps)
    reading.by_table(KEYS)
    _schedule(reading)
    if reading.take("report_to") or reading.take("wandb"):
        reading.put("training.report_to", "wandb")
    reading.drop(NOT_NEEDED)


def _lora(reading: Reading) -> None:
    given: dict[str, Any] = dict(reading.take("lora_parameters", {}))
    rank = int(given.pop("rank", 8))
    reading.put("lora.r", rank)
    alpha = given.pop("alpha", None)
    scale = number(given.pop("scale", 20.0))  # mlx-lm multiplies by it; ours is alpha / r
    reading.put("lora.alpha", number(alpha) if alpha is not None else scale * rank)
    reading.put("lora.dropout", float(given.pop("dropout", 0.0)))
    if keys := given.pop("keys", None):
        reading.put("lora.targets", list(dict.fromkeys(str(key).rpartition(".")[2] for key in keys)))
    reading.leave(given, "lora_parameters.")


def _layers(reading: Reading, count: Any) -> None:
    """mlx-lm adapts the last `count` layers; -1 is all of them."""
    if not isinstance(count, int) or count < 0:
        return
    path = reading.recipe["model.path"]
    config = published_config(path)
    if config is None and (Path(path) / "config.json").is_file():
        config = read_json(Path(path) / "config.json")
    if config is None:
        reading.note("num_layers", "the number of layers of the base is not known; all are adapted", count)
    elif count < (layers := int(config["num_hidden_layers"])):
        reading.put("lora.layers_to_transform", list(range(layers - count, layers)))


def _data(reading: Reading) -> None:
    reading.put("data.train_on", "last_turn" if reading.take("mask_prompt") else "all")
    if hub := reading.take("hf_dataset"):
        reading.take("data")
        rows = dict(hub[0] if isinstance(hub, list) else hub)
        reading.put("data.path", rows.pop("path", rows.pop("name", None)))
        reading.by_table({"train_split": "data.split", "valid_split": "data.eval_split"}, rows)
        reading.given |= rows
    else:
        _folder(reading, str(reading.take("data", "data")))
    features = {"prompt": "prompt_feature", "completion": "completion_feature", "messages": "chat_feature",
                "text": "text_feature", "chosen": "chosen_feature", "rejected": "rejected_feature"}  # fmt: skip
    found = {ours: reading.take(theirs) for ours, theirs in features.items()}
    columns = {ours: value for ours, value in found.items() if value not in (None, ours)}
    if columns:
        reading.put("data.columns", columns)


def _folder(reading: Reading, named: str) -> None:
    """mlx-lm's data is a folder with train.jsonl and valid.jsonl, or a data set of the hub."""
    folder = next((each for each in (Path(named), reading.folder / named) if each.is_dir()), None)
    if folder is None and named.count("/") == 1 and named[0] not in "/.~":
        reading.put("data.path", named)
        return
    reading.put("data.path", str((folder or Path(named)) / "train.jsonl"))
    if folder is None:
        reading.note("data", "is not a folder here; add data.eval_path if it has a valid.jsonl", named)
    elif (folder / "valid.jsonl").exists():
        reading.put("data.eval_path", str(folder / "valid.jsonl"))


def _schedule(reading: Reading) -> None:
    schedule: dict[str, Any] = dict(reading.take("lr_schedule", {}))
    if not schedule:
        return
    name, arguments = schedule.pop("name", ""), schedule.pop("arguments", [])
    if name in SCHEDULES:
        reading.put("training.lr_scheduler_type", SCHEDULES[name])
        reading.note("lr_schedule", "it ends with the run, at 0", {"name": name, "arguments": arguments})
    else:
        reading.note("lr_schedule.name", "not a schedule of transformers; left out", name)
    if arguments:
        reading.put("training.learning_rate", number(arguments[0]))
    reading.by_table({"warmup": "training.warmup_steps"}, schedule)
    reading.leave(schedule, "lr_schedule.")
