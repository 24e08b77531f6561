"""What a run is made of, as its manifests say it, and what of that must not change when it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.fingerprint import base_fingerprint, local_folder
from phi3_lora_plugin.recipe.sections import PEFT_NAMES

_PACKAGES = ("phi3-lora-plugin", "torch", "transformers", "peft", "trl", "accelerate")
_SAMPLED = 64  # rows of the data, and values of each weight, that a fingerprint looks at
#: Settings of an adapter that say where it is from and how it is used, not what it is.
_ABOUT = ("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type", "auto_mapping")
#: Facts that have to be the same for a resumed run to be the same run.
_BINDING = ("base.fingerprint", "lora", "template.fingerprint", "tokenizer", "data")


class DriftError(Phi3LoraError):
    """The run to go on with was made with other settings; `fields` names each of them."""

    def __init__(self, checkpoint: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.fields = list(differences)
        lines = [f"{name}: {was!r} in the checkpoint, {now!r} now" for name, (was, now) in differences.items()]
        super().__init__(
            "\n  ".join([f"{checkpoint} cannot be gone on from with other settings:", *lines])
            + "\nTake the old settings back, start anew in another folder, or allow it field by field "
            f"(--allow-drift {self.fields[0]})"
        )


def run_facts(args: Any, model: Any, tokenizer: Any, dataset: Any, adapter: str | None = None) -> dict[str, Any]:
    """Base, adapter settings, template, tokenizer, data order, world size and versions of a run.

    Args:
        args: the Trainer's arguments.
        model: with its LoRA layers, wrapped or not.
        tokenizer: the Trainer's `processing_class`, or None.
        dataset: the rows to train on, or None.
        adapter: of a PEFT model, which one; the trained one if not given.
    """
    return {
        "base": base_facts(model),
        "lora": lora_facts(model, adapter),
        "template": _template(tokenizer),
        "tokenizer": _tokenizer(tokenizer),
        "data": data_facts(dataset, args),
        "world_size": args.world_size,
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (value before, value now) for everything that has to be the same in a resumed run.

    What only one side knows is passed over: an older manifest, a tokenizer that was not given.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for field in _BINDING:
        was, is_now = _at(before, field), _at(now, field)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            for name in sorted({*was, *is_now}):
                pair = was.get(name), is_now.get(name)
                known = field == "lora" or None not in pair  # a setting of PEFT's that is missing is at its default
                if pair[0] != pair[1] and known:
                    found[f"{field}.{name}"] = _short(pair[0]), _short(pair[1])
        elif was != is_now and was is not None and is_now is not None:
            found[field.removesuffix(".fingerprint")] = _short(was), _short(is_now)
    return found


def refuse_drift(
    checkpoint: str | Path, before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> None:
    """Raise `DriftError` for what differs and is not allowed to.

    Args:
        allowed: dotted fields, or the first part of some (`lora` allows `lora.r`).
    """
    found = {
        name: pair
        for name, pair in differences(before, now).items()
        if not any(name == field or name.startswith(f"{field}.") for field in allowed)
    }
    if found:
        raise DriftError(str(checkpoint), found)


def base_facts(model: Any) -> dict[str, Any]:
    """Name, commit and fingerprint of the base: of its files where they lie here, else of its values in memory."""
    from phi3_lora_plugin.lora.config import base_of

    name, commit = base_of(model)
    folder = local_folder(name, commit)
    fingerprint = base_fingerprint(folder) if folder is not None else _fingerprint_in_memory(model)
    return {"name": name, "revision": commit, "fingerprint": fingerprint}


def lora_facts(model: Any, adapter: str | None = None) -> dict[str, Any]:
    """The settings of the adapter that differ from PEFT's defaults, by this package's names; of loralib's, all."""
    from phi3_lora_plugin.lora.config import loralib_sidecar, minimal_config
    from phi3_lora_plugin.lora.gather import unwrapped
    from phi3_lora_plugin.lora.state import active_adapter

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
    """What the order of the data depends on: rows (their number and a sample of them), batch, seed."""
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
    """sha256 over a sample of rows; None for data of which looking at a row might change something."""
    rows = getattr(dataset, "rows", dataset)  # packs hold rows
    if type(rows).__module__.startswith("datasets."):
        if not hasattr(rows, "__len__"):
            return None
        rows = rows.with_format(None)
    elif not isinstance(rows, (list, tuple)):
        return None
    digest = hashlib.sha256()
    count = len(rows)
    for index in sorted({number * (count - 1) // max(1, _SAMPLED - 1) for number in range(min(count, _SAMPLED))}):
        row = rows[index]
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in dict(row).items()}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _fingerprint_in_memory(model: Any) -> str | None:
    """sha256 over names, shapes and a sample of the values of the frozen weights; None where they are sharded."""
    import torch

    from phi3_lora_plugin.lora.gather import unwrapped
    from phi3_lora_plugin.lora_files.keys import is_lora, without_wrappers

    digest = hashlib.sha256()
    for name, parameter in sorted(unwrapped(model).named_parameters(), key=lambda pair: without_wrappers(pair[0])):
        plain = without_wrappers(name).removeprefix("base_model.model.").replace(".base_layer.", ".")
        if parameter.requires_grad or is_lora(plain):
            continue
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") or parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        count = min(len(flat), _SAMPLED)
        places = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(1, count - 1)
        digest.update(f"{plain} {tuple(parameter.shape)}\n".encode())
        digest.update(json.dumps(flat[places].float().tolist()).encode())
    return digest.hexdigest()


def _template(tokenizer: Any) -> dict[str, Any] | None:
    from phi3_lora_plugin.chat.templates import TemplateError, template_fingerprint, template_for

    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        name = template_for(tokenizer).name
    except TemplateError:  # of another family: its text still has to stay the same
        name = None
    return {"name": name, "fingerprint": template_fingerprint(tokenizer)}


def _tokenizer(tokenizer: Any) -> str | None:
    from phi3_lora_plugin.model.tokenizer import tokenizer_fingerprint

    return tokenizer_fingerprint(tokenizer) if hasattr(tokenizer, "backend_tokenizer") else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _at(facts: Mapping[str, Any], field: str) -> Any:
    value: Any = facts
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _short(value: Any) -> Any:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value
