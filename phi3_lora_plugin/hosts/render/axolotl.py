"""A recipe as an axolotl config, for the plugin of hosts/axolotl.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hosts.axolotl_config import KERNELS, ROWS
from phi3_lora_plugin.hosts.render.common import NO_ROWS, Line, Rendered, Rendering, Rows, note, some, write
from phi3_lora_plugin.hosts.render.settings_section import section
from phi3_lora_plugin.model.precision import precision_elsewhere

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

# TrainingArguments that axolotl knows by the same name.
_SAME = ("max_steps", "eval_steps", "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha",
         "lr_scheduler_kwargs", "bf16", "fp16", "dataloader_num_workers")  # fmt: skip


def render(recipe: Recipe) -> Rendered:
    """See `hosts.render`."""
    r = Rendering(recipe, "axolotl")
    n, lora, data, model = r.numbers, recipe.lora, recipe.data, recipe.model
    head = [
        f"axolotl, from the recipe {recipe.name}. Run it with",
        "  axolotl train FILE",
        "in an environment that has phi3-lora-plugin.",
    ]
    lines = [
        Line("base_model", r.base),
        *some(revision_of_model=model.revision),
        Line("plugins", ["phi3_lora_plugin.hosts.axolotl.Phi3LoraPlugin"], "masks, stop tokens, LoRA-only checkpoints"),
        *section(recipe),
        note("on by default, and they fail on a fused qkv_proj"),
        *(Line(name, False) for name in KERNELS),
        Line("adapter", "qlora" if model.quantize == "nf4" else "lora"),
        *([Line("load_in_4bit", True, "nf4 with double quantisation")] if model.quantize == "nf4" else []),
        *some(load_in_8bit=model.quantize == "int8"),
        *_lora(r),
        *_data(r),
        r.longest("sequence_len"),
        Line("sample_packing", data.packing),
        *some(group_by_length=n.by_length),
        Line("micro_batch_size", n.batch),
        Line("gradient_accumulation_steps", n.accumulation),
        Line("num_epochs", n.epochs),
        *some(max_steps=n.max_steps > 0 and n.max_steps),
        Line("learning_rate", n.learning_rate),
        Line("lr_scheduler", n.scheduler),
        Line("warmup_ratio" if n.warmup < 1 else "warmup_steps", n.warmup),
        Line("optimizer", n.optimizer),
        Line("weight_decay", n.weight_decay),
        Line("max_grad_norm", n.max_grad_norm),
        *some(loraplus_lr_ratio=lora.loraplus_lr_ratio),
        *_precision(precision_elsewhere(model).mixed, model.device, n.rest),
        Line("attn_implementation", "sdpa" if model.attention == "auto" else model.attention),
        Line("gradient_checkpointing", n.checkpointing, n.checkpointing_why),
        *some(gradient_checkpointing_kwargs=n.checkpointing and {"use_reentrant": False}),
        Line("logging_steps", n.logging_steps),
        *some(save_steps=recipe.checkpoint.every_steps),
        Line("save_total_limit", max(1, recipe.checkpoint.keep_last)),
        Line("seed", recipe.seed),
        Line("output_dir", recipe.output_dir),
        *(Line(key, value) for key, value in n.rest.items() if key in _SAME and key not in ("bf16", "fp16")),
        *r.left_out("training", {key: value for key, value in n.rest.items() if key not in _SAME}),
    ]
    return Rendered(write(head, lines))


def _lora(r: Rendering) -> list[Line]:
    lora = r.recipe.lora
    names, why = r.targets()
    lines = [
        Line("lora_r", lora.r),
        Line("lora_alpha", lora.alpha),
        Line("lora_dropout", lora.dropout),
        Line("lora_target_modules", names, why),
    ]
    optional: dict[str, Any] = {
        "lora_target_parameters": lora.target_parameters,
        "lora_modules_to_save": lora.modules_to_save,
        "lora_rank_pattern": lora.rank_pattern,
        "lora_alpha_pattern": lora.alpha_pattern,
        "peft_use_dora": lora.dora,
        "peft_use_rslora": lora.rslora,
        "peft_init_lora_weights": None if lora.init == "default" else lora.init,
        "peft_layers_to_transform": [lora.layers_to_transform]
        if isinstance(lora.layers_to_transform, int)
        else lora.layers_to_transform,
        "peft_trainable_token_indices": lora.trainable_token_indices,
    }
    known = ("loraplus_lr_ratio", "init", *(key.split("_", 1)[1] for key in optional))
    return [*lines, *some(**optional), *r.lora_left_out(*known)]


def _data(r: Rendering) -> list[Line]:
    found = r.rows()
    if found is None:
        return [Line("datasets", [{"path": NO_ROWS.path, "ds_type": "json", "type": ROWS}], NO_ROWS.why)]
    lines = [Line("datasets", [_source(found)], found.why)]
    held_out = r.rows(evaluation=True)
    if held_out is not None:
        lines.append(Line("test_datasets", [_source(held_out)]))
    elif r.recipe.data.eval_fraction:
        lines.append(Line("val_set_size", r.recipe.data.eval_fraction))
    if (held_out is not None or r.recipe.data.eval_fraction) and "eval_strategy" in r.recipe.training:
        lines.append(Line("eval_strategy", r.recipe.training["eval_strategy"]))
    return lines


def _source(found: Rows) -> dict[str, Any]:
    kinds = {"json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet"}
    kind = kinds.get(found.path.rpartition(".")[2]) if found.local else None
    return {
        "path": found.path,
        **({"ds_type": kind} if kind else {}),
        "type": ROWS,
        "split": "train" if found.local else found.split,
    }


def _precision(mixed: str, device: str, rest: dict[str, Any]) -> list[Line]:
    if {"bf16", "fp16"} & set(rest):
        return [Line(name, rest[name]) for name in ("bf16", "fp16") if name in rest]
    if mixed == "fp16":
        return [Line("fp16", True)]
    return [Line("bf16", False if mixed == "no" else True if device == "cpu" else "auto")]
