"""Held-out prompts to compare an export on, and the system message that a run was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.adapt import Reading, conversations
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.readers import Problem, SourceError
from phi3_lora_plugin.chat.sources import find_sources
from phi3_lora_plugin.export.exporter import ExportError

Message = Mapping[str, Any]
_OURS = "embedded:chats/held_out.jsonl"
_LOOK_AT = 2000  # rows of training data that are read for their system message


def held_out_prompts(recipe: Any, most: int, file: str | None = None) -> tuple[list[list[Message]], str]:
    """(chats that each end with the user, where they are from), `most` of them at most.

    They are those of `file`, else of the rows that the recipe (None: there is none) holds out, else of the chats that
    ship here. A chat gives one prompt for each turn of the assistant.

    Raises:
        ExportError: `file` has no chat in it.
    """
    if file is not None:
        prompts = _prompts(_chats(file), most)
        if not prompts:
            raise ExportError(f"--prompts {file}: no chat with a user turn in it")
        return prompts, file
    if recipe is not None and (path := recipe.data.eval_path) is not None:
        try:
            prompts = _prompts(_chats(path, recipe.data.eval_split, recipe.data.format, recipe.data.columns), most)
        except ExportError:  # the run's data is somewhere else now
            prompts = []
        if prompts:
            return prompts, str(path)
    return _prompts(_chats(_OURS), most), _OURS


def trained_system(recipe: Any) -> str | None:
    """The system message that every row of the run's training data begins with; None where they differ or are gone."""
    if recipe is None or not isinstance(recipe.data.path, str):
        return None
    found: set[str | None] = set()
    try:
        chats = _chats(recipe.data.path, recipe.data.split, recipe.data.format, recipe.data.columns)
        for number, chat in enumerate(chats):
            first = chat[0] if chat else {}
            found.add(first.get("content") if first.get("role") == "system" else None)
            if len(found) > 1 or number == _LOOK_AT:
                break
    except ExportError:
        return None
    return found.pop() if len(found) == 1 else None


def _chats(
    path: Any, split: str | None = None, wanted: str = "auto", columns: Mapping[str, str] | None = None
) -> Iterator[list[Any]]:
    from phi3_lora_plugin.recipe.sections import ChatSection

    try:
        data = ChatSection(format=wanted, columns=dict(columns or {}))
        for source in find_sources(path, split, "--prompts").sources:
            for item in conversations(source, Reading(source.name), data, ADAPTERS):
                if not isinstance(item, Problem):
                    yield item[1]
    except SourceError as error:
        raise ExportError(str(error)) from error


def _prompts(chats: Iterator[list[Any]], most: int) -> list[list[Message]]:
    found: list[list[Message]] = []
    for chat in chats:
        for number, message in enumerate(chat):
            if message["role"] == "assistant" and _asks(chat[:number]):
                found.append([{"role": m["role"], "content": m["content"]} for m in chat[:number]])
            if len(found) == most:
                return found
    return found


def _asks(chat: Sequence[Message]) -> bool:
    """Whether a prompt ends with the user and holds nothing that only some templates have a place for."""
    return bool(chat) and chat[-1]["role"] == "user" and all(m["role"] != "tool" and "tools" not in m for m in chat)
