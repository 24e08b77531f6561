"""The content of a message -> text: as it is, or joined from parts, with what each part says of being learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phi3_lora_plugin.chat.marks import MARKS, Span, decisive, joined, spans_of, weight_of
from phi3_lora_plugin.chat.row_error import RowError, shown

# OpenAI's Responses API has names of its own for text; LLaMA-Factory's parts hold it as `value`.
_TEXT = ("text", "input_text", "output_text")
_THOUGHTS = ("reasoning", "thinking", "thought")
_CALLS = ("tool_call", "function_call", "tool_use")
_MEDIA = ("image", "video", "audio", "picture", "file")
_KEYS = ("type", "text", "value", "reasoning", "thinking", "content", "signature", "id", "name", "input")


@dataclass
class Content:
    """What a message says, in the order in which it says it."""

    text: str = ""
    spans: list[Span] | None = None  # over the whole text, where it is not all learned alike
    thoughts: str | None = None
    calls: list[Any] = field(default_factory=list)  # tool calls as the parts hold them


def read_text(value: Any, what: str) -> str:
    """Return text as it is, and text parts (`[{type: text, text: ...}]`) joined as they stand."""
    content = read_content(value, what)
    if content.thoughts is not None or content.calls or content.spans is not None:
        raise RowError(f"{what} has a part that is not text, or not learned like the others")
    return content.text


def read_content(value: Any, what: str) -> Content:
    """Read text or parts.

    Raises:
        RowError: null, anything that is not text, or a picture.
    """
    if isinstance(value, list | tuple) and value:
        return _parts(value, what)
    return Content(checked_text(value, what))


def checked_text(value: Any, what: str) -> str:
    """Return `value` if it is text that can be encoded."""
    if value is None:
        raise RowError(f"{what} is null or missing; expected text")
    if not isinstance(value, str):
        raise RowError(f"{what} is {shown(value)}; expected text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"{what} holds {value[error.start]!r}, half of a surrogate pair, which is not a character"
            ) from None
    return value


def with_details(content: Content, item: Mapping[str, Any], what: str) -> Content:
    """The content with the spans of the message's `train_detail`, if it has one."""
    spans = spans_of(item, content.text, what)
    if spans is None:
        return content
    if content.spans is not None:
        raise RowError(f"{what} has train_detail and parts with marks of their own; keep one")
    content.spans = spans
    return content


def _parts(parts: list[Any] | tuple[Any, ...], what: str) -> Content:
    made = Content()
    texts: list[tuple[str, float | None]] = []
    thoughts: list[str] = []
    for number, part in enumerate(parts, 1):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or not isinstance(kind, str):
            raise RowError(f"{what} has a part that is not text: {shown(part)}")
        if any(word in kind for word in _MEDIA):
            raise RowError(
                f"{what} has a part of type {kind}, and only its text would be trained; skip such rows with "
                "data.on_error: skip"
            )
        inner = next((part[key] for key in ("text", "value", kind, "content") if part.get(key) is not None), None)
        if kind in _CALLS:
            made.calls.append(part if inner is None or kind == "tool_use" else inner)
        elif kind in _THOUGHTS:
            thoughts.append(checked_text(inner, f"part {number} of {what}"))
        elif kind in _TEXT and isinstance(inner, str):
            texts.append((checked_text(inner, f"part {number} of {what}"), weight_of(part, f"part {number} of {what}")))
        else:
            raise RowError(f"{what} has a part that is not text: {shown(part)}")
        for key, value in part.items():
            if key in _KEYS or key in MARKS or kind in _CALLS:
                continue
            if reason := decisive(key, value):
                raise RowError(f"part {number} of {what}: {reason}")
    made.text = "".join(text for text, _ in texts)
    made.thoughts = "\n".join(thoughts) if thoughts else None
    if any(weight is not None for _, weight in texts):
        made.spans = joined([1.0 if weight is None else weight for text, weight in texts for _ in text])
    return made
