"""Rows of the common shapes -> canonical messages (see `turns`); an adapter says in one sentence what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi3_lora_plugin.chat.chatgpt import chatgpt
from phi3_lora_plugin.chat.content import checked_text, read_text
from phi3_lora_plugin.chat.marks import MARKS, ROW_MARKS, decisive
from phi3_lora_plugin.chat.row_error import RowError, named, shown
from phi3_lora_plugin.chat.thoughts import THOUGHTS
from phi3_lora_plugin.chat.turns import Message, complete, read_turns, weighed
from phi3_lora_plugin.wording import closest

Adapter = Callable[[Mapping[str, Any]], list[Message]]

# Column names of each format: those it is recognised by, and those that it also reads.
REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "query_response": ("query", "response"),
    "conversation": ("conversation",),
    "chatgpt": ("mapping",),
    "segments": ("segments",),
    "text": ("text",),
}
_ANY = ("system", "system_prompt", "tools", "functions", *ROW_MARKS)
OPTIONAL = {
    "messages": _ANY,
    "sharegpt": _ANY,
    "alpaca": ("input", "history", *THOUGHTS, *_ANY),
    "prompt_completion": (*THOUGHTS, *_ANY),
    "query_response": ("history", *THOUGHTS, *_ANY),
    "conversation": _ANY,
    "chatgpt": ("current_node", *ROW_MARKS),
    "segments": ROW_MARKS,
    "text": ROW_MARKS,
}
# Many files have such a column beside the ones of another format.
_LAST = ("segments", "text")


def messages(row: Mapping[str, Any]) -> list[Message]:
    """Read `messages`: a list of `{role, content}` as OpenAI and mistral write it, with `weight` or `train`."""
    return _whole(row, list(read_turns(_listed(row, "messages"))))


def sharegpt(row: Mapping[str, Any]) -> list[Message]:
    """Read `conversations`: a list of `{from, value}`, beside the columns `system` and `tools` if given."""
    return _whole(row, list(read_turns(_listed(row, "conversations"))))


def alpaca(row: Mapping[str, Any]) -> list[Message]:
    """Read `instruction`, `input` (put on a line below it) and `output`, with `system` and `history` if given."""
    question = read_text(_column(row, "instruction"), "instruction")
    if row.get("input") is not None and (extra := read_text(row["input"], "input")):
        question = f"{question}\n{extra}" if question else extra
    answer = read_text(_column(row, "output"), "output")
    return _whole(row, [*_history(row), *_exchange(question, answer, row)])


def query_response(row: Mapping[str, Any]) -> list[Message]:
    """Read ms-swift's `query` and `response`, with `system` and `history` if given."""
    question, answer = (read_text(_column(row, name), name) for name in ("query", "response"))
    return _whole(row, [*_history(row), *_exchange(question, answer, row)])


def conversation(row: Mapping[str, Any]) -> list[Message]:
    """Read `conversation`: ms-swift's `{human, assistant}`, xtuner's `{system, input, output}`, or messages."""
    turns: list[Any] = []
    for number, item in enumerate(_listed(row, "conversation"), 1):
        names = [pair for pair in _EXCHANGES if isinstance(item, Mapping) and all(name in item for name in pair)]
        if not names:
            turns.append(item)
            continue
        known = (*names[0], "system", *MARKS)
        for key, value in item.items():
            if key not in known and (reason := decisive(key, value)):
                raise RowError(f"conversation {number}: {reason}")
        if item.get("system"):
            turns.append({"role": "system", "content": item["system"]})
        turns.append({"role": "user", "content": item[names[0][0]]})
        marks = {name: item[name] for name in MARKS if name in item}
        turns.append({"role": "assistant", "content": item[names[0][1]]} | marks)
    return _whole(row, list(read_turns(turns)))


def prompt_completion(row: Mapping[str, Any]) -> list[Message]:
    """Read `prompt` and `completion`, each a text or a list of messages; nothing in the prompt is trained."""
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if isinstance(prompt, list | tuple):
        turns = list(read_turns(_listed(row, "prompt"), "message of prompt"))
        turns = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in turns]
    else:
        turns = [*read_turns([{"role": "user", "content": read_text(prompt, "prompt")}])]
    if isinstance(completion, list | tuple):
        turns += read_turns(_listed(row, "completion"), "message of completion")
    else:
        turns += _exchange("", read_text(completion, "completion"), row)[1:]
    return _whole(row, turns)


def text(row: Mapping[str, Any]) -> list[Message]:
    """Read `text`: no chat, and nothing is put around it; all of it is trained, and the token that ends a text."""
    return weighed(row, [{"role": "text", "content": read_text(_column(row, "text"), "text")}])


def segments(row: Mapping[str, Any]) -> list[Message]:
    """Read axolotl's `segments`, `{label, text}`: texts that stand as they are, trained where `label` is true."""
    whole = ""
    spans = []
    for number, item in enumerate(_listed(row, "segments"), 1):
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), bool) or "text" not in item:
            raise RowError(f"segment {number} is {shown(item)}; expected an object with label (true or false) and text")
        part = checked_text(item["text"], f"text of segment {number}")
        if part:
            spans.append((len(whole), len(whole) + len(part), float(item["label"])))
        whole += part
    return weighed(row, [{"role": "text", "content": whole, "spans": spans, "as_it_is": True}])


ADAPTERS: dict[str, Adapter] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "query_response": query_response,
    "conversation": conversation,
    "chatgpt": chatgpt,
    "segments": segments,
    "text": text,
}


def detect(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the formats whose columns the row has; more than one is for the caller to refuse."""
    found = [name for name, columns in REQUIRED.items() if all(row.get(column) is not None for column in columns)]
    return [name for name in found if name not in _LAST] or found[:1]


_EXCHANGES = (("human", "assistant"), ("input", "output"), ("query", "response"), ("user", "assistant"))


def _exchange(question: str, answer: str, row: Mapping[str, Any] | None = None) -> list[Message]:
    """A question and its answer, with the thoughts that have a column of their own."""
    thoughts = {name: row[name] for name in THOUGHTS if isinstance(row.get(name), str)} if row else {}
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | thoughts]
    return list(read_turns(messages))


def _history(row: Mapping[str, Any]) -> list[Message]:
    turns: list[Message] = []
    for number, pair in enumerate(_listed(row, "history") if row.get("history") is not None else (), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history {number} is {shown(pair)}; expected a pair [question, answer]")
        question, answer = (read_text(one, f"{name} of history {number}")
                            for one, name in zip(pair, ("question", "answer"), strict=True))  # fmt: skip
        turns += _exchange(question, answer)
    return turns


def _whole(row: Mapping[str, Any], turns: list[Message]) -> list[Message]:
    system, tools = ((row.get(name) if row.get(name) is not None else row.get(other))
                     for name, other in (("system", "system_prompt"), ("tools", "functions")))  # fmt: skip
    return weighed(row, complete(turns, system=system, tools=tools))


def _column(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        near = closest(name, [key for key in row if isinstance(key, str)])
        advice = f"; write data.columns: {{{name}: {near}}} if that is it" if near else ""
        raise RowError(f"has no column {name!r}, only {named(row)}{advice}")
    return row[name]


def _listed(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    """Return a column that holds a list, or its JSON text as in a CSV file; never an empty one, but for `history`."""
    value = _column(row, name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{name} is {shown(value)}; expected a list, or its JSON text") from None
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is {shown(value)}; expected a list")
    if not value and name != "history":
        raise RowError(f"{name} is empty")
    return value
