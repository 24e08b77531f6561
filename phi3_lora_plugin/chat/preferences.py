"""Rows with a chosen and a rejected answer -> canonical messages: the prompt that both share, and each answer.

Read are the shapes in which chats come too: lists of messages (`role`, `content` or `from`, `value`), one message, or
text; the prompt as `prompt`, `question`, `messages`, ...; whole chats that begin alike, next to their prompt or without
one; Anthropic's texts of `Human:` and `Assistant:` turns; OpenAI's `input`, `preferred_output`,
`non_preferred_output`; ms-swift's `rejected_response`; LLaMA-Factory's `chosen_messages`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3_lora_plugin.chat.content import read_text
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.row_error import RowError, named, not_too_deep, shown
from phi3_lora_plugin.chat.turns import Message, complete, context, read_turns

_PROMPTS = ("prompt", "question", "messages", "conversations", "conversation", "instruction", "query")
_CHOSEN = ("chosen", "chosen_messages", "preferred_output")
_REJECTED = ("rejected", "rejected_messages", "rejected_response", "non_preferred_output")
#: Every column that is read.
COLUMNS = (*_CHOSEN, *_REJECTED, *_PROMPTS, "input", "history", "response", "system", "system_prompt", "tools",
           "functions")  # fmt: skip
_HUMAN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ \n]?")


@dataclass(frozen=True)
class Pair:
    """Two chats that differ in their last turn, the assistant's; every turn before it is `train: False`."""

    chosen: list[Message]
    rejected: list[Message]


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row has a column that holds a rejected answer."""
    return any(row.get(name) is not None for name in _REJECTED)


@not_too_deep()
def preference(row: Mapping[str, Any]) -> Pair:
    """Read one row.

    Raises:
        RowError: what is wrong with it, in one sentence.
    """
    row = _openai(row)
    better, worse = _answer_column(row, _CHOSEN), _answer_column(row, _REJECTED)
    if better is None and worse is not None:  # ms-swift: the chat itself is the chosen one
        row, better = _with_chosen(row), "chosen"
    for name, found in (("chosen", better), ("rejected", worse)):
        if found is None:
            raise RowError(f"has no column {name!r}, only {named(row)}")
    assert better is not None and worse is not None
    prompts = [name for name in _PROMPTS if row.get(name) is not None]
    if len(prompts) > 1 and row.get("messages") == row[better]:  # UltraFeedback: the chosen chat once more
        prompts.remove("messages")
    if len(prompts) > 1:
        raise RowError(f"has its prompt twice, as {' and '.join(prompts)}; keep one")
    chosen, rejected = (_turns(row[name], name, True) for name in (better, worse))
    prompt = _prompt(row, prompts[0]) if prompts else None
    if prompt is None or _whole(chosen) or _whole(rejected):
        prompt, chosen, rejected = _parted(prompt, chosen, rejected)
    for name, answer in ((better, chosen), (worse, rejected)):
        if [turn["role"] for turn in answer] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in answer) or "nothing"
            raise RowError(f"{name} is {roles} after the prompt; expected one turn of the assistant")
    if _said(chosen[0]) == _said(rejected[0]):
        raise RowError("chosen and rejected are the same, so there is nothing to prefer")
    whole = [complete([*context(prompt), *answer], row) for answer in (chosen, rejected)]
    return Pair(*whole)


def _openai(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """OpenAI's shape, whose `input` holds the prompt and the tools, as columns side by side."""
    inner = row.get("input")
    if not isinstance(inner, Mapping) or row.get("preferred_output") is None:
        return row
    return {name: value for name, value in row.items() if name != "input"} | {
        name: value for name, value in inner.items() if name in ("messages", "tools", "functions")
    }


def _answer_column(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    found = [name for name in names if row.get(name) is not None]
    if len(found) > 1:
        raise RowError(f"has an answer twice, as {' and '.join(found)}; keep one")
    return found[0] if found else None


def _with_chosen(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if row.get("query") is not None and row.get("response") is not None:
        return {name: value for name, value in row.items() if name != "response"} | {"chosen": row["response"]}
    messages = row.get("messages")
    if row.get("rejected_messages") is not None and isinstance(messages, list):
        return {name: value for name, value in row.items() if name != "messages"} | {"chosen": messages}
    if row.get("rejected_response") is not None and isinstance(messages, list) and len(messages) > 1:
        return dict(row) | {"messages": messages[:-1], "chosen": messages[-1:]}
    raise RowError(f"has no column 'chosen', only {named(row)}")


def _whole(turns: list[Message]) -> bool:
    """Whether turns are a chat from its beginning, and not an answer."""
    return bool(turns[0]["role"] != "assistant")


def _parted(
    prompt: list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns that two whole chats share, and those in which they differ; a prompt next to them has to be in them."""
    both = zip(map(_said, chosen), map(_said, rejected), strict=False)
    count = next((n for n, (a, b) in enumerate(both) if a != b), None)
    if count is None:
        count = min(len(chosen), len(rejected))
        if len(chosen) == len(rejected):
            raise RowError("chosen and rejected are the same, so there is nothing to prefer")
    shared = chosen[:count]
    if prompt is None:
        if not shared:
            raise RowError(
                "has no prompt: chosen and rejected differ from their first turn on; add a column `prompt`, or name "
                "it with data.columns"
            )
        return shared, chosen[count:], rejected[count:]
    said, have = list(map(_said, prompt)), list(map(_said, shared))
    if not any(have[start : start + len(said)] == said for start in range(len(have) - len(said) + 1)):
        raise RowError("has a prompt that is not among the turns which chosen and rejected share; drop one of them")
    return shared, chosen[count:], rejected[count:]


def _said(turn: Message) -> Message:
    """A turn without its marks for training, in which the two chats may differ."""
    return {key: value for key, value in turn.items() if key not in ("train", "spans")}


def _prompt(row: Mapping[str, Any], name: str) -> list[Message]:
    if name in ("instruction", "query"):
        kind, answer = ("alpaca", "output") if name == "instruction" else ("query_response", "response")
        without_answer = {key: row[key] for key in (name, "input", "history") if key in row}
        return ADAPTERS[kind](without_answer | {answer: "-"})[:-1]
    return _turns(row[name], name, False)


def _turns(value: Any, name: str, answers: bool) -> list[Message]:
    if isinstance(value, str):
        text = read_text(value, name)
        if text.lstrip().startswith("Human:") and (turns := _dialog(text)):
            return turns
        return list(read_turns([{"role": "assistant" if answers else "user", "content": text}]))
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} is {shown(value)}; expected text, a message or a list of messages")
    return list(read_turns(value, f"message of {name}"))


def _dialog(text: str) -> list[Message]:
    """Turns of a text in the form of Anthropic's hh-rlhf: `Human: ...`, an empty line, `Assistant: ...`; else none."""
    found = list(_HUMAN.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    turns: list[Message] = []
    for match, end in zip(found, ends, strict=True):
        role = "user" if match.group(1) == "Human" else "assistant"
        said = text[match.end() : end]
        if role == "assistant" and not said and end == len(text):
            break  # a prompt that opens the turn which it asks for
        turns.append({"role": role, "content": said})
    return list(read_turns(turns))
