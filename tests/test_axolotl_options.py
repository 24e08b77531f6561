"""What a data set's entry in an axolotl config does to rows that are encoded here, and what is named as ignored."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from phi3_lora_plugin.chat.encode import encode
from phi3_lora_plugin.hosts.axolotl_config import prepare
from phi3_lora_plugin.hosts.axolotl_options import read, row_options
from phi3_lora_plugin.hosts.rows import encode_rows
from phi3_lora_plugin.hosts.settings import HostSettings
from phi3_lora_plugin.hosts.switch import SwitchError, switched
from phi3_lora_plugin.recipe.sections import ChatSection

CONFIG = tiny.config().to_dict()
CHAT = tiny.turns("what?", "the fox.", "the dog?", "lazy.")
ASK, ANSWER = CHAT[:2]


def labels(rows: dict[str, Any], row: dict[str, Any], cfg: dict[str, Any] | None = None) -> dict[str, Any]:
    options, _ = row_options(cfg or {}, rows)
    (encoded,) = encode_rows([read(row, options)], tiny.tokenizer(), options.data(ChatSection()))
    return encoded


def test_names_of_columns_keys_and_roles_are_read_in_both_ways_of_writing_them() -> None:
    plain = encode(CHAT, tiny.tokenizer())
    told = [{"speaker": "bot" if turn["role"] == "assistant" else "boss", "says": turn["content"]} for turn in CHAT]
    roles = {"assistant": ["bot", "gpt"], "user": ["boss"]}
    for names in (
        {"message_property_mappings": {"role": "speaker", "content": "says"}},
        {"message_field_role": "speaker", "message_field_content": "says"},
    ):
        rows = {"field_messages": "talk", "roles": roles, **names}
        assert labels(rows, {"talk": told}) == {key: plain[key] for key in ("input_ids", "labels")}


def test_a_system_message_is_dropped_and_a_column_of_training_marks_is_honoured() -> None:
    system = {"role": "system", "content": "quick."}
    kept = labels({"drop_system_message": True}, {"messages": [system, *CHAT]})
    assert kept["input_ids"] == encode(CHAT, tiny.tokenizer())["input_ids"]
    marked = [ASK, ANSWER | {"learn": False}, *CHAT[2:]]
    expected = encode([ASK, ANSWER | {"train": False}, *CHAT[2:]], tiny.tokenizer())
    assert labels({"message_field_training": "learn"}, {"messages": marked})["labels"] == expected["labels"]


def test_no_role_to_train_leaves_the_turns_that_say_so() -> None:
    marked = [ASK, ANSWER, CHAT[2], CHAT[3] | {"train": True}]
    found = labels({"roles_to_train": []}, {"messages": marked})
    assert found["labels"] == encode(CHAT, tiny.tokenizer(), train_on="last_turn")["labels"]


def test_spans_and_thoughts_have_the_names_of_the_data_set() -> None:
    detail = [{"begin_offset": 0, "end_offset": 2, "train": False}, {"begin_offset": 3, "end_offset": 7, "train": True}]
    rows = {"message_field_training_detail": "spans"}
    found = labels(rows, {"messages": [ASK, ANSWER | {"spans": detail}]})
    spans = [(0, 3, 0.0), (3, 8, 1.0)]
    assert found["labels"] == encode([ASK, ANSWER | {"spans": spans}], tiny.tokenizer())["labels"]
    options, _ = row_options({}, {"field_thinking": "why", "split_thinking": True})
    assert read({"messages": [ANSWER | {"why": "so"}]}, options)["messages"][0]["reasoning_content"] == "so"
    assert options.data(ChatSection()).thoughts == "train"
    assert options.data(ChatSection(thoughts="drop")).thoughts == "drop"


def test_train_on_inputs_trains_what_everybody_says() -> None:
    cfg = {"train_on_inputs": True}
    assert labels({}, {"messages": CHAT}, cfg)["labels"] == encode(CHAT, tiny.tokenizer(), train_on="all")["labels"]


@pytest.mark.parametrize(
    ("rows", "cfg", "named"),
    [
        ({"train_on_eos": "all"}, {}, "train_on_eos: all"),
        ({"train_on_eot": "none"}, {}, "train_on_eot: none"),
        ({"roles_to_train": ["assistant", "user"]}, {}, "roles_to_train: user"),
        ({"chat_template": "chatml"}, {}, "chat_template: chatml"),
        ({"chat_template_jinja": "{{ x }}"}, {}, "chat_template: jinja"),
        ({"field_human": "q"}, {}, "field_human: q"),
        ({}, {"default_system_message": "Be kind."}, "default_system_message: Be kind."),
        ({}, {"eot_tokens": ["<|end|>"]}, "eot_tokens"),
    ],
)
def test_what_cannot_apply_is_named_once_in_the_log(rows: dict[str, Any], cfg: dict[str, Any], named: str) -> None:
    entry = {"path": "a.jsonl", "type": "chat_template"} | rows
    said = prepare({"datasets": [entry], **cfg}, CONFIG, HostSettings(), "<unk>")
    assert sum(f"ignored for rows of a.jsonl: {named}" in sentence for sentence in said) == 1


@pytest.mark.parametrize(
    "rows",
    [
        {},
        {"train_on_eos": "turn", "roles_to_train": ["assistant"]},
        {"roles_to_train": None},
        {"chat_template": "tokenizer_default", "message_property_mappings": {"role": "from"}},
    ],
)
def test_what_says_the_same_as_here_is_not_mentioned(rows: dict[str, Any]) -> None:
    entry = {"path": "a.jsonl", "type": "chat_template"} | rows
    assert not [one for one in prepare({"datasets": [entry]}, CONFIG, HostSettings(), "<unk>") if "ignored" in one]


def test_rows_in_a_format_of_their_own_are_left_to_axolotl_and_reported() -> None:
    own = {"field_instruction": "q", "format": "{instruction}"}
    cfg: dict[str, Any] = {"datasets": [{"path": "a.jsonl", "type": own}]}
    (said,) = (one for one in prepare(cfg, CONFIG, HostSettings(), "<unk>") if "a.jsonl" in one)
    assert "left to axolotl" in said and cfg["datasets"][0]["type"] == own


def test_encoded_rows_are_cached_by_the_options_too() -> None:
    names = set()
    for rows in ({}, {"roles_to_train": []}, {"field_messages": "talk"}, {"drop_system_message": True}):
        cfg: dict[str, Any] = {"datasets": [{"path": "a.jsonl", "type": "chat_template"} | rows]}
        prepare(cfg, CONFIG, HostSettings(), "<unk>")
        names.add(cfg["datasets"][0]["conversation"])
    assert len(names) == 4


def test_the_switch_is_on_off_or_unset() -> None:
    assert switched({}) is None and switched({"PHI3_LORA_ACTIVATE": ""}) is None
    assert switched({"PHI3_LORA_ACTIVATE": "1"}) is True and switched({"PHI3_LORA_ACTIVATE": "Off"}) is False
    with pytest.raises(SwitchError, match="PHI3_LORA_ACTIVATE=maybe: expected 1 or 0"):
        switched({"PHI3_LORA_ACTIVATE": "maybe"})
