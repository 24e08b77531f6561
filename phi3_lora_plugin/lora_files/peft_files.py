"""PEFT adapter folders read as data and written back: the settings, the updates of modules, and all else they hold."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.config_check import wrong_values
from phi3_lora_plugin.lora_files.keys import PREFIX, factor_of, read_key
from phi3_lora_plugin.lora_files.layouts import Lora, misfits
from phi3_lora_plugin.lora_files.weights import named_tensors, read_weights
from phi3_lora_plugin.model.new_files import save_tensors
from phi3_lora_plugin.small_file import read_object
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Settings that do not touch what a finished adapter computes, or that the readers here act upon.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora", "corda_config",
}  # fmt: skip
# Starting points that take something out of the base's weights, which the adapter then needs taken out again.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class PeftFilesError(Phi3LoraError):
    """A folder is not a PEFT LoRA adapter that can be used as asked; lists everything that is wrong."""


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT LoRA adapter as data.

    Attributes:
        config: adapter_config.json.
        tensors: by PEFT's names in files, without `base_model.model.` and without the adapter's name.
        folder: where it was read, or None.
        notes: what had to be understood leniently while reading.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def base(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None


@dataclass(frozen=True)
class Parts:
    """What an adapter consists of: updates, tensors trained in full (by name in the base), rows of single tokens."""

    loras: tuple[Lora, ...]
    full: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)


def read_peft(folder: str | Path) -> PeftAdapter:
    """Read an adapter folder.

    Raises:
        PeftFilesError: no config or weights, another method than LoRA, unknown settings that change what it computes,
            several adapters in one file.
    """
    folder = Path(folder)
    config = read_config(folder)
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA is supported")
    problems += [
        f"{name}={value!r} changes what the adapter computes in a way that is not known here"
        for name, value in config.items()
        if name not in _KNOWN and value not in (None, False, {}, [], "")
    ]
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        problems.append(
            f"r and lora_alpha have to be numbers, got {config.get('r')!r} and {config.get('lora_alpha')!r}"
        )
    if config.get("fan_in_fan_out"):
        problems.append("fan_in_fan_out is set, but every projection of Phi stores its weight as (out, in)")
    if problems:
        raise PeftFilesError(f"{folder / CONFIG}:\n" + "\n".join(f"  {problem}" for problem in problems))
    tensors: dict[str, Tensor] = {}
    adapters, renamed = set(), 0
    for key, tensor in _weights(folder).items():
        read = read_key(key)
        renamed += key != PREFIX + read.shared
        adapters.add(read.adapter)
        if read.shared in tensors:
            raise PeftFilesError(
                f"{folder}: {key!r} and another key both mean {read.shared!r}; the file holds several adapters"
            )
        tensors[read.shared] = tensor
    if len(named := adapters - {None}) > 1:
        raise PeftFilesError(f"{folder}: the file holds several adapters ({listed(sorted(named))}); save one at a time")
    notes = (f"{renamed} keys were brought to PEFT's names (prefixes, adapter name)",) if renamed else ()
    return PeftAdapter(config, tensors, folder, notes)


@contextmanager
def loadable(folder: Path) -> Iterator[Path]:
    """The adapter folder for PEFT's own loader, which silently skips keys with prefixes: if it has any, a copy.

    Raises:
        PeftFilesError: the weights are missing or damaged.
    """
    weights = _weights(folder)
    named = {PREFIX + read_key(key).shared: tensor.contiguous() for key, tensor in weights.items()}
    if named.keys() == weights.keys():
        yield folder
        return
    with TemporaryDirectory() as copy:
        save_tensors(named, Path(copy, WEIGHTS))
        shutil.copyfile(folder / CONFIG, Path(copy, CONFIG))
        yield Path(copy)


def read_config(folder: Path, check: bool = True) -> dict[str, Any]:
    """adapter_config.json of a folder; the error lists named adapters one folder further down.

    Args:
        check: that its values are of the kinds that PEFT writes; the error lists those that are not.
    """
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(found.parent.name for found in folder.glob(f"*/{CONFIG}")) if folder.is_dir() else []
        hint = f"; it has the adapters {', '.join(below)} inside: name one of these folders" if below else ""
        raise PeftFilesError(f"{folder} is not a PEFT adapter: {CONFIG} is missing{hint}")
    config = read_object(path, PeftFilesError)
    if check and (problems := wrong_values(config)):
        raise PeftFilesError(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems.values()))
    return config


def parts(adapter: PeftAdapter) -> Parts:
    """Sort an adapter's tensors into updates, tensors trained in full and token rows; every tensor ends up in one.

    Raises:
        PeftFilesError: half a pair, a rank other than the config's, experts (`target_parameters`), or a starting
            point that changed the base. Callers that can handle the last two (merging) do not use this.
    """
    config, problems = adapter.config, []
    if config.get("target_parameters"):
        problems.append("it adapts stacked expert weights (target_parameters), which have no other layout")
    if changes_base(config):
        problems.append(
            f"it started from {config['init_lora_weights']!r}, which took a part out of the base's weights, so it "
            "means nothing on the published base; merge it, or save it again with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    loras: list[Lora] = []
    left = dict(adapter.tensors)
    for module in dict.fromkeys(module for key in adapter.tensors if (module := factor_of(key))):
        embedding = f"{module}.lora_embedding_A" in left or f"{module}.lora_embedding_B" in left
        a = left.pop(f"{module}.lora_embedding_A" if embedding else f"{module}.lora_A.weight", None)
        b = left.pop(f"{module}.lora_embedding_B" if embedding else f"{module}.lora_B.weight", None)
        bias = left.pop(f"{module}.lora_B.bias", None)
        magnitude = left.pop(f"{module}.lora_magnitude_vector", None)
        if a is None or b is None:
            problems.append(f"{module}: lora_{'A' if a is None else 'B'} is missing")
            continue
        rank = pattern_value(config.get("rank_pattern"), module, config["r"])
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            problems.append(f"{module}: the config has rank {rank}, but A is {tuple(a.shape)} and B {tuple(b.shape)}")
            continue
        alpha = pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
        loras.append(Lora(module, a, b, alpha, bool(config.get("use_rslora")), embedding, magnitude, bias))
        problems += misfits(loras[-1])
    full, tokens = full_tensors(adapter, left)
    problems += [
        f"{name} {tuple(tensor.shape)} is neither a factor of LoRA nor a module's weight or bias"
        for name, tensor in full.items()
        if not re.search(r"\.(?:weight|bias)$", name) or re.search(r"(?:^|\.)lora_", name) or not tensor.dim()
    ]
    if not loras and not full and not tokens and not problems:
        problems.append("it has no LoRA tensors")
    if problems:
        raise PeftFilesError(
            f"{adapter.folder or 'the adapter'}:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return Parts(tuple(loras), full, tokens)


def full_tensors(
    adapter: PeftAdapter, left: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[tuple[int, ...], Tensor]]]:
    """(tensors trained in full by their name in the base, token rows by embedding module) of what is not LoRA."""
    full, tokens = {}, {}
    for key, tensor in left.items():
        if key.endswith(".token_adapter.trainable_tokens_delta"):
            module = key.removesuffix(".token_adapter.trainable_tokens_delta")
            tokens[module] = (_token_ids(adapter, module, tensor), tensor)
        else:
            full[re.sub(r"\.(?:base_layer|modules_to_save(?:\.[^.]+)?)\.(?=[^.]+$)", ".", key)] = tensor
    return full, tokens


def _token_ids(adapter: PeftAdapter, module: str, rows: Tensor) -> tuple[int, ...]:
    asked = adapter.config.get("trainable_token_indices") or []
    if isinstance(asked, Mapping):
        asked = next((ids for name, ids in asked.items() if module == name or module.endswith(f".{name}")), [])
    if rows.dim() != 2:
        raise PeftFilesError(f"{adapter.folder}: {module} has token rows of the shape {tuple(rows.shape)}, no matrix")
    if len(asked) != rows.shape[0]:
        raise PeftFilesError(
            f"{adapter.folder}: {module} has {rows.shape[0]} trained token rows, but trainable_token_indices "
            f"names {len(asked)} tokens"
        )
    return tuple(asked)


def changes_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter's starting point took a part out of the base's weights: PiSSA, OLoRA and their like."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_CHANGES_BASE)


def pattern_key(pattern: Mapping[str, Any], module: str) -> str | None:
    """The first key of PEFT's rank_pattern or alpha_pattern that fits the end of a module's path (regex), or None."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern gives a module."""
    key = pattern_key(pattern or {}, module)
    return default if not pattern or key is None else pattern[key]


def peft_config(
    loras: Iterable[Lora], base: str | None, revision: str | None = None, layers: int | None = None,
    dropout: float = 0.0, modules_to_save: Iterable[str] = (), tokens: Mapping[str, Iterable[int]] | None = None,
    exclude_modules: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The smallest adapter_config.json for these updates: sorted, defaults left out, readable by older PEFT.

    The rank and alpha of most modules become r and lora_alpha, the others go into rank_pattern and alpha_pattern.
    """
    loras = list(loras)
    (rank, alpha), _ = Counter((lora.rank, lora.alpha) for lora in loras).most_common(1)[0] if loras else ((1, 1), 0)
    by_name: dict[str, list[Lora]] = {}
    for lora in loras:
        by_name.setdefault(lora.module.rpartition(".")[2], []).append(lora)
    keyed: dict[str, Lora] = {}
    for name, some in by_name.items():
        alike = len({(lora.rank, lora.alpha) for lora in some}) == 1
        keyed |= {name: some[0]} if alike else {lora.module: lora for lora in some}
    # Last parts of the paths where they mean exactly these modules, else the full paths.
    complete = layers and all(
        len(some) == (layers if re.search(r"\.layers\.\d+\.", some[0].module) else 1) for some in by_name.values()
    )
    config: dict[str, Any] = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": rank,
        "revision": revision,
        "target_modules": sorted(by_name if complete else {lora.module for lora in loras}),
        "task_type": "CAUSAL_LM",
    }
    optional = {
        "alpha_pattern": {key: lora.alpha for key, lora in sorted(keyed.items()) if lora.alpha != alpha},
        "exclude_modules": exclude_modules,
        "rank_pattern": {key: lora.rank for key, lora in sorted(keyed.items()) if lora.rank != rank},
        "lora_bias": any(lora.bias is not None for lora in loras),
        "modules_to_save": sorted(modules_to_save),
        "trainable_token_indices": {name: list(ids) for name, ids in (tokens or {}).items()},
        "use_dora": any(lora.magnitude is not None for lora in loras),
        "use_rslora": any(lora.rslora for lora in loras),
    }
    return dict(sorted((config | {name: value for name, value in optional.items() if value}).items()))


def peft_tensors(found: Parts) -> dict[str, Tensor]:
    """The tensors of `found` by the names under which PEFT saves them, sorted."""
    tensors: dict[str, Tensor] = {}
    for lora in found.loras:
        path = f"{PREFIX}{lora.module}"
        tensors[f"{path}.lora_embedding_A" if lora.embedding else f"{path}.lora_A.weight"] = lora.a
        tensors[f"{path}.lora_embedding_B" if lora.embedding else f"{path}.lora_B.weight"] = lora.b
        if lora.magnitude is not None:
            tensors[f"{path}.lora_magnitude_vector"] = lora.magnitude
        if lora.bias is not None:
            tensors[f"{path}.lora_B.bias"] = lora.bias
    for name, tensor in found.full.items():
        tensors[f"{PREFIX}{name}"] = tensor
    for module, (_, rows) in found.tokens.items():
        tensors[f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"] = rows
    # An A that several slices share is one tensor in memory and has to be several in the file.
    return {name: tensors[name].detach().clone().contiguous() for name in sorted(tensors)}


def write_peft(folder: Path, config: Mapping[str, Any], found: Parts) -> None:
    """Write the two adapter files into `folder`, which exists; equal input gives equal bytes."""
    save_tensors(peft_tensors(found), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights(folder: Path) -> Mapping[str, Tensor]:
    for file in (folder / WEIGHTS, folder / "adapter_model.bin"):
        if file.is_file():
            return named_tensors(read_weights(file, PeftFilesError), file, PeftFilesError)
    found = listed(sorted(entry.name for entry in folder.iterdir()), 8)
    raise PeftFilesError(f"{folder}: {WEIGHTS} is missing; found {found}")
