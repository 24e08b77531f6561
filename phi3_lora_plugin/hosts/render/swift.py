"""A recipe as an ms-swift config, `swift sft FILE`, with the plugin of hosts/swift."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from phi3_lora_plugin.hosts.render.common import NO_ROWS, SAME, Line, Rendered, RenderError, Rendering, some, write
from phi3_lora_plugin.hosts.render.settings_section import settings_of
from phi3_lora_plugin.hosts.swift import plugin_file
from phi3_lora_plugin.model.precision import precision_elsewhere

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

_SAME = (*(name for name in SAME if name != "lr_scheduler_kwargs"), "bf16", "fp16")


def render(recipe: Recipe) -> Rendered:
    """See `hosts.render`."""
    r = Rendering(recipe, "ms-swift")
    n, lora, data, model = r.numbers, recipe.lora, recipe.data, recipe.model
    names, why = r.targets()
    given = settings_of(recipe)
    head = [
        f"ms-swift, from the recipe {recipe.name}. Run it with",
        "  swift sft FILE",
        "in an environment that has phi3-lora-plugin.",
    ]
    dtype = precision_elsewhere(model).weights
    published = model.path.startswith(("microsoft/", "LLM-Research/"))  # names that ms-swift knows
    lines = [
        *([Line("ENV", {"PHI3_LORA_SETTINGS": json.dumps(given)}, "ms-swift has no keys for these")] if given else []),
        Line("model", r.base),
        *some(model_revision=model.revision),
        Line("use_hf", True, "ms-swift's default is another hub"),
        *([] if published else [Line("model_type", "phi3", "ms-swift cannot tell it from a folder's name")]),
        Line("external_plugins", [str(plugin_file())], "exact ids and labels"),
        Line("callbacks", ["phi3_lora"], "LoRA-only checkpoints"),
        Line("torch_dtype", dtype),
        Line("attn_impl", "sdpa" if model.attention == "auto" else model.attention),
        *([Line("quant_method", "bnb"), Line("quant_bits", 4), Line("bnb_4bit_quant_type", "nf4"),
           Line("bnb_4bit_use_double_quant", True)] if model.quantize == "nf4" else []),
        *([Line("quant_method", "bnb"), Line("quant_bits", 8)] if model.quantize == "int8" else []),
        Line("tuner_type", "lora"),
        Line("lora_rank", lora.r),
        Line("lora_alpha", lora.alpha),
        Line("lora_dropout", lora.dropout),
        *([Line("target_regex", names, why)] if isinstance(names, str) else [Line("target_modules", names, why)]),
        *some(use_dora=lora.dora, use_rslora=lora.rslora, lorap_lr_ratio=lora.loraplus_lr_ratio),
        *some(modules_to_save=lora.modules_to_save, target_parameters=lora.target_parameters),
        *some(init_weights=lora.init != "default" and lora.init),
        *r.lora_left_out("loraplus_lr_ratio", "modules_to_save", "target_parameters", "init"),
        *_data(r),
        r.longest("max_length"),
        Line("truncation_strategy", "right", "ms-swift drops longer rows by default; here they are cut"),
        *some(packing=data.packing),
        Line("warmup_ratio" if n.warmup < 1 else "warmup_steps", n.warmup),
        Line("gradient_checkpointing", n.checkpointing, n.checkpointing_why),
        *some(use_cpu=model.device == "cpu"),
        *r.trainer_lines(_SAME),
    ]  # fmt: skip
    return Rendered(write(head, lines))


_COLUMNS = {"prompt": "query", "completion": "response", "instruction": "query", "input": "input", "output": "response"}


def _data(r: Rendering) -> list[Line]:
    found = r.rows()
    if found is None:
        return [Line("dataset", [NO_ROWS.path], NO_ROWS.why)]
    if found.format not in ("messages", "sharegpt", "alpaca", "prompt_completion"):
        raise RenderError(f"data.format: {found.format} is a plugin's, which ms-swift does not know")
    most = f"#{r.recipe.data.max_rows}" if r.recipe.data.max_rows else ""
    split = "" if found.local or found.split == "train" else f":{found.split}"
    lines = [Line("dataset", [f"{found.path}{split}{most}"], found.why)]
    renamed = {foreign: _COLUMNS.get(name, name) for name, foreign in found.columns.items()}
    if found.format == "prompt_completion":
        renamed = {"prompt": "query", "completion": "response"} | renamed
    lines += some(columns=renamed)
    held_out = r.rows(evaluation=True)
    if held_out is not None:
        split = "" if held_out.local or held_out.split == "train" else f":{held_out.split}"
        lines.append(Line("val_dataset", [f"{held_out.path}{split}"]))
    elif r.recipe.data.eval_fraction:
        lines.append(Line("split_dataset_ratio", r.recipe.data.eval_fraction))
    if held_out is not None or r.recipe.data.eval_fraction:
        lines.append(Line("eval_strategy", r.recipe.training.get("eval_strategy", "epoch")))
    return lines
