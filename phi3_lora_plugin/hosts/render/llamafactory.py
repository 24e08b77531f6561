"""A recipe as a LLaMA-Factory config, with the `dataset_info.json` that it looks data up in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hosts.llamafactory import TEMPLATE
from phi3_lora_plugin.hosts.render.common import NO_ROWS, Line, Rendered, RenderError, Rendering, Rows, some, write
from phi3_lora_plugin.hosts.render.settings_section import section
from phi3_lora_plugin.model.precision import precision_elsewhere

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


def render(recipe: Recipe) -> Rendered:
    """See `hosts.render`."""
    r = Rendering(recipe, "LLaMA-Factory")
    n, lora, data, model = r.numbers, recipe.lora, recipe.data, recipe.model
    names, why = r.targets()
    info, chosen, assumed = _data(r)
    head = [
        f"LLaMA-Factory, from the recipe {recipe.name}. Run it with",
        "  python -m phi3_lora_plugin.hosts.llamafactory FILE",
        "(llamafactory-cli forgets callbacks and does not know the template), also under torchrun -m.",
    ]
    lines = [
        Line("model_name_or_path", r.base),
        *some(model_revision=model.revision),
        *section(recipe),
        Line("stage", "sft"),
        Line("do_train", True),
        Line("template", TEMPLATE, "ours: the published ids, exact labels; `phi` is LLaMA-Factory's own"),
        Line("finetuning_type", "lora"),
        Line("lora_rank", lora.r),
        Line("lora_alpha", int(lora.alpha), "" if int(lora.alpha) == lora.alpha else f"the recipe has {lora.alpha}"),
        Line("lora_dropout", lora.dropout),
        Line("lora_target", names if isinstance(names, str) else ",".join(names), why),
        *some(use_dora=lora.dora, use_rslora=lora.rslora, pissa_init=lora.init == "pissa"),
        *some(loraplus_lr_ratio=lora.loraplus_lr_ratio),
        *r.lora_left_out("loraplus_lr_ratio", *(["init"] if lora.init == "pissa" else [])),
        *_quantised(model.quantize),
        Line(
            "flash_attn", {"auto": "sdpa", "eager": "disabled", "flash_attention_2": "fa2"}.get(model.attention, "sdpa")
        ),
        Line("dataset_dir", ".", "the folder of dataset_info.json; run it from there"),
        *[Line(key, value, assumed if key == "dataset" else "") for key, value in chosen.items()],
        r.longest("cutoff_len"),
        *some(packing=data.packing, neat_packing=data.packing, max_samples=data.max_rows),
        Line("warmup_steps", n.warmup, "a share of the run" if 0 < n.warmup < 1 else ""),
        *_precision(recipe, n.rest),
        Line("disable_gradient_checkpointing", not n.checkpointing, n.checkpointing_why),
        *r.trainer_lines(),
    ]
    return Rendered(write(head, lines), {"dataset_info.json": json.dumps(info, indent=2) + "\n"})


def _quantised(quantize: str) -> list[Line]:
    if quantize == "none":
        return []
    lines = [Line("quantization_method", "bnb"), Line("quantization_bit", 4 if quantize == "nf4" else 8)]
    return [*lines, Line("quantization_type", "nf4"), Line("double_quantization", True)] if quantize == "nf4" else lines


def _precision(recipe: Recipe, rest: dict[str, Any]) -> list[Line]:
    if {"bf16", "fp16"} & set(rest):
        return [Line(name, rest[name]) for name in ("bf16", "fp16") if name in rest]
    mixed = precision_elsewhere(recipe.model).mixed
    return some(use_cpu=recipe.model.device == "cpu", bf16=mixed == "bf16", fp16=mixed == "fp16")


def _data(r: Rendering) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(content of dataset_info.json, the keys that choose from it, what was assumed)."""
    found = r.rows() or NO_ROWS
    info, chosen = {"train": _entry(found)}, {"dataset": "train"}
    held_out = r.rows(evaluation=True)
    more: dict[str, Any] = {}
    if held_out is not None:
        info["eval"] = _entry(held_out)
        more = {"eval_dataset": "eval", "do_eval": True}
    elif r.recipe.data.eval_fraction:
        more = {"val_size": r.recipe.data.eval_fraction, "do_eval": True}
    if more:
        more["eval_strategy"] = r.recipe.training.get("eval_strategy", "epoch")
    return info, chosen | more, found.why


_ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
          "system_tag": "system", "observation_tag": "tool", "function_tag": "function_call"}  # fmt: skip


#: Our format -> (LLaMA-Factory's, its names for columns -> ours).
_SHAPES = {
    "messages": ("sharegpt", {"messages": "messages"}),
    "sharegpt": ("sharegpt", {"messages": "conversations"}),
    "alpaca": ("alpaca", {"prompt": "instruction", "query": "input", "response": "output"}),
    "prompt_completion": ("alpaca", {"prompt": "prompt", "response": "completion"}),
}


def _entry(found: Rows) -> dict[str, Any]:
    """How LLaMA-Factory is told the shape of the rows."""
    if found.format not in _SHAPES:
        raise RenderError(f"data.format: {found.format} is a plugin's, which LLaMA-Factory does not know")
    formatting, names = _SHAPES[found.format]
    there = found.columns
    entry: dict[str, Any] = (
        {"file_name": found.path} if found.local else {"hf_hub_url": found.path, "split": found.split}
    )
    entry |= {"formatting": formatting, "columns": {theirs: there.get(ours, ours) for theirs, ours in names.items()}}
    if found.format == "messages":
        named = {"role_tag": there.get("role", "role"), "content_tag": there.get("content", "content")}
        entry["tags"] = _ROLES | named
    return entry
