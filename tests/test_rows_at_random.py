"""Rows drawn at random: what is read is trained as it stands, or reported by its place; nothing is lost in silence."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from read_rows import read
from test_dataset import load, problems

from phi3_lora_plugin.chat.dataset import DataError
from phi3_lora_plugin.chat.preferences import preference
from phi3_lora_plugin.chat.row_error import RowError

PIECES = ["a", " ", "\n", "\t", "\r\n", "é", "🙂", "\0", "\ufeff", "\ud800", "<|end|>", "<think>", "</think>", "Human:",
          "\n\nHuman: a\n\nAssistant: b", "USER: a", "functools[", '{"a": 1, "a": 2}']  # fmt: skip
ODD: list[Any] = [None, True, 0, 10**30, 1.5, float("nan"), "", [], {}, [None], [[]], [{}], {"a": None}, "[]", "null",
                  [{"type": "text", "text": "x"}], [{"type": "image"}], {"role": 5, "content": "x"}]  # fmt: skip


def text(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(4)))


def drawn(rng: random.Random, kind: str) -> dict[str, Any]:
    """A row of a kind of data, with a value of something else in it now and then."""
    if kind == "messages":
        row: dict[str, Any] = {"messages": tiny.turns(text(rng), text(rng))}
    elif kind == "sharegpt":
        row = {"conversations": [{"from": "human", "value": text(rng)}, {"from": "gpt", "value": text(rng)}]}
    elif kind == "pairs":
        row = {"prompt": text(rng), "chosen": text(rng), "rejected": text(rng)}
    else:
        row = {"prompt": text(rng), "completion": text(rng)} | ({"label": rng.random() < 0.5} if kind == "kto" else {})
    if rng.random() < 0.4:
        inside = next((value for value in row.values() if isinstance(value, list)), None)
        place = rng.choice(inside) if inside and rng.random() < 0.7 else row
        place[rng.choice([*place, "weight", "label", "system", "tools", "thinking"])] = rng.choice(ODD)
    return row


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "completion", "pairs", "kto"])
def test_every_row_is_trained_or_reported(kind: str, tmp_path: Path) -> None:
    rng = random.Random(kind)
    loss = {"pairs": ["preference.loss=sigmoid"], "kto": ["preference.loss=kto"]}.get(kind, [])
    for number in range(25):
        given = [drawn(rng, kind) for _ in range(8)]
        path = tmp_path / (f"{number}.json" if number % 2 else f"{number}.jsonl")
        path.write_text(json.dumps(given) if number % 2 else "\n".join(map(json.dumps, given)))
        try:
            report = load(path, "data.on_error=skip", *loss).report
        except DataError as error:
            assert any(said in str(error) for said in ("no row", "all with label", "fits no format"))
            continue
        left = [*report.skipped, *report.dropped]
        assert report.rows_read == len(given) == report.train.rows + len({one.place for one in left})
        if report.skipped:
            stopped = "\n".join(problems(path, *loss))
            assert all(one.why in stopped for one in report.skipped)


def test_a_key_that_stands_twice_is_an_error_with_its_row(tmp_path: Path) -> None:
    good = json.dumps(tiny.chat("q"))
    twice = '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}'
    same = good[:-1] + ", " + good[1:]  # the same value again: nothing is lost
    lines = tiny.write(tmp_path / "a.jsonl", [good, twice, same])
    said = "has the key 'content' twice in one object, with values that differ"
    assert f"{lines}:2: {said}" in problems(lines)[0]
    assert load(lines, "data.on_error=skip").report.train.rows == 2
    whole = tmp_path / "a.json"
    whole.write_text(f"[{good},\n{twice}]")
    assert f"{whole} row 2: {said}" in problems(whole)[0]
    whole.write_text(f'{{"data": [{good}], "data": []}}')
    assert "has the key 'data' twice" in problems(whole)[0]
    turns = json.dumps(tiny.turns("q", "a"))[:-2] + ', "content": "b"}]'
    with pytest.raises(RowError, match="messages has the key 'content' twice"):
        read({"messages": turns})
    calls = [{"function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]
    with pytest.raises(RowError, match="calls a tool with JSON that has the key 'a' twice"):
        read({"messages": [*tiny.turns("q"), {"role": "assistant", "content": None, "tool_calls": calls}]})


@pytest.mark.parametrize("space", ["", " ", "\t", "\r\n", "\n\n"])
def test_a_dialog_may_begin_with_white_space(space: str) -> None:
    begun = f"{space}Human: a\n\nAssistant: "
    pair = preference({"chosen": f"{begun}b", "rejected": f"{begun}c"})
    assert [turn["content"] for turn in (*pair.chosen, pair.rejected[-1])] == ["a", "b", "c"]


def test_text_in_parquet_that_is_not_utf_8_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"prompt": ["a long question"], "completion": ["b"]})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    path.write_bytes(path.read_bytes().replace(b"long question", b"long qu\xb4stion"))
    assert f"{path}: holds text that is not UTF-8 after row 0" in problems(path)[0]
