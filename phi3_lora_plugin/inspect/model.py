"""A model folder: what it is, whether its files match its config, and what presets would train on it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from phi3_lora_plugin.inspect.findings import AGAIN, FETCH, LFS, PULL, Findings, Problem, Trainable
from phi3_lora_plugin.lora.targets import TargetError, resolve_targets
from phi3_lora_plugin.model.base_size import parameters, weight_shapes
from phi3_lora_plugin.model.families import RopeError, UnsupportedModel, projections, recognise, repair_rope, row_limit
from phi3_lora_plugin.model.file_values import wrong_values
from phi3_lora_plugin.model.folder import published_stops
from phi3_lora_plugin.model.published import published_config
from phi3_lora_plugin.model.quantize import PACKED_BYTES, quantized_by
from phi3_lora_plugin.small_file import BadFile, open_regular
from phi3_lora_plugin.small_file import read_json as read_json_file
from phi3_lora_plugin.wording import listed

_INDEX = "model.safetensors.index.json"


def look_at_model(folder: Path, files: set[str], problems: list[Problem]) -> dict[str, Any]:
    """Fields of `Findings` for a folder with a config.json; what is wrong goes into `problems`."""
    config = read_json(folder / "config.json", problems)
    if not config:
        return {}
    try:
        family = recognise(config)
        layout = projections(config)
        weight_shapes(config)
    except UnsupportedModel as error:
        problems.append(Problem(str(error), "use a supported member of the family"))
        return {}
    except RopeError as error:
        problems.append(Problem(str(error), AGAIN))
        return {}
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"has a size that is not a number: {error}"
        problems.append(Problem(f"config.json {what}", AGAIN))
        return {}
    found: dict[str, Any] = {"family": f"{family.name} ({family.title})", "projections": layout}
    try:
        repair_rope(config)
        found["max_length"] = row_limit(None, config)
    except RopeError as error:
        problems.append(Problem(str(error), "download config.json again"))
    problems += _config_problems(config)
    problems += _weight_problems(folder, files, config)
    generation = read_json(folder / "generation_config.json", problems) if "generation_config.json" in files else {}
    problems += _generation_problems(generation, config, family.pad[0] if family.pad else "an unused token")
    found["parameters"] = parameters(config)
    found["trainable"] = _presets(config)
    return found


def look_at_published(name: str, config: Mapping[str, Any]) -> Findings:
    """What is known of a model that Microsoft has published and that is not downloaded here."""
    family = recognise(config)
    return Findings(
        path=name,
        kinds=("model",),
        downloaded=False,
        family=f"{family.name} ({family.title})",
        max_length=row_limit(None, config),
        parameters=parameters(config),
        projections=projections(config),
        template=family.templates[0],
        stop_tokens=family.stop,
        pad_token=family.pad[0],
        trainable=_presets(config),
    )


def read_json(path: Path, problems: list[Problem]) -> dict[str, Any]:
    """A JSON object without the values that it cannot have, each a problem; of anything else an empty one."""
    try:
        read = read_json_file(path)
    except BadFile as error:
        problems.append(Problem(f"{path.name} {error}", AGAIN))
        return {}
    if isinstance(read, dict):
        # Of a model's config, `look_at_model` says it.
        wrong = {} if path.name == "config.json" else wrong_values(path.name, read)
        problems += [Problem(f"{path.name}: {line}", AGAIN) for line in wrong.values()]
        return {name: value for name, value in read.items() if name not in wrong}
    problems.append(Problem(f"{path.name} is not a JSON object", AGAIN))
    return {}


def header_of(path: Path) -> tuple[dict[str, tuple[int, ...]], str | None]:
    """(name -> shape, what is wrong with the file) of a safetensors file, from its first bytes and its size alone."""
    if not path.is_file():
        return {}, "is not a file"
    size = path.stat().st_size
    with open_regular(path) as file:
        start = file.read(8)
        if start.startswith(b"version "):
            return {}, LFS
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            return {}, f"is cut off or damaged: it has {size:,} bytes"
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
            end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            return {}, f"is damaged: its header cannot be read ({error})"
    return shapes, None if end == size else f"is cut off or damaged: it has {size:,} bytes instead of {end:,}"


def quantised(config: Mapping[str, Any]) -> list[Problem]:
    """Reports that weights are quantised, and by what; nothing where they are not."""
    method = quantized_by(config)
    if method is None:
        return []
    fix = "take the unquantised model, and model.quantize: nf4 or int8 to train on it in less memory"
    return [Problem(f"weights are quantised ({method}): training and merging need other libraries or fail", fix)]


def _config_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    yield from quantised(config)
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") if isinstance(scaling, dict) else None
    if kind in ("su", "yarn"):
        what = f"rope type {kind!r} is an old name of longrope, which transformers 5 refuses"
        yield Problem(what, "write 'longrope' into config.json for other hosts", here=True)
    if "auto_map" in config:
        what = "config.json has auto_map: hosts with trust_remote_code run modeling code of 2024 that fails today"
        yield Problem(what, "delete auto_map, or keep trust_remote_code off", here=True)


def _weight_problems(folder: Path, files: set[str], config: Mapping[str, Any]) -> list[Problem]:
    """What keeps the weights from being those of the config; reads headers only."""
    names = sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("adapter_"))
    problems: list[Problem] = []
    if _INDEX in files and "model.safetensors" not in files:
        place = read_json(folder / _INDEX, problems).get("weight_map")
        shards = sorted(set(place.values())) if isinstance(place, dict) else names
        if missing := [shard for shard in shards if shard not in files]:
            what = f"{len(missing)} of {len(shards)} shards are missing, such as {listed(missing, 3)}"
            problems.append(Problem(what, "fetch them"))
        names = [shard for shard in shards if shard in files]
    if not names and not problems:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
            return [Problem("weights are pickles, which can execute code", "convert them to safetensors")]
        return [Problem("the folder has no weights", "fetch model.safetensors or its shards")]
    held: dict[str, tuple[int, ...]] = {}
    for name in names:
        shapes, wrong = header_of(folder / name)
        held |= shapes
        if wrong:
            problems.append(Problem(f"{name} {wrong}", PULL if wrong == LFS else FETCH))
    # Experts have other names on the hub, and packed weights other shapes.
    if problems or config.get("model_type") != "phi3" or config.get("quantization_config"):
        return problems
    wanted = weight_shapes(config)
    if absent := [name for name in wanted if name not in held]:
        what = f"{len(absent)} of {len(wanted)} weights are missing, such as {listed(absent, 3)}"
        problems.append(Problem(what, "fetch the weights again"))
    if other := [name for name in wanted if name in held and held[name] != wanted[name]]:
        example = f"{other[0]}: {list(held[other[0]])} instead of {list(wanted[other[0]])}"
        what = f"{len(other)} weights have another shape than in config.json, such as {example}"
        problems.append(Problem(what, "take config.json and weights from the same model"))
    return problems


def _generation_problems(generation: Mapping[str, Any], config: Mapping[str, Any], pad_with: str) -> Iterator[Problem]:
    stops = published_stops(generation, config)
    if len(stops) < 2:
        what = f"generation stops at {stops or 'nothing'} only, and continues after the end of a turn"
        fix = "give eos_token_id in generation_config.json both the end of turn and the end of text"
        yield Problem(what, fix, here=True)
    pad = generation.get("pad_token_id", config.get("pad_token_id"))
    if pad is not None and pad in stops:
        what = f"pad id {pad} is a stop token, which collators then mask out"
        yield Problem(what, f"pad with {pad_with}", here=True)


def _presets(config: Mapping[str, Any]) -> tuple[Trainable, ...]:
    """What each of this model's presets would train, one line for each set of targets, rank and precision.

    Unpublished sizes have no presets of their own: then all presets that fit are listed.
    """
    from phi3_lora_plugin.recipe import load_recipe
    from phi3_lora_plugin.recipe.layers import shipped_names

    family = recognise(config)
    rows: dict[tuple[str, int, str], Trainable] = {}
    for name in shipped_names():
        recipe = load_recipe(name)
        known = published_config(recipe.model.path, recipe.model.revision)
        if family.templates and (known is None or recognise(known) != family):
            continue
        lora = recipe.lora
        targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
        usual = "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype
        held = usual if recipe.model.quantize == "none" else recipe.model.quantize
        key = (targets, lora.r, held)
        if key in rows:
            rows[key] = replace(rows[key], presets=(*rows[key].presets, name))
            continue
        try:
            plan = resolve_targets(config, lora.targets, lora.r, lora.alpha, target_parameters=lora.target_parameters)
        except TargetError:
            continue  # a preset for another architecture
        rows[key] = Trainable(
            (name,), f"{targets}, r {lora.r}", held, plan.parameters, plan.training_bytes, _held_bytes(config, held)
        )
    return tuple(rows.values())


def _held_bytes(config: Mapping[str, Any], held: str) -> int:
    """Bytes of the base's weights; quantisation packs the projections of the layers and leaves the rest in 16 bits."""
    each = 4 if held == "float32" else 2
    total = 0.0
    for name, shape in weight_shapes(config).items():
        linear = "_proj.weight" in name
        total += prod(shape) * (PACKED_BYTES.get(held, each) if linear else each)
    return round(total)
