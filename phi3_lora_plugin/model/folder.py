"""Where a model's files are: a folder, what `embedded:` names, or a snapshot in the hub's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_lora_plugin.embedded import locate
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.model.families import RopeError, UnsupportedModel, recognise, refused_id
from phi3_lora_plugin.model.file_values import wrong_values
from phi3_lora_plugin.model.refused import REFUSED_IDS
from phi3_lora_plugin.small_file import read_object
from phi3_lora_plugin.wording import first_line, listed

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelError(Phi3LoraError):
    """A base model that is not there, is incomplete, or does not go with its tokenizer or this machine."""


class UnsupportedModelId(ModelError, UnsupportedModel):
    """The hub id of a published model that is not supported and is not on this machine either."""


def find_folder(name: str | Path, revision: str | None = None, download: Sequence[str] = ()) -> Path:
    """The folder that a path, `embedded:NAME` or hub id means.

    Args:
        revision: branch, tag or commit, for a hub id.
        download: patterns of the files to fetch from the hub; none: only look into its cache.

    Raises:
        ModelError: there is none.
        UnsupportedModelId: nor would it be downloaded, because it is a published model that is not supported.
    """
    text = str(name)
    folder = Path(locate(text))
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or text.startswith((".", "~")) or text.count("/") != 1:
        raise ModelError(f"{text}: no such folder, and not the id of a hub repository (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    if (why := refused_id(text, revision)) is not None:
        try:  # what is here is used as far as it goes: a tokenizer, or a config that says what the model is
            return Path(snapshot_download(text, revision=revision, local_files_only=True))
        except Exception as error:
            raise UnsupportedModelId(why) from error
    options: dict[str, Any] = {"allow_patterns": list(download)} if download else {"local_files_only": True}
    try:
        return Path(snapshot_download(text, revision=revision, **options))
    except Exception as error:  # offline, missing, gated: each has a class of its own, and the sentence is the same
        if not download:
            raise ModelError(
                f"{text} is neither a folder nor in the hub's cache; download it with `hf download {text}`"
            ) from error
        raise ModelError(f"{text}: not a folder here, and the hub did not give it: {first_line(error)}") from error


def model_folder(name: str | Path, revision: str | None = None, download: bool = False) -> Path:
    """As `find_folder`, of a model with its config and its weights.

    Raises:
        ModelError: nothing there, no config, or no weights that can be read without executing them.
        UnsupportedModel: by its config, which is downloaded before the weights are.
    """
    if download:
        _refuse_before_weights(find_folder(name, revision, ["config.json"]), copies=False)
    folder = find_folder(name, revision, ["*.json", "*.safetensors", "*.jinja"] if download else ())
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is an adapter, not a base model; give the model that it was trained on")
    _require_config(folder)
    _refuse_before_weights(folder, copies=True)
    weight_files(folder)
    return folder


def find_config(name: str | Path, revision: str | None = None, download: bool = False) -> Path:
    """The config.json of a model whose weights need not be here; `name` may be that file itself.

    Raises:
        ModelError: there is none.
    """
    file = Path(locate(name))
    return file if file.is_file() else _require_config(find_folder(name, revision, ["config.json"] if download else ()))


def weight_files(folder: Path) -> dict[str, str] | None:
    """Weight -> safetensors file, from a model's index; None: all are in model.safetensors.

    Raises:
        ModelError: neither file exists.
    """
    if (folder / INDEX).is_file():
        return dict(read_json(folder / INDEX).get("weight_map") or {})
    if (folder / SINGLE).is_file():
        return None
    pickled = sorted(entry.name for entry in folder.glob("*.bin"))
    advice = ""
    if pickled:
        advice = f"; {pickled[0]} is a pickle, which can execute code and is not read: convert it to safetensors"
    raise ModelError(f"{folder} has no {SINGLE}; it holds {_contents(folder)}{advice}")


def published_stops(generation: Mapping[str, Any], config: Mapping[str, Any]) -> list[int]:
    """The ids at which generation stops by the content of generation_config.json ({}: none) and config.json."""
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    return [ids] if isinstance(ids, int) else list(ids or ())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping. Raises ModelError, also for values that such a file cannot have."""
    content = read_object(path, ModelError)
    if wrong := wrong_values(path.name, content):
        raise ModelError(f"{path}:\n" + "\n".join(f"  {line}" for line in wrong.values()))
    return content


def _refuse_before_weights(folder: Path, copies: bool) -> None:
    """Raise UnsupportedModel by the config; `copies` in the layout of other families, which convert, may pass."""
    if not (folder / "config.json").is_file():
        return
    config = read_json(folder / "config.json")
    if copies and config.get("model_type") not in REFUSED_IDS.values():
        return
    try:
        recognise(config)
    except UnsupportedModel:
        raise
    except (RopeError, ValueError, TypeError):
        return  # reported with what is expected instead, once the config is read for good


def _require_config(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; it holds {_contents(folder)}")
    return folder / "config.json"


def _contents(folder: Path) -> str:
    return listed(sorted(entry.name for entry in folder.iterdir()), 8) or "nothing"
