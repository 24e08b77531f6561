"""Files, globs, folders, saved data sets and hub ids -> rows that know their place; everything wrong said at once."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from phi3_lora_plugin.chat.readers import Problem, Row, SourceError
from phi3_lora_plugin.chat.sources import find_sources

ROWS = [{"prompt": f"question {n} ü", "completion": f"answer\n{n}"} for n in range(5)]


def read(path: str | Path | list[str], split: str | None = None) -> list[Row | Problem]:
    paths = [str(one) for one in path] if isinstance(path, list) else str(path)
    return [item for source in find_sources(paths, split).sources for item in source.rows()]


def values(items: list[Row | Problem]) -> list[dict[str, Any]]:
    assert all(isinstance(item, Row) for item in items), items
    return [item.values for item in items if isinstance(item, Row)]


def problems(items: list[Row | Problem]) -> list[str]:
    return [str(item) for item in items if isinstance(item, Problem)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    lines = [list(rows[0]), *([f'"{value}"' for value in row.values()] for row in rows)]
    return "".join(delimiter.join(line) + "\n" for line in lines)


LAYOUTS = {
    "lines.jsonl": jsonl(ROWS),
    "lines.json": jsonl(ROWS),
    "lines.ndjson": jsonl(ROWS).replace("\n", "\r\n\r\n"),
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "array.jsonl": json.dumps(ROWS, indent=2),
    "objects.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n",
    "under_data.json": json.dumps({"version": 1, "data": ROWS}),
    "under_data_pretty.json": json.dumps({"version": 1, "data": ROWS}, indent=4),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(),
    "no_newline.jsonl": jsonl(ROWS).rstrip(),
    "table.csv": csv_text(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + csv_text(ROWS).encode(),
    "semicolons.csv": csv_text(ROWS, ";"),
    "tabs.tsv": csv_text(ROWS, "\t"),
    "packed.jsonl.gz": gzip.compress(jsonl(ROWS).encode()),
    "packed.csv.gz": gzip.compress(csv_text(ROWS).encode()),
    "packed_in_secret.jsonl": gzip.compress(jsonl(ROWS).encode()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_of_a_text_file_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert values(read(write(tmp_path / name, LAYOUTS[name]))) == ROWS


def test_parquet_and_saved_data_sets_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    assert values(read(tmp_path / "rows.parquet")) == values(read(tmp_path / "one")) == ROWS
    assert values(read(tmp_path / "two", "train")) == ROWS
    assert values(read(tmp_path / "two", "test")) == ROWS[1:2]
    with pytest.raises(SourceError, match="two: has no split 'validation', only train, test"):
        read(tmp_path / "two", "validation")
    with pytest.raises(SourceError, match="two: has the splits train, test; choose one with data.split"):
        read(tmp_path / "two")
    with pytest.raises(SourceError, match="one: has no splits, so no 'test'"):
        read(tmp_path / "one", "test")


def test_every_row_knows_its_file_and_its_line_or_number(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", "\n" + jsonl(ROWS[:1]) + "\n\n" + jsonl(ROWS[1:2]))
    assert [str(item.place) for item in read(lines)] == [f"{lines}:2", f"{lines}:5"]
    table = write(tmp_path / "a.csv", 'prompt,completion\n"two\nlines",x\n\nb,c\n')
    assert [str(item.place) for item in read(table)] == [f"{table}:2", f"{table}:5"]
    array = write(tmp_path / "a.json", json.dumps(ROWS[:2]))
    assert [str(item.place) for item in read(array)] == [f"{array} row 1", f"{array} row 2"]


@pytest.mark.parametrize("name", ["one.jsonl", "one.json"])
def test_the_only_row_of_a_file_has_a_line_unless_it_holds_the_rows(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, '\n{"data": "a column of that name"}')
    assert [str(row.place) for row in read(path)] == [f"{path}:2"]
    write(path, '\n{"data": [{"text": "a"}, {"text": "b"}]}')
    assert [str(row.place) for row in read(path)] == [f"{path} row 1", f"{path} row 2"]


def test_several_files_a_glob_and_a_folder(tmp_path: Path) -> None:
    for n, row in enumerate(ROWS):
        write(tmp_path / "shards" / f"{n}.jsonl", jsonl([row]))
    assert values(read(tmp_path / "shards" / "*.jsonl")) == ROWS
    assert values(read(tmp_path / "shards")) == values(read(tmp_path / "shards", "train")) == ROWS
    assert values(read([tmp_path / "shards" / "3.jsonl", tmp_path / "shards" / "[01].jsonl"])) == [
        ROWS[n] for n in (3, 0, 1)
    ]
    with pytest.raises(SourceError, match=r"3.jsonl: named twice, so its rows would count twice"):
        read([tmp_path / "shards" / "3.jsonl", tmp_path / "shards"])
    with pytest.raises(SourceError, match=r"data.path: .*shards/\*.csv: matches no file"):
        read(tmp_path / "shards" / "*.csv")


def test_a_folder_with_splits_never_mixes_them_and_says_what_it_left_out(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", jsonl(ROWS[1:2]))
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", jsonl(ROWS[2:3]))
    write(tmp_path / "data" / "extra.jsonl", jsonl(ROWS[3:4]))
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / "README.md", "about")
    write(tmp_path / ".cache" / "old.jsonl", jsonl(ROWS))
    found = find_sources(str(tmp_path), "train")
    assert [Path(source.name).name for source in found.sources] == [
        "extra.jsonl",
        "train-00000-of-00002.jsonl",
        "train-00001-of-00002.jsonl",
    ]
    assert [Path(name).name for name in found.left_out] == ["test-00000-of-00001.jsonl"]
    assert values(read(tmp_path, "test")) == ROWS[2:3]
    with pytest.raises(SourceError, match="no file of split 'validation', only extra.jsonl, test-0"):
        read(tmp_path, "validation")
    with pytest.raises(SourceError, match="a file has no split 'test'"):
        read(tmp_path / "data" / "extra.jsonl", "test")


POINTER = b"version https://git-lfs.github.com/spec/v1\n"
IMPOSTORS = {
    "a.jsonl": (b"", "is empty"),
    "b.json": (b" \n\n", "is empty"),
    "c.jsonl": (
        b"<!DOCTYPE html><html><title>Not found</title>",
        r"is a web page \(HTML\), not data; download the raw",
    ),
    "d.csv": (b"\n<html lang=en>", r"is a web page \(HTML\)"),
    "e.json": (POINTER + b"oid sha256:1", "is a Git LFS pointer, not the data; run git lfs"),
    "f.parquet": (POINTER, "is a Git LFS pointer"),
    "g.jsonl": (b"PK\x03\x04....", "is a zip archive; unpack it first"),
    "h.jsonl": ('{"a": "ü"}'.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    "i.parquet": (b"a,b\n1,2\n", "is not Parquet: it does not begin with PAR1"),
    "j.json": (b"PAR1....", "is Parquet; name it .parquet"),
    "k.txt": (b"Once upon a time", "cannot read .txt; expected .csv, .json, .jsonl, .ndjson, .parquet, .tsv"),
    "l": (b"{}", "cannot read a file without ending"),
    "m.jsonl.gz": (gzip.compress(b"{}")[:8], "cannot be read: "),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_a_file_that_is_something_else_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    content, message = IMPOSTORS[name]
    with pytest.raises(SourceError, match=rf"data.path: .*/{name}: {message}"):
        read(write(tmp_path / name, content))


def test_all_sources_that_are_wrong_are_said_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "chats.jsonl", jsonl(ROWS))
    write(tmp_path / "empty.json", "")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError) as caught:
        read([tmp_path / name for name in ("chat.jsonl", "chats.jsonl", "empty.json", "nothing", "there/a/b.csv")])
    missing, empty, folder, deep = caught.value.problems
    assert missing.endswith(f"chat.jsonl: no such file or folder; nearest is {tmp_path / 'chats.jsonl'}")
    assert empty.endswith("empty.json: is empty")
    endings = ".csv, .json, .jsonl, .ndjson, .parquet, .tsv"
    assert folder.endswith(f"nothing: no data files in this folder; expected {endings}")
    assert deep.endswith(f"no such file or folder; no such folder: {tmp_path / 'there'}")


def test_a_hub_id_without_a_connection_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="nobody/nothing: no such file or folder, and as a hub id: .*") as caught:
        read("nobody/nothing")
    assert len(str(caught.value)) < 600
    (tmp_path / "data").mkdir()
    with pytest.raises(SourceError, match="data/nothing: no such file or folder$"):  # a path of this machine, no hub id
        read("data/nothing")


def test_a_hub_id_is_read_as_the_datasets_library_gives_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No hub here: the library reads the same kind of repository from a folder, through the same function.
    write(tmp_path / "someone" / "chats" / "train.jsonl", jsonl(ROWS))
    real = datasets.load_dataset

    def local(name: str, config: str | None, split: str | None) -> Any:
        return real(str(tmp_path / name), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert values(read("someone/chats", "train")) == ROWS
    with pytest.raises(SourceError, match=r"someone/chats: no such .* as a hub id: ValueError: Unknown split .*test"):
        read("someone/chats", "test")


def test_p28_bad_lines_are_all_found_with_their_numbers_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"n": n}).encode() for n in range(10_000)]
    lines[2] = b'{"n": 2'
    lines[4999] = '{"n": "\u00e9"}'.encode("latin-1")
    lines[9998] = b"[1, 2]"
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    start = time.process_time()
    items = read(path)
    assert time.process_time() - start < 2
    assert problems(items) == [
        f"{path}:3: is not JSON: Expecting ',' delimiter, column 8",
        f"{path}:5000: is not UTF-8 (byte 0xe9 at column 8); save the file as UTF-8",
        f"{path}:9999: is a list ([1, 2]); expected an object with columns",
    ]
    assert len(items) == 10_000


def test_odd_lines_of_json(tmp_path: Path) -> None:
    deep = b'{"a": ' + b"[" * 100_000
    content = b"\n".join([b'{"a": 1}', b'{"a": "\x00"}', deep, b'{"a": 1}{"a": 2}', b"null", b'{"a": "cut'])
    items = problems(read(write(tmp_path / "a.jsonl", content)))
    said = [item.split(": ", 1)[1] for item in items]
    assert said.pop(1).startswith("is not JSON: maximum recursion depth exceeded")
    assert said == [
        "holds NUL bytes; the file is damaged",
        "is not JSON: Extra data, column 9",
        "is null; expected an object with columns",
        "is not JSON: Unterminated string starting at, column 7; the file ends here, was it cut off?",
    ]


def test_a_file_that_is_no_json_at_all_is_one_error_and_not_a_thousand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "plain words\n" * 1000)
    said = "a.jsonl:100: is not JSON: Expecting value, column 1, like every line before it"
    with pytest.raises(SourceError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"a": 1},\n{"a" 2}\n]', "a.json:3: is not JSON: Expecting ':' delimiter, column 6$"),
        (
            '[\n{"a": 1},\n{"a": ',
            "a.json:3: is not JSON: Expecting value, column 7; the file ends here, was it cut off",
        ),
        (b'[\n{"a": "\xe9"}\n]', r"a.json:2: is not UTF-8 \(byte 0xe9\); save it as UTF-8"),
        ("[" * 100_000, "a.json: is not JSON that can be read: maximum recursion"),
    ],
)
def test_a_syntax_error_in_an_array_has_its_line(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message):
        read(write(tmp_path / "a.json", content))


def test_rows_of_a_table_that_are_wrong(tmp_path: Path) -> None:
    content = b'prompt,completion\na,b\na,b,c\nx\n"a"b,c\n\xe9,b\na,\x00\nlast,one\n'
    path = write(tmp_path / "a.csv", content)
    items = read(path)
    assert problems(items) == [
        f"{path}:3: has 3 fields, the header has 2: prompt, completion",
        f"{path}:4: has 1 fields, the header has 2: prompt, completion",
        f"{path}:5: is not a row of the table: ',' expected after '\"'",
        f"{path}:6: column 'prompt' is not UTF-8; save the file as UTF-8",
        f"{path}:7: column 'completion' holds NUL bytes; the file is damaged",
    ]
    assert [item.values["prompt"] for item in items if isinstance(item, Row)] == ["a", "last"]
    quote = write(tmp_path / "b.csv", 'a,b\n1,2\n3,"4\n5,6\n')
    (never_closed,) = problems(read(quote))
    assert never_closed == f"{quote}:3: is not a row of the table: a quote that opens here is never closed"
    twice = write(tmp_path / "c.csv", "prompt,answer,prompt\n1,2,3\n")
    with pytest.raises(SourceError, match="c.csv:1: has more than one column named 'prompt'"):
        read(twice)
    long = write(tmp_path / "d.csv", "a,b\n1," + "x" * 1_000_000 + "\n")
    assert len(values(read(long))[0]["b"]) == 1_000_000


def test_files_that_break_off_are_errors_and_not_shorter_data_sets(tmp_path: Path) -> None:
    packed = gzip.compress(jsonl(ROWS * 2000).encode())
    with pytest.raises(SourceError, match="cut.jsonl.gz: cannot be read to its end: Compressed file ended before"):
        read(write(tmp_path / "cut.jsonl.gz", packed[: len(packed) // 2]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    half = (tmp_path / "a.parquet").read_bytes()[:-20]
    with pytest.raises(SourceError, match="half.parquet: cannot be read as Parquet: Parquet magic bytes not found"):
        read(write(tmp_path / "half.parquet", half))
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(SourceError, match="saved: a saved data set that cannot be read: "):
        read(tmp_path / "saved")


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    rows = find_sources(str(path)).sources[0].rows()
    assert isinstance(first := next(rows), Row) and first.values == ROWS[0]
    path.write_text("")  # the rest is not in memory: what the file holds now is what comes
    assert len(list(rows)) <= len(ROWS) - 1
    source = find_sources(str(write(tmp_path / "b.jsonl", jsonl(ROWS)))).sources[0]
    assert list(source.rows()) == list(source.rows())  # each call reads from the top


def test_a_hundred_thousand_lines_take_seconds(tmp_path: Path) -> None:
    row = json.dumps({"messages": [{"role": role, "content": "x" * 100} for role in ("user", "assistant")]}) + "\n"
    path = write(tmp_path / "a.jsonl", row * 100_000)
    start = time.process_time()
    assert sum(1 for _ in find_sources(str(path)).sources[0].rows()) == 100_000
    assert time.process_time() - start < 5


def test_real_chats_of_every_layout_are_read(shared_data: Path) -> None:
    chats = shared_data / "chats"
    counts = {
        "fastchat_sharegpt.json": 500,
        "glaive_toolcall_sharegpt.json": 300,
        "gsm8k_train_1500.jsonl": 1500,
        "identity_alpaca.json": 91,
        "openai_toy_chat.jsonl": 5,
        "self_instruct_seed_tasks.jsonl": 175,
        "sharegpt_multi_turn.jsonl": 1,  # one object over many lines, whatever its name says
    }
    assert {name: len(values(read(chats / name))) for name in counts} == counts
