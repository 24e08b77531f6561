"""Mixtures: several sources of different formats, weighed or capped, drawn by seed, each reported for itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.dataset import Data, DataError, load_data
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.mixture import counts
from phi3_lora_plugin.recipe import RecipeError
from phi3_lora_plugin.recipe.sections import MixtureSource

TOKENIZER = tiny.tokenizer()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 40 pairs of a foreign column name, 10 rows in Alpaca's, and 5 chats."""
    monkeypatch.chdir(tmp_path)
    tiny.write(Path("a.jsonl"), [{"frage": f"a {n}", "antwort": "xa"} for n in range(40)])
    alpaca = [{"instruction": f"b {n}", "output": "xb"} for n in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(alpaca), "b.parquet")
    tiny.write(Path("c.jsonl"), [tiny.chat(f"c {n}", "xc") for n in range(5)])
    return tmp_path


def load(path: list[Any], *overrides: str, cache: bool = False) -> Data:
    base = [f"data.path={json.dumps(path)}", "data.eval_path=null", "data.max_length=null"]
    return load_data(load_recipe("tiny-cpu", [*base, *overrides]), TOKENIZER, ADAPTERS, cache=cache)


def questions(data: Any) -> list[str]:
    texts = [TOKENIZER.decode(row["input_ids"]) for row in data]
    return [text.split("<|user|>")[1].split("<|end|>")[0].strip() for text in texts]


A = {"path": "a.jsonl", "columns": {"prompt": "frage", "completion": "antwort"}}
B = {"path": "b.parquet", "format": "alpaca"}


def test_sources_of_different_formats_come_one_after_the_other_and_are_told_apart(place: Path) -> None:
    data = load([A, B, "c.jsonl"])
    sizes = {"a": 40, "b": 10, "c": 5}
    assert questions(data.train) == [f"{name} {n}" for name, size in sizes.items() for n in range(size)]
    told = [(one.path, one.rows, one.taken) for one in data.report.mixture]
    assert told == [("a.jsonl", 40, 40), ("b.parquet", 10, 10), ("c.jsonl", 5, 5)]
    assert [source.format for source in data.report.sources] == ["prompt_completion", "alpaca", "messages"]
    assert sum(one.trained_tokens for one in data.report.mixture) == data.report.train.trained_tokens
    assert type(data.report).from_json(data.report.to_json()) == data.report
    assert load(["c.jsonl"]).report.mixture == ()


def test_weights_are_shares_and_no_row_stands_twice(place: Path) -> None:
    data = load([A | {"weight": 0.5}, B | {"weight": 0.25}, {"path": "c.jsonl", "weight": 0.25}])
    assert [one.taken for one in data.report.mixture] == [10, 5, 5]
    asked = questions(data.train)
    assert len(set(asked)) == 20 and asked[:10] == sorted(asked[:10], key=lambda text: int(text[2:]))
    for available, weights, want in (
        ((40, 10), (0.7, 0.3), [23, 10]),
        ((40, 10), (0.7, None), [7, 10]),
        ((40, 10), (None, None), [40, 10]),
        ((3, 1000), (1, 1000), [1, 1000]),
    ):
        sources = [MixtureSource(path="x", weight=weight) for weight in weights]
        assert counts(available, sources) == want
    assert counts((40, 10), [MixtureSource(path="x", max_rows=7), MixtureSource(path="y")]) == [7, 10]


def test_what_is_drawn_depends_on_the_seed_alone(place: Path) -> None:
    mixture = [A | {"max_rows": 8}, B | {"max_rows": 4}]
    first, again, other = load(mixture), load(mixture), load(mixture, "seed=7")
    assert questions(first.train) == questions(again.train) != questions(other.train)
    assert [one.taken for one in first.report.mixture] == [8, 4] and first.report.mixture[0].rows == 40
    held = load(mixture, "data.eval_fraction=0.25")
    assert sorted(questions(held.train) + questions(held.eval)) == sorted(questions(first.train))


def test_an_entry_of_the_cache_is_of_its_mixture(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3_LORA_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setattr("phi3_lora_plugin.chat.cache.WORTH", 1)
    made = load([A | {"max_rows": 8}, B], cache=True)
    kept = load([A | {"max_rows": 8}, B], cache=True)
    assert made.cached is None and kept.cached is not None and kept.report == made.report
    assert load([A | {"max_rows": 9}, B], cache=True).cached is None


def test_what_is_wrong_with_a_mixture_is_said_of_its_source(place: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load([{"pth": "a.jsonl", "weight": 0}, {"path": "b.parquet", "max_rows": 0}], "data.max_rows=3")
    said = str(caught.value)
    assert "source 1: path: Field required" in said and "source 1: unknown key 'pth'; available: path, weight" in said
    assert "source 1: weight: must be greater than 0" in said and "source 2: max_rows" in said
    assert "data.max_rows: has no effect on a mixture" in said
    with pytest.raises(DataError, match="data.path: a.jsonl: named twice"):
        load([A, {"path": "a.jsonl"}])
    with pytest.raises(DataError, match="data.path: d.jsonl: no such file"):
        load([A, {"path": "d.jsonl"}])
    with pytest.raises(DataError, match="a.jsonl:1: fits no format.*data.columns="):
        load([{"path": "a.jsonl"}, B])
    tiny.write(Path("d.jsonl"), [{"prompt": "a", "completion": "b", "weight": 0}])
    with pytest.raises(DataError, match="data.path: no row of d.jsonl is left to use"):
        load([A, {"path": "d.jsonl"}])
