"""Rows that are nearly the same: found by a library, counted exactly, and not found where they are not."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from typer.testing import CliRunner

from phi3_lora_plugin.chat.near_duplicates import near_duplicates
from phi3_lora_plugin.cli import app
from phi3_lora_plugin.error import Phi3LoraError


def rows(*ids: list[int]) -> Any:
    return datasets.Dataset.from_dict({"input_ids": list(ids)})


def similarity(one: list[int], other: list[int]) -> float:
    both = [{tuple(ids[at : at + 5]) for at in range(len(ids) - 4)} for ids in (one, other)]
    return len(both[0] & both[1]) / len(both[0] | both[1])


def test_rows_that_differ_in_a_word_are_found_and_others_are_not() -> None:
    pytest.importorskip("datasketch", reason="the extra dedup is not installed")
    draw = random.Random(3)
    plain = [[draw.randrange(30_000) for _ in range(200)] for _ in range(60)]
    edited = [*plain[7]]
    edited[100] = 5
    half = plain[9][:100] + [draw.randrange(30_000) for _ in range(100)]
    train = [*plain, edited, half, plain[3]]
    held = [plain[11], plain[12][:190], [draw.randrange(30_000) for _ in range(200)]]
    twice, leaked = near_duplicates(rows(*train), rows(*held), 0.8)
    assert [(one.row, one.like) for one in twice] == [(61, 8), (63, 4)]
    assert twice[0].similarity == round(similarity(edited, plain[7]), 4) > 0.9 and twice[1].similarity == 1.0
    assert [(one.row, one.like) for one in leaked] == [(1, 12), (2, 13)]
    assert near_duplicates(rows([1, 2], [1, 2], [3]), None, 0.5)[0][0].similarity == 1.0


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(Phi3LoraError, match=r"--near needs datasketch .*pip install 'phi3-lora-plugin\[dedup\]'"):
        near_duplicates(rows([1]), None, 0.8)


def test_data_check_reports_them(tmp_path: Path) -> None:
    pytest.importorskip("datasketch", reason="the extra dedup is not installed")
    answer = "the quick brown fox jumps over the lazy dog " * 3
    texts = [answer, "what is the capital of france? " * 4, answer + "and more"]
    path = tiny.write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": text} for text in texts])
    words = ["data", "check", "tiny-cpu", f"data.path={path}", "data.eval_path=null", "--near", "0.5"]
    report = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(one["row"], one["like"]) for one in report["near_duplicates"]] == [(3, 1)] and report["near_leaked"] == []
    shown = CliRunner().invoke(app, words).stdout
    assert "1 rows to train on are nearly an earlier one: 3 like 1 (" in shown
