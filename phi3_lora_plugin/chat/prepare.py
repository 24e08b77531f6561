"""Messages -> the turns that a template renders: nothing left in them that it would drop or mistake."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, get_args

from phi3_lora_plugin.chat.calls import read_calls
from phi3_lora_plugin.chat.marks import HEAVIEST, Span
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.templates import Template
from phi3_lora_plugin.chat.thoughts import CLOSE, OPEN, without_tags
from phi3_lora_plugin.chat.tool_formats import ToolFormat, said_and_called, tool_format
from phi3_lora_plugin.error import Phi3LoraError
from phi3_lora_plugin.recipe.sections import ChatSection

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_OF_TEXT = ("role", "content", "train", "weight", "spans", "as_it_is")
LONGEST = 10_000_000  # characters of one message: far beyond any context, far below what a tokenizer dies of


class EncodeError(Phi3LoraError):
    """A conversation that cannot be encoded as it is.

    `reason` is one of "messages", "system", "tools", "thoughts", "control_tokens", "untrained" and "truncated".
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, str(self))


@dataclass(frozen=True)
class Policy:
    """What to do with what a template has no place for, and which turns carry loss; keys of the recipe's `data`."""

    train_on: str = "assistant"
    system: str = "error"
    tools: str = "error"
    control_tokens: str = "error"
    tool_format: str = "auto"
    thoughts: str = "error"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            allowed = get_args(ChatSection.model_fields[name].annotation)
            if value not in allowed:
                raise Phi3LoraError(f"{name}={value!r} is not one of {', '.join(allowed)}")

    @classmethod
    def of(cls, data: ChatSection) -> Policy:
        """As configured by a recipe's `data`."""
        return cls(**{field.name: getattr(data, field.name) for field in fields(cls)})


def prepare(
    messages: Sequence[Message], kind: Template, policy: Policy, control: re.Pattern[str]
) -> list[dict[str, Any]]:
    """Copies of the messages with nothing left that the template drops or mistakes; one rendered turn for each.

    Of a row of plain text, its only message, of the role "text".

    Raises:
        EncodeError: as `encode`.
    """
    if len(messages) == 1 and isinstance(messages[0], Mapping) and messages[0].get("role") == "text":
        return [_plain(messages[0], policy, control)]
    turns = [_checked(message, number) for number, message in enumerate(messages, 1)]
    for number, turn in enumerate(turns, 1):
        for key in ("content", "tools"):
            if isinstance(turn.get(key), str) and (found := control.search(turn[key])):
                if policy.control_tokens != "escape":
                    raise EncodeError(
                        "control_tokens",
                        f"message {number} ({turn['role']}) has the control token {found.group()} in its {key}, which "
                        "would end or open a turn; clean the text, or write data.control_tokens: escape",
                    )
                _escape(turn, key, control)
        if "calls" in turn:
            _add_calls(turn, tool_format(policy.tool_format, kind.name), number, control)
        if "thoughts" in turn:
            _add_thoughts(turn, policy, number, control)
    if not kind.tools:
        turns = _without_tools(turns, kind, policy.tools)
    if not kind.system:
        turns = _without_system(turns, kind, policy.system)
    if not kind.empty_system:
        turns = [turn for turn in turns if turn["role"] != "system" or turn["content"]]
    return turns


def _plain(message: Message, policy: Policy, control: re.Pattern[str]) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if key in _OF_TEXT}
    if not isinstance(turn.get("content"), str):
        raise EncodeError("messages", "the text is not text")
    _check_length(turn["content"], "the text")
    if turn.get("spans") is not None:
        turn["spans"] = checked_spans(turn["spans"], turn["content"], "the text")
    keep = turn.get("as_it_is") or policy.control_tokens == "keep"
    if not keep and (found := control.search(turn["content"])):
        if policy.control_tokens == "error":
            raise EncodeError(
                "control_tokens",
                f"the text has the control token {found.group()}, as if a template had been applied already; give "
                "the chats themselves, or write data.control_tokens: keep (all of it is trained as it is) or escape",
            )
        _escape(turn, "content", control)
    return turn


def _read_calls(message: Message, number: int) -> list[Any]:
    """OpenAI's `tool_calls` of a message that was not read before."""
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    try:
        return read_calls(list(calls), f"message {number}")
    except RowError as error:
        raise EncodeError("messages", str(error)) from error


def _add_calls(turn: dict[str, Any], how: ToolFormat, number: int, control: re.Pattern[str]) -> None:
    """Write the calls of a turn after what it says."""
    if missing := [token for token in how.tokens if not control.fullmatch(token)]:
        raise EncodeError(
            "tools",
            f"message {number} calls a tool, and data.tool_format: {how.name} needs the token {missing[0]}, which the "
            "tokenizer does not have",
        )
    said = turn["content"]
    turn["content"] = said_and_called(said, turn.pop("calls"), how, control)
    if "spans" in turn:
        turn["spans"] = [*turn["spans"], (len(said), len(turn["content"]), 1.0)]


def _add_thoughts(turn: dict[str, Any], policy: Policy, number: int, control: re.Pattern[str]) -> None:
    """Put the thoughts of a turn before what it says, or leave them out."""
    block = turn.pop("thoughts")
    if policy.thoughts == "error":
        raise EncodeError(
            "thoughts",
            f"message {number} (assistant) has thoughts; write data.thoughts: train (they are learned), context (they "
            "are there and not learned) or drop",
        )
    if policy.thoughts == "drop":
        return
    if found := control.search(without_tags(block)):
        if policy.control_tokens != "escape":
            raise EncodeError(
                "control_tokens",
                f"message {number} (assistant) has the control token {found.group()} in its thoughts; clean the text, "
                "or write data.control_tokens: escape",
            )
        block = control.sub(lambda match: match[0] if match[0] in (OPEN, CLOSE) else _spaced(match), block)
    said = turn["content"]
    turn["content"] = block + said
    turn["thought"] = len(block)
    if policy.thoughts == "context" or "spans" in turn:
        rest = turn.get("spans") or ([(0, len(said), 1.0)] if said else [])
        weight = 0.0 if policy.thoughts == "context" else 1.0
        turn["spans"] = [(0, len(block), weight), *((a + len(block), b + len(block), w) for a, b, w in rest)]


def _check_length(text: str, what: str) -> None:
    if len(text) > LONGEST:
        raise EncodeError("messages", f"{what} has {len(text):,} characters; at most {LONGEST:,} can be encoded")


def _checked(message: Message, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise EncodeError("messages", f"message {number} is a {type(message).__name__}; expected role and content")
    role, content = message.get("role"), message.get("content")
    what = f"message {number} ({role})"
    calls = message.get("calls") or _read_calls(message, number)
    if content is None and calls:
        content = ""
    if role not in ROLES:
        raise EncodeError("messages", f"message {number} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise EncodeError("messages", f"{what} has content of type {type(content).__name__}; expected text")
    _check_length(content, what)
    tools = message.get("tools")
    if tools is not None and (role != "system" or not isinstance(tools, str)):
        raise EncodeError("messages", f"{what} has tools; expected text, on a system message")
    turn: dict[str, Any] = {"role": role, "content": content}
    if tools is not None:
        turn["tools"] = tools
    thoughts = message.get("thoughts")
    if (calls or thoughts is not None) and role != "assistant":
        raise EncodeError("messages", f"{what} has calls or thoughts; only the assistant has")
    if calls:
        turn["calls"] = calls
    if thoughts is not None:
        turn["thoughts"] = thoughts
    train, weight = message.get("train"), message.get("weight")
    if not (train is None or isinstance(train, bool)):
        raise EncodeError("messages", f"{what} has train {train!r}; expected true or false")
    if weight is not None and not (isinstance(weight, int | float) and 0 <= weight < HEAVIEST):
        raise EncodeError("messages", f"{what} has weight {weight!r}; expected a number from 0 to {HEAVIEST}")
    if train is False or weight == 0:
        turn["train"] = False
    elif weight not in (None, 1):
        turn["weight"] = float(weight)
    if message.get("spans") is not None:
        turn["spans"] = checked_spans(message["spans"], content, what)
    return turn


def checked_spans(spans: Any, content: str, what: str) -> list[Span]:
    """Spans that follow one another and cover all of `content`.

    Raises:
        EncodeError: they do not.
    """
    at = 0
    given: list[Any] = list(spans) if isinstance(spans, list | tuple) else [None]
    for one in given:
        good = isinstance(one, list | tuple) and len(one) == 3 and one[0] == at < one[1] and 0 <= one[2] < HEAVIEST
        if not good:
            raise EncodeError("messages", f"{what} has spans that are not [first, end, weight] from {at} on")
        at = one[1]
    if at != len(content):
        raise EncodeError("messages", f"{what} has spans up to character {at}, while its text has {len(content)}")
    return [(first, end, float(weight)) for first, end, weight in given]


def _escape(turn: dict[str, Any], key: str, control: re.Pattern[str]) -> None:
    """Put a blank into each control token of a text, and move the spans after it along."""
    starts = [match.start() for match in control.finditer(turn[key])]
    turn[key] = control.sub(_spaced, turn[key])
    if key == "content" and "spans" in turn:
        turn["spans"] = [
            (first + bisect_left(starts, first), end + bisect_left(starts, end), weight)
            for first, end, weight in turn["spans"]
        ]


def _spaced(match: re.Match[str]) -> str:
    return f"{match[0][0]} {match[0][1:]}"


def _without_tools(turns: list[dict[str, Any]], kind: Template, policy: str) -> list[dict[str, Any]]:
    """Tool answers as user turns and declared tools as system text, or neither."""
    if not any(turn["role"] == "tool" or "tools" in turn for turn in turns):
        return turns
    if policy == "error":
        raise EncodeError(
            "tools",
            f"template {kind.name} has no place for tools; write data.tools: text (answers of tools become user turns, "
            "declared tools system text) or data.tools: drop",
        )
    left: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            if policy == "text":
                left.append(turn | {"role": "user"})
            continue
        tools = turn.pop("tools", None)
        if tools is not None and policy == "text":
            turn["content"] = "\n\n".join(filter(None, (turn["content"], tools)))
        left.append(turn)
    return left


def _without_system(turns: list[dict[str, Any]], kind: Template, policy: str) -> list[dict[str, Any]]:
    """System text in front of the first user turn, or nowhere."""
    texts = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"]]
    others = [turn for turn in turns if turn["role"] != "system"]
    if not texts or policy == "drop":
        return others
    if policy == "error":
        raise EncodeError(
            "system",
            f"template {kind.name} silently drops system messages; write data.system: fold (the text goes into the "
            "first user turn, in training and in chat) or data.system: drop",
        )
    first = next((turn for turn in others if turn["role"] == "user"), None)
    if first is None:
        raise EncodeError("system", "no user turn to fold the system message into")
    first["content"] = "\n\n".join([*texts, first["content"]])
    return others


def control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """A pattern of every token that is looked for in text as it stands, special or not."""
    return _pattern(tuple(sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len)[::-1]))


@lru_cache(maxsize=16)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
