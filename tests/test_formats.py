"""Rows of four shapes -> the same canonical messages, or one sentence that says what is wrong with the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import turns as chat

from phi3_lora_plugin.chat.columns import lookup, rename, unread_values
from phi3_lora_plugin.chat.formats import ADAPTERS, OPTIONAL, REQUIRED, detect
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.turns import ROLES

user, assistant = ({"role": role} for role in ("user", "assistant"))


def as_messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": messages}


def as_sharegpt(messages: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in messages]}


def as_alpaca(messages: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"input": ""}
    if messages[0]["role"] == "system":
        row["system"] = messages[0]["content"]
        messages = messages[1:]
    texts = [m["content"] for m in messages]
    row["history"] = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
    return row | {"instruction": texts[-2], "output": texts[-1]}


def as_prompt_completion(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": messages[:-1], "completion": messages[-1:]}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.lists(texts, min_size=2, max_size=2), st.none() | texts.filter(bool))
def test_the_same_dialogue_in_four_formats_is_the_same_messages(turns: list[str], system: str | None) -> None:
    expected = chat(*turns, system=system)
    assert ADAPTERS["messages"](as_messages(expected)) == expected
    assert ADAPTERS["sharegpt"](as_sharegpt(expected)) == expected
    assert ADAPTERS["alpaca"](as_alpaca(expected)) == expected
    assert ADAPTERS["prompt_completion"](as_prompt_completion(expected)) == expected
    plain = {"prompt": turns[0], "completion": turns[1], "system": system}
    assert ADAPTERS["prompt_completion"](plain) == expected


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4))
def test_several_turns_are_the_same_messages_and_a_prompt_is_never_trained(pairs: list[tuple[str, str]]) -> None:
    expected = chat(*(text for pair in pairs for text in pair))
    assert ADAPTERS["sharegpt"](as_sharegpt(expected)) == ADAPTERS["messages"](as_messages(expected)) == expected
    assert ADAPTERS["alpaca"](as_alpaca(expected)) == expected
    made = ADAPTERS["prompt_completion"](as_prompt_completion(expected))
    assert [(m["role"], m["content"]) for m in made] == [(m["role"], m["content"]) for m in expected]
    assert [m.get("train") for m in made if m["role"] == "assistant"] == [False] * (len(pairs) - 1) + [None]


def test_sharegpt_and_openai_write_a_tool_call_differently_and_mean_the_same() -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    openai_call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    openai = {
        "tools": [{"name": "add"}],
        "messages": [
            {"role": "user", "content": "1 and 1?"},
            {"role": "assistant", "content": None, "tool_calls": [openai_call]},
            {"role": "tool", "tool_call_id": "x", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ],
    }
    sharegpt = {
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "1 and 1?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two."},
        ],
    }
    expected = [
        {"role": "system", "content": "", "tools": '[{"name": "add"}]'},
        {"role": "user", "content": "1 and 1?"},
        {"role": "assistant", "content": "", "calls": [{"name": "add", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    assert ADAPTERS["messages"](openai) == ADAPTERS["sharegpt"](sharegpt) == expected


def test_a_call_behind_words_joins_their_turn_and_several_calls_are_a_list() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in "ab"]
    row = {"messages": [user | {"content": "go"}, assistant | {"content": "I look.", "tool_calls": calls}]}
    made = [{"name": name, "arguments": {}} for name in "ab"]
    assert ADAPTERS["messages"](row)[1] == assistant | {"content": "I look.", "calls": made}
    old = {"messages": [row["messages"][0], assistant | {"content": None, "function_call": {"name": "a"}}]}
    assert ADAPTERS["messages"](old)[1] == assistant | {"content": "", "calls": made[:1]}
    parts = [("human", "go"), ("gpt", "I look."), ("function_call", '{"name": "a"}'), ("tool_call", '{"name": "b"}')]
    split = {"conversations": [{"from": role, "value": text} for role, text in parts]}
    assert ADAPTERS["sharegpt"](split)[1] == assistant | {"content": "I look.", "calls": made}


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0, "train": False}, {"weight": 0.0}])
def test_a_turn_marked_as_untrained_says_so_and_only_it(mark: dict[str, Any]) -> None:
    turns = chat("a", "b", "c", "d")
    marked = [turns[0], turns[1] | mark, turns[2], turns[3] | {"weight": 1, "train": None}]
    assert ADAPTERS["messages"]({"messages": marked}) == [turns[0], turns[1] | {"train": False}, *turns[2:]]


def test_alpaca_puts_the_input_below_the_instruction() -> None:
    row = {"instruction": "Sort.", "input": "2 1", "output": "1 2"}
    assert ADAPTERS["alpaca"](row) == chat("Sort.\n2 1", "1 2")
    assert ADAPTERS["alpaca"](row | {"instruction": ""}) == chat("2 1", "1 2")


def test_content_is_text_parts_joined_and_never_stripped() -> None:
    parts = [{"type": "text", "text": " a"}, {"type": "text", "text": "b\n"}]
    row = {"messages": [user | {"content": parts}, assistant | {"content": "\n\n x "}]}
    assert ADAPTERS["messages"](row) == chat(" ab\n", "\n\n x ")


def test_the_assistant_may_open_and_roles_are_read_in_any_case() -> None:
    row = {"conversations": [{"from": "GPT", "value": "Hi!"}, {"from": "Human", "value": "Bye"}]}
    assert ADAPTERS["sharegpt"](row) == [assistant | {"content": "Hi!"}, user | {"content": "Bye"}]


def test_a_column_of_a_csv_file_may_hold_the_json_of_a_list() -> None:
    assert ADAPTERS["messages"]({"messages": json.dumps(chat("a", "b"))}) == chat("a", "b")


ok = {"role": "assistant", "content": "x"}
hi = {"role": "user", "content": "hi"}
WRONG_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages is null; expected a list"),
    ([], "messages is empty"),
    ("hello", r"messages is text \('hello'\); expected a list, or its JSON text"),
    ({"role": "user"}, "messages is an object"),
    ([[hi, ok]], "message 1 is a list .* expected an object with role and content"),
    ([hi, "x"], r"message 2 is text \('x'\)"),
    ([hi, {"content": "x"}], "message 2 has no role, only content"),
    ([hi, {"role": None, "content": "x"}], "message 2 has no role"),
    ([hi, {"role": 3, "content": "x"}], r"message 2 has the unknown role a number \(3\)"),
    ([{"role": "bot", "content": "x"}], "message 1 has the unknown role .*bot.*known are system"),
    ([hi, assistant], r"content of message 2 \(assistant\) is null or missing; expected text"),
    ([hi, assistant | {"content": 7}], r"content of message 2 .* is a number \(7\)"),
    ([hi, assistant | {"content": True}], r"is a switch \(True\)"),
    ([hi, assistant | {"content": []}], r"is a list \(\[\]\); expected text"),
    ([hi, assistant | {"content": ["x"]}], "has a part that is not text"),
    ([user | {"content": [{"type": "image_url"}]}, ok], "message 1 .* a part of type image_url, and only its text"),
    ([hi, assistant | {"content": "\ud83d"}], "half of a surrogate pair"),
    ([hi], "has no turn of the assistant"),
    ([hi, hi, ok], "turns 1 and 2 are both of role user"),
    ([hi, ok, ok], "turns 2 and 3 are both of role assistant"),
    ([hi, {"role": "system", "content": "s"}, ok], "turn 2 is a system message"),
    ([hi, {"role": "tool", "content": "t"}, ok], "turn 2 is a tool's answer"),
    ([hi, ok | {"weight": -0.5}], r"weight of message 2 .* a number \(-0.5\); expected a number from 0"),
    ([hi, ok | {"train": "no"}], "expected true or false"),
    ([hi, ok | {"train": True, "weight": 0}], "train: true and weight: 0, which contradict each other; leave one out"),
    ([hi | {"weight": 1}, ok], "is marked as trained, which only the assistant's turns are"),
    ([hi, ok | {"tool_calls": [{"id": 1}]}], "calls a tool without a name"),
    ([hi, ok | {"tool_calls": [{"function": "f"}]}], "calls a tool without a name"),
    ([hi, ok | {"tool_calls": [{"name": "f", "arguments": "{"}]}], "arguments that are not JSON"),
    ([hi | {"tool_calls": [{"name": "f"}]}, ok], "has tool calls, which only the assistant"),
]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(("messages", {"messages": given}, message) for given, message in WRONG_MESSAGES),
    ("messages", {}, "has no column 'messages', only nothing"),
    ("messages", {"mesages": []}, r"has no column 'messages', only mesages; write data.columns: \{messages: mesages\}"),
    ("messages", {"messages": [hi, ok], "tools": 3}, "tools of row is a number"),
    ("messages", {"messages": [{"role": "system", "content": "a"}, hi, ok], "system": "b"}, "that differ; keep one"),
    ("sharegpt", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, r"message 1 \(human\) is null"),
    (
        "sharegpt",
        {"conversations": [{"from": "bing", "value": "x"}]},
        "unknown role .*human, assistant, gpt.*observation",
    ),
    ("alpaca", {"instruction": "a"}, "has no column 'output', only instruction"),
    ("alpaca", {"instruction": None, "output": "b"}, "instruction is null or missing"),
    ("alpaca", {"instruction": "a", "output": ["b", "c"]}, "output has a part that is not text"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 4}, r"input is a number \(4\)"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["q"]]},
        r"history 1 is a list .* a pair \[question, ans",
    ),
    ("prompt_completion", {"prompt": "a", "completion": None}, "completion is null or missing"),
    ("prompt_completion", {"prompt": [], "completion": "x"}, "prompt is empty"),
    ("prompt_completion", {"prompt": "a", "completion": [hi]}, "turns 1 and 2 are both of role user"),
]


@pytest.mark.parametrize(("name", "row", "message"), WRONG)
def test_p28_what_is_wrong_with_a_row_is_one_clear_sentence(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        ADAPTERS[name](row)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*ROLES, "bot"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "weight", "train", "tool_calls", "x"]), inner
        )
    ),
    max_leaves=12,
)
names = sorted({column for table in (REQUIRED, OPTIONAL) for columns in table.values() for column in columns})


@pytest.mark.slow
@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(names), values), st.sampled_from(sorted(ADAPTERS)))
def test_p28_whatever_a_row_holds_it_becomes_canonical_messages_or_a_row_error(row: dict[str, Any], name: str) -> None:
    before = repr(row)
    try:
        made = ADAPTERS[name](row)
    except RowError as error:
        assert str(error)
    else:
        assert {turn["role"] for turn in made} <= {"system", "user", "assistant", "tool"}
        assert all(isinstance(turn["content"], str) for turn in made)
        known = {"role", "content", "train", "weight", "tools", "spans", "calls", "thoughts", "as_it_is"}
        assert all(set(turn) <= known for turn in made)
        assert any(turn["role"] == "assistant" for turn in made)
    assert repr(row) == before  # rows are never written to
    detect(row), list(unread_values(row, (*REQUIRED[name], *OPTIONAL[name])))


spoken = [role for role in ROLES if role not in ("function_call", "tool_call")]  # the others hold JSON


@given(st.lists(st.sampled_from([*spoken, "narrator"]), min_size=1, max_size=6))
def test_no_role_and_no_text_vanishes(roles: list[str]) -> None:
    row = {"conversations": [{"from": role, "value": f"<{n}>"} for n, role in enumerate(roles)]}
    try:
        made = ADAPTERS["sharegpt"](row)
    except RowError:
        return
    assert "narrator" not in roles
    assert "".join(turn["content"].replace("\n", "") for turn in made) == "".join(f"<{n}>" for n in range(len(roles)))
    for n, role in enumerate(roles):
        assert next(turn for turn in made if f"<{n}>" in turn["content"])["role"] == ROLES[role]


def test_formats_are_recognised_by_their_columns() -> None:
    assert detect(as_messages(chat("a", "b"))) == ["messages"]
    assert detect({"prompt": "a", "prompt_id": 1, "messages": chat("a", "b")}) == ["messages"]
    assert detect({"instruction": "a", "output": "b", "text": "c"}) == ["alpaca"]
    assert detect({"messages": None, "conversations": [], "output": None, "instruction": "x"}) == ["sharegpt"]
    assert detect({"messages": [], "prompt": "a", "completion": "b"}) == ["messages", "prompt_completion"]
    assert detect({"question": "a", "answer": "b"}) == []


def test_columns_are_renamed_also_inside_and_in_messages() -> None:
    row = {"question": "q", "answer": "a", "id": 1}
    assert rename(row, {"prompt": "question", "completion": "answer"}) == {"prompt": "q", "completion": "a", "id": 1}
    task = {"instruction": "i", "instances": [{"input": "x", "output": "o"}]}
    inside = rename(task, {"output": "instances.0.output", "input": "instances.0.input"})
    assert inside == task | {"output": "o", "input": "x"}
    odd = {"dialog": [{"speaker": "human", "text": "hi"}]}
    renamed = rename(odd, {"conversations": "dialog", "from": "speaker", "value": "text"})
    assert renamed == {"conversations": [{"from": "human", "value": "hi"}]}
    swapped = rename({"prompt": "a", "completion": "b"}, {"prompt": "completion", "completion": "prompt"})
    assert swapped == {"prompt": "b", "completion": "a"}
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert rename({"instruction": "i", "output": "o"}, {"input": "context"}) == {"instruction": "i", "output": "o"}


def test_a_missing_foreign_column_is_named_with_its_neighbours() -> None:
    message = r"has no column 'qestion' \(data.columns.prompt\), only question, answer; did you mean 'question'\?"
    with pytest.raises(RowError, match=message):
        rename({"question": "q", "answer": "a"}, {"prompt": "qestion", "completion": "answer"})
    with pytest.raises(RowError, match="has no column 'a.3.b'"):
        rename({"a": [{"b": 1}]}, {"prompt": "a.3.b"})


def test_what_no_format_reads_is_listed() -> None:
    turns = [hi | {"id": 7, "name": None}, ok | {"timestamp": 1, "weight": 1}]
    unread = unread_values({"messages": turns, "id": 1}, (*REQUIRED["messages"], *OPTIONAL["messages"]))
    assert {path for path, _ in unread} == {"id", "messages[].id", "messages[].timestamp"}


def test_real_chats_of_every_format_are_read_whole(shared_data: Path) -> None:
    chats = shared_data / "chats"
    glaive = json.loads((chats / "glaive_toolcall_sharegpt.json").read_text(encoding="utf-8"))
    for row in glaive:
        made = ADAPTERS["sharegpt"](row)
        turns = [turn for turn in made if turn["role"] != "system"]
        for turn, item in zip(turns, row["conversations"], strict=True):
            if item["from"] == "function_call":
                assert turn["content"] == "" and turn["calls"] == [json.loads(item["value"])]
            else:
                assert turn["content"] == item["value"] and "calls" not in turn
        assert ("tools" in made[0]) == (row["tools"] != "[]")
    for row in json.loads((chats / "fastchat_sharegpt.json").read_text(encoding="utf-8")):
        roles = [turn["role"] for turn in ADAPTERS["sharegpt"](row)]
        assert roles == ["user", "assistant"] * (len(row["conversations"]) // 2)
    for line in (chats / "openai_toy_chat.jsonl").read_text(encoding="utf-8").splitlines():
        assert ADAPTERS["messages"](json.loads(line)) == json.loads(line)["messages"]
    for row in json.loads((chats / "identity_alpaca.json").read_text(encoding="utf-8")):
        assert ADAPTERS["alpaca"](row) == chat(row["instruction"], row["output"])
