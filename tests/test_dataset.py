"""The `data` section of a recipe -> rows to train and evaluate on: the fate of every row; errors that say it all."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from tiny import chat, write

from phi3_lora_plugin import encode, load_recipe, load_tokenizer
from phi3_lora_plugin.chat.dataset import Data, DataError, load_data
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.templates import template_for

TOKENIZER = tiny.tokenizer()


def load(path: Any, *overrides: str, tokenizer: Any = TOKENIZER, adapters: Any = ADAPTERS, **given: Any) -> Data:
    if path is not None:
        path = [str(one) for one in path] if isinstance(path, list) else str(path)
        overrides = (f"data.path={json.dumps(path)}", *overrides)
    base = ["data.path=null", "data.eval_path=null", "data.max_length=null"]
    return load_data(load_recipe("tiny-cpu", [*base, *overrides]), tokenizer, adapters, **given)


def problems(path: Any, *overrides: str, **given: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        load(path, *overrides, **given)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def rows(data: Any) -> list[dict[str, list[int]]]:
    return [dict(row) for row in data]


def test_rows_are_what_encode_gives_in_the_order_of_the_file(tmp_path: Path) -> None:
    given = [chat(f"what is {n}?", f"it is\n{n}") for n in range(2500)]  # more than two batches
    data = load(write(tmp_path / "a.jsonl", given))
    assert rows(data.train) == [encode(row["messages"], TOKENIZER) for row in given]
    assert data.eval is None and data.report.rows_read == data.report.train.rows == 2500


def test_the_same_dialogue_in_four_formats_and_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    asked = [(f"what is {n}?", f'it is "{n}",\nü') for n in range(3)]
    want = [encode(chat(*pair)["messages"], TOKENIZER) for pair in asked]
    write(tmp_path / "messages.jsonl", [chat(*pair) for pair in asked])
    turns = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in asked]
    (tmp_path / "sharegpt.json").write_text(json.dumps(turns))
    write(tmp_path / "alpaca.jsonl", [{"instruction": q, "input": "", "output": a} for q, a in asked])
    pairs = [{"prompt": q, "completion": a} for q, a in asked]
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, pairs)).encode()))
    table = pyarrow.Table.from_pylist(pairs)
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    datasets.Dataset(table).to_csv(tmp_path / "pairs.csv")
    datasets.Dataset.from_list([chat(*pair) for pair in asked]).save_to_disk(tmp_path / "saved")
    for name in ("messages.jsonl", "sharegpt.json", "alpaca.jsonl", "pairs.jsonl.gz", "pairs.parquet", "pairs.csv"):
        data = load(tmp_path / name)
        assert rows(data.train) == want, name
        (source,) = data.report.sources
        assert source.rows == 3 and source.format in name.replace("pairs", "prompt_completion"), name
        assert "column" in source.because
    assert rows(load(tmp_path / "saved").train) == want
    write(tmp_path / "foreign.jsonl", [{"question": q, "answer": a, "id": 7} for q, a in asked])
    data = load(tmp_path / "foreign.jsonl", "data.columns={prompt: question, completion: answer}")
    assert rows(data.train) == want and data.report.unread == {"id": 3}


@pytest.mark.slow
def test_malformed_rows_are_all_named_with_file_and_line_at_once(tmp_path: Path) -> None:
    given: list[Any] = [chat(f"q {n}") for n in range(10_000)]
    given[17] = "{broken"
    given[4_000] = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}
    given[9_998] = {"messages": [{"content": "no role"}]}
    file = write(tmp_path / "many.jsonl", given)
    broken, empty, nameless, advice = problems(file)
    assert broken.startswith(f"{file}:18: is not JSON") and "skip" in advice
    assert empty == f"{file}:4001: content of message 1 (user) is null or missing; expected text"
    assert nameless == f"{file}:9999: message 1 has no role, only content"

    data = load(file, "data.on_error=skip")
    assert [left.place for left in data.report.skipped] == [f"{file}:{line}" for line in (18, 4001, 9999)]
    assert (data.report.rows_read, data.report.train.rows, len(data.train)) == (10_000, 9_997, 9_997)
    kept = [row for number, row in enumerate(given) if number not in (17, 4_000, 9_998)]
    assert data.train[4_000]["input_ids"] == encode(kept[4_000]["messages"], TOKENIZER)["input_ids"]


def test_the_same_mistake_in_many_rows_is_one_line_that_names_some_and_counts_all(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [chat("q"), *[{"messages": []}] * 30])
    told, _ = problems(file)
    assert told.startswith(f"{file}:2, 3, 4, ") and "and 22 more: messages is empty" in told
    kinds = [chat("q", role=f"unknown {n}") for n in range(80)]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "b.jsonl", [chat("q"), *kinds]))
    assert len(caught.value.problems) == 81 and str(caught.value).count("\n") == 51 and "31 more" in str(caught.value)


def test_problems_are_told_in_the_order_of_the_rows_whatever_finds_them(tmp_path: Path) -> None:
    bad = [chat("<|end|>"), {"messages": []}, chat("<|user|>"), "{broken"]
    one, two = (write(tmp_path / name, [chat("q"), *bad]) for name in ("b.jsonl", "a.jsonl"))
    told = problems([one, two])
    assert [text.split(": ")[0] for text in told[:-1]] == [f"{one}:{line}, {two}:{line}" for line in range(2, 6)]
    skipped = load([one, two], "data.on_error=skip").report.skipped
    assert [left.place for left in skipped] == [f"{file}:{line}" for file in (one, two) for line in range(2, 6)]


def test_problems_of_all_files_and_of_rows_come_together(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", [chat("q")]), write(tmp_path / "bad.jsonl", [chat("q"), "[]"])
    wrong = write(tmp_path / "wrong.jsonl", [{"frage": "q"}] * 2)
    held = tmp_path / "held.json"
    held.write_text("<!DOCTYPE html><html>404</html>")
    told = problems([good, bad, wrong], f"data.eval_path={held}")
    for place in ("bad.jsonl:2", "wrong.jsonl:1", "held.json", "skip"):
        assert any(place in text for text in told), told
    assert len(told) == 4 and "data.eval_path" in "".join(told)


def test_wrong_sources(tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", [chat("q")])
    empty = write(tmp_path / "empty.jsonl", [])
    page = write(tmp_path / "page.jsonl", ["<html><body>Sign in</body></html>"])
    (tmp_path / "none").mkdir()
    assert "data.path=FILE" in problems(None)[0]
    assert f"nearest is {file}" in problems(tmp_path / "chat.jsonl")[0]
    assert "is empty" in problems(empty)[0]
    assert "HTML" in problems(page)[0]
    assert "matches no file" in problems(tmp_path / "*.csv")[0]
    assert "no data files" in problems(tmp_path / "none")[0]
    assert "named twice" in problems([file, file])[0]
    (unknown,) = problems(file, "data.format=mesages")
    assert "did you mean 'messages'" in unknown


def test_wrong_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    foreign, _ = problems(file, "data.columns={prompt: qestion, completion: answers}")
    assert "'qestion'" in foreign and "did you mean 'question'" in foreign
    (own,) = problems(file, "data.columns={promt: question, completion: answer}", "data.format=prompt_completion")
    assert "did you mean 'prompt'" in own
    (none,) = problems(file)
    assert "question, answer" in none and "data.columns" in none
    (named,) = problems(file, "data.format=alpaca")
    assert "needs instruction, output" in named


def test_rows_to_evaluate_on_that_have_other_columns_are_told_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    held = write(tmp_path / "held.jsonl", [chat("q")])
    columns = "data.columns={prompt: question, completion: answer}"
    first, second, advice = problems(file, columns, f"data.eval_path={held}")
    assert first.startswith(f"data.eval_path: data.columns.prompt: no row of {held}") and "completion" in second
    assert "data.eval_path=null" in advice


def test_mixed_formats_in_one_file_and_two_that_fit_are_refused(tmp_path: Path) -> None:
    pair = {"prompt": "q", "completion": "a"}
    file = write(tmp_path / "mixed.jsonl", [chat("q"), pair, pair])
    told, _ = problems(file)
    assert f"{file}:2, 3: " in told and "prompt_completion" in told
    both = write(tmp_path / "both.jsonl", [chat("q") | pair])
    (told,) = problems(both)
    assert "messages" in told and "prompt_completion" in told and "data.format" in told
    assert load(both, "data.format=messages").report.sources[0].because == "as data.format says"
    data = load([write(tmp_path / "a.jsonl", [chat("q")]), write(tmp_path / "b.jsonl", [pair])])
    assert [source.format for source in data.report.sources] == ["messages", "prompt_completion"]


def test_system_turns_on_a_template_that_drops_them(tmp_path: Path) -> None:
    medium = tiny.tokenizer(template=tiny.MEDIUM_TEMPLATE)
    system = {"role": "system", "content": "be brief"}
    given = [chat("q"), {"messages": [system, *chat("what?")["messages"]]}]
    file = write(tmp_path / "a.jsonl", given)
    told, advice = problems(file, tokenizer=medium)
    assert told.startswith(f"{file}:2: template phi-3-medium silently drops system messages") and "fold" in told
    folded = load(file, "data.system=fold", tokenizer=medium)
    assert folded.report.template == "phi-3-medium"
    assert "be brief" in medium.decode(folded.train[1]["input_ids"])
    dropped = load(file, "data.system=drop", tokenizer=medium)
    assert "be brief" not in medium.decode(dropped.train[1]["input_ids"])
    assert len(load(file, "data.on_error=skip", tokenizer=medium).train) == 1
    assert "be brief" in TOKENIZER.decode(load(file).train[1]["input_ids"])


def test_control_tokens_in_the_text_of_a_row_are_an_error_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [chat("q"), chat("q<|end|>\n<|assistant|>\nno")])
    assert f"{file}:2: " in problems(file)[0]
    escaped = load(file, "data.control_tokens=escape")
    assert escaped.train[1]["input_ids"].count(TOKENIZER.convert_tokens_to_ids("<|assistant|>")) == 1


def test_no_row_without_trained_tokens_reaches_the_trainer(tmp_path: Path) -> None:
    long = "nothing of what was learned before. " * 4
    untrained = chat("q")
    untrained["messages"][1] |= {"weight": 0}
    given = [chat("hi", "a"), chat("hi", long), chat(long, "a"), untrained]
    file = write(tmp_path / "a.jsonl", given)
    report = load(file).report
    assert report.train.rows == 3 and [left.place for left in report.dropped] == [f"{file}:4"]
    data = load(file, "data.max_length=24")
    assert len(data.train) == 2 and all(len(row["input_ids"]) <= 24 for row in rows(data.train))
    assert all(any(label != -100 for label in row["labels"]) for row in rows(data.train))
    assert [left.place for left in data.report.truncated] == [f"{file}:2"]
    assert [left.place for left in data.report.dropped] == [f"{file}:3", f"{file}:4"]
    assert "24" in data.report.dropped[0].why and data.report.rows_read == 4
    assert rows(load(file, max_length=24).train) == rows(data.train)
    assert load(file, "data.max_length=24", max_length=9).report.max_length == 24


def test_all_rows_dropped_is_an_error_of_its_own(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [chat("what is the capital of france? " * 4)] * 3)
    told = problems(file, "data.max_length=16")
    assert "data.path: no row is left" in told[0] and "3 without a trained token" in told[1] and "16 tokens" in told[2]
    good = write(tmp_path / "b.jsonl", [chat("q")])
    assert "data.eval_path: no row is left" in problems(good, f"data.eval_path={file}", "data.max_length=16")[0]
    bad = write(tmp_path / "c.jsonl", [{"messages": []}] * 2)
    assert "2 malformed" in problems(bad, "data.on_error=skip")[1]


def test_the_split_depends_on_the_seed_alone_and_loses_no_row(tmp_path: Path) -> None:
    given = [chat(f"q {n}", f"a {n}") for n in range(40)]
    file = write(tmp_path / "a.jsonl", given)
    one = load(file, "data.eval_fraction=0.25", "seed=1")
    again = load(file, "data.eval_fraction=0.25", "seed=1")
    other = load(file, "data.eval_fraction=0.25", "seed=2")
    assert one.eval is not None and again.eval is not None and other.eval is not None
    assert len(one.eval) == 10 and rows(one.eval) == rows(again.eval) != rows(other.eval)
    whole = [encode(row["messages"], TOKENIZER) for row in given]
    held = rows(one.eval)
    assert rows(one.train) == [row for row in whole if row not in held]
    assert held == [row for row in whole if row in held]
    assert len(load(file, "data.eval_fraction=0.001").eval or ()) == 1
    assert "nothing to hold out" in problems(write(tmp_path / "b.jsonl", [chat("q")] * 3), "data.eval_fraction=0.5")[0]


def test_duplicates_never_leak_from_training_into_evaluation(tmp_path: Path) -> None:
    given = [chat(f"q {n % 10}", f"a {n % 10}") for n in range(50)]
    file = write(tmp_path / "a.jsonl", given)
    for seed in range(5):
        data = load(file, "data.eval_fraction=0.3", f"seed={seed}")
        assert data.eval is not None and len(data.eval) == 15 and len(data.train) == 35
        assert not [row for row in rows(data.eval) if row in rows(data.train)] and not data.report.leaked
    report = load(file).report
    assert len(report.duplicates) == 40 and report.duplicates[0].place == f"{file}:11"
    assert report.duplicates[0].why == f"the same conversation as {file}:1"


def test_a_file_of_its_own_to_evaluate_on_is_used_as_it_is_and_leaks_are_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [chat(f"q {n}") for n in range(5)])
    held = write(tmp_path / "held.jsonl", [chat("q 3"), chat("q 7")])
    data = load(train, f"data.eval_path={held}")
    assert data.eval is not None and len(data.train) == 5 and len(data.eval) == 2
    assert [left.place for left in data.report.leaked] == [f"{held}:1"]
    assert data.report.eval is not None and data.report.rows_read == 7


def test_splits_of_a_folder_and_of_a_saved_data_set(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "train.jsonl", [chat("q 1"), chat("q 2")])
    write(tmp_path / "folder" / "test.jsonl", [chat("q 3")])
    parts = {name: [chat(f"{name} {n}") for n in range(2)] for name in ("train", "validation")}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "folder", "data.eval_split=test")
    assert data.eval is not None and (len(data.train), len(data.eval)) == (2, 1)
    assert rows(data.eval) == [encode(chat("q 3")["messages"], TOKENIZER)]
    alone = load(tmp_path / "folder")
    assert len(alone.train) == 2 and alone.report.files_left_out == (str(tmp_path / "folder" / "test.jsonl"),)
    data = load(tmp_path / "saved", "data.eval_split=validation")
    assert rows(data.eval) == [encode(chat(f"validation {n}")["messages"], TOKENIZER) for n in range(2)]
    (told,) = problems(tmp_path / "saved", "data.eval_split=test")
    assert "no split 'test', only train, validation" in told
    assert "a file has no split" in problems(tmp_path / "folder" / "train.jsonl", "data.eval_split=test")[0]


def test_max_rows_counts_from_the_top_over_all_files_and_leaves_evaluation_alone(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", [chat(f"{name} {n}") for n in range(3)])
    write(tmp_path / "c.jsonl", ["{broken"])
    held = write(tmp_path / "held" / "h.jsonl", [chat(f"h {n}") for n in range(9)])
    data = load(tmp_path / "*.jsonl", "data.max_rows=5", f"data.eval_path={held}")
    want = [encode(chat(text)["messages"], TOKENIZER) for text in ("a 0", "a 1", "a 2", "b 0", "b 1")]
    assert rows(data.train) == want and len(data.eval or ()) == 9
    assert [source.rows for source in data.report.sources] == [3, 2, 9]


def test_a_registered_format_is_used_and_its_errors_are_about_rows(tmp_path: Path) -> None:
    def tickets(row: Any) -> list[dict[str, str]]:
        if not row["text"]:
            raise ValueError("the ticket has no text")
        return chat(row["text"], row["answer"])["messages"]

    file = write(tmp_path / "a.jsonl", [{"text": "q", "answer": "a"}, {"text": "", "answer": "a"}, {"answer": "a"}])
    silent, absent, _ = problems(file, "data.format=tickets", adapters=ADAPTERS | {"tickets": tickets})
    assert silent == f"{file}:2: data format 'tickets': the ticket has no text" and f"{file}:3: " in absent
    write(file, [{"text": "q", "answer": "a"}])
    data = load(file, "data.format=tickets", adapters=ADAPTERS | {"tickets": tickets})
    assert rows(data.train) == [encode(chat("q", "a")["messages"], TOKENIZER)]


def test_train_on_and_template_reach_the_encoder(tmp_path: Path) -> None:
    turns = [*chat("q 1", "a 1")["messages"], *chat("q 2", "a 2")["messages"]]
    file = write(tmp_path / "a.jsonl", [{"messages": turns}])
    for given in ("assistant", "last_turn", "all"):
        assert rows(load(file, f"data.train_on={given}").train) == [encode(turns, TOKENIZER, train_on=given)]
    assert load(file, "data.template=phi-3.5-mini").report.template == "phi-3.5-mini"
    (told,) = problems(file, "data.template=phi-5")
    assert "data.template" in told and "phi-3.5-mini" in told


def test_ids_and_labels_are_those_that_trl_makes_with_a_marked_template(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    given = [chat(f"what is {n}?", f" it is\n{n}\n" * (n % 5)) for n in range(20)]
    given += [{"messages": [{"role": "system", "content": "be brief"}, *row["messages"] * 2]} for row in given]
    tokenizer = tiny.tokenizer(template=template_for(TOKENIZER).text)
    arguments = trl.SFTConfig(str(tmp_path), max_length=64, assistant_only_loss=True, report_to="none", use_cpu=True)
    rows_of_trl = datasets.Dataset.from_list(given)
    made = trl.SFTTrainer(tiny.model(), arguments, train_dataset=rows_of_trl, processing_class=tokenizer)
    theirs = made.train_dataset
    ours = load(write(tmp_path / "a.jsonl", given), "data.max_length=64").train
    assert ours["input_ids"][:] == theirs["input_ids"][:]
    swallowing = [n for n, row in enumerate(rows(ours)) if row["labels"] != theirs[n]["labels"]]
    # S4: role tokens that swallow white space carry TRL's mask onto the header; ours never trains one.
    role = TOKENIZER.convert_tokens_to_ids("<|assistant|>")
    assert all(role in theirs[n]["labels"] and role not in ours[n]["labels"] for n in swallowing)
    assert all(bool(n % 5) == (n in swallowing) for n in range(20))


REAL = {
    "fastchat_sharegpt.json": "sharegpt",
    "glaive_toolcall_sharegpt.json": "sharegpt",
    "gsm8k_test_200.jsonl": "prompt_completion",
    "identity_alpaca.json": "alpaca",
    "openai_toy_chat.jsonl": "messages",
    "sharegpt_multi_turn.jsonl": "sharegpt",
}


@pytest.mark.parametrize("name", REAL)
def test_real_chats_of_every_format_are_loaded_and_every_row_is_accounted_for(shared_data: Path, name: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "phi-3-mini-4k-instruct")
    overrides = ["data.on_error=skip", "data.tools=text", "data.max_length=512"]
    overrides += ["data.columns={prompt: question, completion: answer}"] if "gsm8k" in name else []
    data = load(shared_data / "chats" / name, *overrides, tokenizer=tokenizer)
    report = data.report
    assert report.sources[0].format == REAL[name]
    assert report.rows_read == report.train.rows + len(report.dropped) + len(report.skipped)
    for row in rows(data.train):
        assert len(row["input_ids"]) == len(row["labels"]) <= 512
        assert any(label != -100 for label in row["labels"])
