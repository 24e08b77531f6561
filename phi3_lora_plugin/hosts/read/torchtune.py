"""A torchtune config (`tune run lora_finetune_single_device --config FILE`) as a recipe."""

from __future__ import annotations

import re
from typing import Any

from phi3_lora_plugin.hosts.read.common import ImportConfigError, Reading

SIGNS = ("checkpointer", "enable_activation_checkpointing", "metric_logger", "batch_size", "epochs")
KEYS = {
    "batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "seed": "seed",
    "output_dir": "output_dir",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "log_every_n_steps": "training.logging_steps",
    "clip_grad_norm": "training.max_grad_norm",
}
#: Of `model`, the arguments of its builder.
LORA = {"lora_rank": "lora.r", "lora_alpha": "lora.alpha", "lora_dropout": "lora.dropout", "use_dora": "lora.dora"}
NOT_NEEDED = {
    "checkpointer": "checkpoints are LoRA-only, and resumed by --resume",
    "tokenizer": "it is the base's",
    "loss": "cross-entropy",
    "metric_logger": "training.report_to",
    "resume_from_checkpoint": "--resume",
    "save_adapter_weights_only": "it always does",
    **dict.fromkeys(
        ("profiler", "log_level", "device_map", "enable_activation_offloading", "custom_sharded_layers",
         "fsdp_cpu_offload"), "of torchtune's",
    ),
    "compile": "training.torch_compile",
    "log_peak_memory_stats": "memory is in the run's report",
    "shuffle": "rows are shuffled by seed",
    "model_type": "the family is recognised",
    "save_last_epoch_only": "checkpoint.keep_last",
    "optimizer_in_bwd": "LoRA is small",
    "run_val_every_n_steps": "training.eval_steps",
    "adapter_path": "output_dir",
}  # fmt: skip
#: The builder that a config names -> the base.
BASES = {
    "phi3_mini": "microsoft/Phi-3-mini-4k-instruct",
    "phi4_14b": "microsoft/phi-4",
    "phi4_mini": "microsoft/Phi-4-mini-instruct",
}
#: Builders of data sets -> (hub id, format).
DATA = {
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt"),
    "instruct_dataset": (None, "prompt_completion"),
    "chat_dataset": (None, "auto"),
    "text_completion_dataset": (None, "text"),
    "preference_dataset": (None, "auto"),
}
MODULES = {"output_proj": "o_proj"}
DEFAULTS: dict[str, Any] = {"lora.r": 8, "lora.alpha": 16}


def read(reading: Reading) -> None:
    """See `hosts.read`."""
    given = reading.given
    for key in list(given):
        given[key] = _resolved(given[key], given)
    model = dict(reading.take("model", {}))
    builder = str(model.pop("_component_", "")).rpartition(".")[2]
    kind = re.fullmatch(r"(q?)lora_(\w+)", builder)
    if kind is None:
        raise ImportConfigError(f"model._component_: expected a builder such as lora_phi3_mini, found {builder!r}")
    folder = str((given.get("checkpointer") or {}).get("checkpoint_dir", ""))
    reading.read_base("model._component_", BASES.get(kind[2], folder or builder))
    if kind[1] or model.pop("quantize_base", False):
        reading.put("model.quantize", "nf4")
    model.pop("quantize_base", None)
    reading.put(
        "model.dtype",
        {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(str(reading.take("dtype", "bf16")), "bfloat16"),
    )
    device = str(reading.take("device", "cuda"))
    if device in ("cpu", "mps", "xpu"):
        reading.put("model.device", device)
    _lora(reading, model)
    _data(reading)
    _schedule(reading)
    reading.by_table(KEYS)
    steps = reading.take("max_steps_per_epoch")
    if steps is not None:
        reading.put("training.max_steps", int(steps) * int(reading.recipe.get("training.num_train_epochs", 1)))
    reading.drop(NOT_NEEDED)


def _lora(reading: Reading, model: dict[str, Any]) -> None:
    names = [MODULES.get(name, name) for name in model.pop("lora_attn_modules", [])]
    if model.pop("apply_lora_to_mlp", False):
        names += ["gate_proj", "up_proj", "down_proj"]
    if model.pop("apply_lora_to_output", False):
        reading.note("model.apply_lora_to_output", "LoRA on the head is refused; left out", True)
    if names:
        reading.put("lora.targets", names)
    reading.by_table(LORA, model)
    reading.leave(model, "model.")


def _data(reading: Reading) -> None:
    rows = dict(reading.take("dataset", {}))
    builder = str(rows.pop("_component_", "")).rpartition(".")[2]
    known, form = DATA.get(builder, (None, "auto"))
    files, path = rows.pop("data_files", None), rows.pop("source", known)
    if files:
        path = files
    if path is None:
        reading.note("dataset._component_", "not a data set that is known; write data.path", builder)
    else:
        reading.put("data.path", path)
    style = rows.pop("conversation_style", None)
    form = {"sharegpt": "sharegpt", "openai": "messages"}.get(str(style), form)
    column = rows.pop("conversation_column", None)
    columns = dict(rows.pop("column_map", None) or {})
    if form == "prompt_completion":
        columns = {"prompt": columns.get("input", "input"), "completion": columns.get("output", "output")}
    if form in ("sharegpt", "messages") and column:
        columns = {"conversations" if form == "sharegpt" else "messages": column}
    if form == "text" and (text := rows.pop("column", "text")) != "text":
        columns = {"text": text}
    if form != "auto":
        reading.put("data.format", form)
    if columns := {ours: theirs for ours, theirs in columns.items() if ours != theirs}:
        reading.put("data.columns", columns)
    if (split := rows.pop("split", "train")) != "train":
        reading.put("data.split", split)
    if rows.pop("packed", False):
        reading.put("data.packing", True)
    trained = rows.pop("train_on_input", builder == "alpaca_cleaned_dataset" or builder == "alpaca_dataset")
    if trained:
        reading.put("data.train_on", "all")
    longest = (reading.given.get("tokenizer") or {}).get("max_seq_len")
    if longest is not None:
        reading.put("data.max_length", longest)
    reading.leave(rows, "dataset.")


def _schedule(reading: Reading) -> None:
    optimizer = dict(reading.take("optimizer", {}))
    name = str(optimizer.pop("_component_", "")).rpartition(".")[2]
    fused = optimizer.pop("fused", False)
    known = {
        "AdamW": "adamw_torch_fused" if fused else "adamw_torch",
        "PagedAdamW8bit": "paged_adamw_8bit",
        "AdamW8bit": "adamw_8bit",
        "PagedAdamW": "paged_adamw_32bit",
        "SGD": "sgd",
        "Adam": "adamw_torch",
    }
    if name in known:
        reading.put("training.optim", known[name])
    elif name:
        reading.note("optimizer._component_", "not an optimizer of transformers; left out", name)
    reading.by_table({"lr": "training.learning_rate", "weight_decay": "training.weight_decay"}, optimizer)
    schedule = dict(reading.take("lr_scheduler", {}))
    named = str(schedule.pop("_component_", ""))
    found = re.search(r"get_(cosine|linear|constant)_schedule_with_warmup", named)
    if found:
        reading.put("training.lr_scheduler_type", found[1] if found[1] != "constant" else "constant_with_warmup")
    elif named:
        reading.note("lr_scheduler._component_", "not a schedule of transformers; left out", named)
    reading.by_table({"num_warmup_steps": "training.warmup_steps"}, schedule)
    reading.leave(optimizer, "optimizer.")
    reading.leave(schedule, "lr_scheduler.")


def _resolved(value: Any, config: dict[str, Any]) -> Any:
    """Text with `${key}` of OmegaConf's filled in, also inside mappings and lists."""
    if isinstance(value, dict):
        return {key: _resolved(inner, config) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, config) for inner in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)\}", lambda found: str(config.get(found[1], found[0])), value)
    return value
