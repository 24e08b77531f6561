"""Weights between 0 and 1: what each token's loss is multiplied by, exactly, in every layout of a batch; or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from read_rows import trained
from torch.nn import functional

from phi3_lora_plugin import load_recipe, train
from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.chat.encode import EncodeError, encode
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.pack import PackedCollator
from phi3_lora_plugin.chat.stream import encode_dataset
from phi3_lora_plugin.hosts.rows import RowsError, encode_rows
from phi3_lora_plugin.recipe.sections import ChatSection
from phi3_lora_plugin.speed.apply import speed_up
from phi3_lora_plugin.speed.loss import fuse_loss
from phi3_lora_plugin.training.rows import WeightedCollator

TOKENIZER = tiny.tokenizer()
WEIGHTS = [0.25, 1, 2.5, 0.5, 0]


def chat(number: int, weight: float | None) -> dict[str, Any]:
    asked, said = tiny.turns(f"xy {number}", f"zu {number}" * (1 + number % 3))
    return {"messages": [asked, said if weight is None else said | {"weight": weight}]}


def read(row: dict[str, Any]) -> dict[str, Any]:
    return encode(ADAPTERS["messages"](row), TOKENIZER)


ROWS = [read(chat(number, weight)) for number, weight in enumerate(WEIGHTS[:4])]


def test_a_weight_is_that_of_every_token_of_its_turn_and_of_its_span() -> None:
    row = read(chat(1, 0.25))
    plain = read(chat(1, None))
    assert "weights" not in plain and (row["input_ids"], row["labels"]) == (plain["input_ids"], plain["labels"])
    assert row["weights"] == [0.25 if label != -100 else 0.0 for label in row["labels"]]
    parts = [
        {"type": "text", "text": "zu", "weight": 0.5},
        {"type": "text", "text": " ko"},
        {"type": "text", "text": " mi", "weight": 0},
    ]
    turns = [{"role": "user", "content": "xy"}, {"role": "assistant", "content": parts, "loss_weight": 0.5}]
    made = read({"messages": turns, "weight": 2.0})
    runs = [weight for weight, label in zip(made["weights"], made["labels"], strict=True) if label != -100]
    assert set(runs) == {0.5, 1.0} and runs == sorted(runs)  # the first part counts half, the end as the turn
    assert trained(made, TOKENIZER) == "zu ko|"
    texted = encode(ADAPTERS["text"]({"text": "zu ko", "weight": 0.5}), TOKENIZER)
    assert set(texted["weights"]) == {0.5}
    assert "weights" not in read(chat(1, 1.0))


def model() -> Any:
    torch.manual_seed(1)
    wrapped = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return wrapped.train()


def gradients(wrapped: Any, batches: list[dict[str, Any]], items: int) -> tuple[float, torch.Tensor]:
    wrapped.zero_grad()
    total = 0.0
    for batch in batches:
        loss = wrapped(**batch, num_items_in_batch=items, use_cache=False).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad])


def by_hand(wrapped: Any, items: int) -> tuple[float, torch.Tensor]:
    """One row at a time, from its logits, token by token."""
    wrapped.zero_grad()
    total: Any = 0.0
    for row in ROWS:
        logits = wrapped(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        weights = row.get("weights", [1.0] * len(row["labels"]))
        for one, label, weight in zip(logits, row["labels"][1:], weights[1:], strict=True):
            if label != -100:
                total = total + weight * functional.cross_entropy(one, torch.tensor(label)) / items
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in wrapped.parameters() if p.requires_grad])


@dataclass
class Padded:
    """Right padding, as transformers' collator gives it."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["labels"]) for row in rows)
        filled = {
            name: torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])
            for name, fill in (("input_ids", 0), ("labels", -100))
        }
        mask = [[1] * len(row["labels"]) + [0] * (width - len(row["labels"])) for row in rows]
        return filled | {"attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("speed", ["loss", "all", "asked for logits"])
def test_the_loss_and_its_gradients_are_those_by_hand_in_every_layout(speed: str) -> None:
    items = sum(label != -100 for row in ROWS for label in row["labels"][1:])
    want, slopes = by_hand(model(), items)
    wrapped = model()
    if speed == "all":
        speed_up(wrapped)
    else:
        fuse_loss(wrapped.get_base_model())
        wrapped.get_base_model()._asked = "logits" if speed != "loss" else None
    padded, packed = WeightedCollator(Padded()), PackedCollator()
    layouts = {
        "one batch": [padded(ROWS)],
        "accumulated": [padded(ROWS[:1]), padded(ROWS[1:])],
        "one a batch": [padded([row]) for row in ROWS],
        "packed": [packed([{"rows": ROWS}])],
        "packs accumulated": [packed([{"rows": ROWS[:3]}]), packed([{"rows": ROWS[3:]}])],
    }
    for name, batches in layouts.items():
        got, found = gradients(wrapped, batches, items)
        assert got == pytest.approx(want, rel=1e-5), name
        torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny.base(folder / "base")
    tiny.write(folder / "chats.jsonl", [chat(number, WEIGHTS[number % 5]) for number in range(20)])
    return folder


def recipe(place: Path, out: Path, *overrides: str) -> Any:
    given = [f"model.path={place / 'base'}", f"data.path={place / 'chats.jsonl'}", "data.eval_path=null",
             "data.eval_fraction=0.25", "data.max_length=64", "training.num_train_epochs=null", "training.max_steps=2",
             "training.logging_steps=1", f"output_dir={out}"]  # fmt: skip
    return load_recipe("tiny-cpu", [*given, *overrides])


@pytest.mark.slow
def test_a_run_honours_weights_and_says_which_rows_have_none(place: Path, tmp_path: Path) -> None:
    data = load_data(recipe(place, tmp_path), TOKENIZER, ADAPTERS)
    assert data.report.rows_read == 20 and len(data.report.dropped) == 4  # of weight 0
    assert data.report.weighed == sum(set(row["weights"]) - {0.0, 1.0} != set() for row in data.train) > 0
    numbers = {0.0, 0.25, 0.5, 1.0, 2.5}
    assert {weight for row in data.train for weight in row["weights"]} <= numbers
    assert "weights" in data.eval.column_names
    path = tiny.write(tmp_path / "heavy.jsonl", [chat(number, 999) for number in range(20)])
    losses = [train(recipe(place, tmp_path / str(n), *more), check=False).train_loss
              for n, more in enumerate([(), (f"data.path={path}", "training.learning_rate=0.0")])]  # fmt: skip
    assert losses[1] > 100 * losses[0] > 0
    packed = train(recipe(place, tmp_path / "packed", "data.packing=true"), check=False)
    assert packed.steps == 2 and packed.train_loss > 0


def test_where_nothing_would_honour_a_weight_it_is_refused(place: Path, tmp_path: Path) -> None:
    for more, why in (
        ("speed=off", r"speed.loss is off \(switched off\)"),
        ("training.label_smoothing_factor=0.1", "label_smoothing"),
    ):
        with pytest.raises(DataError, match=f"rows have weights between 0 and 1, which this run cannot use: .*{why}"):
            train(recipe(place, tmp_path / "off", more), check=False)
    pair = {"prompt": "xy", "chosen": [{"role": "assistant", "content": "ko", "weight": 0.5}], "rejected": "mi"}
    path = tiny.write(tmp_path / "pairs.jsonl", [pair])
    with pytest.raises(DataError, match="chosen has a weight between 0 and 1, which preference losses cannot use"):
        load_data(recipe(place, tmp_path, f"data.path={path}", "preference.loss=sigmoid"), TOKENIZER, ADAPTERS)
    with pytest.raises(RowsError, match="has a weight between 0 and 1"):
        encode_rows([chat(1, 0.5)], TOKENIZER, ChatSection())
    streamed = encode_dataset(datasets.Dataset.from_list([chat(1, 0.5)]).to_iterable_dataset(), TOKENIZER)
    with pytest.raises(DataError, match="row 1: has a weight between 0 and 1"):
        next(iter(streamed))
    with pytest.raises(EncodeError, match="has weight -1; expected a number from 0"):
        encode([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": -1}], TOKENIZER)
