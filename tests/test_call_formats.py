"""Data sets of tool calls with shapes of their own, read as turns with calls and declarations."""

from __future__ import annotations

import json
from typing import Any

import pytest
from read_rows import read
from tiny import chat

from phi3_lora_plugin.chat.row_error import RowError

TOOL = {"name": "area", "description": "d", "parameters": {"type": "object", "properties": {"base": {}}}}


GLAIVE = {
    "system": f"SYSTEM: Use them -\n{json.dumps(TOOL, indent=4)}\n{json.dumps(TOOL)}\n",
    "chat": 'USER: How big?\n\n\nASSISTANT: I see. <functioncall> {"name": "area", "arguments": \'{"base": '
    '"it\\\'s 3"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"area": 9}\n\n\nASSISTANT: It is 9. <|endoftext|>\n\n\n',
}


def test_glaive() -> None:
    system, asked, called, result, said = read(GLAIVE)
    assert system["content"] == "Use them -" and json.loads(system["tools"]) == [TOOL, TOOL]
    assert asked == {"role": "user", "content": "How big?"}
    calls = [{"name": "area", "arguments": {"base": "it's 3"}}]
    assert called == {"role": "assistant", "content": "I see.", "calls": calls}
    assert (result, said["content"]) == ({"role": "tool", "content": '{"area": 9}'}, "It is 9.")
    plain = read({"system": "SYSTEM: No functions.", "chat": "USER: Hi\n\n\nASSISTANT: Ho <|endoftext|>"})
    assert [turn["content"] for turn in plain] == ["No functions.", "Hi", "Ho"]
    unquoted = '<functioncall> {"name": "area", "arguments": {"base": 3}}'
    made = read({"system": "s", "chat": f"USER: a\n\n\nASSISTANT: {unquoted}"})
    assert made[2]["calls"][0]["arguments"] == {"base": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hello", "does not begin with USER: or ASSISTANT:"),
        ([{"role": "user"}], "lists of messages are read with data.columns: {messages: chat}"),
        ("USER: a\n\n\nASSISTANT: <functioncall> {'name'", "calls a tool with text that is not JSON"),
    ],
)
def test_what_is_wrong_with_a_chat_of_glaive(text: Any, message: str) -> None:
    with pytest.raises(RowError, match=message.replace("{", r"\{")):
        read({"system": "s", "chat": text})


def test_xlam() -> None:
    answers = [{"name": "area", "arguments": {"base": [1, "]"]}}, {"name": "area", "arguments": {}}]
    system, asked, called = read({"id": 1, "query": "q", "answers": json.dumps(answers), "tools": json.dumps([TOOL])})
    assert json.loads(system["tools"]) == [TOOL] and asked["content"] == "q" and called["calls"] == answers


def test_bfcl() -> None:
    row = {
        "id": "parallel_0", "question": [[{"role": "user", "content": "q"}]], "function": [TOOL],
        "ground_truth": [{"area": {"base": [3, 3.0], "unit": ["", "cm"]}}, {"area": {"base": [{"x": [1], "y": [""]}]}}],
    }  # fmt: skip
    _, asked, called = read(row)
    assert asked["content"] == "q"
    assert [call["arguments"] for call in called["calls"]] == [{"base": 3}, {"base": {"x": 1}}]
    with pytest.raises(RowError, match="question has 2 rounds"):
        read(row | {"question": [[{"role": "user", "content": "q"}]] * 2})
    with pytest.raises(RowError, match="expected {name: {argument: "):
        read(row | {"ground_truth": ["area(3)"]})


def test_tags_of_hermes_are_calls_and_text_about_them_is_text() -> None:
    def said(text: str) -> dict[str, Any]:
        return read(chat("q", text))[1]

    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    made = said(f"I look.\n{call}\n{call}")
    assert made["calls"] == [{"name": "f", "arguments": {"a": 1}}] * 2 and made["content"] == "I look.\n"
    for text in (f"{call} is how it looks", '<tool_call>{"x": 1}</tool_call>', "<tool_call>f</tool_call>"):
        assert said(text) == {"role": "assistant", "content": text}
