"""Where a model's files are: its folder, its config, a hub snapshot."""

from __future__ import annotations

from pathlib import Path

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.error import Phi3LoraError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


class ModelError(Phi3LoraError):
    """A base model that is not there, is incomplete, or does not go with its tokenizer or this machine."""


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder that holds a model: itself, what `embedded:` names, or a snapshot of the hub.

    Raises:
        ModelError: nothing there, no config, or no weights that can be read without executing them.
    """
    folder = _local_or_hub(name, revision, ["*.json", "*.safetensors", "*.jinja"])
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is an adapter, not a base model; give the model that it was trained on")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; it holds {_listed(folder)}")
    if not any((folder / weights).is_file() for weights in _WEIGHTS):
        pickled = sorted(entry.name for entry in folder.glob("*.bin"))
        advice = (
            f"; {pickled[0]} is a pickle, which can execute code and is not read: convert it to safetensors"
            if pickled
            else ""
        )
        raise ModelError(f"{folder} has no model.safetensors; it holds {_listed(folder)}{advice}")
    return folder


def config_folder(name: str, revision: str | None = None) -> Path:
    """The folder that holds a model's config.json, for `load_config`; of a hub repository nothing else is fetched.

    Raises:
        ModelError: there is no such folder or repository.
    """
    return _local_or_hub(name, revision, ["config.json"])


def find_config(name: str, revision: str | None = None) -> Path:
    """The config.json of a model whose weights need not be here: in a folder, itself, or in the hub's cache.

    Raises:
        ModelError: it is in none of these.
    """
    folder = Path(locate(name))
    if folder.is_file() and folder.suffix == ".json":
        return folder
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; it holds {_listed(folder)}")
        return folder / "config.json"
    if folder.is_absolute() or name.count("/") != 1:
        raise ModelError(f"{name}: no such folder, and not the id of a hub repository (OWNER/NAME)")
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise ModelError(
            f"{name}: its config.json is not in the hub's cache; get it by `hf download {name} config.json`"
        )
    return Path(found)


def _local_or_hub(name: str, revision: str | None, wanted: list[str]) -> Path:
    """The folder itself, what `embedded:` names, or a snapshot of the hub with the files that fit `wanted`."""
    folder = Path(locate(name))
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"{name}: no such folder, and not the id of a hub repository (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # offline, missing, gated: each has a class of its own, and the sentence is the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name}: not a folder here, and the hub did not give it: {reason}") from error


def _listed(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
