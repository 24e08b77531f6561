"""A recipe as the YAML of TRL's own command: `trl sft`, or `trl dpo` and `trl kto` for preferences."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.chat.templates import template_for
from phi3_lora_plugin.hosts.render.common import NO_ROWS, Line, Rendered, RenderError, Rendering, note, some, write
from phi3_lora_plugin.model.families import recognise
from phi3_lora_plugin.model.precision import precision_elsewhere
from phi3_lora_plugin.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe


def render(recipe: Recipe) -> Rendered:
    """See `hosts.render`."""
    r = Rendering(recipe, "TRL's command")
    n, lora, data, model = r.numbers, recipe.lora, recipe.data, recipe.model
    names, why = r.targets()
    script = {"chats": "sft", "pairs": "dpo", "judged": "kto"}[recipe.preference.rows]
    head = [
        f"TRL, from the recipe {recipe.name}. Run it with",
        f"  trl {script} --config FILE",
        f"or, with LoRA-only checkpoints and stop tokens as well, `phi3-lora trl {script} --config FILE`.",
    ]
    dtype = precision_elsewhere(model).weights
    lines = [
        Line("model_name_or_path", r.base),
        *some(model_revision=model.revision),
        Line("dtype", dtype, "TRL's default is float32"),
        Line("attn_implementation", "sdpa" if model.attention == "auto" else model.attention),
        *([Line("load_in_4bit", True), Line("bnb_4bit_quant_type", "nf4"), Line("use_bnb_nested_quant", True)]
          if model.quantize == "nf4" else some(load_in_8bit=model.quantize == "int8")),
        Line("use_peft", True),
        Line("lora_r", lora.r),
        Line("lora_alpha", int(lora.alpha), "" if int(lora.alpha) == lora.alpha else f"the recipe has {lora.alpha}"),
        Line("lora_dropout", lora.dropout),
        Line("lora_target_modules", names, why or "PEFT has no default for phi3"),
        *some(use_dora=lora.dora, use_rslora=lora.rslora, lora_modules_to_save=lora.modules_to_save),
        *r.lora_left_out("modules_to_save"),
        *_data(r),
        *(_preference(recipe) if recipe.preference.on else _template(r)),
        r.longest("max_length"),
        *([] if recipe.preference.on else [Line("packing", data.packing)]),
        Line("warmup_steps", n.warmup, "a share of the run" if 0 < n.warmup < 1 else ""),
        Line("gradient_checkpointing", n.checkpointing, n.checkpointing_why or "on by default in TRL"),
        *_precision(recipe, n.rest),
        *r.trainer_lines(report="`phi3-lora trl` adds LoRA-only checkpoints"),
    ]  # fmt: skip
    return Rendered(write(head, lines))


def _preference(recipe: Recipe) -> list[Line]:
    section = recipe.preference
    lines = [
        Line("beta", section.beta),
        Line("disable_dropout", False, "on by default in TRL; the recipe's dropout is that of its LoRA"),
    ]
    if section.loss == "kto":
        return [
            *lines,
            Line("desirable_weight", section.desirable_weight),
            Line("undesirable_weight", section.undesirable_weight),
        ]
    return [*lines, Line("loss_type", [section.loss]), *some(label_smoothing=section.label_smoothing)]


def _data(r: Rendering) -> list[Line]:
    found = r.rows() or NO_ROWS
    if not r.recipe.preference.on and found.format not in ("messages", "sharegpt", "prompt_completion", "alpaca"):
        raise RenderError(f"data.format: {found.format} is a plugin's, which TRL does not know")
    held_out = r.rows(evaluation=True)
    evaluated = Line("eval_strategy", r.recipe.training.get("eval_strategy", "epoch"))
    if found.local:
        kind = {"jsonl": "json"}.get(found.path.rpartition(".")[2], found.path.rpartition(".")[2])
        source = {"path": kind, "data_files": found.path, "split": "train"}
        lines = [Line("datasets", [source], found.why)]
    else:
        lines = [Line("dataset_name", found.path), Line("dataset_train_split", found.split, found.why)]
    if held_out is not None and not held_out.local and held_out.path == found.path:
        lines += [Line("dataset_test_split", held_out.split), evaluated]
    elif found.local and r.recipe.data.eval_fraction:
        lines += [Line("test_split_size", r.recipe.data.eval_fraction), evaluated]
    elif held_out is not None or r.recipe.data.eval_fraction:
        lines.append(note("left out: rows to evaluate on; TRL's command takes a split of the same data set only"))
    if r.recipe.preference.on:
        wanted = "completion and label" if r.recipe.preference.loss == "kto" else "chosen and rejected"
        lines.append(note(f"TRL reads rows of prompt, {wanted}"))
    elif found.format == "alpaca" or found.columns:
        lines.append(
            note(f"TRL reads messages and prompt/completion; turn rows of the format {found.format} into those")
        )
    return lines


def _template(r: Rendering) -> list[Line]:
    """Our file of the model's template, which marks the assistant's text."""
    data = r.recipe.data
    if data.train_on != "assistant":
        return [
            Line("assistant_only_loss", False),
            note(f"data.train_on: {data.train_on}; TRL's command trains all tokens, or all of the assistant's"),
        ]
    name = data.template or _template_of(r)
    if name is None:
        return [Line("assistant_only_loss", True), note("chat_template_path: a template with generation marks, as "
                                                        "`phi3-lora trl` puts one on the tokenizer")]  # fmt: skip
    path = str(files("phi3_lora_plugin.chat").joinpath("templates", f"{name}.jinja"))
    return [
        Line("assistant_only_loss", True),
        Line("chat_template_path", path, "renders as published and marks the assistant's text"),
    ]


def _template_of(r: Rendering) -> str | None:
    """By the tokenizer if that is here, else by the model's published name."""
    if Path(r.base).is_dir():
        return template_for(load_tokenizer(r.base)).name
    templates = recognise(r.base_config).templates if r.base_config else ()
    return templates[0] if templates else None


def _precision(recipe: Recipe, rest: dict[str, Any]) -> list[Line]:
    if {"bf16", "fp16"} & set(rest):
        return [Line(name, rest[name]) for name in ("bf16", "fp16") if name in rest]
    mixed = precision_elsewhere(recipe.model).mixed
    cpu = [Line("use_cpu", True)] if recipe.model.device == "cpu" else []
    if mixed == "fp16":
        return [*cpu, Line("bf16", False), Line("fp16", True)]
    return [*cpu, Line("bf16", mixed == "bf16", "on by default in TRL")]
