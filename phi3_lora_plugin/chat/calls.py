"""Tool calls as data sets write them -> `{"name", "arguments"}`: OpenAI's, Anthropic's, JSON, or as models write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from phi3_lora_plugin.chat.json_keys import TwiceError, loads
from phi3_lora_plugin.chat.row_error import RowError, shown

Call = dict[str, Any]

_MARKED = re.compile(r"<\|tool_call\|>\s*(.*?)\s*<\|/tool_call\|>\s*", re.DOTALL)
_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
_FUNCTOOLS = re.compile(r"functools(?=\[)")


def read_calls(calls: list[Any], what: str) -> list[Call]:
    """Calls with `name`, `arguments` (any JSON value; an object where there are none) and, if it has one, `id`.

    Raises:
        RowError: no name, arguments that are not JSON, or values that JSON has no form for.
    """
    read: list[Call] = []
    for call in calls:
        if isinstance(call, str):
            call = _from_json(call, what, "text that is")
            if isinstance(call, list):
                read += read_calls(call, what)
                continue
        inner = call.get("function") if isinstance(call, Mapping) else None
        function = inner if isinstance(inner, Mapping) else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise RowError(f"{what} calls a tool without a name: {shown(call)}")
        names = [name for name in ("arguments", "parameters", "input") if function.get(name) is not None]
        arguments = function[names[0]] if names else {}
        if isinstance(arguments, str):
            arguments = _from_json(arguments or "{}", what, "arguments that are")
        made = {"name": function["name"], "arguments": arguments}
        _check_json(made, what)
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            made["id"] = call["id"]
        read.append(made)
    return read


def calls_in(text: str) -> tuple[str, list[Call]]:
    """The text, and the calls at the end of it in a form that models of the family write; maybe none.

    Read are `<|tool_call|>[...]<|/tool_call|>` and `functools[...]`, each up to the end of the text, and the tags of
    Hermes, `<tool_call>{...}</tool_call>`, which data sets for other models have.
    """
    for marks in (_MARKED, _HERMES):
        blocks = list(marks.finditer(text))
        if not blocks:
            continue
        start = blocks[0].start()
        whole = all(a.end() == b.start() for a, b in zip(blocks, blocks[1:], strict=False))
        if not whole or blocks[-1].end() != len(text):
            continue
        try:
            values = [loads(block.group(1)) for block in blocks]
            return text[:start], read_calls([c for v in values for c in (v if isinstance(v, list) else [v])], "it")
        except (ValueError, RecursionError) as error:
            if isinstance(error, RowError) and marks is _MARKED:  # other tags may be what a text is about
                raise
    for found in _FUNCTOOLS.finditer(text):
        try:
            value, end = json.JSONDecoder().raw_decode(text, found.end())
            if not text[end:].strip() and value:
                return text[: found.start()], read_calls(value, "it")
        except (ValueError, RecursionError):
            continue
    return text, []


def split_results(item: Any) -> list[Any]:
    """A message as Anthropic writes it, whose parts hold results of tools, as a message for each and one for the rest.

    Any other message is given back as it is.
    """
    parts = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(parts, list | tuple) or not any(_is_result(part) for part in parts):
        return [item]
    results = [
        {"role": "tool", "content": part.get("content") or "", "tool_call_id": part.get("tool_use_id")}
        for part in parts
        if _is_result(part)
    ]
    rest = [part for part in parts if not _is_result(part)]
    return [*results, {**item, "content": rest}] if rest else results


def _is_result(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "tool_result"


def in_order(calls: list[Call], results: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Results in the order of the calls that they answer, where ids tell; otherwise as they stand.

    Raises:
        RowError: an id that no call has, or that has two results.
    """
    ids = [call.get("id") for call in calls]
    given = [result.get("id") for result in results]
    if None in ids or None in given or not results:
        return results
    for one in given:
        if one not in ids:
            raise RowError(f"{what} is followed by a result for the call {one!r}, which it does not make")
        if given.count(one) > 1:
            raise RowError(f"{what} is followed by two results for the call {one!r}")
    return sorted(results, key=lambda result: ids.index(result["id"]))


def _from_json(text: str, what: str, part: str) -> Any:
    try:
        return loads(text)
    except TwiceError as error:
        raise RowError(f"{what} calls a tool with JSON that {error}") from None
    except (ValueError, RecursionError):
        raise RowError(f"{what} calls a tool with {part} not JSON: {shown(text)}") from None


def _check_json(value: Any, what: str) -> None:
    """Refuse what JSON has no form for: Parquet may hold dates or bytes, and Python reads NaN."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} calls a tool with half of a surrogate pair, which is not a character") from None
    except (TypeError, ValueError) as error:
        raise RowError(f"calls of {what} cannot be written as JSON: {error}") from None
