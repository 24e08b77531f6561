"""One way in and out for other people's formats: find out what a path holds, convert it, say what became what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.export.base_layouts import convert_base
from phi3_lora_plugin.export.gguf import write_gguf_adapter, write_gguf_model
from phi3_lora_plugin.lora.finite import not_finite
from phi3_lora_plugin.lora.text_side import excluded_modules
from phi3_lora_plugin.lora_files import layouts, loralib_files, mlx_files, peft_files, torchtune_files
from phi3_lora_plugin.lora_files.layouts import Lora, Row
from phi3_lora_plugin.lora_files.servable import servable
from phi3_lora_plugin.model.families import projections
from phi3_lora_plugin.model.folder import ModelError, find_config, model_folder, read_json
from phi3_lora_plugin.model.new_files import staged, staged_file
from phi3_lora_plugin.model.shards import Weights, copy_tokenizer
from phi3_lora_plugin.wording import listed

if TYPE_CHECKING:
    from phi3_lora_plugin.model.families import Projection

TARGETS = ("peft", "fused", "split", "loralib", "gguf", "llama-base", "phi3-base")
_FILES = {"loralib": (".pt", ".safetensors"), "gguf": (".gguf",)}


class ConvertError(Phi3LoraError):
    """A conversion that cannot be done as asked, with every reason; nothing was written."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source, target: the paths.
        kind: what the source turned out to be: peft, mlx, loralib, torchtune, model.
        to: what was asked for.
        rows: one for each module or weight.
        notes: what else a person should know.
    """

    source: Path
    target: Path
    kind: str
    to: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def lines(self, every_row: bool = False) -> list[str]:
        """The report for people: the rules with how often they were used, or every row."""
        text = [f"{self.kind} {self.source} -> {self.to} {self.target}: {len(self.rows)} rows"]
        if every_row:
            text += [f"  {row.source} -> {row.target} {list(row.shape)}: {row.rule}" for row in self.rows]
        else:
            kinds = Counter((_short(row.source), _short(row.target), row.rule) for row in self.rows)
            text += [f"  {count} x {old} -> {new}: {rule}" for (old, new, rule), count in kinds.items()]
        return text + [f"note: {note}" for note in self.notes]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return asdict(self) | {"source": str(self.source), "target": str(self.target)}


@dataclass(frozen=True)
class _Source:
    """An adapter, whatever file it was in: its updates and what else it holds."""

    kind: str
    found: peft_files.Parts
    base: str | None
    revision: str | None
    dropout: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    folder: Path


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    base: str | Path | None = None,
    target_base: str | None = None,
    alpha: float | None = None,
    r: int | None = None,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
    dtype: str = "auto",
    max_shard: str | int = "2GB",
    compact: bool = True,
    uniform: bool = False,
    drop_equal_embeddings: bool = False,
    check: bool = True,
    overwrite: bool = False,
    max_rank: int = 64,
) -> ConversionReport:
    """Convert an adapter (PEFT folder, loralib or torchtune file) or a whole model into another layout, exactly.

    Args:
        to: `peft` keeps the modules as they are, `fused` and `split` name Phi's or Llama's projections (both PEFT),
            `loralib` writes its file, `gguf` llama.cpp's (adapter or model); `llama-base` and `phi3-base` convert
            models.
        base: folder or cached hub id of the model; its config says where the rows of fused projections begin. None
            asks the adapter.
        target_base: what the new adapter shall name as its base, where the layout changes.
        alpha, r, enable_lora: what loralib and torchtune do not store.
        dtype: of GGUF files: auto, float32, float16, bfloat16.
        compact: share and leave out ranks where that changes nothing; see `layouts`.
        uniform: one rank and alpha for all modules, for servers that read only these.
        drop_equal_embeddings: leave out embeddings and heads that were saved in full and equal the base's.
        max_rank: the rank that servers shall be able to take, for the notes.

    Raises:
        ConvertError, or the error of the format that is at fault; lists all that is wrong.
    """
    source, target = Path(source), Path(target)
    if to not in TARGETS:
        raise ConvertError(f"unknown target {to!r}; available: {', '.join(TARGETS)}")
    if (suffixes := _FILES.get(to)) and target.suffix not in suffixes:
        raise ConvertError(f"{target}: {to} is one file; give it a name that ends in {' or '.join(suffixes)}")
    model = _is_model(source)
    if not model and not source.exists():
        raise ConvertError(f"{source}: no such file or folder, and no model in the local cache")
    if model != (to in ("llama-base", "phi3-base")) and not (model and to == "gguf"):
        what = "a model" if model else "an adapter"
        fits = "llama-base, phi3-base, gguf" if model else ", ".join(TARGETS[:5])
        raise ConvertError(f"{source} is {what}; it can be converted to {fits}, not to {to}")
    if model:
        return _convert_model(source, target, to, dtype, max_shard, check, overwrite)

    read = _read(source, base, alpha, r, enable_lora, compact)
    _refuse_broken(source, read.found)
    config = _base_config(base or read.base, read.revision, needed=to in ("fused", "split", "gguf"))
    if to == "gguf" and _is_split(config):
        raise ConvertError(
            f"{base or read.base} is a split copy; llama.cpp's adapter is for the fused model: pass that with --base"
        )
    layout = _layout(config)
    loras, rows, notes = list(read.found.loras), list(read.rows), list(read.notes)
    if config and layout and (problems := layouts.unknown_modules(loras, layout, int(config["num_hidden_layers"]))):
        raise ConvertError(f"{source} does not fit {base or read.base}:\n" + "\n".join(f"  {p}" for p in problems[:20]))
    was_split = layouts.is_split(loras, layout)
    if to in ("fused", "gguf") and was_split:
        loras, rows = layouts.split_to_fused(loras, layout, compact)
    elif to == "split":
        loras, rows = layouts.fused_to_split(loras, layout, compact)
    elif not rows:
        rows = [Row(lora.module, lora.module, tuple(lora.b.shape), "kept") for lora in loras]
    if uniform and loras:
        loras = layouts.uniform(loras)
    _same_update(read.found.loras, loras, layout)
    found = replace(read.found, loras=tuple(loras))
    if drop_equal_embeddings:
        found = _without_equal_embeddings(found, model_folder(base or read.base or "", read.revision), notes)
    _refuse_full(found, to, layout)

    if to in ("peft", "fused", "split"):
        changed = (to == "split" and not was_split) or (to == "fused" and was_split) or read.kind == "torchtune"
        name, revision = _named_base(read, base, target_base, config, changed, to, notes)
        _write_peft_folder(target, found, read, name, revision, config, overwrite)
        notes += [f"not servable as it is: {problem}" for problem in servable(target, max_rank)]
    elif to == "loralib":
        tensors, sidecar, rows = loralib_files.to_loralib(
            loras, layout, read.dropout, str(base or read.base or "") or None
        )
        with staged_file(target, overwrite) as file:
            loralib_files.write_loralib(file, tensors, sidecar)
    else:
        with staged_file(target, overwrite) as file:
            rows = write_gguf_adapter(file, loras, config or {}, "float32" if dtype == "auto" else dtype, source.name)
    return ConversionReport(source, target, read.kind, to, tuple(rows), tuple(notes))


def _convert_model(
    source: Path, target: Path, to: str, dtype: str, max_shard: str | int, check: bool, overwrite: bool
) -> ConversionReport:
    if to == "gguf":
        with staged_file(target, overwrite) as file:
            rows, notes = write_gguf_model(file, source, dtype, source.name)
    else:
        rows, notes = convert_base(source, target, to, max_shard, overwrite, check)
    return ConversionReport(source, target, "model", to, tuple(rows), tuple(notes))


def _is_model(source: Path) -> bool:
    """Whether a path holds a model's weights and no adapter."""
    if (source / peft_files.CONFIG).is_file():
        return False
    try:
        # A config that is damaged is a model's all the same.
        folder = source if (source / "config.json").is_file() else model_folder(source)
    except ModelError:
        return False
    return any(folder.glob("*.safetensors")) and not (folder / "adapter").is_dir()


def _read(
    source: Path,
    base: Any,
    alpha: float | None,
    r: int | None,
    enable: Mapping[str, Sequence[bool]] | None,
    compact: bool,
) -> _Source:
    if source.is_file() and source.name != peft_files.CONFIG:
        tensors = loralib_files.read_tensors(source)
        if torchtune_files.looks_like_torchtune(tensors):
            loras, rows = torchtune_files.from_torchtune(tensors, alpha)
            return _Source("torchtune", peft_files.Parts(tuple(loras)), None, None, 0.0, tuple(rows), (), source.parent)
        sidecar = loralib_files.sidecar_of(source)
        settings = loralib_files.read_settings(sidecar) if sidecar else loralib_files.Settings()
        if alpha is not None or r is not None or enable:
            # Options win over the file, also over what it has for single modules.
            settings = replace(
                settings,
                alpha=settings.alpha if alpha is None else alpha,
                r=settings.r if r is None else r,
                enable_lora={name: tuple(flags) for name, flags in enable.items()} if enable else settings.enable_lora,
                modules=None,
            )
        config = _base_config(base or settings.base, None, needed=False)
        loras, rows = loralib_files.from_loralib(tensors, settings, _layout(config), compact)
        notes = (f"alpha and the like were read from {sidecar.name}",) if sidecar else ()
        found = peft_files.Parts(tuple(loras))
        return _Source("loralib", found, settings.base, None, settings.dropout, tuple(rows), notes, source.parent)
    if alpha is not None or r is not None or enable:
        raise ConvertError(
            f"{source} is an adapter folder, whose config has r and alpha; --alpha, --r, --enable-lora are for files"
        )
    if mlx_files.looks_like_mlx(source):
        loras, rows, dropout = mlx_files.read_mlx(source)
        parts = peft_files.Parts(tuple(loras))
        return _Source("mlx", parts, mlx_files.mlx_base(source), None, dropout, tuple(rows), (), source)
    from phi3_lora_plugin.store.adapter_folder import read_adapter

    adapter = peft_files.read_peft(read_adapter(source).folder)
    return _Source(
        "peft", peft_files.parts(adapter), adapter.base, adapter.config.get("revision"),
        float(adapter.config.get("lora_dropout") or 0), (), adapter.notes, adapter.folder or source,
    )  # fmt: skip


def _base_config(base: str | Path | None, revision: str | None, needed: bool) -> dict[str, Any] | None:
    if base is None:
        if needed:
            raise ConvertError("the base model is missing; pass it with --base: its config has the projections' sizes")
        return None
    try:
        return read_json(find_config(base, revision))
    except ModelError:
        if needed:
            raise
        return None


def _layout(config: Mapping[str, Any] | None) -> Sequence[Projection]:
    if not config:
        return ()
    # A split copy has the sizes of what it was made from, and its adapters are for that.
    return projections({**config, "model_type": "phi3"} if _is_split(config) else config)


def _is_split(config: Mapping[str, Any] | None) -> bool:
    """Whether a config is that of a split copy, as unsloth's mirrors are and `--to llama-base` makes them."""
    return bool(config) and (config or {}).get("model_type") in ("llama", "mistral")


def _same_update(before: Sequence[Lora], after: Sequence[Lora], layout: Sequence[Projection]) -> None:
    """Both sets of updates do the same to random inputs; a safeguard, the maps themselves are tested."""
    import torch

    def outputs(loras: Sequence[Lora]) -> dict[str, Any]:
        pieces, _ = layouts.fused_to_split(loras, layout, compact=False)
        found = {}
        for lora in pieces:
            width = lora.a.shape[1]
            probe = torch.randn(width, 2, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
            bias = torch.zeros(len(lora.b)) if lora.bias is None else lora.bias
            product = lora.b.double() @ (lora.a.double() @ probe)
            found[lora.module] = torch.cat([product, bias.double()[:, None]], dim=1) * lora.scaling
        return found

    wanted, got = outputs(before), outputs(after)
    for module in {*wanted, *got}:
        one, other = wanted.get(module), got.get(module)
        size = max(float(x.abs().max()) for x in (one, other) if x is not None)
        left = other if one is None else one if other is None else one - other
        if left is not None and float(left.abs().max()) > 1e-5 * size * (one is not None and other is not None):
            raise ConvertError(f"{module}: the converted update differs from the original; this is a defect, report it")


def _refuse_broken(source: Path, found: peft_files.Parts) -> None:
    """Refuse tensors that do not belong together, and NaN, which would go through every map unseen."""
    if problems := [problem for lora in found.loras for problem in layouts.misfits(lora)]:
        raise ConvertError(f"{source}:\n" + "\n".join(f"  {problem}" for problem in problems))
    tensors = {f"{lora.module}.lora_A": lora.a for lora in found.loras}
    tensors |= {f"{lora.module}.lora_B": lora.b for lora in found.loras}
    tensors |= {f"{lora.module}.lora_magnitude": each for lora in found.loras if (each := lora.magnitude) is not None}
    tensors |= dict(found.full) | {name: rows for name, (_, rows) in found.tokens.items()}
    if broken := not_finite(tensors):
        what = f"{len(broken)} tensors are not finite (NaN or Inf), so the adapter is broken"
        raise ConvertError(f"{source}: {what}: {listed(broken, 3)}")


def _without_equal_embeddings(found: peft_files.Parts, base: Path, notes: list[str]) -> peft_files.Parts:
    """The parts without embeddings and heads that are the base's own, bit by bit in the base's type."""
    weights = Weights(base)
    full = {name: tensor for name, tensor in found.full.items() if not weights.equal(name, tensor)}
    if dropped := sorted(found.full.keys() - full.keys()):
        notes.append(f"left out, because they equal the base's: {', '.join(dropped)}")
    return replace(found, full=full)


def _refuse_full(found: peft_files.Parts, to: str, layout: Sequence[Projection]) -> None:
    """Tensors trained in full go along where the target can hold them and names them the same."""
    if not found.full and not found.tokens:
        return
    names = [*found.full, *found.tokens]
    shown = listed(names, 3)
    if to in ("loralib", "gguf"):
        raise ConvertError(
            f"{shown}: trained in full or by token, which {to} files do not hold; merge the adapter instead"
        )
    if biases := [name for name in found.full if name.endswith(".bias")]:
        raise ConvertError(f"{listed(biases, 3)}: trained biases are not carried over; merge the adapter instead")
    parts = {part for p in layout for part in (p.name, *(piece.name for piece in p.slices))}
    inside = [
        name
        for name in found.full
        if to != "peft" and name.rpartition(".")[0].rpartition(".")[2] in parts and ".layers." in name
    ]
    if inside:
        raise ConvertError(
            f"{listed(inside, 3)}: a projection trained in full has no {to} form here; merge the adapter instead"
        )


def _named_base(
    read: _Source,
    base: Any,
    target_base: str | None,
    config: Mapping[str, Any] | None,
    changed: bool,
    to: str,
    notes: list[str],
) -> tuple[str | None, str | None]:
    """(base, revision) that the new adapter names."""
    if target_base:
        return target_base, None
    if not changed:
        return (str(base), None) if base and not Path(base).is_file() and not read.base else (read.base, read.revision)
    if base and not Path(base).is_file() and _is_split(config) == (to == "split"):
        return str(base), None
    notes.append("the adapter records no base model, since that of the other layout is not known; pass --target-base")
    return None, None


def _write_peft_folder(
    target: Path, found: peft_files.Parts, read: _Source, name: str | None, revision: str | None,
    config: Mapping[str, Any] | None, overwrite: bool,
) -> None:  # fmt: skip
    adapted = {lora.module for lora in found.loras}  # next to one that is an embedding, PEFT stores its own weight
    saved = {module.rpartition(".")[2] for full in found.full if (module := full.rpartition(".")[0]) not in adapted}
    settings = peft_files.peft_config(
        found.loras, name, revision, int(config["num_hidden_layers"]) if config else None, read.dropout,
        sorted(saved), {module.rpartition(".")[2]: ids for module, (ids, _) in found.tokens.items()},
        excluded_modules(config or {}),
    )  # fmt: skip
    with staged(target, overwrite) as stage:
        peft_files.write_peft(stage, settings, found)
        copy_tokenizer([read.folder], stage)


def _short(name: str) -> str:
    return re.sub(r"(layers|blk)\.\d+\.", r"\1.N.", name)
