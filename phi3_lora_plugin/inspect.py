"""Look at a folder of a model, tokenizer or adapter: what it is, what would be trained, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.families import (
    Projection,
    RopeError,
    UnsupportedModel,
    default_max_length,
    projections,
    recognise,
    repair_rope,
)


class InspectError(ValueError):
    """There is nothing at the path that could be looked at."""


@dataclass(frozen=True)
class Problem:
    """Something that breaks or misleads a host, and how to mend it; `here`: this package gets round it by itself."""

    what: str
    fix: str
    here: bool = False


@dataclass(frozen=True)
class Trainable:
    """What some presets would train on this model: parameters, and bytes of adapter, gradients and AdamW's state."""

    presets: tuple[str, ...]
    targets: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Findings:
    """Everything that was found in a folder; empty where the folder has nothing of the kind."""

    path: str
    kinds: tuple[str, ...]
    family: str | None = None
    max_length: int | None = None
    projections: tuple[Projection, ...] = ()
    template: str | None = None
    stop_tokens: tuple[str, ...] = ()
    pad_token: str | None = None
    adapter: Mapping[str, Any] = field(default_factory=dict)
    trainable: tuple[Trainable, ...] = ()
    problems: tuple[Problem, ...] = ()


def inspect(path: str | Path) -> Findings:
    """Look at a folder without loading any model weights into memory.

    Args:
        path: folder, or `embedded:NAME`.

    Raises:
        InspectError: no such folder, or neither model, tokenizer nor adapter in it.
    """
    folder = Path(locate(path))
    if not folder.is_dir():
        raise InspectError(f"{path}: no such folder; inspect looks at folders on this machine")
    files = {entry.name for entry in folder.iterdir()}
    kinds = [
        kind
        for kind, file in (
            ("model", "config.json"),
            ("tokenizer", "tokenizer.json"),
            ("adapter", "adapter_config.json"),
        )
        if file in files
    ]
    if not kinds:
        raise InspectError(
            f"{folder} has none of config.json, tokenizer.json and adapter_config.json; it holds "
            f"{', '.join(sorted(files)[:8]) or 'nothing'}"
        )
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    if "model" in kinds:
        _model(folder, files, found, problems)
    if "tokenizer" in kinds:
        _tokenizer(folder, files, found, problems)
    if "adapter" in kinds:
        _adapter(folder, files, found, problems)
    return Findings(path=str(folder), kinds=tuple(kinds), problems=tuple(problems), **found)


def _model(folder: Path, files: set[str], found: dict[str, Any], problems: list[Problem]) -> None:
    config = _json(folder / "config.json", problems)
    if not config:
        return
    try:
        family = recognise(config)
    except UnsupportedModel as error:
        problems.append(Problem(str(error), "use a supported member of the family"))
        return
    found["family"] = f"{family.name} ({family.title})"
    found["projections"] = projections(config)
    try:
        repair_rope(config)
        found["max_length"] = default_max_length(config)
    except RopeError as error:
        problems.append(Problem(str(error), "take config.json from the model's repository again"))
    scaling = config.get("rope_scaling") or {}
    if isinstance(scaling, dict) and scaling.get("type", scaling.get("rope_type")) in ("su", "yarn"):
        problems.append(
            Problem(
                f"rope type {scaling.get('type')!r} is longrope's first name, which transformers 5 refuses",
                "write 'longrope' into config.json for other hosts",
                here=True,
            )
        )
    if "auto_map" in config:
        problems.append(
            Problem(
                "config.json has auto_map: hosts with trust_remote_code run modeling code of 2024 that fails today",
                "delete auto_map, or keep trust_remote_code off",
                here=True,
            )
        )
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if not weights:
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in files)
        problems.append(
            Problem(
                "weights are pickles, which can execute code" if pickled else "there are no weights",
                "convert them to safetensors" if pickled else "fetch model.safetensors or its shards",
            )
        )
    generation = _json(folder / "generation_config.json", problems) if "generation_config.json" in files else {}
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if len(stops) < 2:
        problems.append(
            Problem(
                f"generation stops at {stops or 'nothing'} only, and runs on behind the end of a turn",
                "give eos_token_id in generation_config.json both the end of turn and the end of text",
                here=True,
            )
        )
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    if pad is not None and pad in stops:
        problems.append(
            Problem(f"pad id {pad} is a stop token, which collators then mask out", "pad with <unk>", here=True)
        )
    found["trainable"] = _presets(config)


def _tokenizer(folder: Path, files: set[str], found: dict[str, Any], problems: list[Problem]) -> None:
    from phi3_lora_plugin.chat.templates import TemplateError, template_for
    from phi3_lora_plugin.tokenizer import TokenizerError, load_tokenizer, stop_token_ids

    try:
        tokenizer = load_tokenizer(folder)
    except TokenizerError as error:
        problems.append(Problem(str(error), "take the tokenizer's files from the model's repository again"))
        return
    found["pad_token"] = f"{tokenizer.pad_token} ({tokenizer.pad_token_id})"
    stops = stop_token_ids(tokenizer)
    found["stop_tokens"] = tuple(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in stops)
    settings = _json(folder / "tokenizer_config.json", problems) if "tokenizer_config.json" in files else {}
    try:
        template = template_for(tokenizer)
        found["template"] = template.name
        if not template.system:
            problems.append(
                Problem(
                    f"template {template.name} drops system messages in silence",
                    "data.system: fold, or drop",
                    here=True,
                )
            )
    except TemplateError as error:
        problems.append(Problem(str(error), "data.template: NAME"))
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is not None and tokenizer.convert_tokens_to_ids(pad) in stops:
        problems.append(
            Problem(f"pads with {pad}, which is a stop token", f"pad_token: {tokenizer.pad_token}", here=True)
        )
    kind = settings.get("tokenizer_class")
    if kind in ("LlamaTokenizer", "LlamaTokenizerFast") and "config.json" not in files:
        problems.append(
            Problem(
                f"tokenizer_class is {kind} and no config.json stands beside it: AutoTokenizer then gives other ids",
                "save the tokenizer with phi3_lora_plugin, or put config.json beside it",
                here=True,
            )
        )
    backend = _json(folder / "tokenizer.json", problems)
    for key in ("truncation", "padding"):
        if backend.get(key):
            problems.append(
                Problem(
                    f"tokenizer.json has {key} saved in it, which raw tokenizers apply", f"set {key} to null", here=True
                )
            )


def _adapter(folder: Path, files: set[str], found: dict[str, Any], problems: list[Problem]) -> None:
    from safetensors import SafetensorError, safe_open

    from phi3_lora_plugin.lora.servable import servable

    config = _json(folder / "adapter_config.json", problems)
    base = config.get("base_model_name_or_path")
    targets = config.get("target_modules") or []
    found["adapter"] = {
        "base": base,
        "revision": config.get("revision"),
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": targets if isinstance(targets, str) else sorted(targets),
    }
    if not base:
        problems.append(Problem("names no base model", "write base_model_name_or_path into adapter_config.json"))
    if "adapter_model.safetensors" not in files:
        pickled = "adapter_model.bin" in files
        problems.append(
            Problem(
                "weights are a pickle, which can execute code" if pickled else "there are no adapter weights",
                "save the adapter as safetensors",
            )
        )
        return
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            keys = list(file.keys())
            dead = [key for key in keys if "lora_B" in key and not file.get_tensor(key).any()]
            broken = [key for key in keys if not file.get_tensor(key).isfinite().all()]
    except SafetensorError as error:
        problems.append(
            Problem(f"adapter_model.safetensors is cut off or damaged: {error}", "take an older checkpoint")
        )
        return
    found["adapter"]["tensors"] = len(keys)
    loras = [key for key in keys if "lora_B" in key]
    if not loras:
        problems.append(Problem("holds no LoRA tensor", "check what wrote it; it may be a full checkpoint"))
    elif len(dead) == len(loras):
        problems.append(Problem("every lora_B is zero: the adapter changes nothing", "check that it was trained"))
    elif dead:
        problems.append(Problem(f"{len(dead)} of {len(loras)} lora_B are zero, such as {dead[0]}", "check the targets"))
    if broken:
        problems.append(
            Problem(f"{len(broken)} tensors are not finite, such as {broken[0]}", "take an older checkpoint")
        )
    odd = [
        key for key in keys if key.startswith(("module.", "_orig_mod.", "_fsdp_wrapped_module.")) or ".default." in key
    ]
    if odd:
        problems.append(
            Problem(f"{len(odd)} keys have a prefix that PEFT ignores in silence, such as {odd[0]}", "convert the file")
        )
    split = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} & {key.split(".")[-3] for key in loras}
    if split:
        problems.append(
            Problem(
                f"adapts {', '.join(sorted(split))}, which Microsoft's Phi-3 has fused: there it loads as nothing",
                "phi3-lora convert SRC DST --to fused",
            )
        )
    if not split:
        problems += [Problem(text, "see docs/export.md") for text in servable(folder) if "base_model_name" not in text]
    if "manifest.json" in files:
        from phi3_lora_plugin.checkpoint import verify

        report = verify(folder)
        problems += [Problem(str(problem), "take an older checkpoint") for problem in report.problems]


def _presets(config: Mapping[str, Any]) -> tuple[Trainable, ...]:
    """What each of this package's presets would train here, one line for each different set of targets and rank."""
    from phi3_lora_plugin.lora.targets import TargetError, resolve_targets
    from phi3_lora_plugin.recipe import load_recipe
    from phi3_lora_plugin.recipe_layers import shipped_names

    rows: dict[tuple[str, int], Trainable] = {}
    for name in shipped_names():
        lora = load_recipe(name).lora
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        key = (targets, lora.r)
        if key in rows:
            rows[key] = replace(rows[key], presets=(*rows[key].presets, name))
            continue
        try:
            plan = resolve_targets(config, lora.targets, lora.r, lora.alpha, target_parameters=lora.target_parameters)
        except TargetError:
            continue  # a preset for another architecture
        # float32 adapter, its gradient, and two moments of AdamW
        rows[key] = Trainable((name,), f"{targets}, r {lora.r}", plan.parameters, 16 * plan.parameters)
    return tuple(rows.values())


def _json(path: Path, problems: list[Problem]) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(
            Problem(f"{path.name} cannot be read: {error}", "take it from where the folder came from again")
        )
        return {}
    return read if isinstance(read, dict) else {}


def lines(found: Findings) -> Sequence[str]:
    """The findings as lines for a person."""
    told = [f"{found.path}: {' + '.join(found.kinds)}"]
    if found.family:
        told.append(f"family       {found.family}, rows up to {found.max_length} tokens")
    for each in found.projections:
        parts = ", ".join(f"{part.name} {part.start}:{part.stop}" for part in each.slices)
        shape = f"{f'{each.experts} x ' if each.experts else ''}{each.out_features} x {each.in_features}"
        told.append(f"  {each.path:<24} {shape}{f'  ({parts})' if parts else ''}")
    if found.template or found.pad_token:
        told.append(f"template     {found.template or 'unknown'}")
        told.append(f"stops at     {', '.join(found.stop_tokens)}; pads with {found.pad_token}")
    for key, value in found.adapter.items():
        told.append(f"{key:<12} {', '.join(value) if isinstance(value, list) else value}")
    if found.trainable:
        told.append("presets would train")
        for row in found.trainable:
            told.append(f"  {row.targets}: {row.parameters:,} parameters, {row.bytes / 1e6:,.1f} MB to train them")
            told.append(f"    {', '.join(row.presets)}")
    told.append(f"problems     {len(found.problems) or 'none'}")
    for problem in found.problems:
        told.append(f"  - {problem.what}\n    {'handled here; elsewhere' if problem.here else 'fix'}: {problem.fix}")
    return told
