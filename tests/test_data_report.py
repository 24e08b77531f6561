"""`phi3-lora data check` and the report behind it: every row counted, everything named, readable in a pipe."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from rich.console import Console
from tiny import chat, write
from typer.testing import CliRunner
from warm_process import COMMAND, Warm

from phi3_lora_plugin import load_recipe
from phi3_lora_plugin.chat.dataset import load_data
from phi3_lora_plugin.chat.encode import encode
from phi3_lora_plugin.chat.formats import ADAPTERS
from phi3_lora_plugin.chat.report import DataReport, describe
from phi3_lora_plugin.chat.report_view import pieces, printable, short_names, show_rows
from phi3_lora_plugin.chat.templates import TEMPLATES
from phi3_lora_plugin.cli import app

TOKENIZER = tiny.tokenizer()
COLOURS: dict[str, Any] = {"force_terminal": True, "color_system": "standard", "legacy_windows": False}


def fresh_check(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`phi3-lora data check` in a fresh process, as what is said by imports needs one."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "data", "check", *arguments],
        capture_output=True, encoding="utf-8", env=os.environ | {"COLUMNS": "80"}, timeout=100,
    )  # fmt: skip


def messy(folder: Path) -> Path:
    """Rows of every fate: good, cut, without a trained token, malformed, twice, in evaluation too."""
    rows: list[Any] = [chat(f"what is {n}?", f"it is {n}") for n in range(20)]
    rows += [chat("what?", "xyz " * 30)] * 12  # cut
    rows += [chat("xyz " * (30 + n), "a") for n in range(3)]  # nothing trained is left
    rows += ["{broken", {"messages": []}]
    write(folder / "held" / "held.jsonl", [chat("what is 3?", "it is 3"), chat("what is new?", "it is new")])
    return write(folder / "chats.jsonl", rows)


def load(file: Path, *overrides: str) -> Any:
    settings = [f"data.path={file}", "data.eval_path=null", *overrides]
    return load_data(load_recipe("tiny-cpu", settings), TOKENIZER, ADAPTERS)


def shown(report: DataReport) -> list[str]:
    out = io.StringIO()
    report.render(Console(file=out, width=80))
    return out.getvalue().splitlines()


def rows_shown(rows: Any, tokenizer: Any = TOKENIZER, count: int = 1, width: int = 80, **console: Any) -> str:
    out = io.StringIO()
    show_rows(Console(file=out, width=width, **console), rows, tokenizer, count)
    return out.getvalue()


@pytest.fixture
def report(tmp_path: Path) -> DataReport:
    file = messy(tmp_path)
    held = file.parent / "held" / "held.jsonl"
    data = load(file, f"data.eval_path={held}", "data.max_length=40", "data.on_error=skip")
    return data.report  # type: ignore[no-any-return]


def test_every_row_is_counted_once_and_every_fate_names_its_rows(report: DataReport, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    assert report.rows_read == 39
    assert report.eval is not None and report.eval.rows == 2 and report.train.rows == 32
    places = {name: [left.place for left in getattr(report, name)] for name in ("skipped", "dropped", "truncated")}
    assert places["truncated"] == [f"{file}:{line}" for line in range(21, 33)]
    assert places["dropped"] == [f"{file}:{line}" for line in range(33, 36)]
    assert places["skipped"] == [f"{file}:{line}" for line in (36, 37)]
    assert len(report.duplicates) == 11 and report.duplicates[0].why == f"the same conversation as {file}:21"
    assert [left.place for left in report.leaked] == [f"{tmp_path / 'held' / 'held.jsonl'}:1"]


def test_the_json_is_the_whole_report_and_reads_back(report: DataReport) -> None:
    line = report.to_json()
    assert "\n" not in line and DataReport.from_json(line) == report
    value = json.loads(line)
    assert len(value["truncated"]) == 12 and 0 < value["train"]["share_trained"] < 1


def test_a_report_fits_80_columns_with_short_names_and_short_lists(report: DataReport, tmp_path: Path) -> None:
    lines = shown(report)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80 and str(tmp_path) not in text
    assert lines[0] == "data      chats.jsonl: 37 rows as messages, by its column messages"
    assert lines[1].startswith("data      held.jsonl: 2 rows")
    assert "12 of 39 rows cut to the longest length" in text and "and 2 more" in text
    assert "3 of 39 rows without a trained token, left out:" in text
    assert "  chats.jsonl:37: messages is empty" in lines
    assert "1 of 39 rows to evaluate on, but also trained on (the same conversation is" in text
    assert all(line.startswith(("  ", "data", "template", "train", "eval")) or line[0].isdigit() for line in lines)


def test_rows_of_a_single_file_are_told_by_their_lines_alone(tmp_path: Path) -> None:
    report = load(messy(tmp_path), "data.max_length=40", "data.on_error=skip").report
    text = "\n".join(shown(report))
    assert "  line 36: is not JSON" in text and "(line 21)" in text and "line 22, line 23, " in text
    assert "chats.jsonl: 37 rows" in text and text.count("chats.jsonl") == 1
    (tmp_path / "rows.json").write_text(json.dumps([chat("q"), chat("q")]))
    text = " ".join(" ".join(shown(load(tmp_path / "rows.json").report)).split())
    assert "(the same conversation as row 1): row 2" in text


def test_names_stay_different_and_what_is_no_path_stays() -> None:
    names = ["/data/a/train.jsonl", "/data/b/train.jsonl", "/data/b/test.jsonl", "owner/name", "chats/a.jsonl"]
    assert short_names(names) == {
        "/data/a/train.jsonl": "a/train.jsonl",
        "/data/b/train.jsonl": "b/train.jsonl",
        "/data/b/test.jsonl": "test.jsonl",
    }


def test_many_files_and_many_left_out_columns_are_summed_up(tmp_path: Path) -> None:
    for number in range(25):
        write(tmp_path / f"part-{number:02}.jsonl", [chat("q") | {f"extra {number}": 1}, chat("p")])
    lines = shown(load(tmp_path / "*.jsonl").report)
    assert sum("part-" in line and line.startswith("data") for line in lines) == 10
    assert "          and 30 rows from 15 more sources" in lines
    assert "extra 9 (1) and 15 more" in " ".join(" ".join(lines).split())


def test_figures_of_a_part() -> None:
    part = describe([("a:1", 10, 4, ("user", "assistant")), ("a:2", 40, 6, ("system", "user", "assistant"))] * 2)
    assert (part.rows, part.tokens, part.trained_tokens, part.share_trained) == (4, 100, 20, 0.2)
    assert part.histogram == ((16, 2), (64, 2)) and part.turns == (2, 3, 3) and part.longest[0] == ("a:2", 40)
    assert part.roles == {"user": 4, "assistant": 4, "system": 2}
    assert describe([]).rows == 0


def test_a_row_shows_what_is_trained_and_cannot_command_the_terminal(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [chat("hello \x1b[31mred", "fine \u202ethanks\x07"), chat("x " * 4000)]))
    row = data.train[0]
    assert [trained for trained, _ in pieces(row["input_ids"], row["labels"], TOKENIZER)] == [False, True, False]
    for terminal in (False, True):
        text = rows_shown(data.train, force_terminal=terminal, color_system=None)
        assert "\x1b[31m" not in text and "\x07" not in text and "\u202e" not in text and "\\x1b[31mred" in text
    coloured = rows_shown(data.train, count=2, **COLOURS)
    assert "in green" in coloured and "⟦" not in coloured and "\x1b[1;32m" in coloured
    assert printable("a\tb\nü\x00") == "a\tb\nü\\x00"


def test_long_texts_are_shown_by_their_ends(tmp_path: Path) -> None:
    data = load(write(tmp_path / "a.jsonl", [chat("begin " + "x " * 4000 + "end")]), "data.max_length=100000")
    text = rows_shown(data.train, count=3)
    assert len(text) < 3000 and "begin" in text and "end<|end|>" in text and "characters ...]" in text


@pytest.mark.slow
def test_data_check_in_a_pipe_is_plain_and_complete() -> None:
    done = fresh_check("tiny-cpu")
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "data      train.jsonl: 400 rows as messages, by its column messages"
    assert "⟦Ahoy!" in done.stdout and "row 3: " in done.stdout and "row 4: " not in done.stdout


@pytest.mark.slow
def test_data_check_as_json_and_with_a_terminal_that_knows_no_unicode(tmp_path: Path, warm: Warm) -> None:
    file = write(tmp_path / "a.jsonl", [chat("wie geht's?", "schön 😀")])
    arguments = ("data", "check", "tiny-cpu", f"data.path={file}", "data.eval_path=null", "data.template=phi-3.5-mini")
    there: dict[str, Any] = {"cwd": tmp_path, "COLUMNS": "80", "PYTHONIOENCODING": "ascii"}
    done = warm.command(*arguments, "--json", **there)
    value = json.loads(done.stdout)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1
    assert (value["train"]["rows"], value["template"]) == (1, "phi-3.5-mini")
    assert value["sources"][0]["name"] == str(file)
    done = warm.command(*arguments, **there)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "sch?n" in done.stdout


def test_data_check_needs_no_model(tmp_path: Path, warm: Warm) -> None:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    file = write(tmp_path / "a.jsonl", [chat("q")])
    overrides = [f"model.path={tmp_path / 'tokenizer'}", f"data.path={file}", "data.eval_path=null"]
    overrides += ["data.max_length=null"]
    done = warm.command("data", "check", "tiny-cpu", *overrides, "--rows", "0", cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "no limit on row length" in done.stdout and "as the model sees them" not in done.stdout


WRONG = {
    "no data": ("data.path=null", "data.path: the recipe names no data"),
    "missing": ("data.path={}/nowhere.jsonl", "no such file"),
    "malformed": ("data.path={}/chats.jsonl", "chats.jsonl:36: is not JSON"),
    "columns": ("data.columns={{prompt: question}}", "data.columns.prompt: none of the first 100 rows of"),
    "format": ("data.format=mesages", "did you mean 'messages'"),
    "system": ("data.template=phi-3-medium", "data.system: fold"),
    "key": ("data.pth=x", "did you mean 'path'"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_data_is_told_in_sentences_with_exit_code_2(kind: str, tmp_path: Path, warm: Warm) -> None:
    messy(tmp_path)
    override, said = WRONG[kind]
    given = ["tiny-cpu", override.format(tmp_path), "data.eval_path=null"]
    done = warm.command("data", "check", *given, cwd=tmp_path, COLUMNS="80")
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and "\x1b" not in done.stderr


def test_rows_are_cut_as_in_a_run_wherever_the_model_lies() -> None:
    done = CliRunner().invoke(app, ["data", "check", "tiny-cpu", "data.max_length=null", "--rows=0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["max_length"] == 512  # the context that the embedded model's config says


def test_thoughts_calls_and_weights_stand_out_in_colours_of_their_own() -> None:
    words = tiny.tokenizer(template=TEMPLATES["phi-4-mini"].text)
    call = {"name": "f", "arguments": {"x": [1]}}
    answer = {"role": "assistant", "content": "ko", "thoughts": "<think>zu</think>", "calls": [call]}
    row = encode([{"role": "user", "content": "xy"}, answer], words, thoughts="train")
    said = rows_shown([row], words, width=200, **COLOURS)
    assert "trained tokens in green, thoughts in blue, tool calls in magenta:" in said
    assert "\x1b[1;34m<think>zu</think>" in said and '\x1b[1;35mfunctools[{"name"' in said and "\x1b[1;32mko" in said
    context = encode([{"role": "user", "content": "xy"}, answer], words, thoughts="context")
    assert "\x1b[2;34m<think>zu</think>" in rows_shown([context], words, width=200, **COLOURS)
    half = encode([{"role": "user", "content": "xy"}, {"role": "assistant", "content": "ko", "weight": 0.5}], words)
    said = rows_shown([half], words, width=200)
    assert "⟦0.5× ko<|end|>⟧" in said and "between ⟦ and ⟧" in said
