"""Look at a folder of a model, tokenizer or adapter: what it is, what would be trained, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi3_lora_plugin.chat.templates import TemplateError, template_for
from phi3_lora_plugin.inspect.adapter import look_at_adapter
from phi3_lora_plugin.inspect.findings import Findings as Findings
from phi3_lora_plugin.inspect.findings import InspectError as InspectError
from phi3_lora_plugin.inspect.findings import Problem as Problem
from phi3_lora_plugin.inspect.findings import Trainable as Trainable
from phi3_lora_plugin.inspect.findings import lines as lines
from phi3_lora_plugin.inspect.model import look_at_model, look_at_published, read_json
from phi3_lora_plugin.model.families import FAMILIES, UnsupportedModel
from phi3_lora_plugin.model.folder import ModelError, UnsupportedModelId, find_folder
from phi3_lora_plugin.model.published import published_config
from phi3_lora_plugin.model.tokenizer import load_tokenizer, stop_token_ids
from phi3_lora_plugin.small_file import BadFile
from phi3_lora_plugin.small_file import read_json as read_json_file
from phi3_lora_plugin.wording import listed

_KINDS = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "adapter": ("adapter_config.json",),
}


def inspect(path: str | Path) -> Findings:
    """Look at a folder without loading any model weights into memory.

    Args:
        path: folder, `embedded:NAME`, the folder of a run, whose newest complete checkpoint is looked at, or a hub id:
            its snapshot in the cache, or what is known of a published model that was not downloaded.

    Raises:
        InspectError: nothing is known of it here, or it has no model, tokenizer or adapter.
    """
    try:
        folder = find_folder(path)
    except UnsupportedModelId:
        raise
    except ModelError as error:
        if (config := published_config(str(path))) is None:
            raise InspectError(f"{error}; inspect downloads nothing") from error
        return look_at_published(str(path), config)
    files = _files(folder)
    if not _kinds(files):
        folder = _checkpoint_in(folder, files)
        files = _files(folder)
    kinds = _kinds(files)
    found: dict[str, Any] = {}
    problems: list[Problem] = []
    if "model" in kinds:
        found |= look_at_model(folder, files, problems)
    if "tokenizer" in kinds:
        # A config identifies the family more exactly than a template can.
        found = _look_at_tokenizer(folder, files, problems) | found
    if "adapter" in kinds:
        found |= look_at_adapter(folder, files, problems)
    return Findings(path=str(folder), kinds=tuple(kinds), problems=tuple(problems), **found)


def _files(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _kinds(files: set[str]) -> list[str]:
    return [kind for kind, names in _KINDS.items() if files.intersection(names)]


def _checkpoint_in(folder: Path, files: set[str]) -> Path:
    """The newest complete checkpoint of a run."""
    from phi3_lora_plugin.store.adapter_folder import AdapterError, adapter_folder

    try:
        return adapter_folder(folder)
    except AdapterError as error:
        raise InspectError(
            f"{folder} has none of config.json, tokenizer.json and adapter_config.json, and no complete checkpoint; "
            f"found: {listed(sorted(files), 8) or 'nothing'}"
        ) from error


def _look_at_tokenizer(folder: Path, files: set[str], problems: list[Problem]) -> dict[str, Any]:
    """Fields of `Findings` for a folder with a tokenizer; what is wrong goes into `problems`."""
    try:
        tokenizer = load_tokenizer(folder)
    except ModelError as error:
        problems.append(Problem(str(error), "download the tokenizer's files again"))
        return {}
    except UnsupportedModel:
        return {}  # already reported for its config.json
    found: dict[str, Any] = {"pad_token": f"{tokenizer.pad_token} ({tokenizer.pad_token_id})"}
    stops = stop_token_ids(tokenizer)
    found["stop_tokens"] = tuple(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in stops)
    try:
        template = template_for(tokenizer)
        found["template"] = template.name
        known = template.name.partition(" ")[0]  # without "with a preamble"
        members = [each.title for each in FAMILIES.values() if known in each.templates]
        if members:
            found["family"] = f"by its template, of {', '.join(members)}"
        if not template.system:
            what = f"template {template.name} silently drops system messages"
            problems.append(Problem(what, "data.system: fold, or drop", here=True))
    except TemplateError as error:
        problems.append(Problem(str(error), "data.template: NAME"))
    highest = max(tokenizer.get_vocab().values())
    rows = _embedding_rows(folder) if "config.json" in files else None
    if rows is not None and highest >= rows:
        what = f"the tokenizer has ids up to {highest}, the model {rows} rows of embeddings"
        problems.append(Problem(what, "take model and tokenizer from the same repository"))
    settings = read_json(folder / "tokenizer_config.json", problems) if "tokenizer_config.json" in files else {}
    problems += _settings_problems(settings, "config.json" not in files, tokenizer, stops)
    backend = read_json(folder / "tokenizer.json", problems)
    for key in ("truncation", "padding"):
        if backend.get(key):
            what = f"tokenizer.json has {key} saved in it, which raw tokenizers apply"
            problems.append(Problem(what, f"set {key} to null", here=True))
    return found


def _settings_problems(settings: dict[str, Any], alone: bool, tokenizer: Any, stops: list[int]) -> Iterator[Problem]:
    """What other hosts would make of a tokenizer_config.json; `alone`, without a config.json next to it."""
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is not None and tokenizer.convert_tokens_to_ids(pad) in stops:
        yield Problem(f"pads with {pad}, which is a stop token", f"pad_token: {tokenizer.pad_token}", here=True)
    kind = settings.get("tokenizer_class")
    if kind in ("LlamaTokenizer", "LlamaTokenizerFast") and alone:
        what = f"tokenizer_class is {kind} without a config.json next to it: AutoTokenizer then gives other ids"
        yield Problem(what, "save the tokenizer with phi3_lora_plugin, or put config.json next to it", here=True)
    if settings.get("auto_map"):
        what = "tokenizer_config.json has auto_map: hosts with trust_remote_code run remote code for it"
        yield Problem(what, "delete auto_map", here=True)


def _embedding_rows(folder: Path) -> int | None:
    try:
        rows = read_json_file(folder / "config.json")["vocab_size"]
    except (BadFile, KeyError, TypeError):
        return None  # already reported for its config.json
    return rows if isinstance(rows, int) else None
