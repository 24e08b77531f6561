"""The YAML of TRL's command, `trl sft --config FILE`, as a recipe; also of dpo, kto and of older releases."""

from __future__ import annotations

from typing import Any

from phi3_lora_plugin.hosts.read.common import ATTENTION, ImportConfigError, Reading

SIGNS = tuple(
    "use_peft dataset_name lora_target_modules dataset_train_split assistant_only_loss chat_template_path "
    "dataset_mixer max_seq_length".split()
)
KEYS = {
    "model_revision": "model.revision",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_modules_to_save": "lora.modules_to_save",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "lora_target_parameters": "lora.target_parameters",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "packing": "data.packing",
    "beta": "preference.beta",
    "label_smoothing": "preference.label_smoothing",
    "desirable_weight": "preference.desirable_weight",
    "undesirable_weight": "preference.undesirable_weight",
    "simpo_gamma": "preference.gamma",
    "cpo_alpha": "preference.cpo_alpha",
    "seed": "seed",
    "output_dir": "output_dir",
}
NOT_NEEDED = {
    "trust_remote_code": "remote code is never run",
    **dict.fromkeys(("chat_template_path", "tokenizer_name_or_path"), "it is the base's"),
    "bnb_4bit_quant_type": "nf4",
    "use_bnb_nested_quant": "on",
    "bnb_4bit_compute_dtype": "model.dtype",
    "bnb_4bit_quant_storage": "of bitsandbytes",
    "eos_token": "stop tokens are known",
    "pad_token": "one that ends nothing",
    **dict.fromkeys(("dataset_num_proc", "preprocessing_num_workers"), "rows are encoded in batches"),
    "eval_packing": "it follows data.packing",
    "packing_strategy": "whole rows, each attending to itself",
    "padding_free": "rows of a batch are never padded there",
    "lora_task_type": "CAUSAL_LM",
    "gradient_checkpointing_kwargs": "set as LoRA needs it",
    "use_liger_kernel": "recipes have fast paths of their own",
    "overwrite_output_dir": "a run never overwrites another's",
    "do_eval": "it follows from the data",
    "truncation_mode": "rows are cut at the end",
    "dataset_kwargs": "rows are recognised by their columns",
    "logging_strategy": "by steps",
    **dict.fromkeys(("push_to_hub", "hub_strategy", "hub_model_id"), "`phi3-lora export --to hub`"),
}
#: TRL's where they are not a recipe's.
DEFAULTS = {
    "training.learning_rate": 2e-5,
    "lora.dropout": 0.05,
    "data.max_length": 1024,
    "training.gradient_checkpointing": True,
}


def read(reading: Reading) -> None:
    """See `hosts.read`."""
    reading.read_base("model_name_or_path", reading.take("model_name_or_path"))
    if reading.take("use_peft") is False:
        raise ImportConfigError("use_peft: false: a recipe trains LoRA; TRL trains the whole model without it")
    for key in ("torch_dtype", "dtype"):
        if (dtype := reading.take(key)) is not None:
            reading.put("model.dtype", str(dtype).removeprefix("torch."))
    for key, value in (("fp16", "float16"), ("bf16", "bfloat16")):
        if reading.take(key) is True and reading.recipe.get("model.dtype", "auto") in ("auto", "float32"):
            reading.put("model.dtype", value)
    if (attention := reading.take("attn_implementation")) in ATTENTION:
        reading.put("model.attention", ATTENTION[attention])
    reading.flags(
        {
            "use_flash_attention_2": ("model.attention", "flash_attention_2"),
            "load_in_8bit": ("model.quantize", "int8"),
            "load_in_4bit": ("model.quantize", "nf4"),
            "use_cpu": ("model.device", "cpu"),
        }
    )
    reading.read_targets("lora_target_modules", reading.take("lora_target_modules"), ("all-linear", "all"))
    if (loss := reading.take("loss_type")) not in (None, "nll", "dft", "chunked_nll"):
        reading.read_loss("loss_type", loss)
    elif loss not in (None, "nll", "chunked_nll"):
        reading.note("loss_type", "has no equal in a recipe; left out", loss)
    if (only := reading.take("assistant_only_loss")) is not None:
        reading.put("data.train_on", "assistant" if only else "all")
    if reading.take("completion_only_loss"):
        reading.put("data.train_on", "last_turn")
    if (rows := reading.take("dataset_text_field", "text")) != "text":
        reading.put("data.columns", {"text": rows})
    _data(reading)
    reading.read_report_to()
    reading.read_checkpoints()
    reading.by_table(KEYS)
    reading.drop(NOT_NEEDED)
    if (strategy := reading.take("eval_strategy", reading.take("evaluation_strategy"))) is not None:
        reading.put("training.eval_strategy", strategy if reading.holds_out() else "no")
    reading.read_optimizer_and_rest()


def _data(reading: Reading) -> None:
    sources = []
    for rows in reading.take("datasets", []):
        rows = dict(rows)
        path, files = rows.pop("path", None), rows.pop("data_files", None)
        made: dict[str, Any] = {"path": files if files else path}
        if (split := rows.pop("split", "train")) != "train":
            made["split"] = split
        reading.leave(rows, "datasets.")
        sources.append(made)
    for path, weight in (reading.take("dataset_mixer") or {}).items():  # alignment-handbook
        sources.append({"path": path, "weight": weight})
    named = reading.take("dataset_name")
    if named and not sources:
        sources = [{"path": named}]
    mixed = reading.take("dataset_splits")
    train, test = reading.take("dataset_train_split"), reading.take("dataset_test_split")
    if mixed:
        train, test = (mixed[0], mixed[1] if len(mixed) > 1 else None)
    if train and train != "train" and sources:
        for source in sources:
            source["split"] = train
    reading.put_sources(sources)
    evaluates = reading.given.get("eval_strategy", reading.given.get("evaluation_strategy", "no")) != "no"
    if share := reading.take("test_split_size"):
        reading.put("data.eval_fraction", share)
    elif sources and evaluates and (test or named):
        reading.put("data.eval_split", test or "test")
    if (config := reading.take("dataset_config")) is not None:
        reading.note("dataset_config", "has no equal in a recipe; name the files of that subset in data.path", config)
