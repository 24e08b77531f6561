"""A recipe as a torchtune config, for `tune run lora_finetune_single_device`.

torchtune splits the fused projections, so its adapters have other factors than ours at the same rank; `phi3-lora
convert` reads them. It is no longer maintained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.hosts.render.common import (
    Line,
    Rendered,
    RenderError,
    base_path,
    left_out,
    note,
    numbers,
    rows,
    write,
)

if TYPE_CHECKING:
    from phi3_lora_plugin.recipe import Recipe

_MINI, _PHI4 = "Phi-3-mini-4k-instruct", "phi-4"
_ATTENTION = {"q_proj": ["q_proj"], "k_proj": ["k_proj"], "v_proj": ["v_proj"], "o_proj": ["output_proj"],
              "qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # fmt: skip
_MLP = ("gate_up_proj", "down_proj", "gate_proj", "up_proj")
_COSINE = "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"


def render(recipe: Recipe) -> Rendered:
    """See `hosts.render`.

    Raises:
        RenderError: a model other than Phi-3-mini-4k and Phi-4, which are all that torchtune has.
    """
    n, lora, data, model = numbers(recipe), recipe.lora, recipe.data, recipe.model
    name = model.path.rpartition("/")[2]
    tiny = model.path.startswith("embedded:")
    if name.lower() not in (_MINI.lower(), _PHI4) and not tiny:
        raise RenderError(f"torchtune has {_MINI} and {_PHI4}, not {model.path}")
    phi4 = name.lower() == _PHI4
    family, builder = ("phi4", "phi4_14b") if phi4 else ("phi3", "phi3_mini")
    quantised = "qlora" if model.quantize == "nf4" else "lora"
    attention, mlp, why = _targets(recipe)
    checkpoint = f"downloads/{name}"
    head = [
        f"torchtune, from the recipe {recipe.name}. Run it with",
        f"  tune download {base_path(recipe)} --output-dir {checkpoint}",
        "  tune run lora_finetune_single_device --config FILE",
        "  phi3-lora convert    # its adapter into one that PEFT loads",
        "torchtune splits qkv_proj and gate_up_proj, each slice with its own A: more parameters at the same rank.",
    ]
    steps = n.warmup if n.warmup >= 1 else 100
    lines = [
        Line("output_dir", recipe.output_dir),
        *([note(f"torchtune has no model of this size; {_MINI} stands for it")] if tiny else []),
        Line("model", {
            "_component_": f"torchtune.models.{family}.{quantised}_{builder}",
            "lora_attn_modules": attention,
            "apply_lora_to_mlp": mlp,
            "apply_lora_to_output": False,
            "lora_rank": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            **({"use_dora": True} if lora.dora else {}),
        }, why),
        Line("tokenizer", _tokenizer(phi4, checkpoint, data.max_length)),
        Line("checkpointer", {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": checkpoint,
            "checkpoint_files": [f"model-{i:05d}-of-{6 if phi4 else 2:05d}.safetensors"
                                 for i in range(1, (6 if phi4 else 2) + 1)],
            "recipe_checkpoint": None,
            "output_dir": recipe.output_dir,
            "model_type": "PHI4" if phi4 else "PHI3_MINI",
        }),
        Line("resume_from_checkpoint", False),
        Line("save_adapter_weights_only", True),
        *_data(recipe),
        Line("seed", recipe.seed),
        Line("shuffle", True),
        Line("epochs", int(n.epochs), "" if int(n.epochs) == n.epochs else f"the recipe has {n.epochs}"),
        Line("max_steps_per_epoch", n.max_steps if n.max_steps > 0 else None),
        Line("batch_size", n.batch),
        Line("gradient_accumulation_steps", n.accumulation),
        Line("optimizer", _optimizer(n.optimizer, n.learning_rate, n.weight_decay)),
        Line("lr_scheduler", {"_component_": _COSINE, "num_warmup_steps": steps},
             _schedule(n.scheduler, n.warmup)),
        Line("loss", {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}),
        Line("clip_grad_norm", n.max_grad_norm),
        Line("compile", False),
        Line("device", "cpu" if model.device == "cpu" else "cuda"),
        Line("enable_activation_checkpointing", n.checkpointing),
        Line("enable_activation_offloading", False),
        Line("dtype", "fp32" if model.dtype == "float32" or model.device == "cpu" else "bf16"),
        Line("metric_logger", {"_component_": "torchtune.training.metric_logging.DiskLogger",
                               "log_dir": f"{recipe.output_dir}/logs"}),
        Line("log_every_n_steps", max(1, int(n.logging_steps))),
        Line("log_peak_memory_stats", model.device != "cpu"),
        Line("profiler", {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False}),
        *left_out("lora", _unknown_lora(recipe), "torchtune"),
        *left_out("training", n.rest, "torchtune"),
    ]  # fmt: skip
    return Rendered(write(head, lines))


def _targets(recipe: Recipe) -> tuple[list[str], bool, str]:
    asked = recipe.lora.targets
    if asked == "all-linear":
        return ["q_proj", "k_proj", "v_proj", "output_proj"], True, "every projection of a layer"
    names = [asked] if isinstance(asked, str) else list(asked)
    attention = list(dict.fromkeys(part for name in names for part in _ATTENTION.get(name, [])))
    mlp = any(name in _MLP for name in names)
    if not attention and not mlp:
        raise RenderError(f"lora.targets: {asked} names nothing that torchtune can adapt")
    part = mlp and not ({"gate_up_proj", "down_proj"} <= set(names) or set(_MLP[1:]) <= set(names))
    return attention, mlp, "apply_lora_to_mlp adapts gate, up and down; the recipe names fewer" if part else ""


def _tokenizer(phi4: bool, folder: str, longest: int | None) -> dict[str, Any]:
    if phi4:
        return {
            "_component_": "torchtune.models.phi4.phi4_tokenizer",
            "vocab_path": f"{folder}/vocab.json",
            "merges_path": f"{folder}/merges.txt",
            "max_seq_len": longest,
        }
    return {
        "_component_": "torchtune.models.phi3.phi3_mini_tokenizer",
        "path": f"{folder}/tokenizer.model",
        "max_seq_len": longest,
    }


def _data(recipe: Recipe) -> list[Line]:
    found = rows(recipe)
    path, local, columns = ("YOUR_CHATS.jsonl", True, {}) if found is None else (found.path, found.local, found.columns)
    kind = "messages" if found is None else found.format
    why = "the recipe names none" if found is None else found.why
    file = {"jsonl": "json"}.get(path.rpartition(".")[2], path.rpartition(".")[2])
    source: dict[str, Any] = {"source": file, "data_files": path} if local else {"source": path}
    split = "train" if found is None or found.local else found.split
    shared = {"packed": recipe.data.packing, "train_on_input": recipe.data.train_on == "all", "split": split}
    if kind in ("messages", "sharegpt"):
        column = "messages" if kind == "messages" else "conversations"
        made = {"_component_": "torchtune.datasets.chat_dataset", **source,
                "conversation_column": columns.get(column, column),
                "conversation_style": "openai" if kind == "messages" else "sharegpt"}  # fmt: skip
    elif kind in ("alpaca", "prompt_completion"):
        asks, answers = ("instruction", "output") if kind == "alpaca" else ("prompt", "completion")
        made = {"_component_": "torchtune.datasets.instruct_dataset", **source,
                "column_map": {"input": columns.get(asks, asks), "output": columns.get(answers, answers)}}  # fmt: skip
    else:
        raise RenderError(f"data.format: {kind} is a plugin's, which torchtune does not know")
    lines = [Line("dataset", made | shared, why)]
    if kind == "alpaca":
        lines.append(note("instruct_dataset reads one column to ask with: `input` of alpaca rows is not read"))
    if recipe.data.eval_path or recipe.data.eval_split or recipe.data.eval_fraction:
        lines.append(note("left out: rows to evaluate on; this torchtune recipe does not evaluate"))
    return lines


def _optimizer(name: str, rate: float, decay: float) -> dict[str, Any]:
    if name.startswith("paged_adamw"):
        return {"_component_": "bitsandbytes.optim.PagedAdamW", "lr": rate, "weight_decay": decay}
    return {"_component_": "torch.optim.AdamW", "fused": name.endswith("fused"), "lr": rate, "weight_decay": decay}


def _schedule(name: str, warmup: float) -> str:
    said = [] if name == "cosine" else [f"the recipe has {name}, of which torchtune has none"]
    return "; ".join([*said, *([f"the recipe warms up for {warmup:g} of the run"] if 0 < warmup < 1 else [])])


def _unknown_lora(recipe: Recipe) -> dict[str, Any]:
    lora = recipe.lora
    names = ("exclude_modules", "rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save", "rslora",
             "trainable_token_indices", "target_parameters", "loftq_config", "eva_config",
             "loraplus_lr_ratio")  # fmt: skip
    found = {name: getattr(lora, name) for name in names if getattr(lora, name)}
    return found | ({} if lora.init == "default" else {"init": lora.init})
