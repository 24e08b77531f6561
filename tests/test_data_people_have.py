"""Data as other tools write it: read for what it means, or refused with a sentence; nothing that matters is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import read_rows
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from read_rows import read

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.adapt import adapted
from phi3_lora_plugin.chat.columns import refuse_decisive, unread_values
from phi3_lora_plugin.chat.dataset import Data, DataError, load_data
from phi3_lora_plugin.chat.encode import EncodeError, encode
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.marks import token_weights
from phi3_lora_plugin.chat.preferences import COLUMNS, preference
from phi3_lora_plugin.chat.propose import propose
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.turns import KEYS, ROLES
from phi3_lora_plugin.model.families import UnsupportedModel, row_limit

TOKENIZER = tiny.tokenizer()
USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = [USER, SAID]
REJECTED = [USER, SAID | {"content": "Go"}]


def load(path: Path, *overrides: str) -> Data:
    base = ["data.eval_path=null", "data.max_length=null", f"data.path={path}"]
    return load_data(load_recipe("tiny-cpu", [*base, *overrides]), TOKENIZER, ADAPTERS)


def trained(row: dict[str, Any]) -> str:
    return read_rows.trained(row, TOKENIZER)


def _node(role: str, text: str, **more: Any) -> dict[str, Any]:
    """A message in an export of ChatGPT."""
    return {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}} | more


READ: dict[str, dict[str, Any]] = {
    "parts of LLaMA-Factory v1": {
        "messages": [
            USER | {"content": [{"type": "text", "value": "Hi"}], "loss_weight": 0.0},
            SAID | {"content": [{"type": "text", "value": "Hel"}, {"type": "text", "value": "lo"}], "loss_weight": 1.0},
        ]
    },
    "ms-swift's query": {"query": "Hi", "response": "Hello", "history": []},
    "ms-swift's conversation": {"conversation": [{"human": "Hi", "assistant": "Hello"}]},
    "xtuner's conversation": {"conversation": [{"input": "Hi", "output": "Hello"}]},
    "messages called conversation": {"conversation": CHAT, "language": "English"},
    "OpenOrca's system_prompt": {"query": "Hi", "response": "Hello", "system_prompt": ""},
    "KTO that is good": {"prompt": "Hi", "completion": "Hello", "label": True},
    "a row of weight 1": {"instruction": "Hi", "output": "Hello", "weight": 1.0, "loss": True},
    "an own text beside it": {"instruction": "Hi", "output": "Hello", "text": "Below is an instruction ..."},
    "an export of ChatGPT": {
        "title": "Greeting",
        "mapping": {
            "r": {"message": None, "parent": None, "children": ["s"]},
            "s": {"message": _node("system", ""), "parent": "r", "children": ["u"]},
            "u": {"message": _node("user", "Hi"), "parent": "s", "children": ["a", "b"]},
            "a": {"message": _node("assistant", "No"), "parent": "u", "children": []},
            "b": {"message": _node("assistant", "Hello", recipient="all", weight=1.0), "parent": "u", "children": []},
        },
        "current_node": "b",
    },
}


@pytest.mark.parametrize("name", READ)
def test_the_same_chat_in_the_shapes_of_other_tools(name: str) -> None:
    assert [(turn["role"], turn["content"]) for turn in read(READ[name])] == [("user", "Hi"), ("assistant", "Hello")]
    assert [turn.get("train", True) for turn in read(READ[name]) if turn["role"] == "assistant"] == [True]


NOT_LEARNED: dict[str, dict[str, Any]] = {
    "loss": {"messages": [USER, SAID | {"loss": False}]},
    "loss_scale": {"messages": [USER, SAID | {"loss_scale": 0.0}]},
    "loss_weight": {"messages": [USER, SAID | {"loss_weight": 0.0}]},
    "weight": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0}]},
    "training": {"conversations": [USER, SAID | {"training": False}]},
    "in a completion": {"prompt": [USER], "completion": [SAID | {"loss": False}]},
    "in a pair of a conversation": {"conversation": [{"human": "Hi", "assistant": "Hello", "loss": False}]},
    "of the whole row": {"query": "Hi", "response": "Hello", "loss": False},
    "of the row of a CSV file": {"prompt": "Hi", "completion": "Hello", "train": "false"},
    "of every part": {"messages": [USER, SAID | {"content": [{"type": "text", "text": "Hello", "loss": False}]}]},
    "of every character": {
        "messages": [USER, SAID | {"train_detail": [{"begin_offset": 0, "end_offset": 4, "train": False}]}]
    },
}


@pytest.mark.parametrize("name", NOT_LEARNED)
def test_what_is_marked_as_not_to_be_learned_is_not(name: str) -> None:
    made = read(NOT_LEARNED[name])
    assert made[-1]["content"] == "Hello" and made[-1]["train"] is False
    with pytest.raises(EncodeError, match="no turn in it is to be trained"):
        encode(made, TOKENIZER)


_CODE = _node("assistant", "", content={"content_type": "code", "text": "1"}, recipient="python")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "KTO that is bad": ({"prompt": "Hi", "completion": "Go", "label": False}, "has label: false.*on_error: skip"),
    "and in a CSV file": ({"prompt": "Hi", "completion": "Go", "label": "False"}, "has label: false"),
    "and in messages": ({"messages": CHAT, "label": 0}, "has label: false"),
    "a label of another kind": ({"messages": CHAT, "label": "spam"}, r"'label' looks like.*data.ignore: \[label\]"),
    "no weight": ({"messages": [USER, SAID | {"weight": 1001}]}, r"weight of message 2 .*expected a number from 0"),
    "a measured loss": ({"prompt": "a", "completion": "b", "loss": 1.2}, r"expected true or false.*ignore: \[loss\]"),
    "half a loss": ({"messages": [USER, SAID | {"loss": 0.5}]}, "loss of message 2 .*expected true or false"),
    "two that differ": ({"messages": [USER, SAID | {"loss": True, "weight": 0}]}, "true and weight: 0, which"),
    "a name of one's own": ({"messages": [USER, SAID | {"is_masked": True}]}, "'is_masked' .*in a message of messages"),
    "of a row": ({"prompt": "Hi", "completion": "Go", "lossWeight": [0.1]}, r"'lossWeight' .*ignore: \[lossWeight\]"),
    "deep inside": ({"messages": CHAT, "meta": {"about": {"train": False}}}, r"'meta.about.train' looks like a mark"),
    "in a part": ({"messages": [USER | {"content": [{"type": "text", "text": "a", "mask": 1}]}, SAID]}, "part 1 of"),
    "masks of TRL": ({"prompt": "a", "completion": "b", "completion_mask": [0, 1]}, "'completion_mask'"),
    "images": ({"messages": [USER | {"content": "<image>What?"}, SAID], "images": ["a"]}, "'images' holds pictures"),
    "a part of a picture": (
        {"messages": [USER | {"content": [{"type": "image_url", "value": "a.jpg"}]}, SAID]},
        "a part of type image_url, and only its text would be trained",
    ),
    "a preference": ({"messages": CHAT, "rejected_response": "Go"}, "'rejected_response' is one side of a preference"),
    "offsets behind the end": (
        {"messages": [USER, SAID | {"train_detail": [{"begin_offset": 0, "end_offset": 5, "train": True}]}]},
        "covers characters 0 to 5; its text has 5, counted from 0",
    ),
    "a tool of ChatGPT": (
        {"mapping": {"a": {"message": _CODE, "children": []}}},
        "of type code to python, which is not text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_what_is_trained_is_refused(name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(RowError, match=message) as caught:
        read(row)
    assert "\n" not in str(caught.value)


def test_what_does_not_matter_is_said_to_or_harmless() -> None:
    assert read({"messages": CHAT, "images": ["a"], "label": 3}, "images", "label") == CHAT
    odd = SAID | {"lossy": 1, "id": 3, "mask": None}
    assert read({"messages": [USER, odd], "score_chosen": 8, "images": []}) == CHAT


def test_what_a_tool_takes_says_nothing_of_learning() -> None:
    tools = [{"name": "f", "parameters": {"properties": {"weight": {"type": "number"}, "labels": {}, "image": {}}}}]
    call = SAID | {"content": None, "tool_calls": [{"name": "f", "arguments": {"weight": 3, "train": False}}]}
    for column in ("tools", "functions"):
        row = {"messages": [USER, call], column: tools}
        unused: Counter[str] = Counter()
        assert adapted(ADAPTERS["messages"], row, "messages", unused)[2]["calls"][0]["arguments"]["weight"] == 3
        assert not unused
    row = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "tools": tools}
    assert refuse_decisive(unread_values(row, COLUMNS)) == [] and preference(row).chosen[0]["tools"]


def test_pieces_of_an_answer_are_learned_and_others_are_not() -> None:
    text = "xaz kuv wox zeb"
    details = [(0, 2, True), (3, 6, False), (7, 10, True), (11, 14, False)]
    marked = [{"begin_offset": first, "end_offset": last, "train": train} for first, last, train in details]
    row = encode(read({"messages": [USER, SAID | {"content": text, "train_detail": marked}]}), TOKENIZER)
    assert trained(row) == "xaz wox|"
    parts = [
        {"type": "text", "text": "xaz", "loss": True},
        {"type": "text", "text": " kuv", "loss": False},
        {"type": "text", "text": " wox"},
        {"type": "text", "text": " zeb", "weight": 0},
    ]
    assert encode(read({"messages": [USER, SAID | {"content": parts}]}), TOKENIZER) == row
    whole = encode([USER, SAID | {"content": text}], TOKENIZER)
    assert whole["input_ids"] == row["input_ids"] and trained(whole) == "xaz kuv wox zeb|"


def test_an_escaped_control_token_does_not_move_the_marks_behind_it() -> None:
    parts = [{"type": "text", "text": "a <|end|> b"}, {"type": "text", "text": " zeb", "loss": False}]
    row = encode(read({"messages": [USER, SAID | {"content": parts}]}), TOKENIZER, control_tokens="escape")
    assert trained(row) == "a < |end|> b|"


def test_no_letter_that_is_not_to_be_learned_is_in_a_learned_token() -> None:
    text, offsets = "ab cd", [(0, 2), (2, 4), (4, 5)]
    assert token_weights([(0, 4, 1.0), (4, 5, 0.0)], text, offsets, 0, 5) == [1, 1, 0]
    assert token_weights([(0, 3, 1.0), (3, 5, 0.0)], text, offsets, 0, 5) == [1, 0, 0]
    assert token_weights([(0, 3, 0.0), (3, 5, 1.0)], text, offsets, 0, 5) == [0, 1, 1]  # a blank is no letter
    assert token_weights([(0, 4, 0.0), (4, 5, 1.0)], text, offsets, 0, 5) == [0, 0, 1]


def test_texts_and_segments_stand_as_they_are() -> None:
    made = encode(read({"text": "the quick fox"}), TOKENIZER)
    assert trained(made) == "the quick fox<|endoftext|>" and made["labels"] == made["input_ids"]
    written = [("<|user|>\nHi<|end|>\n<|assistant|>\n", False), ("Hello<|end|>", True), (" bye", False)]
    made = encode(read({"segments": [{"text": text, "label": label} for text, label in written]}), TOKENIZER)
    assert trained(made) == "Hello|"
    assert made["input_ids"] == TOKENIZER("".join(text for text, _ in written), add_special_tokens=False).input_ids
    with pytest.raises(EncodeError, match="as if a template had been applied already.*control_tokens: keep"):
        encode(read({"text": "<|user|>\nHi<|end|>"}), TOKENIZER)
    kept = encode(read({"text": "<|user|>\nHi<|end|>"}), TOKENIZER, control_tokens="keep")
    assert trained(kept) == "<|user|>Hi|<|endoftext|>".replace("<|user|>", "<|user|> ")
    with pytest.raises(EncodeError, match="has the control token"):
        encode([USER | {"content": "<|end|>"}, SAID], TOKENIZER, control_tokens="keep")


PAIRS: dict[str, dict[str, Any]] = {
    "UltraFeedback": {"prompt": "Hi", "chosen": CHAT, "rejected": REJECTED, "messages": CHAT, "score_chosen": 8.0},
    "hh-rlhf": {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"},
    "orca": {"question": "Hi", "chosen": "Hello", "rejected": "Go", "system": ""},
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [SAID],
        "non_preferred_output": REJECTED[1:],
    },
    "ms-swift messages": {"messages": CHAT, "rejected_response": "Go"},
    "ms-swift query": {"query": "Hi", "response": "Hello", "rejected_response": "Go"},
    "ms-swift chats": {"messages": CHAT, "rejected_messages": REJECTED},
    "LLaMA-Factory v1": {
        "chosen_messages": [USER | {"loss_weight": 0.0}, SAID | {"loss_weight": 1.0}],
        "rejected_messages": [USER, SAID | {"content": [{"type": "text", "value": "Go"}]}],
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_in_the_shapes_of_other_tools(name: str) -> None:
    pair = preference(PAIRS[name])
    said = [[(turn["role"], turn["content"]) for turn in chat] for chat in (pair.chosen, pair.rejected)]
    assert said == [[("user", "Hi"), ("assistant", answer)] for answer in ("Hello", "Go")]


def test_preferences_that_contradict_themselves() -> None:
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Ho\n\nAssistant: Go"}
    with pytest.raises(RowError, match="chosen and rejected differ from their first turn on"):
        preference(hh)
    with pytest.raises(RowError, match="a prompt that is not among the turns which chosen and rejected share"):
        preference(PAIRS["UltraFeedback"] | {"prompt": "Ho"})
    long = "\n\nHuman: a\n\nAssistant: b\nb\n\nHuman: c\n\nAssistant:"
    pair = preference({"prompt": long, "chosen": " Hello", "rejected": " Go"})
    assert [turn["content"] for turn in pair.chosen] == ["a", "b\nb", "c", " Hello"]


PROPOSED: list[tuple[dict[str, Any], bool, str | None]] = [
    ({"question": "q", "answer": "a", "id": 3}, False, "{prompt: question, completion: answer}"),
    ({"user_question": "q", "model response": "a"}, False, '{prompt: user_question, completion: "model response"}'),
    ({"instruction": "i", "context": "c", "response": "r", "category": "x"}, False,
     "{instruction: instruction, input: context, output: response}"),
    ({"frage": "q", "antwort": "a"}, False, "{prompt: frage, completion: antwort}"),
    ({"dialog": [{"speaker": "human", "text": "q"}, {"speaker": "gpt", "text": "a"}]}, False,
     "{messages: dialog, role: speaker, content: text}"),
    ({"item": {"problem": "q", "solution": "a"}}, False, "{prompt: item.problem, completion: item.solution}"),
    ({"ask": "q", "input": "p", "good_answer": "a", "bad_answer": "b"}, True,
     "{prompt: input, chosen: good_answer, rejected: bad_answer}"),
    ({"a": 1, "b": [1, 2]}, False, None),
    ({"system": "s", "chat": "USER: a ASSISTANT: b"}, False, None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "pairs", "given"), PROPOSED)
def test_columns_are_proposed_from_the_files_own_names(row: dict[str, Any], pairs: bool, given: str | None) -> None:
    made = propose([row], pairs)
    assert made == (None if given is None else f"data.columns='{given}'")


def test_what_is_proposed_is_what_reads_the_file(tmp_path: Path) -> None:
    rows = [row for row, pairs, given in PROPOSED if given is not None and not pairs]
    for number, row in enumerate(rows):
        path = tiny.write(tmp_path / f"{number}.jsonl", [row])
        with pytest.raises(DataError, match="fits no format.*If that is what they mean, write data.columns=") as caught:
            load(path)
        given = str(caught.value).split("write ")[1].replace("'", "")
        assert load(path, given).report.train.rows == 1


def test_nulls_and_empty_answers_are_named_row_by_row(tmp_path: Path) -> None:
    rows = [{"instruction": None, "output": "L"}, {"instruction": "ok", "output": None}]
    path = tiny.write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path)
    assert [line.split(":", 1)[1] for line in caught.value.problems[:2]] == [
        "1: instruction is null or missing; expected text",
        "2: output is null or missing; expected text",
    ]
    tiny.write(path, [{"prompt": "a", "completion": text} for text in (" \n", "b")])
    (left,) = load(path).report.empty
    assert left.place == f"{path}:1" and "is empty: it is trained to say nothing" in left.why


def test_the_reports_of_users(shared_data: Path) -> None:
    reports = shared_data / "reports"
    assert trained(load(reports / "swift_msgs_loss.jsonl").train[0]) == "y|"
    with pytest.raises(DataError, match="kto.jsonl:2: has label: false"):
        load(reports / "kto.jsonl")
    assert load(reports / "kto.jsonl", "data.on_error=skip").report.train.rows == 1
    declared = load(reports / "oai_legacy_fn.jsonl", "data.tools=text").train[0]
    assert '"name": "weather"' in TOKENIZER.decode(declared["input_ids"])


@pytest.mark.slow
def test_rows_that_are_too_deep_or_too_long_are_told_by_their_line(tmp_path: Path) -> None:
    deep = '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}"
    nested = json.dumps({"messages": '[{"role": "user", "content": ' + "[" * 50_000 + "]" * 50_000 + "}]"})
    good = {"messages": CHAT}
    path = tiny.write(tmp_path / "a.jsonl", [good, deep, nested, good])
    with pytest.raises(DataError) as caught:
        load(path)
    assert [line.split(":")[1] for line in caught.value.problems[:2]] == ["2", "3"]
    tiny.write(path, [{"prompt": "a", "completion": "b" * length} for length in (1, 11_000_000, 70_000_000)])
    with pytest.raises(DataError) as caught:
        load(path)
    assert "a.jsonl:2: message 2 (assistant) has 11,000,000 characters" in caught.value.problems[0]
    assert "a.jsonl:3: has 70,000,0" in caught.value.problems[1]
    table = tmp_path / "a.csv"
    table.write_text("prompt,completion\na," + "b" * 70_000_000 + "\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="a.csv:2: is not a row of the table: has 70,000,00"):
        load(table)
    assert load(table, "data.on_error=skip").report.train.rows == 1


@pytest.mark.slow
def test_a_small_packed_file_cannot_fill_the_memory(tmp_path: Path) -> None:
    code = """
import gzip, resource, sys
import pyarrow
from phi3_lora_plugin.chat.opened import LONGEST_LINE
from phi3_lora_plugin.chat.readers import SourceError
from phi3_lora_plugin.chat.sources import find_sources
path = sys.argv[1]
for head in ('{"prompt": "', '["'):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head.encode())
        for _ in range(150):
            file.write(b"a" * 1024**2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for item in find_sources(path).sources[0].rows():
            print(str(item)[-70:])
    except SourceError as error:
        print(str(error)[-70:])
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * LONGEST_LINE)
"""
    path = tmp_path / "bomb.jsonl.gz"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    line, small, whole, small_too = done.stdout.splitlines()
    assert "has 157,286,412 bytes; a row may have" in line and "s one JSON value of more than" in whole
    assert (small, small_too) == ("True", "True"), done.stdout


def test_zstandard_is_read_like_gzip(tmp_path: Path) -> None:
    import pyarrow

    text = "".join(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(1000)).encode()
    path = tmp_path / "a.jsonl.zst"
    frames = [pyarrow.compress(part, "zstd", asbytes=True) for part in (text[:5000], text[5000:])]
    path.write_bytes(b"".join(frames))
    assert load(path).report.train.rows == 1000
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="a.jsonl.zst: cannot be read"):
        load(path)


def test_rows_longer_than_the_context_are_not_asked_for() -> None:
    config = tiny.config(max_position_embeddings=4096).to_dict()
    assert row_limit(None, config) == row_limit(4096, config) == 4096
    with pytest.raises(UnsupportedModel, match="data.max_length: 8,192 is more than the 4,096 tokens"):
        row_limit(8192, config)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from([*ROLES, "Human: a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*KEYS, "type", "text", "messages", "tools", "function", "name", "arguments", "id"]), inner
        )
    ),
    max_leaves=10,
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from([*COLUMNS, "label", "weight", "meta"]), anything))
def test_whatever_a_preference_holds_it_is_a_pair_or_a_row_error(row: dict[str, Any]) -> None:
    before = repr(row)
    try:
        refuse_decisive(unread_values(row, COLUMNS))
        pair = preference(row)
    except RowError as error:
        assert "\n" not in str(error)
    else:
        assert pair.chosen[-1]["role"] == pair.rejected[-1]["role"] == "assistant" and pair.chosen != pair.rejected
    assert repr(row) == before
