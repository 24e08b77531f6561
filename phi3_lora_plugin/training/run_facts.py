"""What a run is made of, as its manifests record it, and which of that must not change when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phi3_lora_plugin.chat.templates import TemplateError, template_fingerprint, template_for
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.lora.config import base_of, loralib_sidecar, minimal_config
from phi3_lora_plugin.lora.gather import unwrapped
from phi3_lora_plugin.lora.state import active_adapter
from phi3_lora_plugin.lora_files.keys import bare, is_lora
from phi3_lora_plugin.model.fingerprint import base_fingerprint, local_folder
from phi3_lora_plugin.model.tokenizer import tokenizer_fingerprint
from phi3_lora_plugin.recipe.sections import PEFT_NAMES
from phi3_lora_plugin.training.settings_facts import (
    cannot_change,
    may_change,
    model_facts,
    optimizer_facts,
    training_facts,
)

_PACKAGES = ("phi3-lora-plugin", "torch", "transformers", "peft", "trl", "accelerate")
#: Settings of an adapter that record where it is from and how it is used, not what it is.
_ABOUT = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type", "auto_mapping")
#: Facts that have to be the same for a resumed run to be the same run.
_BINDING = (
    "base.fingerprint", "model", "lora", "template.fingerprint", "tokenizer", "data", "training", "optimizer",
)  # fmt: skip
_ROWS = 1000  # read at once to be hashed


class DriftError(Phi3LoraError):
    """The run to resume was made with other settings; `fields` names each of them."""

    def __init__(self, checkpoint: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.fields = list(differences)
        lines, allowable = [], []
        for name, (was, now) in differences.items():
            never = cannot_change(name, was, now)
            lines.append(f"{name}: {was!r} in the checkpoint, {now!r} now{f' ({never})' if never else ''}")
            allowable += [] if never else [name]
        advice = "Restore the old settings, or start again in another folder"
        if allowable:
            advice += f"; to resume with a changed setting, pass --allow-drift {allowable[0]}"
        super().__init__(
            "\n  ".join([f"{checkpoint} cannot be resumed: these settings changed:", *lines]) + f"\n{advice}"
        )


def run_facts(
    args: Any, model: Any, tokenizer: Any, dataset: Any, adapter: str | None = None, optimizer: Any = None
) -> dict[str, Any]:
    """Base, adapter and training settings, template, tokenizer, data, world size and versions of a run.

    Args:
        args: the Trainer's arguments.
        model: with its LoRA layers, wrapped or not.
        tokenizer: the Trainer's `processing_class`, or None.
        dataset: the rows to train on, or None.
        adapter: of a PEFT model, which one; the trained one if not given.
        optimizer: None if the Trainer makes it later from its arguments.
    """
    return {
        "base": base_facts(model),
        "model": model_facts(unwrapped(model)),
        "lora": lora_facts(model, adapter),
        "template": _template(tokenizer),
        "tokenizer": tokenizer_fingerprint(tokenizer) if hasattr(tokenizer, "backend_tokenizer") else None,
        "data": data_facts(dataset, args),
        "training": training_facts(args),
        "optimizer": optimizer_facts(optimizer, args),
        "world_size": args.world_size,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Package -> version of what a run depends on."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (value before, value now) for everything that has to be the same in a resumed run.

    What only one side knows is skipped: an older manifest, a tokenizer that was not given.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for field in _BINDING:
        was, is_now = _at(before, field), _at(now, field)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            for name in sorted({*was, *is_now}):
                pair = was.get(name), is_now.get(name)
                known = field == "lora" or (name in was and name in is_now)  # PEFT's that is missing is at its default
                if pair[0] != pair[1] and known:
                    found[f"{field}.{name}"] = _short(pair[0]), _short(pair[1])
        elif was != is_now and was is not None and is_now is not None:
            found[field.removesuffix(".fingerprint")] = _short(was), _short(is_now)
    if before.get("world_size") != now.get("world_size") and "data.batch" not in found:
        # The same rows a step, divided anew.
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            found.pop(f"training.{name}", None)
    if "training.learning_rate" in found:
        found.pop("optimizer.learning_rates", None)  # the same change, reported twice
    return found


def refuse_drift(
    checkpoint: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Raise `DriftError` for what differs and is not allowed to; return what differs and is.

    Args:
        allowed: dotted fields, or the first part of some (`lora` allows `lora.r`).
    """
    found = differences(before, now)
    refused = {
        name: pair
        for name, pair in found.items()
        if cannot_change(name, *pair)
        or not (may_change(name, now) or any(name == field or name.startswith(f"{field}.") for field in allowed))
    }
    if refused:
        raise DriftError(str(checkpoint), refused)
    return found


def base_facts(model: Any) -> dict[str, Any]:
    """Name, commit and fingerprint of the base: of its files if they are here, else of its values in memory."""
    name, commit = base_of(model)
    folder = local_folder(name, commit)
    fingerprint = base_fingerprint(folder) if folder is not None else _fingerprint_in_memory(model)
    return {"name": name, "revision": commit, "fingerprint": fingerprint}


def lora_facts(model: Any, adapter: str | None = None) -> dict[str, Any]:
    """The settings of the adapter that differ from PEFT's defaults, by this package's names; of loralib's, all."""
    inner = unwrapped(model)
    configs = getattr(inner, "peft_config", None)
    if not isinstance(configs, Mapping):
        sidecar = loralib_sidecar(inner)
        return {name: value for name, value in sidecar.items() if name not in ("base", "format")}
    settings = configs.get(adapter or active_adapter(inner))
    if settings is None:
        return {}
    plain = minimal_config(settings, inner)
    return {PEFT_NAMES.get(name, name): value for name, value in plain.items() if name not in _ABOUT}


def data_facts(dataset: Any, args: Any) -> dict[str, Any]:
    """What the order of the data depends on: rows (their number and a hash of all), batch, seed."""
    seed = getattr(args, "data_seed", None)
    facts: dict[str, Any] = {
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seed": args.seed if seed is None else seed,
    }
    if hasattr(dataset, "__len__"):
        facts["rows"] = len(dataset)
    digest = _rows_digest(dataset)
    return facts if digest is None else facts | {"fingerprint": digest}


def _rows_digest(dataset: Any) -> str | None:
    """sha256 over all rows and, of packs, which rows are in which; None for data that reading might change."""
    rows = getattr(dataset, "rows", dataset)  # packs hold rows
    digest = hashlib.sha256()
    if packs := getattr(dataset, "packs", None):
        digest.update(json.dumps(packs).encode())
    if type(rows).__module__.startswith("datasets."):
        if not hasattr(rows, "__len__"):
            return None
        _add_table(digest, rows)
    elif isinstance(rows, list | tuple):
        for row in rows:
            plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in dict(row).items()}
            digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    else:
        return None
    return digest.hexdigest()


def _add_table(digest: Any, rows: Any) -> None:
    """Hash a `datasets.Dataset` by its Arrow buffers, which takes a second for a million rows.

    Tables are read in pieces of the same length, and Arrow writes each piece without what is before or after it,
    so that equal rows give equal bytes however the data set was cut, shuffled or loaded.
    """
    import pyarrow as pa

    names = sorted(rows.column_names)
    digest.update(json.dumps(names).encode())
    for piece in rows.select_columns(names).with_format("arrow").iter(_ROWS):
        for batch in piece.select(names).combine_chunks().to_batches():
            digest.update(batch.serialize())
    digest.update(pa.schema([(name, rows.features.arrow_schema.field(name).type) for name in names]).serialize())


def _fingerprint_in_memory(model: Any) -> str | None:
    """sha256 over names, shapes and all values of the frozen weights; None where they are sharded."""
    from concurrent.futures import ThreadPoolExecutor

    frozen = []
    for name, parameter in sorted(unwrapped(model).named_parameters(), key=lambda pair: bare(pair[0])):
        plain = bare(name).replace(".base_layer.", ".")
        if parameter.requires_grad or is_lora(plain):
            continue
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") or parameter.is_meta:
            return None
        frozen.append((plain, parameter))
    digest = hashlib.sha256()
    with ThreadPoolExecutor(4) as threads:  # hashing leaves Python's lock alone
        for (plain, parameter), values in zip(frozen, threads.map(_values_digest, frozen), strict=True):
            digest.update(f"{plain} {parameter.dtype} {tuple(parameter.shape)} {values}\n".encode())
    return digest.hexdigest()


def _values_digest(named: tuple[str, Any]) -> str:
    """sha256 over the values of a tensor, a piece at a time: one that is expanded or on a GPU is never copied whole."""
    import torch

    digest = hashlib.sha256()
    for piece in named[1].detach().flatten().split(1 << 22):
        digest.update(piece.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _template(tokenizer: Any) -> dict[str, Any] | None:
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        name = template_for(tokenizer).name
    except TemplateError:  # of another family: its text still has to stay the same
        name = None
    return {"name": name, "fingerprint": template_fingerprint(tokenizer)}


def _at(facts: Mapping[str, Any], field: str) -> Any:
    value: Any = facts
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
