"""An axolotl config as a recipe."""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.hosts.axolotl_config import KERNELS, ROWS
from phi3_lora_plugin.hosts.read.common import ATTENTION, ImportConfigError, Reading

#: Keys that no other host has.
SIGNS = ("base_model", "micro_batch_size", "sequence_len", "num_epochs", "adapter", "lora_target_linear")
KEYS = {
    "revision_of_model": "model.revision",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_rank_pattern": "lora.rank_pattern",
    "lora_alpha_pattern": "lora.alpha_pattern",
    "lora_target_parameters": "lora.target_parameters",
    "peft_use_dora": "lora.dora",
    "peft_use_rslora": "lora.rslora",
    "peft_init_lora_weights": "lora.init",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_trainable_token_indices": "lora.trainable_token_indices",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
    "sequence_len": "data.max_length",
    "sample_packing": "data.packing",
    "micro_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "lr_scheduler": "training.lr_scheduler_type",
    "rl_beta": "preference.beta",
    "seed": "seed",
    "output_dir": "output_dir",
    "kto_desirable_weight": "preference.desirable_weight",
    "kto_undesirable_weight": "preference.undesirable_weight",
    "simpo_gamma": "preference.gamma",
}
NOT_NEEDED = {
    **dict.fromkeys(KERNELS, "the fast paths of a recipe work on fused projections"),
    "plugins": "a plugin of axolotl's",
    **dict.fromkeys(("model_type", "is_llama_derived_model"), "the family is recognised"),
    **dict.fromkeys(
        ("tokenizer_type", "tokenizer_config", "base_model_config", "chat_template", "chat_template_jinja"),
        "it is the base's",
    ),
    "processor_type": "text only",
    "trust_remote_code": "remote code is never run",
    "strict": "of axolotl's reader",
    "special_tokens": "the tokenizer's own are right",
    "dataset_prepared_path": "encoded rows are cached",
    "pad_to_sequence_len": "rows are padded batch by batch",
    "eval_sample_packing": "it follows data.packing",
    "gradient_checkpointing_kwargs": "set as LoRA needs it",
    "local_rank": "set by the launcher",
    **dict.fromkeys(("debug", "flash_optimum"), "of axolotl's"),
    "train_on_eos": "stop tokens are trained",
    "tf32": "on where the card has it",
    "eot_tokens": "the template's are known",
}
#: axolotl's where they are not a recipe's.
DEFAULTS = {"training.num_train_epochs": 1, "training.lr_scheduler_type": "cosine", "data.max_length": 512}


def read(reading: Reading) -> None:
    """See `hosts.read`."""
    reading.read_base("base_model", reading.take("base_model"))
    adapter = reading.take("adapter")
    if adapter not in ("lora", "qlora"):
        raise ImportConfigError(f"adapter: {adapter}: a recipe trains LoRA; axolotl trains the whole model without one")
    eight, four = reading.take("load_in_8bit"), reading.take("load_in_4bit")
    if eight or four or adapter == "qlora":
        reading.put("model.quantize", "int8" if eight and not four else "nf4")
    reading.read_targets("lora_target_modules", reading.take("lora_target_modules"))
    reading.flags(
        {
            "lora_target_linear": ("lora.targets", "all-linear"),
            "flash_attention": ("model.attention", "flash_attention_2"),
            "sdp_attention": ("model.attention", "sdpa"),
            "eager_attention": ("model.attention", "eager"),
            "flex_attention": ("model.attention", "flex_attention"),
            "train_on_inputs": ("data.train_on", "all"),
            "group_by_length": ("training.train_sampling_strategy", "group_by_length"),
        }
    )
    if (named := reading.take("attn_implementation")) in ATTENTION:
        reading.put("model.attention", ATTENTION[named])
    if (checkpointing := reading.take("gradient_checkpointing")) is not None:
        reading.put("training.gradient_checkpointing", bool(checkpointing))
        if not isinstance(checkpointing, bool):
            reading.note("gradient_checkpointing", "on, without offloading", checkpointing)
    reading.read_half(reading.take("bf16", reading.take("bfloat16")), reading.take("fp16", reading.take("float16")))
    if loss := reading.take("rl"):
        reading.read_loss("rl", loss)
    _data(reading)
    _evaluation(reading)
    for key in ("fsdp", "fsdp_config", "fsdp_version"):
        if (sharded := reading.take(key)) is not None:
            reading.note(key, "left out; see training.fsdp, or an accelerate config", sharded)
    if reading.take("wandb_project"):
        reading.put("training.report_to", "wandb")
    reading.read_checkpoints()
    reading.read_own()
    reading.by_table(KEYS)
    reading.drop(NOT_NEEDED)
    reading.read_optimizer_and_rest()


def _data(reading: Reading) -> None:
    sources = [_source(reading, rows, "datasets") for rows in reading.take("datasets", [])]
    reading.put_sources(sources)
    held_out = [_source(reading, rows, "test_datasets") for rows in reading.take("test_datasets", [])]
    if held_out:
        reading.put("data.eval_path", held_out[0]["path"] if len(held_out) == 1 else [one["path"] for one in held_out])
        if held_out[0].get("split", "train") != "train":
            reading.put("data.eval_split", held_out[0]["split"])
    share = reading.take("val_set_size", 0)
    if isinstance(share, float) and 0 < share < 1 and not held_out:
        reading.put("data.eval_fraction", share)
    elif share:
        reading.note("val_set_size", "a number of rows; write data.eval_fraction as a share", share)


def _source(reading: Reading, rows: dict[str, Any], key: str) -> dict[str, Any]:
    """One entry of `datasets` as a source of ours."""
    rows = {name: value for name, value in rows.items() if value is not None}
    path, kind = rows.pop("path", None), rows.pop("type", None)
    files = rows.pop("data_files", None)
    if files and (path in ("json", "csv", "parquet", "text", None) or isinstance(files, list)):
        path = files[0] if isinstance(files, list) and len(files) == 1 else files
    made: dict[str, Any] = {"path": path}
    rows.pop("ds_type", None)
    if (split := rows.pop("split", "train")) != "train":
        made["split"] = split
    word = kind.split(".")[0].split(":")[0] if isinstance(kind, str) else kind
    columns: dict[str, str] = {}
    if word in ("alpaca", "alpaca_chat"):
        asked = isinstance(kind, str) and kind.endswith("load_qa")
        made["format"] = "prompt_completion" if asked else "alpaca"
        columns = {"prompt": "question", "completion": "answer"} if asked else {}
    elif word in ("sharegpt", "chat_template"):
        made["format"], columns = _chat(rows, word)
    elif word in ("completion", "pretrain"):
        made["format"] = "text"
        columns = {"text": rows.pop("field")} if rows.get("field", "text") != "text" else {}
    elif word == "input_output":
        made["format"] = "segments"
    elif isinstance(word, dict):
        names = {"instruction": "field_instruction", "input": "field_input", "output": "field_output"}
        made["format"] = "alpaca"
        columns = {ours: word[theirs] for ours, theirs in names.items() if word.get(theirs, ours) != ours}
        if lost := [name for name in word if name not in names.values()]:
            reading.note(
                f"{key}.type", "the base's own template is used for prompts", {name: word[name] for name in lost}
            )
    elif word not in (None, ROWS.split(".")[0]) and "preference" not in str(made) and "." not in str(kind):
        reading.note(f"{key}.type", "rows are recognised by their columns", kind)
    if columns:
        made["columns"] = columns
    rows.pop("conversation", None)
    if all(theirs == [ours] for ours, theirs in (rows.get("roles") or {}).items()):
        rows.pop("roles", None)
    reading.leave(rows, f"{key}.")
    return made


def _chat(rows: dict[str, Any], word: str) -> tuple[str, dict[str, str]]:
    """(format, columns) of rows of chats."""
    found = rows.pop("message_property_mappings", None) or {}
    role = rows.pop("message_field_role", found.get("role", "from" if word == "sharegpt" else "role"))
    text = rows.pop("message_field_content", found.get("content", "value" if word == "sharegpt" else "content"))
    turns = rows.pop("field_messages", "conversations" if word == "sharegpt" else "messages")
    if (role, text) == ("from", "value"):
        return "sharegpt", {"conversations": turns} if turns != "conversations" else {}
    columns = {"messages": turns, "role": role, "content": text}
    return "messages", {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _evaluation(reading: Reading) -> None:
    for key, word in (("evals_per_epoch", "evaluated"), ("saves_per_epoch", "saved")):
        if (times := reading.take(key)) is not None:
            if key == "evals_per_epoch" and times and "data.eval_fraction" in reading.recipe:
                reading.put("training.eval_strategy", "epoch")
            reading.note(key, f"once an epoch is {word}; write training.eval_steps or checkpoint.every_steps", times)
    held_out = reading.holds_out()
    if (steps := reading.take("eval_steps")) is not None:
        if held_out:
            reading.put("training.eval_strategy", "steps")
        reading.put("training.eval_steps", steps)
    if strategy := reading.take("eval_strategy", reading.take("evaluation_strategy")):
        reading.put("training.eval_strategy", strategy if held_out else "no")
