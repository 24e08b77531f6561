"""Data sets that are streamed give the rows that `load_data` gives, one batch at a time."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny
from datasets.distributed import split_dataset_by_node
from lora_runs import arguments
from tiny import chat, write
from transformers import DataCollatorForSeq2Seq, Trainer

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.dataset import DataError, load_data
from phi3_lora_plugin.chat.encode import Policy
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.stream import encode_dataset
from phi3_lora_plugin.chat.templates import TemplateError

TOKENIZER = tiny.tokenizer()


def stream(*files: Path) -> Any:
    return datasets.load_dataset("json", data_files=[str(file) for file in files], split="train", streaming=True)


def loaded(file: Path, *overrides: str) -> list[dict[str, list[int]]]:
    settings = [f"data.path={file}", "data.eval_path=null", "data.max_length=null", *overrides]
    return list(load_data(load_recipe("tiny-cpu", settings), TOKENIZER, ADAPTERS).train)


def test_a_stream_gives_what_load_data_gives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [chat(f"what is {n}?", f"it is\n{n} " * (n % 9)) for n in range(250)] + [chat("x" * 300)]
    rows[7]["messages"][1]["train"] = False
    rows[9]["messages"].insert(0, {"role": "system", "content": "be brief"})
    file = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO):
        got = list(encode_dataset(stream(file), TOKENIZER, max_length=60, batch_size=100))
    assert got == loaded(file, "data.max_length=60") and 200 < len(got) < 251
    assert "left out, without a trained token within 60 tokens: row 8" in caplog.text
    assert "left out, without a trained token within 60 tokens: row 251" in caplog.text
    assert "cut within 60 tokens: rows " in caplog.text
    whole = datasets.Dataset.from_list(rows)
    assert list(encode_dataset(whole, TOKENIZER, max_length=60)) == got
    everything = list(encode_dataset(stream(file), TOKENIZER, policy=Policy(train_on="all")))
    assert everything == loaded(file, "data.train_on=all")


def test_other_formats_foreign_columns_and_adapters(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": f"q {n}", "answer": f"a {n}", "id": n} for n in range(5)])
    columns = {"prompt": "question", "completion": "answer"}
    want = loaded(file, f"data.columns={json.dumps(columns)}")
    assert list(encode_dataset(stream(file), TOKENIZER, "prompt_completion", columns=columns)) == want

    def adapter(row: Any) -> Any:
        return chat(row["question"], row["answer"])["messages"]

    assert list(encode_dataset(stream(file), TOKENIZER, adapter)) == want


def test_malformed_rows_are_named_by_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [chat(f"q {n}") for n in range(30)]
    rows[11] = chat("<|end|>")
    rows[17]["messages"][1]["content"] = None
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        list(encode_dataset(stream(file), TOKENIZER, batch_size=10))
    control, empty = caught.value.problems
    assert control.startswith("row 12: message 1 (user) has the control token") and "skip" not in control
    assert empty == "row 18: content of message 2 (assistant) is null or missing; expected text"
    with caplog.at_level(logging.WARNING):
        got = list(encode_dataset(stream(file), TOKENIZER, on_error="skip", batch_size=10))
    assert got == loaded(file, "data.on_error=skip") and len(got) == 28
    assert "left out: row 18: " in caplog.text


def test_nothing_is_read_before_it_is_asked_for() -> None:
    read = []

    def endless() -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            read.append(number)
            yield chat(f"q {number}")
            number += 1

    rows = encode_dataset(datasets.IterableDataset.from_generator(endless), TOKENIZER, batch_size=10)
    assert len(read) <= 1  # a look at the names of the columns
    assert len(list(rows.take(15))) == 15 and len(read) <= 31


def test_ranks_share_the_files_of_a_stream(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{part}.jsonl", [chat(f"{part} {n}") for n in range(4)]) for part in range(4)]
    rows = encode_dataset(stream(*files), TOKENIZER)
    parts = [list(split_dataset_by_node(rows, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(parts[0] + parts[1], key=str) == sorted(rows, key=str) and len(parts[0]) == len(parts[1]) == 8


def test_a_trainer_takes_a_stream(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [chat(f"q {n}") for n in range(8)])
    settings = arguments(tmp_path / "out", max_steps=2, per_device_train_batch_size=2)
    collator = DataCollatorForSeq2Seq(TOKENIZER, label_pad_token_id=-100)
    rows = encode_dataset(stream(file), TOKENIZER)
    done = Trainer(tiny.model(), settings, collator, rows).train()
    assert done.global_step == 2 and done.training_loss > 0


def test_what_cannot_be_encoded_is_refused_at_once(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([chat("q")])
    with pytest.raises(ValueError, match="is not one of .*messages, prompt_completion"):
        encode_dataset(rows, TOKENIZER, "tickets")
    with pytest.raises(ValueError, match="one split"):
        encode_dataset(datasets.DatasetDict(train=rows), TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="neither stop nor skip"):
        encode_dataset(rows, TOKENIZER, on_error="ignore")
    with pytest.raises(TemplateError, match="phi-5"):
        encode_dataset(rows, TOKENIZER, template="phi-5")
