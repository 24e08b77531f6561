"""What was thought before an answer: read under every name, learned, shown or left out, and never cut open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import read_rows
import tiny

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.adapt import adapted
from phi3_lora_plugin.chat.dataset import load_data
from phi3_lora_plugin.chat.encode import EncodeError, encode, prompt_ids
from phi3_lora_plugin.chat.formats import ADAPTERS, detect
from phi3_lora_plugin.chat.preferences import preference
from phi3_lora_plugin.chat.row_error import RowError
from phi3_lora_plugin.chat.templates import TEMPLATES
from phi3_lora_plugin.chat.thoughts import hidden
from phi3_lora_plugin.model.tokenizer import load_tokenizer

TOKENIZER = tiny.tokenizer(template=TEMPLATES["phi-4-mini-reasoning"].text)
USER = {"role": "user", "content": "xy"}
BLOCK = "<think>\nzu\n</think>\n\n"


def read(**message: Any) -> list[dict[str, Any]]:
    return read_rows.read({"messages": [USER, {"role": "assistant"} | message]})


def trained(row: dict[str, Any], tokenizer: Any = TOKENIZER) -> str:
    return read_rows.trained(row, tokenizer)


def whole(row: dict[str, Any]) -> str:
    return str(TOKENIZER.decode(row["input_ids"]))


SHAPES: list[dict[str, Any]] = [
    {"content": "ko", "reasoning_content": "zu"},
    {"content": "ko", "reasoning": "zu"},
    {"content": "ko", "thinking": "zu", "reasoning_content": "zu"},
    {"content": [{"type": "reasoning", "value": "zu"}, {"type": "text", "value": "ko"}]},
    {"content": [{"type": "thinking", "thinking": "zu", "signature": "s"}, {"type": "text", "text": "ko"}]},
    {"content": BLOCK + "ko"},
]


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_thoughts_are_read_under_every_name_and_in_the_text(number: int) -> None:
    assert read(**SHAPES[number])[1] == {"role": "assistant", "content": "ko", "thoughts": BLOCK}


def test_thoughts_are_learned_shown_left_out_or_refused() -> None:
    chat = read(content="ko", reasoning_content="zu")
    with pytest.raises(EncodeError, match="message 2 .* has thoughts; write data.thoughts: train"):
        encode(chat, TOKENIZER)
    made = {name: encode(chat, TOKENIZER, thoughts=name) for name in ("train", "context", "drop")}
    assert trained(made["train"]) == BLOCK + "ko|" and trained(made["context"]).strip() == "ko|"
    assert made["train"]["input_ids"] == made["context"]["input_ids"]
    assert "think" not in whole(made["drop"]) and trained(made["drop"]) == "ko|"
    assert made["drop"] == encode([USER, {"role": "assistant", "content": "ko"}], TOKENIZER)


def test_the_text_of_a_file_stands_as_it_is() -> None:
    for text in ("<think> zu </think> ko", "\n<think>zu</think>ko", "zu\n</think>\n\nko"):
        row = encode(read(content=text), TOKENIZER, thoughts="train")
        assert trained(row).replace("\n", "") == text.replace("\n", "") + "|"
        assert "zu" not in whole(encode(read(content=text), TOKENIZER, thoughts="drop"))
    for text in ("the tag </think> ends it", "ko <think>zu</think>"):
        assert "thoughts" not in read(content=text)[1]  # something that the answer is about


def test_masks_of_thoughts_calls_and_marked_pieces_go_together() -> None:
    parts = [{"type": "text", "text": "ko"}, {"type": "text", "text": " mi", "loss": False}]
    call = {"name": "f", "arguments": {}}
    chat = read(content=parts, reasoning_content="zu", tool_calls=[call])
    text = '{"name": "f", "arguments": {}}|'
    for name, want in (("train", BLOCK + "ko\n" + text), ("context", "ko\n" + text), ("drop", "ko\n" + text)):
        said = trained(encode(chat, TOKENIZER, thoughts=name))
        assert said.replace("\n", "").strip() == want.replace("\n", "")
    with pytest.raises(EncodeError, match="no turn in it is to be trained"):
        encode(read(content="ko", thinking="zu", weight=0), TOKENIZER, thoughts="train")


def test_earlier_turns_keep_theirs_and_a_prompt_goes_on_from_them() -> None:
    first = read(content="ko", reasoning_content="zu")
    chat = [*first, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = encode(chat, TOKENIZER, thoughts="train")["input_ids"]
    assert whole({"input_ids": ids}).count("</think>") == 1
    prompt = prompt_ids(chat[:3], TOKENIZER, thoughts="train")
    assert ids[: len(prompt)] == prompt == prompt_ids(chat[:3], TOKENIZER)
    dropped = prompt_ids(chat[:3], TOKENIZER, thoughts="drop")
    assert "think" not in TOKENIZER.decode(dropped)


def test_a_cut_never_leaves_a_thought_open() -> None:
    chat = read(content="ko" * 5, reasoning_content="zu" * 20)
    row = encode(chat, TOKENIZER, thoughts="train")
    closed = next(n for n in range(len(row["input_ids"])) if "</think>" in TOKENIZER.decode(row["input_ids"][:n]))
    with pytest.raises(
        EncodeError, match=f"the cut at {closed - 8} tokens would leave a thought of the assistant open"
    ):
        encode(chat, TOKENIZER, max_length=closed - 8, thoughts="train")
    assert len(encode(chat, TOKENIZER, max_length=closed + 4, thoughts="train")["input_ids"]) == closed + 4


def test_a_cut_thought_is_told_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"messages": [USER, {"role": "assistant", "content": "ko", "reasoning_content": text}]}
            for text in ("zu", "zu" * 300)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    base = [f"data.path={path}", "data.eval_path=null", "data.max_length=200", "data.thoughts=train"]
    report = load_data(load_recipe("tiny-cpu", base), TOKENIZER, ADAPTERS).report
    assert report.train.rows == 1 and report.dropped[0].place == f"{path}:2" and "open" in report.dropped[0].why


def test_wrong_thoughts_are_named() -> None:
    with pytest.raises(RowError, match="has thoughts twice, and they differ"):
        read(content="ko", reasoning_content="a", thinking="b")
    with pytest.raises(RowError, match="has thoughts, which only the assistant has"):
        adapted(ADAPTERS["messages"], {"messages": [USER | {"thinking": "a"}, {"role": "assistant", "content": "b"}]},
                "messages")  # fmt: skip
    with pytest.raises(EncodeError, match=r"the control token <\|end\|> in its thoughts"):
        encode(read(content="ko", thinking="a <|end|>"), TOKENIZER, thoughts="train")
    escaped = encode(read(content="ko", thinking="a <|end|>"), TOKENIZER, thoughts="train", control_tokens="escape")
    assert "a < |end|>" in whole(escaped)


def test_where_the_tags_are_tokens_they_are_written_as_tokens(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi-4-base")
    tokenizer.add_tokens(["<think>", "</think>"])
    numbers = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    row = encode(read(content="ko", reasoning_content="zu"), tokenizer, thoughts="train")
    assert [row["labels"].count(number) for number in numbers] == [1, 1]
    with pytest.raises(EncodeError, match="has the control token <think> in its content"):
        encode([{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "b"}], tokenizer)


def test_thoughts_of_a_column_and_in_the_text_of_every_format() -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "xy", "output": "ko", "reasoning": "zu"},
        {"prompt": "xy", "completion": BLOCK + "ko"},
        {"query": "xy", "response": "ko", "thinking": "zu"},
        {"conversation": [{"human": "xy", "assistant": BLOCK + "ko"}]},
    ]
    for row in rows:
        (name,) = detect(row)
        assert adapted(ADAPTERS[name], row, name)[1] == {"role": "assistant", "content": "ko", "thoughts": BLOCK}
    pair = preference({"prompt": "xy", "chosen": BLOCK + "ko", "rejected": "no"})
    assert pair.chosen[1]["thoughts"] == BLOCK and "thoughts" not in pair.rejected[1]


def test_thoughts_are_hidden_piece_by_piece() -> None:
    for text, shown in ((BLOCK + "ko <think>", "ko <think>"), ("ko", "ko"), ("<thin", "<thin"), ("<think>zu", "")):
        for size in (1, 3, 100):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            assert "".join(hidden(pieces)) == shown
