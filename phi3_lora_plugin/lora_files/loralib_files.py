"""loralib's files (`lora.lora_state_dict` saved by torch) read as updates, and written with the sidecar they lack.

A loralib file holds `lora_A` and `lora_B` and nothing else: r, alpha, dropout and enable_lora live in the script that
made it. They come from a JSON file next to it or from arguments, and are never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora_files.config_check import wrong_values
from phi3_lora_plugin.lora_files.keys import bare
from phi3_lora_plugin.lora_files.layouts import LayoutError, Lora, Row, fused_to_grouped, grouped_to_fused
from phi3_lora_plugin.lora_files.weights import named_tensors, read_weights
from phi3_lora_plugin.model.new_files import save_tensors
from phi3_lora_plugin.small_file import read_object
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from torch import Tensor

    from phi3_lora_plugin.model.families import Projection


class LoralibError(Phi3LoraError):
    """A loralib file lacks settings that were not given either, or cannot be read at all; lists every problem."""


@dataclass(frozen=True)
class Settings:
    """What loralib does not store.

    Attributes:
        alpha: loralib's lora_alpha, for all modules.
        r: for all modules; only checked where the shapes tell it.
        dropout: for further training.
        enable_lora: end of a module path -> flags of its MergedLinear.
        modules: full module path -> {"kind", "r", "alpha", "enable_lora"}, as our own sidecar has it; comes first.
        base: the model it belongs to.
    """

    alpha: float | None = None
    r: int | None = None
    dropout: float = 0.0
    enable_lora: Mapping[str, tuple[bool, ...]] | None = None
    modules: Mapping[str, Mapping[str, Any]] | None = None
    base: str | None = None


def parse_enable_lora(text: str) -> tuple[str, tuple[bool, ...]]:
    """`qkv_proj=T,F,T` as ("qkv_proj", (True, False, True))."""
    name, equals, flags = text.partition("=")
    words = [flag.strip().lower() for flag in flags.split(",")]
    if not equals or not name.strip() or any(word not in ("t", "f", "true", "false", "1", "0") for word in words):
        raise LoralibError(f"enable_lora {text!r}: expected MODULE=T,F,..., for example qkv_proj=T,F,T")
    return name.strip(), tuple(word in ("t", "true", "1") for word in words)


def sidecar_of(file: Path) -> Path | None:
    """The JSON file that belongs to a loralib file: `lora.pt.json`, `lora.json` or `lora_config.json` next to it."""
    for path in (file.with_name(f"{file.name}.json"), file.with_suffix(".json"), file.with_name("lora_config.json")):
        if path.is_file():
            return path
    return None


def read_settings(path: Path) -> Settings:
    """Settings from a sidecar; `r`/`lora_r`, `alpha`/`lora_alpha`, `dropout`/`lora_dropout` are all understood."""
    data = read_object(path, LoralibError)
    if problems := wrong_values(data, "loralib"):
        raise LoralibError(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems.values()))
    flags = data.get("enable_lora") or {}
    if isinstance(flags, list):
        flags = {"": flags}  # the short form for files with one kind of MergedLinear
    return Settings(
        alpha=data.get("alpha", data.get("lora_alpha")),
        r=data.get("r", data.get("lora_r")),
        dropout=float(data.get("dropout") or data.get("lora_dropout") or 0.0),
        enable_lora={name: tuple(each) for name, each in flags.items()},
        modules=data.get("modules"),
        base=data.get("base") or data.get("base_model_name_or_path"),
    )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt`/`.pth`/`.bin` (no pickled code is run) or `.safetensors` file.

    Raises:
        LoralibError: not such a file, or not a flat mapping of names to tensors.
    """
    if not file.is_file():
        raise LoralibError(f"{file} is not a file")
    loaded = read_weights(file, LoralibError)
    if isinstance(loaded, dict) and len(loaded) == 1 and isinstance(loaded.get("adapter"), dict):
        loaded = loaded["adapter"]
    loaded = named_tensors(loaded, file, LoralibError)
    named = {bare(key): tensor for key, tensor in loaded.items()}
    if len(named) < len(loaded):
        raise LoralibError(f"{file}: keys that differ in their prefixes alone mean the same tensor; save it unwrapped")
    return named


def from_loralib(
    tensors: Mapping[str, Tensor], settings: Settings, layout: Sequence[Projection] = (), compact: bool = True
) -> tuple[list[Lora], list[Row]]:
    """loralib's Linear, Embedding and MergedLinear as updates of the whole modules.

    Args:
        layout: `families.projections` of the base, against which heights are checked; () where it is not known.

    Raises:
        LoralibError: alpha is missing, MergedLinear without enable_lora, Conv layers, tensors that are not LoRA.
    """
    problems: list[str] = []
    if settings.alpha is None and not settings.modules:
        problems.append(
            "alpha is missing: loralib does not store r or lora_alpha in its file; pass --alpha, or save a JSON file "
            'next to it with {"alpha": ...}'
        )
    modules = dict.fromkeys(key.rpartition(".")[0] for key in tensors if key.rpartition(".")[2] in ("lora_A", "lora_B"))
    other = [key for key in tensors if key.rpartition(".")[2] not in ("lora_A", "lora_B")]
    if other:
        problems.append(
            f"{len(other)} tensors are not LoRA ({listed(other, 3)}); save with "
            "lora.lora_state_dict(model), without biases: Phi-3 has none"
        )
    if not modules:
        problems.append("it has no lora_A or lora_B")
    loras, rows = [], []
    for module in modules:
        a, b = tensors.get(f"{module}.lora_A"), tensors.get(f"{module}.lora_B")
        if a is None or b is None:
            problems.append(f"{module}: lora_{'A' if a is None else 'B'} is missing")
            continue
        try:
            lora, rule = _one(module, a, b, settings, layout, compact)
        except LayoutError as error:
            problems += error.problems
            continue
        loras.append(lora)
        rows.append(Row(module, module, tuple(lora.b.shape), rule))
    if problems:
        raise LoralibError("\n".join(problems))
    return loras, rows


def _one(
    module: str, a: Tensor, b: Tensor, settings: Settings, layout: Sequence[Projection], compact: bool
) -> tuple[Lora, str]:
    if a.dim() != 2 or b.dim() != 2:
        raise LayoutError([f"{module}: A {tuple(a.shape)} and B {tuple(b.shape)} are not two matrices"])
    said = (settings.modules or {}).get(module) or {}
    alpha = said.get("alpha", settings.alpha)
    r = said.get("r", settings.r)
    enable = said.get("enable_lora") or _flags(module, settings.enable_lora)
    kind = said.get("kind") or (
        "merged_linear" if enable else "embedding" if module.endswith("embed_tokens") else "linear"
    )
    projection = next((p for p in layout if module.endswith(f".{p.path}")), None)
    if alpha is None and settings.modules:
        raise LayoutError([f"{module}: alpha is missing"])
    alpha = 1.0 if alpha is None else alpha  # already reported; the shapes are checked all the same
    if kind.startswith("conv") or (a.dim() == 2 and a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1]):
        raise LayoutError([
            f"{module}: a loralib Conv layer (A {tuple(a.shape)}, B {tuple(b.shape)}) has no PEFT counterpart: its "
            "update is a product reshaped over the kernel, PEFT's is two convolutions; merge it into the base instead"
        ])  # fmt: skip
    if kind == "merged_linear":
        r = r or int(b.shape[1])
        lora = grouped_to_fused(Lora(module, a, b, alpha), r, enable, compact)
        if projection and lora.b.shape[0] != projection.out_features:
            raise LayoutError([_wrong_height(module, int(lora.b.shape[0]), projection, len(enable))])
        flags = ",".join("T" if flag else "F" for flag in enable)
        return lora, f"MergedLinear {flags}: A kept, B block-diagonal, rank {lora.rank}, alpha {lora.alpha:g}"
    if a.shape[0] != b.shape[1]:
        raise LayoutError([
            f"{module}: A has {a.shape[0]} rows and B {b.shape[1]} columns, so this is a MergedLinear; pass its flags, "
            f"for example --enable-lora {module.rpartition('.')[2]}=T,F,T"
        ])  # fmt: skip
    if r is not None and r != b.shape[1]:
        raise LayoutError([f"{module}: r is set to {r}, but the tensors have rank {b.shape[1]} (a Conv layer?)"])
    if projection and b.shape[0] != projection.out_features:
        raise LayoutError([_wrong_height(module, int(b.shape[0]), projection, 0)])
    return Lora(module, a, b, alpha, embedding=kind == "embedding"), "kept"


def _flags(module: str, flags: Mapping[str, Sequence[bool]] | None) -> tuple[bool, ...]:
    for name, each in (flags or {}).items():
        if not name or module == name or module.endswith(f".{name}"):
            return tuple(each)
    return ()


def _wrong_height(module: str, rows: int, projection: Projection, groups: int) -> str:
    problem = f"{module}: B reaches over {rows} rows, the model's {projection.name} has {projection.out_features}"
    if groups:
        sizes = ", ".join(f"{part.name} {part.stop - part.start}" for part in projection.slices)
        return f"{problem}; loralib's groups are equal in height, the slices here are {sizes}"
    return f"{problem}; if it was a MergedLinear, pass its flags with --enable-lora {projection.name}=T,F,..."


def to_loralib(
    loras: Sequence[Lora], layout: Sequence[Projection], dropout: float, base: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], list[Row]]:
    """(tensors, sidecar, report rows): what `lora.lora_state_dict` would have saved, and what it leaves out.

    A block-diagonal update of a fused projection becomes a MergedLinear, anything else a Linear or Embedding.

    Raises:
        LoralibError: DoRA or a bias of the second factor, which loralib does not have.
    """
    tensors: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Any]] = {}
    rows, problems = [], []
    for lora in loras:
        if lora.magnitude is not None or lora.bias is not None:
            problems.append(f"{lora.module}: loralib has no {'DoRA' if lora.magnitude is not None else 'bias of B'}")
            continue
        plain = replace(lora, alpha=lora.scaling * lora.rank, rslora=False)  # loralib divides by r, always
        alpha = int(plain.alpha) if float(plain.alpha).is_integer() else plain.alpha
        projection = next((p for p in layout if lora.module.endswith(f".{p.path}")), None)
        grouped = fused_to_grouped(replace(plain, alpha=alpha), projection) if projection else None
        if grouped:
            stored, r, enable = grouped
            modules[lora.module] = {"kind": "merged_linear", "r": r, "alpha": stored.alpha, "enable_lora": list(enable)}
            rule = f"MergedLinear {','.join('T' if on else 'F' for on in enable)}, r {r}"
        else:
            stored = replace(plain, alpha=alpha)
            kind = "embedding" if lora.embedding else "linear"
            modules[lora.module] = {"kind": kind, "r": lora.rank, "alpha": alpha}
            rule = f"{kind}, r {lora.rank}"
        tensors[f"{lora.module}.lora_A"] = stored.a.detach().clone()
        tensors[f"{lora.module}.lora_B"] = stored.b.detach().clone()
        rows.append(Row(lora.module, lora.module, tuple(stored.b.shape), rule))
    if problems:
        raise LoralibError("\n".join(problems))
    return tensors, sidecar(modules, base, dropout), rows


def sidecar(modules: Mapping[str, Mapping[str, Any]], base: str | None, dropout: float) -> dict[str, Any]:
    """The content of the JSON file: what `Settings` has, with the r and alpha that all modules have, if they do."""
    same = {name: {each[name] for each in modules.values()} for name in ("r", "alpha")}
    known = {name: values.pop() for name, values in same.items() if len(values) == 1}
    return {"format": "loralib", "base": base, "dropout": dropout, "modules": modules} | known


def write_loralib(file: Path, tensors: Mapping[str, Tensor], sidecar: Mapping[str, Any]) -> None:
    """Write the one file of `lora_` tensors (`.pt` or `.safetensors`) and `NAME.json` next to it."""
    import torch

    if file.suffix == ".safetensors":
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    else:
        torch.save(dict(tensors), file)
    file.with_name(f"{file.name}.json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
