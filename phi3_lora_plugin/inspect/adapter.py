"""An adapter folder: what it adapts, and whether its files fit the base model that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_lora_plugin.inspect.findings import AGAIN, LFS, OLDER, PULL, Problem
from phi3_lora_plugin.inspect.model import header_of, quantised
from phi3_lora_plugin.lora.finite import not_finite
from phi3_lora_plugin.lora_files.config_check import wrong_values
from phi3_lora_plugin.lora_files.keys import PREFIX, read_key
from phi3_lora_plugin.lora_files.layouts import unknown_modules
from phi3_lora_plugin.lora_files.mlx_files import MlxError, looks_like_mlx, mlx_base, read_mlx
from phi3_lora_plugin.lora_files.peft_files import PeftFilesError, changes_base, parts, read_config, read_peft
from phi3_lora_plugin.lora_files.servable import servable
from phi3_lora_plugin.model.families import WHOLE, Projection, UnsupportedModel, projections, recognise
from phi3_lora_plugin.model.folder import ModelError, UnsupportedModelId, find_config, read_json
from phi3_lora_plugin.wording import listed

_IN_FULL = ("embed_tokens.weight", "embed_tokens.base_layer.weight", "lm_head.weight", "lm_head.base_layer.weight")
_ITS_PEFT = "load it with the version of PEFT that wrote it"
_SHOWN = 3  # of a kind that are spelled out


def look_at_adapter(folder: Path, files: set[str], problems: list[Problem]) -> dict[str, Any]:
    """Fields of `Findings` for a folder with an adapter_config.json; what is wrong goes into `problems`."""
    from phi3_lora_plugin.store.adapter_folder import damage

    if looks_like_mlx(folder):
        return _of_mlx(folder, problems)
    problems += [Problem(problem, OLDER) for problem in damage(folder)]
    try:
        config = read_config(folder, check=False)
    except PeftFilesError as error:
        problems.append(Problem(str(error), AGAIN))
        return {}
    wrong_settings = wrong_values(config)
    problems += [Problem(f"adapter_config.json: {line}", _ITS_PEFT) for line in wrong_settings.values()]
    config = {name: value for name, value in config.items() if name not in wrong_settings}
    base = config.get("base_model_name_or_path")
    targets = config.get("target_modules") or []
    about: dict[str, Any] = {
        "base": base,
        "revision": config.get("revision"),
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "targets": targets if isinstance(targets, str) else sorted(targets),
    }
    if config.get("target_parameters"):
        about["experts"] = sorted(config["target_parameters"])
    found: dict[str, Any] = {"adapter": about}
    if not base:
        problems.append(Problem("records no base model", "write base_model_name_or_path into adapter_config.json"))
    of_base = _config_of(base, config.get("revision"), problems) if base else None
    if of_base is not None:
        problems += quantised(of_base)
        family = recognise(of_base)
        found |= {"family": f"{family.name} ({family.title})", "projections": projections(of_base)}
    if "adapter_model.safetensors" not in files:
        pickled = Problem("weights are a pickle, which can execute code", "save the adapter as safetensors")
        none = Problem("the folder has no adapter weights", AGAIN)
        problems.append(pickled if "adapter_model.bin" in files else none)
        return found
    shapes, wrong = header_of(folder / "adapter_model.safetensors")
    if wrong:
        problems.append(Problem(f"adapter_model.safetensors {wrong}", PULL if wrong == LFS else OLDER))
        return found
    about["tensors"] = len(shapes)
    problems += _embedding_problems(shapes, of_base, about)
    problems += _tensor_problems(folder, list(shapes))
    if not wrong_settings:
        problems += _layout_problems(folder, config, of_base, list(shapes))
    return found


def _of_mlx(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    """An adapter of mlx-lm, which PEFT and its servers do not read."""
    convert = "phi3-lora convert SRC DST --to peft"
    problems.append(Problem("written by mlx-lm, in a form that PEFT does not read", convert, here=True))
    try:
        loras, _, _ = read_mlx(folder)
    except MlxError as error:
        problems.append(Problem(str(error), AGAIN))
        return {"adapter": {"base": mlx_base(folder), "format": "MLX"}}
    return {
        "adapter": {
            "format": "MLX",
            "base": mlx_base(folder),
            "r": max((lora.rank for lora in loras), default=None),
            "alpha": max((lora.alpha for lora in loras), default=None),
            "targets": sorted({lora.module.rpartition(".")[2] for lora in loras}),
            "tensors": 2 * len(loras),
        }
    }


def _config_of(base: str, revision: str | None, problems: list[Problem]) -> dict[str, Any] | None:
    """The base's config, if it is on this machine; a hub id that is not cached is not a problem."""
    try:
        file = find_config(base, revision)
    except UnsupportedModelId as error:
        problems.append(Problem(f"its base is {error}", "use an adapter for a supported member of the family"))
        return None
    except ModelError as error:
        if Path(base).is_absolute() or base.startswith((".", "~")):
            problems.append(Problem(f"its base model is not found: {error}", "pass --base"))
        return None
    try:
        config = read_json(file)
        recognise(config)
        projections(config)
    except UnsupportedModel as error:
        problems.append(Problem(f"its base is {error}", "use an adapter for a supported member of the family"))
        return None
    except (ValueError, TypeError, KeyError) as error:
        what = f"the config.json of its base cannot be used: {error}"
        problems.append(Problem(what, "look at the base with inspect"))
        return None
    return config


def _embedding_problems(
    shapes: dict[str, tuple[int, ...]], of_base: dict[str, Any] | None, about: dict[str, Any]
) -> list[Problem]:
    """Embeddings and heads that are saved in full; their sizes go into `about`."""
    problems = []
    found = {name: shape for key, shape in shapes.items() if (name := read_key(key).shared).endswith(_IN_FULL)}
    rows = of_base["vocab_size"] if of_base else None
    for name, shape in found.items():
        about.setdefault("embeddings", []).append(f"{name.rpartition('.')[0]} {' x '.join(map(str, shape))}")
        if rows is not None and shape[0] != rows:
            what = f"{name} has {shape[0]} rows, its base {rows}: the vocabulary was resized in training"
            problems.append(Problem(what, "resize the base in the same way before the adapter is put on it"))
    if found and not problems:
        fix = "phi3-lora convert SRC DST --to peft --drop-equal-embeddings, where they were not trained"
        problems.append(Problem(f"{', '.join(found)}: saved in full, which servers do not load", fix))
    return problems


def _tensor_problems(folder: Path, keys: list[str]) -> Iterator[Problem]:
    """Problems of the values themselves."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in keys}
    dead = [key for key in keys if "lora_B" in key and not tensors[key].any()]
    broken = not_finite(tensors)
    loras = [key for key in keys if "lora_B" in key]
    if not loras:
        yield Problem("has no LoRA tensors", "check what wrote it; it may be a full checkpoint")
    elif len(dead) == len(loras):
        yield Problem("every lora_B is zero: the adapter changes nothing", "check that it was trained")
    elif dead:
        yield Problem(f"{len(dead)} of {len(loras)} lora_B are zero, such as {dead[0]}", "check the targets")
    if broken:
        yield Problem(f"{len(broken)} tensors are not finite, such as {broken[0]}", OLDER)


def _layout_problems(
    folder: Path, config: dict[str, Any], of_base: dict[str, Any] | None, keys: list[str]
) -> Iterator[Problem]:
    """Names and shapes: what no loader takes, what the base does not have, and what servers refuse."""
    if odd := [key for key in keys if key != PREFIX + read_key(key).shared]:
        what = f"{len(odd)} keys are spelled in a way that PEFT silently ignores, such as {odd[0]}"
        yield Problem(what, "phi3-lora convert SRC DST --to peft", here=True)
    parents = {key.split(".")[-3] for key in keys if "lora_B" in key and key.count(".") > 2}
    # PhiMoE has these by name; without its base at hand, a q_proj is most likely one that Phi-3 has fused.
    fused = of_base is None or of_base.get("model_type") == "phi3"
    split = WHOLE.keys() & parents if fused else set()
    if split:
        what = f"adapts {', '.join(sorted(split))}, fused in Microsoft's Phi-3, which ignores these tensors"
        yield Problem(what, "phi3-lora convert SRC DST --to fused")
    try:
        adapter = read_peft(folder)
    except PeftFilesError as error:
        told = str(error).splitlines()
        yield from (Problem(line.strip(), _ITS_PEFT) for line in told[1:] or told)
        return
    if not split:
        fix = "phi3-lora docs export says how to convert it"
        yield from (Problem(text, fix) for text in servable(folder) if "base_model_name" not in text)
    if config.get("target_parameters") or changes_base(config):
        return
    try:
        pieces = parts(adapter)
    except PeftFilesError as error:
        told = str(error).splitlines()
        yield from (Problem(line.strip(), OLDER) for line in told[1:] or told)
        return
    if of_base is not None and not split:
        layout, layers = projections(of_base), int(of_base["num_hidden_layers"])
        wrong = unknown_modules(pieces.loras, layout, layers)
        yield from (Problem(text, "use it on the model that it was trained on") for text in wrong[:_SHOWN])
        if len(wrong) > _SHOWN:
            yield Problem(f"{len(wrong) - _SHOWN} more modules do not fit the base", "see above")
        if missing := sorted(_named(config, layout, layers) - {lora.module for lora in pieces.loras}):
            some = listed(missing, _SHOWN)
            yield Problem(f"{len(missing)} modules that the config names have no tensors, such as {some}", OLDER)


def _named(config: dict[str, Any], layout: tuple[Projection, ...], layers: int) -> set[str]:
    """Modules of the base that the config's list of targets names; none where it is a pattern."""
    targets, only = config.get("target_modules"), config.get("layers_to_transform")
    if not isinstance(targets, list):
        return set()
    numbers = range(layers) if only is None else [only] if isinstance(only, int) else only
    modules = [f"model.layers.{layer}.{each.path}" for layer in numbers for each in layout if not each.experts]
    left_out = config.get("exclude_modules") or ()
    return {
        module
        for module in modules
        if any(module == target or module.endswith(f".{target}") for target in targets) and not left_out
    }
