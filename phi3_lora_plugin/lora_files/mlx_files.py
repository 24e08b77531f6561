"""LoRA adapters as mlx-lm writes them: `adapters.safetensors` with transposed factors, and one rank and scale for all.

mlx-lm computes `y + scale * (x @ lora_a) @ lora_b` with lora_a (in, r) and lora_b (r, out); PEFT's A and B are their
transposes, and its alpha is `scale * r` (mlx_lm/tuner/lora.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.config_check import wrong_values
from phi3_lora_plugin.lora_files.layouts import Lora, Row, uniform
from phi3_lora_plugin.lora_files.weights import read_weights
from phi3_lora_plugin.model.new_files import save_tensors
from phi3_lora_plugin.small_file import BadFile, read_json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_IN_LAYER = re.compile(r"^(.*\blayers)\.(\d+)\.(.+)$")


class MlxError(Phi3LoraError):
    """A folder that is not a readable MLX adapter, or an adapter that mlx-lm cannot hold; gives the reason."""


def looks_like_mlx(folder: str | Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm: its weights, or a config with `lora_parameters`."""
    folder = Path(folder)
    return (folder / WEIGHTS).is_file() or "lora_parameters" in _config(folder)


def mlx_base(folder: str | Path) -> str | None:
    """The model that an MLX adapter records as its base."""
    named = _config(Path(folder)).get("model")
    return named if isinstance(named, str) and named else None


def read_mlx(folder: str | Path) -> tuple[list[Lora], list[Row], float]:
    """(updates, report rows, dropout) of an MLX adapter folder; exact, nothing is rounded.

    Raises:
        MlxError: everything that is missing or of another kind than LoRA and DoRA.
    """
    folder = Path(folder)
    config = _config(folder)
    if wrong := wrong_values(config, "mlx"):
        raise MlxError(f"{folder / CONFIG}:\n" + "\n".join(f"  {problem}" for problem in wrong.values()))
    parameters = config.get("lora_parameters") or {}
    problems = []
    if not (folder / WEIGHTS).is_file():
        raise MlxError(f"{folder} has an MLX adapter's config, but no {WEIGHTS}")
    if config.get("fine_tune_type", "lora") not in ("lora", "dora"):
        raise MlxError(f"{folder}: fine_tune_type is {config['fine_tune_type']!r}; only lora and dora are adapters")
    given = parameters.get("scale")
    scale = float(given) if isinstance(given, int | float) and not isinstance(given, bool) else None
    if scale is None:
        problems.append(f"{folder / CONFIG}: lora_parameters.scale is {given!r}; expected a number")
    tensors = read_weights(folder / WEIGHTS, MlxError)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part not in ("lora_a", "lora_b", "m") or (part != "m" and tensor.dim() != 2):
            problems.append(f"{name} {list(tensor.shape)} is not a factor of a linear layer (lora_a, lora_b)")
        else:
            found.setdefault(module, {})[part] = tensor
    loras, rows = [], []
    for module, parts in found.items():
        a, b = parts.get("lora_a"), parts.get("lora_b")
        if a is None or b is None:
            problems.append(f"{module}: {'lora_a' if a is None else 'lora_b'} is missing")
        elif a.shape[1] != b.shape[0]:
            problems.append(f"{module}: lora_a {list(a.shape)} and lora_b {list(b.shape)} have different ranks")
        elif scale is not None:
            a, b = a.T.contiguous(), b.T.contiguous()
            alpha = scale * a.shape[0]
            loras.append(Lora(module, a, b, int(alpha) if alpha.is_integer() else alpha, magnitude=parts.get("m")))
            rule = "transposed, alpha is scale times rank"
            rows.append(Row(f"{module}.lora_a, .lora_b", module, tuple(b.shape), rule))
    if not found and not problems:
        problems.append(f"{folder / WEIGHTS} has no tensors")
    if problems:
        raise MlxError("\n".join(problems))
    return loras, rows, float(parameters.get("dropout") or 0.0)


def write_mlx(folder: Path, loras: Sequence[Lora], layers: int, model: str) -> list[Row]:
    """Write the two files of an MLX adapter into `folder`; returns report rows.

    mlx-lm has one rank and one scale for all modules: smaller ranks are filled up with zeros, other scalings are
    multiplied into lora_b.

    Args:
        layers: of the model; mlx-lm counts adapted layers from the last one.

    Raises:
        MlxError: embeddings, DoRA together with plain LoRA, biases.
    """
    problems = [f"{lora.module}: {what}; merge it" for lora in loras for what in _unfit(lora)]
    dora = {lora.magnitude is not None for lora in loras}
    if len(dora) > 1:
        problems.append("some modules have DoRA magnitudes and some have none; merge the adapter")
    if problems or not loras:
        raise MlxError("\n".join(problems) or "the adapter has no updates")
    fitted = uniform(loras)
    rank, scale = fitted[0].rank, fitted[0].scaling
    tensors: dict[str, Tensor] = {}
    rows = []
    keys: set[str] = set()
    first = layers
    for old, lora in zip(loras, fitted, strict=True):
        inside = _IN_LAYER.match(lora.module)
        keys.add(inside[3] if inside else lora.module)
        first = min(first, int(inside[2])) if inside else first
        tensors[f"{lora.module}.lora_a"] = lora.a.T.contiguous().clone()
        tensors[f"{lora.module}.lora_b"] = lora.b.T.contiguous().clone()
        if lora.magnitude is not None:
            tensors[f"{lora.module}.m"] = lora.magnitude.clone()
        rule = "transposed" + (f", rank {old.rank} filled up to {rank}" if old.rank != rank else "")
        rows.append(Row(lora.module, f"{lora.module}.lora_a, .lora_b", tuple(lora.b.shape), rule))
    config = {
        "fine_tune_type": "dora" if dora == {True} else "lora",
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        "model": model,
        "num_layers": layers - first,
    }
    save_tensors(tensors, folder / WEIGHTS, "mlx")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return rows


def _unfit(lora: Lora) -> list[str]:
    found = ["an adapted embedding, whose factors mlx-lm stores differently"] if lora.embedding else []
    return [*found, *(["a bias of the second factor"] if lora.bias is not None else [])]


def _config(folder: Path) -> Mapping[str, Any]:
    """adapter_config.json, or nothing where there is none that can be read."""
    try:
        told = read_json(folder / CONFIG)
    except BadFile:
        return {}
    return told if isinstance(told, Mapping) else {}
