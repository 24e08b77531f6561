"""A LLaMA-Factory config as a recipe, with the `dataset_info.json` that it looks data up in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3_lora_plugin.hosts.read.common import ATTENTION, ImportConfigError, Reading

SIGNS = ("finetuning_type", "lora_target", "cutoff_len", "dataset_dir", "lora_rank", "stage")
KEYS = {
    "model_revision": "model.revision",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "loraplus_lr_ratio": "lora.loraplus_lr_ratio",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "cutoff_len": "data.max_length",
    "max_samples": "data.max_rows",
    "packing": "data.packing",
    "pref_beta": "preference.beta",
    "simpo_gamma": "preference.gamma",
    "kto_chosen_weight": "preference.desirable_weight",
    "kto_rejected_weight": "preference.undesirable_weight",
    "seed": "seed",
    "output_dir": "output_dir",
}
NOT_NEEDED = {
    "do_train": "`phi3-lora train` trains",
    "do_eval": "it follows from the data",
    "template": "it is the base's",
    "trust_remote_code": "remote code is never run",
    "overwrite_cache": "rows are encoded anew when they change",
    "preprocessing_num_workers": "rows are encoded in batches",
    "preprocessing_batch_size": "of LLaMA-Factory's",
    "plot_loss": "losses are in the run's report",
    "overwrite_output_dir": "a run never overwrites another's",
    "ddp_timeout": "of torch's launcher",
    "neat_packing": "packed rows attend to themselves only",
    "quantization_type": "nf4",
    "double_quantization": "on",
    "save_only_model": "checkpoints can be resumed",
    "tokenized_path": "encoded rows are cached",
    "use_fast_tokenizer": "it always is",
    "upcast_layernorm": "as stored",
    "quantization_method": "bitsandbytes",
    "ref_model": "the reference is the base without its adapter",
    "resize_vocab": "the vocabulary stays",
    "media_dir": "text only",
}
DEFAULTS: dict[str, Any] = {"lora.r": 8, "data.max_length": 2048, "training.gradient_checkpointing": True}


def read(reading: Reading) -> None:
    """See `hosts.read`."""
    reading.read_base("model_name_or_path", reading.take("model_name_or_path"))
    kind, stage = reading.take("finetuning_type", "lora"), reading.take("stage", "sft")
    if kind != "lora":
        raise ImportConfigError(f"finetuning_type: {kind}: a recipe trains LoRA")
    loss = reading.take("pref_loss", "sigmoid")
    if stage in ("dpo", "kto"):
        reading.read_loss("pref_loss" if stage == "dpo" else "stage", loss if stage == "dpo" else "kto")
    elif stage != "sft":
        raise ImportConfigError(f"stage: {stage} has no equal in a recipe; available: sft, dpo, kto")
    reading.read_targets("lora_target", reading.take("lora_target", None if reading.partial else "all"), ("all",))
    if more := reading.take("additional_target"):
        reading.put("lora.modules_to_save", [part.strip() for part in str(more).split(",")])
    if (bits := reading.take("quantization_bit")) is not None:
        reading.put("model.quantize", {4: "nf4", 8: "int8"}.get(int(bits), "nf4"))
        if int(bits) not in (4, 8):
            reading.note("quantization_bit", "read as 4", bits)
    if (attention := reading.take("flash_attn")) in ATTENTION:
        reading.put("model.attention", ATTENTION[str(attention)])
    reading.flags(
        {
            "pissa_init": ("lora.init", "pissa"),
            "train_on_prompt": ("data.train_on", "all"),
            "mask_history": ("data.train_on", "last_turn"),
            "use_cpu": ("model.device", "cpu"),
        }
    )
    if reading.take("disable_gradient_checkpointing") is True:
        reading.put("training.gradient_checkpointing", False)
    reading.read_half(reading.take("bf16"), reading.take("fp16"))
    _data(reading, bool(reading.take("streaming")))
    reading.read_report_to()
    reading.read_checkpoints()
    reading.read_own()
    reading.by_table(KEYS)
    reading.drop(NOT_NEEDED)
    if not {"data.eval_fraction", "data.eval_path"} & set(reading.recipe):
        for key in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
            if (value := reading.take(key)) not in (None, "no"):
                reading.note(key, "nothing is evaluated: there is no val_size or eval_dataset", value)
    reading.read_optimizer_and_rest()
    if not reading.partial and "lora.alpha" not in reading.recipe:
        reading.put("lora.alpha", 2 * reading.recipe.get("lora.r", DEFAULTS["lora.r"]))


def _data(reading: Reading, streaming: bool) -> None:
    if streaming:
        reading.note("streaming", "rows are read as they are needed where they do not fit", True)
    info = _info(reading) if {"dataset", "eval_dataset"} & set(reading.given) else {}
    sources = [_source(reading, name, info) for name in _names(reading.take("dataset"))]
    if len(sources) > 1 and (most := reading.take("max_samples")) is not None:  # of each
        sources = [source | {"max_rows": most} for source in sources]
    reading.put_sources(sources)
    held_out = [_source(reading, name, info)["path"] for name in _names(reading.take("eval_dataset"))]
    if held_out:
        reading.put("data.eval_path", held_out[0] if len(held_out) == 1 else held_out)
    share = reading.take("val_size", 0)
    if 0 < float(share) < 1:
        reading.put("data.eval_fraction", float(share))
    elif float(share):
        reading.note("val_size", "a number of rows; write data.eval_fraction as a share", share)


def _names(given: Any) -> list[str]:
    return [name.strip() for name in given.split(",")] if isinstance(given, str) else list(given or ())


def _info(reading: Reading) -> dict[str, Any]:
    """The content of `dataset_info.json`; empty, with a note, where it cannot be read."""
    named = reading.take("dataset_dir", "data")
    for folder in (Path(named), reading.folder / named, reading.folder):
        file = folder / "dataset_info.json"
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ImportConfigError(f"{file}: {error}") from error
            return {name: {"folder": folder, **entry} for name, entry in found.items()}
    reading.note("dataset_dir", "no dataset_info.json there: names of data sets are taken for paths", named)
    return {}


def _source(reading: Reading, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """One entry of dataset_info.json as a source of ours."""
    entry = info.get(name)
    if entry is None:
        if info:
            reading.note(f"dataset.{name}", "is not in dataset_info.json; taken for a path")
        return {"path": name}
    if file := entry.get("file_name"):
        inside = entry["folder"] / file
        made: dict[str, Any] = {"path": str(inside if inside.exists() else file)}
    else:
        made = {"path": entry.get("hf_hub_url") or entry.get("ms_hub_url") or name}
    if (split := entry.get("split", "train")) != "train":
        made["split"] = split
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    if entry.get("ranking") or {"chosen", "kto_tag"} & set(columns):
        named = {"label": columns.get("kto_tag"), "chosen": columns.get("chosen"), "rejected": columns.get("rejected")}
    elif entry.get("formatting") == "sharegpt":
        plain = tags.get("role_tag", "from") == "from"
        made["format"] = "sharegpt" if plain else "messages"
        turns = columns.get("messages", "conversations")
        named = (
            {"conversations": turns}
            if plain
            else {"messages": turns, "role": tags["role_tag"], "content": tags.get("content_tag", "value")}
        )
    else:
        made["format"] = "alpaca"
        named = {"instruction": columns.get("prompt"), "input": columns.get("query"), "output": columns.get("response")}
        if history := columns.get("history"):
            reading.note(f"dataset.{name}.columns.history", "has no equal in a recipe; left out", history)
    renamed = {ours: theirs for ours, theirs in named.items() if theirs and theirs != ours}
    return made | ({"columns": renamed} if renamed else {})
